# SPDX-License-Identifier: MIT
"""The launcher for TorchUMM's runners: with a stand-in for its checkout, and with the real one (marker torchumm).

The stand-in has the few functions of `umm` that the launcher touches, written here. The real one is run by
`TORCHUMM_ROOT=path pytest -m torchumm tests/test_torchumm_launch.py`; it needs PyYAML too.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from janusflow_min import loading
from janusflow_min.cli import main
from janusflow_min.torchumm import backend, launcher

REGISTRY = """
made = {}
def register(kind, name, factory): made[name] = factory
def get(kind, name): return made[name]
def list_registered(kind): return sorted(made)
"""
OURS = "janusflow_min.torchumm.backend"
CONFIG = """
import json
overrides = []
def set_config_overrides(given): overrides[:] = given
def load_config(path):
    cfg = json.loads(open(path).read())
    for text in overrides:
        key, value = text.split("=")
        *where, last = key.split(".")
        block = cfg
        for part in where:
            block = block.setdefault(part, {})
        block[last] = value
    return cfg
"""
BUILTIN = """
from umm.core import registry
def register_builtin_backbones():
    for name in ("bagel", "janus_flow"):
        if name not in registry.list_registered("backbone"):
            module = __import__("umm.backbones." + name, fromlist=["x"])
            registry.register("backbone", name, module.BagelBackbone if name == "bagel" else module.JanusFlowBackbone)
"""
RUNNER = """
import json, sys
from pathlib import Path
from umm.core import registry
from umm.core.config import load_config
from umm.inference import register_builtin_backbones
if __name__ == "__main__":
    cfg = load_config(sys.argv[2])
    register_builtin_backbones()
    backbone = registry.get("backbone", "janus_flow")()
    from umm.backbones.janus_flow import JanusFlowBackbone
    seen = {"argv": sys.argv, "backbone": type(backbone).__module__, "names": registry.list_registered("backbone"),
            "beside": str(Path(__file__).parent) in sys.path, "file": __file__,
            "imported": type(JanusFlowBackbone()).__module__}
    Path(cfg["geneval"]["out"]).write_text(json.dumps(seen))
    sys.exit(int(cfg["geneval"].get("code", 0)))
"""
# How `umm eval` and TorchUMM's runners start programs: with a list, a shell, a script of the shell, relative to cwd.
UMM = """
import json, os, subprocess, sys
from pathlib import Path
def main(argv):
    root = Path(__file__).parents[3]
    cfg = json.loads(Path(argv[2]).read_text())
    if argv[0] == "infer":
        print("infer", *argv[1:])
        return 0
    script = cfg.get("script", "eval/generation/geneval/run_generation.py")
    env = dict(os.environ)
    env["PYTHONPATH"] = str(root / "src") + ":" + env.get("PYTHONPATH", "")
    line = f"{sys.executable} {root / script} --config {argv[2]}"
    match cfg.get("way", "list"):
        case "list":
            return subprocess.run(line.split(), cwd=root, env=env).returncode
        case "relative":
            here = (root / script).parent
            return subprocess.run([sys.executable, Path(script).name, *line.split()[2:]], cwd=here, env=env).returncode
        case "shell":
            return subprocess.run(line, shell=True).returncode
        case "system":
            return os.waitstatus_to_exitcode(os.system(line))
        case "bash":
            (root / "run.sh").write_text("set -e\\n" + line)
            return subprocess.Popen(["bash", "run.sh"], cwd=root).wait()
        case "runner":  # a runner that starts another one
            code = f"import subprocess, sys; sys.exit(subprocess.call({line.split()!r}))"
            return subprocess.call([sys.executable, "-c", code])
        case "torchrun":
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1"]
            return subprocess.run([*torchrun, *line.split()[1:]], cwd=root, env=env).returncode
