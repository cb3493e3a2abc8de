# SPDX-License-Identifier: MIT
"""The lmms-eval plug-in: its class with a stand-in for lmms-eval, and lmms-eval's own command line (marker lmms_eval).

The real one runs its unmodified tasks pope, mme, mmstar, mmbench_en_dev_static and vqav2_val, with invented data in
folders that have the data sets' names, which are read in the place of the hub's; and a task file of our own.
`pip install lmms-eval`, then `pytest -m lmms_eval tests/integrations`.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from invented import write_lines
from PIL import Image

import janusflow_min as jf
from janusflow_min.shapes import scenes

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "integrations.md"
SHORT = "\nAnswer the question using a single word or phrase."


class Lmms:
    """What the plug-in takes from `lmms_eval.api.model.lmms`."""

    rank = 0

    def __init__(self):
        self.task_dict: dict[str, Any] = {}


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None


class Collator:
    """Groups by the second of each tuple, sorts each group, and puts results back in their order."""

    def __init__(self, items, sort, grouping):
        assert grouping
        self.groups = defaultdict(list)
        for i, item in enumerate(items):
            self.groups[json.dumps(item[1], sort_keys=True)].append((i, item))
        self.sort, self.order = sort, []

    def get_batched(self, n):
        for group in self.groups.values():
            group.sort(key=lambda pair: self.sort(pair[1]))
            self.order += [i for i, _ in group]
            for k in range(0, len(group), n):
                yield [item for _, item in group[k : k + n]]

    def get_original(self, values):
        return [value for _, value in sorted(zip(self.order, values, strict=True))]


@pytest.fixture(scope="module")
def pipe():
    return jf.load("tiny")


@pytest.fixture
def plugin(monkeypatch, pipe):  # after diffusers is imported, which looks for accelerate
    """The module, imported over stand-ins for lmms-eval and accelerate."""
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.utils": {"Collator": Collator},
        "loguru": {"logger": SimpleNamespace(warning=warnings.warn)},
        "accelerate": {"Accelerator": lambda: accelerator},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "janusflow_min.integrations.lmms_eval", raising=False)
    yield import_module("janusflow_min.integrations.lmms_eval")
    sys.modules.pop("janusflow_min.integrations.lmms_eval", None)


@dataclass
class Asked:
    """Documents of one invented task; `request` makes what lmms-eval's generate_until gets."""

    model: Any
    documents: list[dict] = field(default_factory=list)

    def request(self, question: str, images: list | None, **kwargs: Any) -> SimpleNamespace:
        self.documents.append({"images": images})
        self.model.task_dict = {"invented": {"test": self.documents}}
        seen = (question, kwargs, lambda doc: doc["images"], len(self.documents) - 1, "invented", "test")
        return SimpleNamespace(args=seen)


def pictures(count: int) -> list[tuple[Image.Image, str, str]]:
    """(image, colour, shape) of single shapes."""
    rng, found = random.Random(7), []
    while len(found) < count:
        scene = scenes.sample_scene(rng, "single_object")
        (thing,) = scene.objects
        found.append((scenes.to_pil(scenes.render(scenes.pack([scene]))[0]), thing.colour, thing.shape))
    return found