"""
OTHER_RUNNERS = ("eval/generation/ueval/run_generation.py", "eval/generation/unified_bench/run_generation.py")
OTHER_RUNNERS += ("eval/edit/gedit/run_gedit_eval.py", "eval/vlm/eval/new/evaluate.py", "tools/run.py")


@pytest.fixture
def root(tmp_path):
    """A stand-in for a checkout of TorchUMM."""
    root = tmp_path / "TorchUMM"
    files = {
        "src/umm/__init__.py": "",
        "src/umm/core/__init__.py": "",
        "src/umm/core/registry.py": REGISTRY,
        "src/umm/core/config.py": CONFIG,
        "src/umm/cli/__init__.py": "",
        "src/umm/cli/main.py": UMM,
        "src/umm/inference/__init__.py": BUILTIN,
        "src/umm/backbones/__init__.py": "raise ImportError('what TorchUMM needs is not installed')",
        "src/umm/backbones/janus_flow/__init__.py": "class JanusFlowBackbone: pass",
        "eval/generation/geneval/run_generation.py": RUNNER,
    }
    files |= dict.fromkeys(OTHER_RUNNERS, RUNNER)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    yield root
    for name in [name for name in sys.modules if name.split(".")[0] == "umm"]:
        del sys.modules[name]


@pytest.fixture
def config(tmp_path):
    def write(**changes):
        cfg = {"inference": {"backbone": "janus_flow"}, "geneval": {"out": str(tmp_path / "seen.json")}}
        path = tmp_path / "geneval.json"
        path.write_text(json.dumps(cfg | changes))
        return path

    return write


def run(root, *arguments) -> int:
    return main(["torchumm", *map(str, arguments), "--root", str(root)])


# The stand-in ---------------------------------------------------------------------------------------------------


def test_a_runner_finds_our_backbone(root, config, tmp_path):
    """Stops: a runner that gets TorchUMM's own adapter, or imports the others; a process left changed."""
    before = (list(sys.path), list(sys.argv), list(sys.meta_path), dict(os.environ))
    assert run(root, "geneval", "--config", config()) == 0
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["backbone"] == seen["imported"] == OURS
    assert seen["names"] == ["bagel", "janus-flow", "janus_flow"]
    assert seen["argv"] == [seen["file"], "--config", str(config())] and seen["beside"]
    assert before == (list(sys.path), list(sys.argv), list(sys.meta_path), dict(os.environ))


def test_the_other_backbones_say_why_they_fail(root, config):
    """Stops: a silent None where a configuration asks for another model."""
    run(root, "geneval", "--config", config())
    from umm.core import registry

    with pytest.raises(RuntimeError, match=r"'bagel' is TorchUMM's own.*only 'janus_flow'"):
        registry.get("backbone", "bagel")()


@pytest.mark.parametrize("way", ["list", "relative", "shell", "system", "bash", "runner", "torchrun"])
def test_no_process_gets_another_adapter(root, config, tmp_path, way):
    """Stops: numbers of TorchUMM's own adapter under our name, however a runner is started."""
    cfg = config(way=way, script=OTHER_RUNNERS[0])
    assert run(root, "eval", "--config", cfg, "--set", "geneval.code=0") == 0
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["backbone"] == seen["imported"] == OURS


@pytest.mark.parametrize("script", OTHER_RUNNERS)
def test_every_runner_gets_ours(root, config, tmp_path, script):
    """Stops: a list of known runners, beside which the others silently run TorchUMM's own adapter."""
    for arguments in (("eval", "--config", config(script=script)), (script, "--config", config())):
        (tmp_path / "seen.json").unlink(missing_ok=True)
        assert run(root, *arguments) == 0
        assert json.loads((tmp_path / "seen.json").read_text())["backbone"] == OURS


def test_a_process_that_has_nothing_to_do_with_it(root, tmp_path):
    """Stops: a scorer's environment whose own sitecustomize is hidden, or that must have our dependencies."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import sys; sys.its_own = True")
    code = "import sys; assert sys.its_own; print(*(m for m in ('umm', 'torch', 'janusflow_min') if m in sys.modules))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(launcher.HOOK), str(own)])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_a_runner_s_exit_code_and_overrides(root, config):
    """Stops: a failed run that looks done, and a --set that is lost."""
    assert run(root, "geneval", "--config", config(), "--set", "geneval.code=3") == 3
    script = "eval/generation/geneval/run_generation.py"
    assert run(root, script, "--config", config()) == 0


def test_infer_and_eval(root, config, tmp_path, capfd):
    """Stops: `umm infer` without its options; overrides that `umm eval` does not hand on to its runners."""
    assert run(root, "infer", "--config", config(), "--set", "a=1") == 0
    assert capfd.readouterr().out.split() == ["infer", "--config", str(config()), "--set", "a=1"]
    assert run(root, "eval", "--config", config(), "--set", "geneval.code=4") == 4
    cfg = config(mme={})  # a benchmark's name is `umm eval` with its configuration
    assert run(root, "mme", "--config", cfg, "--set", "geneval.code=5") == 5


def test_its_spelling_of_our_name(root, config, tmp_path):
    """Stops: `backbone: janus-flow`, which every runner of TorchUMM takes, refused."""
    for name in ("janus-flow", " Janus_Flow"):
        assert run(root, "geneval", "--config", config(inference={"backbone": name})) == 0


def test_a_wrong_root_runner_or_configuration(root, config, tmp_path, capsys, monkeypatch):
    """Stops: minutes of loading before the mistake is told, or a traceback from inside TorchUMM."""
    monkeypatch.delenv("TORCHUMM_ROOT", raising=False)

    def fails(*arguments) -> str:
        assert main(["torchumm", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    at = ("--root", root)
    assert "set TORCHUMM_ROOT" in fails("geneval")
    assert "not a checkout of TorchUMM" in fails("geneval", "--root", tmp_path)
    assert "RUNNER must be one of geneval, " in fails("genval", *at)
    assert "no runner" in fails("eval/nothing.py", *at)
    assert "no runner" in fails("wise", *at)
    assert "no configuration" in fails("geneval", *at, "--config", tmp_path / "no.yaml")
    assert "--config is needed" in fails("infer", *at)
    wrong = config(inference={"backbone": "janusflow"})
    assert "must be 'janus_flow', got 'janusflow'" in fails("geneval", *at, "--config", wrong)
    assert "NOWHERE_SET" in fails("geneval", *at, "--config", config(extra="${NOWHERE_SET}/x"))
    assert "no block 'geneval'" in fails("geneval", *at, "--config", config(geneval=None))
    block = {"backbone": "janus_flow", "request": {"params": {"cfg_wieght": 1, "max_new_tokens": 5}}}
    error = fails("geneval", *at, "--config", config(inference=block))
    assert "inference.request.params: JanusFlow has no cfg_wieght; it has cfg_weight, " in error
    broken = tmp_path / "broken.json"
    broken.write_bytes(b"\xef\xbb\xbf{}")
    assert "broken.json or --set cannot be read: Unexpected UTF-8 BOM" in fails(
        "geneval", *at, "--config", broken
    )


def test_another_checkout_s_package_is_refused(root, config, tmp_path, capsys):
    """Stops: results of a checkout that was not named."""
    import shutil

    assert run(root, "geneval", "--config", config()) == 0
    other = shutil.copytree(root, tmp_path / "other")
    assert run(other, "geneval", "--config", config()) == 2
    assert "comes from" in capsys.readouterr().err


def test_the_current_card_is_used(monkeypatch):
    """Stops: every rank of a torchrun on the first card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    devices = []
    monkeypatch.setattr(loading, "load", lambda *args, device, **options: devices.append(device))
    for device in ({}, {"device": "cuda"}, {"device": "cuda:1"}, {"device": "cpu"}):
        backend.JanusFlowBackbone().load({"model_path": "tiny"} | device)
    assert devices == ["cuda:3", "cuda:3", "cuda:1", "cpu"]


@pytest.mark.parametrize("name", launcher.SHIPPED)
def test_the_shipped_configurations(name):
    """Stops: a configuration whose images are generated for nothing, or one of JanusFlow's published settings wrong."""
    yaml = pytest.importorskip("yaml")
    cfg = yaml.safe_load((launcher.CONFIGS / f"{name}.yaml").read_text())
    assert cfg["eval"]["benchmark"] == name and name in cfg
    inference = cfg["inference"]
    assert inference["backbone"] == "janus_flow" and "seed" not in inference.get("request", {}).get(
        "params", {}
    )
    if name in launcher.EVALUATIONS:
        assert inference["backbone_cfg"]["understanding_cfg"] == {"max_new_tokens": 512, "do_sample": False}
    if name in launcher.EVALUATIONS and name != "unified_bench":
        return
    generation = inference["backbone_cfg"]["generation_cfg"]
    size = 4 if name == "dpg_bench" else 1
    assert generation == {
        "cfg_weight": 2.0,
        "num_inference_steps": 30,
        "parallel_size": size,
        "img_size": 384,
    }