def test_the_manifest_names_the_class(plugin):
    """Stops: an entry point or a class path that lmms-eval cannot follow."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (name, module, attribute) = re.search(r'"lmms_eval.models"\]\n(\w+) = "([\w.]+):(\w+)"', text).groups()
    manifest = getattr(import_module(module), attribute)
    assert manifest.model_id == name == "janusflow_min"
    module, cls = manifest.simple_class_path.rsplit(".", 1)
    assert getattr(import_module(module), cls) is plugin.JanusFlowMin and plugin.JanusFlowMin.is_simple


def test_answers_are_those_of_the_published_form(plugin, pipe):
    """Stops: another prompt than the family's (a system prompt, the image after the text, a doubled sentence), and
    answers in the order of the batches."""
    model = plugin.JanusFlowMin("tiny", batch_size=3)
    asked, shown = Asked(model), pictures(5)
    words = [
        "What color is the shape?",
        "What shape is this?",
        "Is there a star?",
        "How many shapes?",
        "What is it?",
    ]
    requests = [
        asked.request(text + SHORT, [image], max_new_tokens=8 + i % 2, until=["\n\n"])
        for i, (text, (image, *_)) in enumerate(zip(words, shown, strict=True))
    ]
    answers = model.generate_until(requests)
    for i, (text, (image, *_)) in enumerate(zip(words, shown, strict=True)):
        message = {"role": "User", "content": f"<image_placeholder>\n{text}{SHORT}", "images": [image]}
        alone = pipe.chat([message], system_prompt="", max_new_tokens=8 + i % 2, temperature=0)
        assert answers[i] == alone.text.strip() != alone.text  # GQA's exact_match forgives no space
        assert alone.sft_format == f"User: <image_placeholder>\n{text}{SHORT}\n\nAssistant:"
    assert len(set(answers)) > 2
    assert model.device == torch.device("cpu")


def test_questions_without_and_with_several_images(plugin, pipe):
    """Stops: a task of text alone, whose images are None or [], that ends the run."""
    model = plugin.JanusFlowMin("tiny", batch_size="auto")
    asked, (one, two) = Asked(model), [image for image, *_ in pictures(2)]
    requests = [asked.request("Is there a star?", images) for images in (None, [], [one, two])]
    answers = model.generate_until(requests)
    assert answers[0] == answers[1] == pipe.understand("Is there a star?", system_prompt="").text.strip()
    both = pipe.understand("Is there a star?", [one, two], system_prompt="")
    assert answers[2] == both.text.strip()


def test_an_answer_ends_before_until(plugin):
    """Stops: generation_kwargs that are ignored."""
    model = plugin.JanusFlowMin("tiny")
    asked, (image, *_) = Asked(model), pictures(1)[0]
    whole, cut, short = model.generate_until(
        [
            asked.request("Describe the image.", [image]),
            asked.request("Describe the image.", [image], until=[" on", " of"]),
            asked.request("Describe the image.", [image], max_new_tokens=1),
        ]
    )

    assert cut == re.split(" on| of", whole)[0] != whole
    assert len(short) < len(cut) and whole.startswith(short)


def test_a_question_that_is_too_long_is_answered_with_nothing(plugin):
    """Stops: an evaluation of hours that one document ends, and neighbours in its batch that lose their answers."""
    model = plugin.JanusFlowMin("tiny", batch_size=4)
    asked, (image, *_) = Asked(model), pictures(1)[0]
    requests = [asked.request(text, [image]) for text in ("What is it?", "star " * 5000, "Is there a star?")]
    with pytest.warns(
        UserWarning, match=r'answered "" to document 1 of invented: .* positions; the model has'
    ):
        answers = model.generate_until(requests)
    assert answers[1] == "" and answers[0] and answers[2]
    with pytest.raises(ValueError, match="image_placeholder"):  # any other fault ends the run
        model.generate_until([asked.request("<image_placeholder> what is it?", [image])])


@pytest.mark.parametrize(
    "asked, temperature",
    [
        ({}, 0.0),
        ({"temperature": 0}, 0.0),
        ({"temperature": 0.2, "do_sample": False}, 0.0),
        ({"temperature": 0.2}, 0.2),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
    ],
)
def test_a_task_samples_only_where_it_says_so(plugin, asked, temperature):
    """Stops: mmvet, with do_sample false beside a temperature, answered at random."""
    assert plugin.answer_options(asked)["temperature"] == temperature


def test_sampled_repeats_differ_and_come_again(plugin):
    """Stops: 64 repeats of one document that are one answer, and answers that nobody can reproduce."""
    model = plugin.JanusFlowMin("tiny", batch_size=2)
    asked, (image, *_) = Asked(model), pictures(1)[0]
    hot = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 8, "top_k": 0}
    requests = [asked.request("Describe the image.", [image], **hot)] * 6
    first = model.generate_until(requests)
    assert len(set(first)) > 1 and model.generate_until(requests) == first


@pytest.mark.parametrize(
    "run, error, words",
    [
        (lambda plugin: plugin.answer_options({"num_beams": 3}), ValueError, "num_beams 3.*--gen_kwargs"),
        (lambda plugin: plugin.JanusFlowMin("tiny", colour="red"), TypeError, "colour"),
        (lambda plugin: plugin.JanusFlowMin("nowhere/at/all"), Exception, "nowhere"),
        (lambda plugin: plugin.JanusFlowMin("tiny").loglikelihood([]), NotImplementedError, "generate_until"),
        (
            lambda plugin: plugin.JanusFlowMin("tiny").generate_until_multi_round([]),
            NotImplementedError,
            "generate_until",
        ),
    ],
)
def test_what_it_cannot_do_it_says(plugin, run, error, words):
    """Stops: beam search that is greedy, a misspelt argument without effect, likelihoods that are zeros."""
    with pytest.raises(error, match=words):
        run(plugin)


# lmms-eval itself -----------------------------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    """Eight documents for each of lmms-eval's tasks, under the names of their data sets."""
    from datasets import Dataset
    from datasets import Image as ImageFeature

    shown = pictures(8)
    others = {"red": "blue"}
    rows = defaultdict(list)
    for i, (image, colour, shape) in enumerate(shown):
        base = {"image": image, "question_id": str(i)}
        other = others.get(colour, "red")
        answer = "yes" if i % 2 else "no"
        thing = f"{colour if i % 2 else other} {shape}"
        rows["lmms-lab-encoder/POPE"].append(
            base | {"question": f"Is there a {thing}?", "answer": answer, "category": "adversarial"}
        )
        rows["lmms-lab-encoder/MME"].append(
            base
            | {
                "question_id": f"color/{i // 2}.jpg",
                "question": f"Is there a {thing}? Please answer yes or no.",
                "answer": answer.capitalize(),
                "category": "color",
            }
        )
        rows["Lin-Chen/MMStar"].append(
            base
            | {
                "index": i,
                "question": f"What color is the {shape}?\nOptions: A: {colour}, B: {other}",
                "answer": "A",
                "category": "coarse perception",
                "l2_category": "image emotion",
            }
        )
        rows["lmms-lab-encoder/MMBench"].append(
            {
                "image": image,
                "index": i // 2 + 1_000_000 * (1 - i % 2),  # a copy, then the question itself
                "question": f"What color is the {shape}?",
                "hint": "nan",
                "A": colour,
                "B": other,
                "C": "nan",
                "D": "nan",
                "answer": "A",
                "category": "color",
                "L2-category": "perception",
                "source": "invented",
                "split": "dev",
            }
        )
        rows["lmms-lab-encoder/VQAv2"].append(
            base
            | {
                "question": f"What color is the {shape}?",
                "answers": [{"answer": colour, "answer_id": k} for k in range(10)],
                "question_type": "what",
                "answer_type": "other",
            }
        )
    splits = {"VQAv2": "validation", "MMBench": "dev", "MMStar": "val"}
    for name, documents in rows.items():
        config, split = (
            "en" if name.endswith("MMBench") else "default",
            splits.get(name.split("/")[1], "test"),
        )
        (folder / name).mkdir(parents=True)
        table = Dataset.from_list(documents).cast_column("image", ImageFeature())
        table.to_parquet(folder / name / "documents.parquet")
        files = f"  data_files:\n  - split: {split}\n    path: documents.parquet\n"
        (folder / name / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n{files}---\n")


TASK = """\
task: shapes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/documents.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
generation_kwargs:
  until: [" object"]
  max_new_tokens: 16
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
VISUAL = """\
from PIL import Image
def visual(doc):
    return [Image.open(doc["image"])]
"""


def write_task(folder: Path) -> list[dict]:
    """A task file of our own, in the words that the default knows; its last question is too long. The documents."""
    documents = []
    for i, (image, colour, shape) in enumerate(pictures(8)):
        path = folder / "tasks" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        article = "an" if colour == "orange" else "a"
        for question, answer in (
            (f"Is there {article} {colour} {shape}?", "yes"),
            (f"What color is the {shape}?", colour),
            ("How many objects are there?", "one"),
        ):
            documents.append({"image": str(path), "question": question, "answer": answer})
    documents.append(documents[-1] | {"question": "star " * 5000})
    write_lines(folder / "tasks" / "documents.jsonl", documents)
    (folder / "tasks" / "shapes.yaml").write_text(TASK.format(folder=folder / "tasks"), encoding="utf-8")
    (folder / "tasks" / "utils.py").write_text(VISUAL, encoding="utf-8")
    return documents


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Runs lmms-eval's command line in a folder with the data; (results, samples by task, what it printed)."""
    pytest.importorskip("lmms_eval")
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("lmms")
    write_data(folder)
    write_task(folder)
    for block in re.findall(r"```\w+\n# once/(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        name = re.match(r"[\w.]+", block)[0]
        (folder / "tasks" / name).write_text("# " + block, encoding="utf-8")
    plugin = folder / "installed" / "plugin-0.dist-info"  # as pip writes it from pyproject.toml
    plugin.mkdir(parents=True)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    group = re.search(r'\[project.entry-points."(lmms_eval.models)"\]\n(\w+) = "([\w.:]+)"', text).groups()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text("[{}]\n{} = {}\n".format(*group))

    def run(name: str, *words: str, launcher: tuple[str, ...] = ()) -> tuple[dict, dict, str]:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(plugin.parent), str(ROOT)]),
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_TOKEN": "none",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, *launcher, "-m", "lmms_eval", "--model", "janusflow_min"]
        command += ["--model_args", "pretrained=tiny", "--log_samples", "--output_path", name, *words]
        command += ["--include_path", "tasks"]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed[-6000:]
        (results,) = (folder / name / "tiny").glob("*_results.json")
        samples = {}
        for path in (folder / name).rglob("*_samples_*.jsonl"):
            task = path.stem.split("_samples_")[1]
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            samples[task] = {line["doc_id"]: line["filtered_resps"] for line in lines}
        return json.loads(results.read_text(encoding="utf-8"))["results"], samples, printed

    return run