# The real one ---------------------------------------------------------------------------------------------------

needs_checkout = pytest.mark.skipif(
    "TORCHUMM_ROOT" not in os.environ, reason="TORCHUMM_ROOT names no checkout of TorchUMM"
)
TINY = {"model_path": "tiny", "torch_dtype": "float32", "device": "cpu"}


@pytest.fixture
def checkout() -> Path:
    pytest.importorskip("yaml")
    return Path(os.environ["TORCHUMM_ROOT"]).resolve()


def launch(checkout: Path, runner: str, *options: str, **env: str) -> str:
    """A process of its own, as a user has it."""
    sets = [f"inference.backbone_cfg.{key}={value}" for key, value in TINY.items()]
    sets += ["inference.backbone_cfg.generation_cfg.num_inference_steps=2", *options]
    command = [sys.executable, "-m", "janusflow_min", "torchumm", runner, "--root", str(checkout)]
    command += [text for value in sets for text in ("--set", value)]
    path = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path} | env,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.torchumm
@needs_checkout
def test_geneval_generation(checkout, tmp_path):
    """Stops: a drop-in that only our own copy of the contract accepts. Its own prompts, its own layout, resumed."""
    options = ["geneval.max_samples=3", "geneval.images_per_prompt=2", f"geneval.out_dir={tmp_path}"]
    assert "ok=3, skipped=0, error=0" in launch(checkout, "geneval", *options)
    images = sorted((tmp_path / "images").glob("0*/samples/*.png"))
    assert [str(path.relative_to(tmp_path / "images")) for path in images] == [
        f"{i:05d}/samples/{k:05d}.png" for i in range(3) for k in range(2)
    ]
    assert len({path.read_bytes() for path in images}) == 6  # a seed of its own for each
    lines = (checkout / "eval/generation/geneval/prompts/evaluation_metadata.jsonl").read_text().splitlines()
    for i in range(3):
        assert json.loads((tmp_path / f"images/{i:05d}/metadata.jsonl").read_text()) == json.loads(lines[i])
    assert "ok=0, skipped=3, error=0" in launch(checkout, "geneval", *options)
    contents = {path: path.read_bytes() for path in images}
    for path in images[1:4]:
        path.unlink()
    assert "ok=2, skipped=1, error=0" in launch(checkout, "geneval", *options)
    assert {path: path.read_bytes() for path in images} == contents  # resumed, none twice


@pytest.mark.torchumm
@needs_checkout
def test_dpg_generation(checkout, tmp_path):
    """Stops: grids of one image counted twice."""
    prompts = sorted((checkout / "eval/generation/dpg_bench/prompts").glob("*.txt"))[:2]
    (tmp_path / "prompts").mkdir()
    for path in prompts:
        (tmp_path / "prompts" / path.name).write_bytes(path.read_bytes())
    options = [
        f"dpg_bench.prompts_dir={tmp_path / 'prompts'}",
        f"dpg_bench.image_output_dir={tmp_path / 'out'}",
    ]
    assert "[done]" in launch(checkout, "dpg_bench", *options)
    for path in prompts:
        with Image.open(tmp_path / "out" / f"{path.stem}.png") as grid:
            assert grid.size == (768, 768)
            boxes = [(x, y, x + 384, y + 384) for y in (0, 384) for x in (0, 384)]
            assert len({grid.crop(box).tobytes() for box in boxes}) == 4


@pytest.mark.torchumm
@needs_checkout
def test_wise_and_uni_mmmu_generation(checkout, tmp_path):
    """Stops: the two runners that catch errors for each sample, and so would end well without one image."""
    data = tmp_path / "wise" / "data"
    data.mkdir(parents=True)
    names = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
    for i, name in enumerate(names, 1):
        item = {
            "Prompt": "a star",
            "Explanation": "-",
            "Category": "time",
            "Subcategory": "x",
            "prompt_id": i,
        }
        (data / f"{name}.json").write_text(json.dumps([item]))
    options = [f"wise.data_root={tmp_path / 'wise'}", f"wise.out_dir={tmp_path / 'w'}"]
    options += [f"wise.score_output_path={tmp_path / 'w.json'}"]
    assert "ok=3, skipped=0, error=0" in launch(checkout, "wise", *options)
    assert len(list((tmp_path / "w" / "images").glob("[0-9]*.png"))) == 3

    svg = tmp_path / "uni" / "uni_mmmu" / "Uni-MMMU-Eval" / "data" / "svg"
    svg.mkdir(parents=True)
    (svg / "a.svg").write_text('<svg width="8" height="8"><rect width="4" height="4" fill="#E74C3C"/></svg>')
    sample = {"id": "A_1", "difficulty": "A", "svg": "a.svg", "png": "a.png"}
    (svg / "metadata.json").write_text(json.dumps({"samples": [sample]}))
    options = ["uni_mmmu.tasks=[code_rendering]", f"uni_mmmu.out_dir={tmp_path / 'u'}"]
    options += ["inference.request.params.max_new_tokens=8"]
    assert "Success=1" in launch(checkout, "uni_mmmu", *options, UMM_DATASETS=str(tmp_path / "uni"))
    assert (tmp_path / "u" / "code" / "case_01_A_1" / "model_image_01.png").is_file()


@pytest.mark.torchumm
@needs_checkout
def test_its_pipeline_for_both_tasks(checkout, tmp_path):
    """Stops: a backbone that TorchUMM's own dispatch cannot call. `umm infer`, and its InferencePipeline directly."""
    config = tmp_path / "infer.json"
    image = str(tmp_path / "star.png")
    requests = [
        {
            "task": "generation",
            "prompt": "a red star",
            "output_path": image,
            "params": {"parallel_size": 1, "num_inference_steps": 2},
        },
        {
            "task": "understanding",
            "prompt": "What is it?",
            "images": [image],
            "params": {"max_new_tokens": 4},
        },
    ]
    block = {"backbone": "janus_flow", "backbone_cfg": TINY, "requests": requests}
    config.write_text(json.dumps({"inference": block | {"output_json": str(tmp_path / "out.json")}}))
    launch_ = [sys.executable, "-m", "janusflow_min", "torchumm"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    subprocess.run(
        [*launch_, "infer", "--root", str(checkout), "--config", str(config)],
        check=True,
        env=env,
        timeout=300,
    )
    generated, answered = json.loads((tmp_path / "out.json").read_text())
    assert generated["saved_paths"] == [image] and isinstance(answered["text"], str)

    program = tmp_path / "own.py"
    program.write_text(
        "import sys\n"
        "from umm.inference import InferencePipeline, InferenceRequest\n"
        f"pipeline = InferencePipeline('janus_flow', {TINY!r})\n"
        "assert type(pipeline.backbone).__module__ == 'janusflow_min.torchumm.backend'\n"
        "assert not [m for m in sys.modules if m.startswith('umm.backbones') and '__file__' in vars(sys.modules[m])]\n"
        "ask = dict(backbone='janus_flow', params={'max_new_tokens': 4, 'num_inference_steps': 2})\n"
        "made = pipeline.run(InferenceRequest(task='generation', prompt='a star', **ask))\n"
        "assert len(made['images']) == 5 and made['saved_paths'] == []\n"
        f"said = pipeline.run(dict(ask, task='understanding', prompt='?', images=[{image!r}]))\n"
        "assert isinstance(said['text'], str)\n"
        "try:\n"
        f"    pipeline.run(dict(ask, task='editing', prompt='?', images=[{image!r}]))\n"
        "    sys.exit('editing')\n"
        "except NotImplementedError:\n"
        "    pass\n"
    )
    subprocess.run(
        [*launch_, str(program), "--root", str(checkout), "--config", str(config)],
        check=True,
        env=env,
        timeout=300,
    )


@pytest.mark.torchumm
@needs_checkout
def test_its_eval_command(checkout, tmp_path):
    """Stops: `umm eval`, which starts a process, with TorchUMM's adapter."""
    import yaml

    cfg = yaml.safe_load((launcher.CONFIGS / "geneval.yaml").read_text())
    cfg["inference"]["backbone_cfg"] |= TINY
    cfg["inference"]["backbone_cfg"]["generation_cfg"]["num_inference_steps"] = 2
    cfg["geneval"] |= {"out_dir": str(tmp_path), "max_samples": 1, "images_per_prompt": 1}
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump(cfg))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-m", "janusflow_min", "torchumm", "eval", "--root", str(checkout)]
    subprocess.run([*command, "--config", str(config)], check=True, env=env, timeout=300)
    assert json.loads((tmp_path / "gen_summary.json").read_text())["ok"] == 1