TASKS = "pope,mme,mmstar,mmbench_en_dev_static,vqav2_val,shapes,mmbench_en_dev_once"


@pytest.fixture(scope="module")
def single(evaluated):
    return evaluated("single", "--tasks", TASKS, "--batch_size", "4")


@pytest.mark.lmms_eval
def test_lmms_eval_finds_the_model_and_scores_it(single, pipe, tmp_path):
    """Stops: a plug-in that its own tests alone can load; yes/no, multiple choice and open tasks of lmms-eval's."""
    results, samples, printed = single
    counts = {task: len(answers) for task, answers in samples.items()}
    assert counts == dict.fromkeys(TASKS.split(","), 8) | {"shapes": 25, "mmbench_en_dev_once": 4}
    for i, (image, *_, shape) in enumerate(pictures(8)):
        question = f"What color is the {shape}?{SHORT}"
        answer = pipe.understand(question, image, system_prompt="", max_new_tokens=16)
        assert samples["vqav2_val"][i] == answer.text.strip()
    right = 0
    for i, document in enumerate(write_task(tmp_path)[:-1]):
        answer = pipe.understand(document["question"], document["image"], system_prompt="", stop=" object")
        assert samples["shapes"][i] == answer.text.strip()
        right += answer.text.strip() == document["answer"]
    assert right > 16 and results["shapes"]["exact_match,none"] == pytest.approx(right / 25)
    assert samples["shapes"][24] == "" and 'answered "" to document 24 of shapes' in printed
    assert (
        results["mmbench_en_dev_static"]["gpt_eval_score,none"] == 100
    )  # the option's name, in a description


@pytest.mark.lmms_eval
def test_two_ranks_give_the_scores_of_one(evaluated, single):
    """Stops: ranks that answer the same half, or that wait for each other for ever."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617")
    results, samples, printed = evaluated("ranks", "--tasks", TASKS, "--batch_size", "4", launcher=launcher)
    assert "Running on rank 1" in printed
    assert samples == single[1]
    for task, scores in single[0].items():
        numbers = {
            key: value for key, value in scores.items() if isinstance(value, float) and "stderr" not in key
        }
        assert {key: results[task][key] for key in numbers} == pytest.approx(numbers)