@pytest.mark.torchumm
@needs_checkout
@pytest.mark.parametrize("name", ["ueval", "unified_bench"])
def test_its_other_runners(checkout, tmp_path, name):
    """Stops: `umm eval` of a benchmark that is not in our list, with TorchUMM's own adapter, silently."""
    data, references = tmp_path / "data.json", tmp_path / "references"
    data.write_text(json.dumps([{"id": str(i), "prompt": f"a {i} star"} for i in range(2)]))
    references.mkdir()
    for i in range(2):
        Image.new("RGB", (40, 30), ("red", "blue")[i]).save(references / f"{i}.png")
    block = {
        "mode": "generate",
        "local_data": str(data),
        "ref_dir": str(references),
        "out_dir": str(tmp_path),
    }
    generation = {"num_inference_steps": 2, "parallel_size": 1}
    inference = {"backbone": "janus-flow", "backbone_cfg": TINY | {"generation_cfg": generation}}
    inference["request"] = {"params": {"max_new_tokens": 8}}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"eval": {"benchmark": name}, "inference": inference, name: block}))
    command = [sys.executable, "-m", "janusflow_min", "torchumm", "eval", "--root", str(checkout)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(
        [*command, "--config", str(config)], env=env, timeout=300, capture_output=True, text=True
    )
    assert "ok=2, skipped=0, error=0" in done.stdout, done.stdout + done.stderr
    images = sorted((tmp_path / "images").glob("*.png"))
    assert [path.stem for path in images] == ["0", "1"]
    with Image.open(images[0]) as first, Image.open(images[1]) as second:
        assert first.size == (384, 384) and first.tobytes() != second.tobytes()


def documents(name: str, folder: Path) -> list[str]:
    """Two invented documents (of each of MME's tasks and MMMU's subjects) as the runner reads them; what to --set."""
    images = []
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / f"{i}.png")
        images.append({"bytes": (folder / f"{i}.png").read_bytes(), "path": None})
    if name == "mme":
        tasks = "existence count position color posters celebrity scene landmark artwork OCR commonsense_reasoning"
        for task in [*tasks.split(), "numerical_calculation", "text_translation", "code_reasoning"]:
            (folder / task).mkdir()
            (folder / task / "0.png").write_bytes(images[0]["bytes"])
            lines = [
                f"0.png\tIs it {colour}?\t{answer}" for colour, answer in (("red", "Yes"), ("blue", "No"))
            ]
            (folder / f"{task}.txt").write_text("\n".join(lines))
        # Its calculation fails where no answer is yes or no, and the default knows no sentence about short answers.
        pytest.importorskip("sklearn")
        return [f"mme.root={folder}", f"mme.image_root={folder}", "mme.prompt_suffix=''"]
    if name == "mmbench":
        rows = ["index\tquestion\tA\tB\tanswer\tcategory\timage"]
        for i, image in enumerate(images):
            rows.append(f"{i}\tWhat is it?\tred\tblue\tA\tcolor\t{base64.b64encode(image['bytes']).decode()}")
        (folder / "questions.tsv").write_text("\n".join(rows))
        return [f"mmbench.dataset_paths.MMBench_TEST_EN_V11={folder / 'questions.tsv'}"]
    if name == "mmvet":
        lines = [{"question_id": f"v1_{i}", "image": f"{i}.png", "text": "What is it?"} for i in range(2)]
        (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        sets = [f"mmvet.dataset_paths.image_root={folder}"]
        return [*sets, f"mmvet.dataset_paths.question={folder / 'questions.jsonl'}"]
    if name == "unified_bench":
        (folder / "references").mkdir()
        for i, image in enumerate(images):
            (folder / "references" / f"{i}.png").write_bytes(image["bytes"])
        return [f"unified_bench.ref_dir={folder / 'references'}"]
    return [
        f"{name}.root={write_hub_data(name, folder / 'hub', images)}",
        f"{name}.cache_dir={folder / 'cache'}",
    ]


def write_hub_data(name: str, folder: Path, images: list[dict]) -> Path:
    """What `load_dataset` reads: a table and the names of its configurations and split."""
    datasets = pytest.importorskip("datasets")
    question = {"question": "What is it?\nOptions: A: red, B: blue", "answer": "A", "category": "color"}
    rows, picture, configs, split = [], "image", ["default"], "val"
    if name == "mathvista":
        picture, split = "decoded_image", "testmini"
    if name == "mmmu":
        picture, split = "image_1", "validation"
        from runpy import run_path

        code = Path(os.environ["TORCHUMM_ROOT"]) / "src/umm/eval/internvl_chat/eval/mmmu/data_utils.py"
        configs = list(run_path(str(code))["CAT_SHORT2LONG"].values())
    for i, image in enumerate(images):
        row = {picture: image} | question
        if name == "mmstar":
            row |= {"index": i, "l2_category": "color", "meta_info": "-"}
        if name == "mathvista":
            row |= {"pid": str(i), "query": "What is it?", "choices": ["red", "blue"]}
        if name == "mmmu":
            row |= {"id": f"validation_Accounting_{i + 1}", "options": "['red', 'blue']"}
            row |= {"question_type": "multiple-choice"} | {f"image_{k}": None for k in range(2, 8)}
        rows.append(row)
    folder.mkdir()
    table = datasets.Dataset.from_list(rows).cast_column(picture, datasets.Image())
    for k in range(2, 8) if name == "mmmu" else ():
        table = table.cast_column(f"image_{k}", datasets.Image())
    table.to_parquet(folder / "table.parquet")
    lines = ["---", "configs:"]
    for config in configs:
        lines += [
            f"- config_name: {config}",
            "  data_files:",
            f"  - split: {split}",
            "    path: table.parquet",
        ]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


@pytest.mark.torchumm
@needs_checkout
@pytest.mark.parametrize("name", launcher.EVALUATIONS)
def test_its_evaluations_with_the_shipped_configurations(checkout, tmp_path, name):
    """Stops: a shipped configuration that its runner does not take, and answers that are not ours."""
    sets = documents(name, tmp_path)
    sets += [f"{name}.out_dir={tmp_path / 'out'}", f"{name}.score_output_path={tmp_path / 'summary.json'}"]
    sets += ["inference.backbone_cfg.understanding_cfg.max_new_tokens=8"]
    printed = launch(
        checkout, name, *sets, UMM_DATASETS=str(tmp_path), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf")
    )
    written = "".join(path.read_text() for path in (tmp_path / "out").rglob("*.*") if path.suffix in TEXTS)
    prompts = {"mme": "Is there a red square?", "mmvet": "What is it?", "mathvista": "What is it?"}
    if name in prompts:
        answer = loading.load("tiny").understand(prompts[name], tmp_path / "0.png", max_new_tokens=8)
        assert answer.text.strip() and answer.text.strip() in written, printed + written
    elif name == "unified_bench":
        assert "ok=2, skipped=0, error=0" in printed
    else:  # whose prompts its runners make
        key = {"mmbench": "prediction", "mmstar": "raw_prediction", "mmmu": "raw_response"}[name]
        assert len(re.findall(rf'"{key}": " ?\w[^"]*"', written)) >= 2, printed + written
    if name in ("mme", "mmmu"):  # its own calculation ran
        assert ("total score" if name == "mme" else "Overall") in printed


TEXTS = (".json", ".jsonl", ".txt")
