# SPDX-License-Identifier: MIT
"""The seed API, as TorchUMM's users and runners use it. Each docstring names the mistake that its test stops."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from janusflow_min import InferencePipeline, InferenceRequest, JanusFlowBackbone
from janusflow_min.answering import DEFAULT_QUESTION
from janusflow_min.torchumm import backend

FAST = {"num_inference_steps": 1, "parallel_size": 2, "img_size": 64}
ONE = FAST | {"parallel_size": 1}


def make(parity_dir: Path, **cfg) -> InferencePipeline:
    return InferencePipeline("janus_flow", {"model_path": str(parity_dir), "device": "cpu"} | cfg)


@pytest.fixture(scope="module")
def pipeline(parity_dir) -> InferencePipeline:
    return make(parity_dir)


@pytest.fixture
def asked(pipeline, monkeypatch) -> dict:
    """What reaches the pipeline's own calls, which then do little."""
    caught = {}
    pipe = pipeline.backbone.pipe
    generate, understand = pipe.generate, pipe.understand

    def generation(prompt, **options):
        caught.update(options, prompt=prompt)
        return generate(prompt, **options | {"num_inference_steps": 1, "parallel_size": 1})

    def understanding(prompt, **options):
        caught.update(options, prompt=prompt)
        return understand(prompt, **options | {"max_new_tokens": 1})

    monkeypatch.setattr(pipe, "generate", generation)
    monkeypatch.setattr(pipe, "understand", understanding)
    return caught


def generate(pipeline: InferencePipeline, prompt: str = "a cat", output_path=None, **params) -> dict:
    params = ONE | params
    return pipeline.run(
        InferenceRequest("janus_flow", "generation", prompt, params=params, output_path=output_path)
    )


def ask(pipeline: InferencePipeline, prompt=None, images=(), **params) -> dict:
    params = {"max_new_tokens": 6} | params
    return pipeline.run(
        InferenceRequest("janus_flow", "understanding", prompt, images=list(images), params=params)
    )


def pixels(result: dict) -> list[bytes]:
    return [image.tobytes() for image in result["images"]]


@pytest.fixture(scope="module")
def image(parity_dir):
    return lambda name: str(parity_dir / "images" / f"{name}.png")


# The seed's own lines -------------------------------------------------------------------------------------------


def test_the_seed_api_word_for_word(parity_dir, tmp_path):
    """Stops: a renamed argument, key or default that breaks every existing user."""
    pipeline = InferencePipeline(
        backbone_name="janus_flow",
        backbone_cfg={
            "model_path": str(parity_dir),
            "janus_root": "/not/needed",
            "vae_path": str(parity_dir / "vae"),
            "seed": 42,
            "torch_dtype": "bfloat16",
        },
    )
    image = tmp_path / "image.jpg"
    Image.new("RGB", (40, 30), "red").save(image)
    generated = pipeline.run(
        InferenceRequest(backbone="janus_flow", task="generation", prompt="A cat sitting on a rainbow")
    )
    answered = pipeline.run(
        InferenceRequest(
            backbone="janus_flow",
            task="understanding",
            prompt="Describe this image",
            images=[str(image)],
            params={"max_new_tokens": 3},
        )
    )
    assert set(generated) == {"image", "images", "saved_paths"} and generated["saved_paths"] == []
    assert len(generated["images"]) == 5 and generated["image"] is generated["images"][0]
    assert {(i.mode, i.size) for i in generated["images"]} == {("RGB", (384, 384))}
    assert set(answered) == {"text", "sft_format"} and all(isinstance(v, str) for v in answered.values())
    assert "User: <image_placeholder>\nDescribe this image\n\nAssistant:" in answered["sft_format"]
    assert str(pipeline.backbone.pipe.model.dtype) == "torch.bfloat16"


def test_the_request_s_fields_are_torchumm_s():
    """Stops: a request that TorchUMM's own code cannot build."""
    request = InferenceRequest("janus_flow", "generation")
    values = {name: getattr(request, name) for name in request.__slots__}
    assert values == {
        "backbone": "janus_flow",
        "task": "generation",
        "prompt": None,
        "images": [],
        "videos": [],
        "params": {},
        "metadata": {},
        "output_path": None,
    }
    assert request.params is not InferenceRequest("janus_flow", "generation").params


def test_the_backbone_is_torchumm_s():
    """Stops: a class that TorchUMM cannot construct, or whose editing is called otherwise than its runners do."""
    backbone = JanusFlowBackbone()
    assert backbone.name == "janus_flow"
    with pytest.raises(NotImplementedError, match="does not edit"):
        backbone.editing(prompt="a", images=["a.png"], output_path="b.png", editing_cfg={})
    for method, names in {
        "generation": ["prompt", "output_path", "generation_cfg"],
        "understanding": ["prompt", "images", "videos", "understanding_cfg"],
        "generate": ["batch", "gen_cfg"],
        "understand": ["batch", "understanding_cfg"],
    }.items():
        assert list(inspect.signature(getattr(backbone, method)).parameters)[: len(names)] == names
    names = ["model_path", "janus_root", "vae_path", "seed", "torch_dtype"]
    assert list(inspect.signature(JanusFlowBackbone).parameters) == names
    batch = {"prompt": "hi", "images": ["a.png"], "videos": []}
    request = InferenceRequest("janus_flow", "understanding", "hi", ["a.png"])
    assert request.to_batch() == batch
    request.metadata["id"] = 5
    assert request.to_batch() == batch | {"metadata": {"id": 5}}


def test_a_call_before_load_loads_what_the_constructor_names(parity_dir):
    """Stops: a backbone that TorchUMM's users construct and call, and that then asks for another call first."""
    backbone = JanusFlowBackbone(str(parity_dir), seed=9, torch_dtype="fp32")
    first = backbone.generation("a cat", generation_cfg=ONE)
    assert str(backbone.pipe.model.dtype) == "torch.float32"
    assert pixels(first) == pixels(generate(make(parity_dir, seed=9)))


def test_batches_go_the_same_way(pipeline, image, tmp_path):
    """Stops: the alternative entrances `generate` and `understand` with other meanings."""
    backbone = pipeline.backbone
    path = str(tmp_path / "a.png")
    generated = backbone.generate({"prompt": "a cat", "output_path": path}, ONE | {"seed": 3})
    assert generated["saved_paths"] == [path]
    assert pixels(generated) == pixels(backbone.generation("a cat", generation_cfg=ONE | {"seed": 3}))
    batch = {"prompt": "What?", "images": [image("wide")]}
    cfg = {"max_new_tokens": 4}
    assert backbone.understand(batch, cfg) == backbone.understanding(**batch, understanding_cfg=cfg)


# Defaults and their order -----------------------------------------------------------------------------------------


def test_generation_defaults(pipeline, asked):
    """Stops: defaults other than the seed's, which change every benchmark."""
    pipeline.run({"backbone": "janus_flow", "task": "generation", "prompt": "a cat"})
    del asked["seed"]
    assert asked == {
        "prompt": "a cat",
        "parallel_size": 5,
        "cfg_weight": 2.0,
        "num_inference_steps": 30,
        "img_size": 384,
        "progress": False,
    }


def test_understanding_defaults(pipeline, asked):
    """Stops: sampling, or short answers, where nobody asked for them."""
    pipeline.run({"backbone": "janus_flow", "task": "understanding", "prompt": "hi"})
    assert asked.pop("images") in (None, [])
    assert asked == {
        "prompt": "hi",
        "max_new_tokens": 5120,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 50,
        "seed": None,
    }


def test_a_request_overrides_load_which_overrides_the_defaults(parity_dir, asked, pipeline, monkeypatch):
    """Stops: generation_cfg and understanding_cfg read in one of their two places only, or kept for later requests."""
    other = make(
        parity_dir,
        generation_cfg={"cfg_weight": 5.0, "num_inference_steps": 7, "use_cache": True},
        understanding_cfg={"max_new_tokens": 5120, "do_sample": False, "use_cache": True},
    )
    monkeypatch.setattr(other.backbone, "pipe", pipeline.backbone.pipe)
    request = {"backbone": "janus_flow", "task": "generation", "prompt": "a cat"}
    with pytest.warns(UserWarning, match="no params nonsense; they are ignored"):
        other.run(request | {"params": {"cfg_weight": 3, "max_new_tokens": 9, "nonsense": object()}})
    assert (asked["cfg_weight"], asked["num_inference_steps"], asked["parallel_size"]) == (3.0, 7, 5)
    other.run(request)
    assert asked["cfg_weight"] == 5.0
    question = {"backbone": "janus_flow", "task": "understanding", "prompt": "hi"}
    with pytest.warns(UserWarning, match="no params nonsense"):
        other.run(question | {"params": {"top_k": 3, "cfg_weight": 2.0, "nonsense": object()}})
    assert (asked["max_new_tokens"], asked["top_k"], asked["temperature"]) == (5120, 3, 0.0)
    other.run(question)
    assert asked["top_k"] == 50


def test_a_null_of_a_yaml_file_means_the_default(parity_dir, asked, pipeline, monkeypatch):
    """Stops: `seed: null` in a configuration that ends in a TypeError."""
    nulls = dict.fromkeys(["seed", "torch_dtype", "vae_path", "janus_root", "generation_cfg"])
    other = make(parity_dir, understanding_cfg={"temperature": None}, **nulls | {"device": None})
    monkeypatch.setattr(other.backbone, "pipe", pipeline.backbone.pipe)
    generate(other, cfg_weight=None, seed=None)
    assert asked["cfg_weight"] == 2.0 and asked["seed"] == 42
    ask(other, "hi", temperature=None, top_p=None, seed=None)
    assert (asked["temperature"], asked["top_p"], asked["seed"]) == (0.0, 1.0, None)
    assert other.run(
        {"backbone": "janus_flow", "task": "understanding", "prompt": "hi", "images": None, "params": None}
    )


@pytest.mark.parametrize(
    "at_load, request_, temperature",
    [
        ({}, {}, 0.0),
        ({}, {"temperature": 0.7}, 0.7),
        ({}, {"do_sample": True}, 1.0),
        ({}, {"do_sample": True, "temperature": 0.3}, 0.3),
        ({}, {"do_sample": False, "temperature": 0.7}, 0.0),
        ({"temperature": 0.7}, {}, 0.0),
        ({"temperature": 0.7}, {"do_sample": True}, 0.7),
        ({"do_sample": True, "temperature": 0.7}, {}, 0.7),
        ({"do_sample": True}, {}, 1.0),
        ({"do_sample": True, "temperature": 0.7}, {"do_sample": False}, 0.0),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.0}, 0.0),
    ],
)
def test_do_sample_and_temperature(pipeline, asked, monkeypatch, at_load, request_, temperature):
    """Stops: `do_sample: false` that samples all the same, and sampling at temperature 0."""
    monkeypatch.setattr(pipeline.backbone, "default_understanding_cfg", backend.UNDERSTANDING | at_load)
    ask(pipeline, "hi", **request_)
    assert asked["temperature"] == temperature


@pytest.mark.parametrize(
    "name, dtype",
    [("bf16", "bfloat16"), ("FP32", "float32"), ("torch.bfloat16", "bfloat16"), ("float", "float32")],
)
def test_short_names_of_dtypes(parity_dir, name, dtype):
    """Stops: `torch_dtype: bf16`, which TorchUMM takes, refused."""
    assert str(make(parity_dir, torch_dtype=name).backbone.pipe.model.dtype) == f"torch.{dtype}"


@pytest.mark.parametrize(
    "cfg, message",
    [
        ({"modelpath": "x"}, "backbone_cfg: unknown keys modelpath; known ones are model_path, janus_root"),
        ({"generation_cfg": {"guidance": 3}}, "backbone_cfg.generation_cfg: unknown keys guidance"),
        ({"understanding_cfg": {"max_length": 3}}, "backbone_cfg.understanding_cfg: unknown keys max_length"),
        ({"generation_cfg": [1]}, r"backbone_cfg.generation_cfg must be a mapping, got \[1\]"),
        ({"torch_dtype": "int8"}, "dtype must be one of auto"),
    ],
)
def test_a_wrong_backbone_cfg_is_refused_before_the_work(cfg, message):
    """Stops: a misspelt setting without effect, noticed after a whole benchmark if at all."""
    with pytest.raises(ValueError, match=message):
        InferencePipeline("janus_flow", {"model_path": "/nowhere"} | cfg)


@pytest.mark.parametrize("name", ["janus-flow", "Janus_Flow "])
def test_other_spellings_of_the_name(parity_dir, name):
    """Stops: a name that TorchUMM's own runners take refused."""
    pipe = InferencePipeline(name, {"model_path": str(parity_dir), "device": "cpu"})
    assert pipe.run_many([InferenceRequest(name, "generation", "a cat", params=ONE)], batch_size=4)


def test_numbers_may_come_as_text(pipeline, asked):
    """Stops: "30" out of an environment variable refused; 4.5 images or `true` steps accepted."""
    generate(pipeline, num_inference_steps="30", img_size=64.0, cfg_weight="2.5")
    assert (asked["num_inference_steps"], asked["img_size"], asked["cfg_weight"]) == (30, 64, 2.5)
    for key, value in (
        ("parallel_size", 4.5),
        ("num_inference_steps", True),
        ("img_size", "big"),
        ("seed", [1]),
    ):
        with pytest.raises(ValueError, match=f"{key} must be a whole number"):
            generate(pipeline, **{key: value})
    with pytest.raises(ValueError, match="cfg_weight must be a number, got 'high'"):
        generate(pipeline, cfg_weight="high")


@pytest.mark.parametrize("key", ["parallel_size", "num_inference_steps", "img_size"])
@pytest.mark.parametrize("value", [0, -2])
def test_sizes_and_steps_of_zero_are_refused(pipeline, tmp_path, key, value):
    """Stops: an IndexError for no images, or a stream of seeds that runs backwards."""
    with pytest.raises(ValueError, match=f"{key} must be a whole number"):
        generate(pipeline, output_path=str(tmp_path / "a.png"), **{key: value})
    assert list(tmp_path.iterdir()) == []


# Saving -----------------------------------------------------------------------------------------------------------


def test_one_image_is_saved_under_its_very_name(pipeline, tmp_path):
    """Stops: `NNNNN_0.png`, which GenEval's runner does not find; and a missing parent folder."""
    path = tmp_path / "deep" / "er" / "00003.png"
    result = generate(pipeline, output_path=str(path))
    assert result["saved_paths"] == [str(path)]
    assert Image.open(path).tobytes() == result["image"].tobytes()
    assert [p.name for p in path.parent.iterdir()] == ["00003.png"]


def test_several_images_are_numbered(pipeline, tmp_path):
    """Stops: images that overwrite each other, and paths in another order than the images."""
    result = generate(pipeline, output_path=tmp_path / "out.v2.png", parallel_size=3)
    paths = [tmp_path / f"out.v2_{i}.png" for i in range(3)]
    assert result["saved_paths"] == [str(p) for p in paths] and sorted(tmp_path.iterdir()) == paths
    assert [Image.open(p).tobytes() for p in paths] == pixels(result)


@pytest.mark.parametrize(
    "name, form", [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.WEBP", "WEBP"), ("a", "PNG")]
)
def test_the_extension_says_the_format(pipeline, tmp_path, name, form):
    """Stops: PNG bytes under another name, and a crash without an extension."""
    (path,) = generate(pipeline, output_path=str(tmp_path / name))["saved_paths"]
    assert Path(path).name == (name if "." in name else "a.png")
    assert Image.open(path).format == form


def test_names_are_torchumm_s(pipeline, tmp_path, monkeypatch):
    """Stops: a dot in a name taken for an unknown format, and files that a runner then looks for in vain."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, count, files in (
        ("uo/v1.5_out", 1, ["v1.5_out"]),
        ("two/v1.5_out", 2, ["v1_0.5_out", "v1_1.5_out"]),
        ("~/home/a.tmp", 1, ["a.tmp"]),
        ("three/.hidden", 1, [".hidden.png"]),
    ):
        path = name if name.startswith("~") else str(tmp_path / name)
        result = generate(pipeline, output_path=path, parallel_size=count)
        folder = tmp_path / Path(name).parent.name
        assert result["saved_paths"] == [str(folder / file) for file in files]
        assert [Image.open(folder / file).format for file in files] == ["PNG"] * count


def test_a_folder_s_name_is_refused_before_the_work(pipeline, tmp_path, monkeypatch):
    """Stops: minutes of work thrown away because the file's name is a folder's."""
    monkeypatch.setattr(pipeline.backbone.pipe, "generate", lambda *a, **k: pytest.fail("generated first"))
    (tmp_path / "v1.5_out").mkdir()
    with pytest.raises(IsADirectoryError, match=r"output_path: .*v1\.5_out is a folder"):
        generate(pipeline, output_path=str(tmp_path / "v1.5_out"))


def test_nothing_half_written_stays(pipeline, tmp_path, monkeypatch):
    """Stops: a truncated file that a resumed benchmark takes for a finished sample."""
    (tmp_path / "a_1.png").write_bytes(b"old")
    save, count = Image.Image.save, []

    def full_disk(image, path, *args, **kwargs):
        count.append(path)
        if len(count) == 2:
            Path(path).write_bytes(b"half")
            raise OSError("no space left")
        save(image, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        generate(pipeline, output_path=tmp_path / "a.png", parallel_size=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a_0.png", "a_1.png"]
    assert (tmp_path / "a_1.png").read_bytes() == b"old" and Image.open(tmp_path / "a_0.png").size == (64, 64)


def test_without_a_path_nothing_is_saved(pipeline, tmp_path, monkeypatch):
    """Stops: files in the working folder, and DPG's runner counting an image twice."""
    monkeypatch.chdir(tmp_path)
    for path in (None, ""):
        assert generate(pipeline, output_path=path)["saved_paths"] == []
    assert list(tmp_path.iterdir()) == []


# Seeds ----------------------------------------------------------------------------------------------------------


def test_seeds_go_on_from_request_to_request(parity_dir):
    """Stops: four identical samples for DPG-Bench's four requests with one prompt."""
    stream = make(parity_dir, seed=7)
    first, second = generate(stream, parallel_size=2), generate(stream, parallel_size=2)
    assert len({*pixels(first), *pixels(second)}) == 4
    assert pixels(generate(make(parity_dir, seed=9), parallel_size=2)) == pixels(second)


def test_a_resumed_run_gives_the_same_images(parity_dir, tmp_path):
    """Stops: a resumed GenEval run that generates its first image twice; ranks and orders that change images."""

    def samples(folder, jobs, **params):
        pipe = make(parity_dir)
        return {
            job: generate(pipe, job[0], tmp_path / folder / job[1], **params)["image"].tobytes()
            for job in jobs
        }

    jobs = [(prompt, f"{k:05d}.png") for prompt in ("a cat", "a dog") for k in range(3)]
    whole = samples("one", jobs)
    assert len(set(whole.values())) == 6
    assert samples("two", jobs[2:4]) == {job: whole[job] for job in jobs[2:4]}
    assert samples("three", jobs[::-1]) == whole
    assert samples("four", jobs, seed=5) != whole and samples("five", jobs[:1])[jobs[0]] == whole[jobs[0]]
    without_files = [generate(make(parity_dir), prompt)["image"].tobytes() for prompt in ("a cat", "a dog")]
    stream = make(parity_dir)
    assert [generate(stream, prompt)["image"].tobytes() for prompt in ("a cat", "a dog")] == without_files


def test_a_request_that_fails_moves_no_seed(parity_dir):
    """Stops: another image because an earlier request was wrong."""
    stream = make(parity_dir)
    with pytest.raises(ValueError, match="img_size"):
        generate(stream, img_size=0)
    assert pixels(generate(stream)) == pixels(generate(make(parity_dir)))


def test_a_pipeline_s_seed_repeats_its_sequence(parity_dir):
    """Stops: a benchmark that nobody can run again; and a seed without effect."""
    runs = [[pixels(generate(p)) for _ in range(2)] for p in (make(parity_dir), make(parity_dir, seed=42))]
    assert runs[0] == runs[1]  # 42 is the default
    assert pixels(generate(make(parity_dir, seed=1))) != runs[0][0]


def test_a_request_s_seed_is_its_own(parity_dir):
    """Stops: a request's seed that shifts the stream of the others, or has no effect."""
    stream, plain = make(parity_dir), make(parity_dir)
    a, b = generate(stream, seed=5), generate(stream, seed=5)
    assert pixels(a) == pixels(b) == pixels(generate(plain, seed=5))
    assert pixels(generate(stream)) == pixels(generate(plain)) != pixels(a)


def test_answers_may_be_seeded(pipeline):
    """Stops: a sampling seed that never reaches the sampler."""
    options = {"do_sample": True, "max_new_tokens": 12, "top_p": 1.0, "top_k": 0}
    one, again, other = (ask(pipeline, "hi", seed=s, **options)["text"] for s in (1, 1, 2))
    assert one == again != other


# Requests -------------------------------------------------------------------------------------------------------


def test_run_many(pipeline, image):
    """Stops: results in another order, and dicts that only `run` understands."""
    requests = [
        InferenceRequest("janus_flow", "generation", "a cat", params=ONE | {"seed": 1}),
        {"backbone": "janus_flow", "task": "understanding", "prompt": "hi", "params": {"max_new_tokens": 2}},
        {"backbone": "janus_flow", "task": "generation", "prompt": "a dog", "params": FAST},
    ]
    a, b, c = pipeline.run_many(iter(requests))
    assert (len(a["images"]), len(c["images"])) == (1, 2) and set(b) == {"text", "sft_format"}
    assert pixels(a) == pixels(pipeline.run(requests[0])) and pipeline.run_many([]) == []


def test_a_dict_is_a_request(pipeline, tmp_path):
    """Stops: a field of a dict that is dropped on its way."""
    request = InferenceRequest(
        "janus_flow", "generation", "a cat", params=ONE | {"seed": 4}, output_path=str(tmp_path / "a.png")
    )
    as_dict = {name: getattr(request, name) for name in request.__slots__}
    one, two = pipeline.run(request), pipeline.run(as_dict)
    assert pixels(one) == pixels(two) and one["saved_paths"] == two["saved_paths"]
    nulls = as_dict | dict.fromkeys(["images", "videos", "metadata", "output_path"])
    assert pixels(pipeline.run(nulls)) == pixels(one)


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"task": "generation", "prompt": "a"}, "missing: backbone"),
        ({"backbone": "janus_flow", "prompt": "a"}, "missing: task"),
        ({"backbone": None, "task": None}, "missing: backbone, task"),
        ({"backbone": "janus_flow", "task": "generation", "promt": "a", "image": 1}, "unknown: image, promt"),
        ({"backbone": "janus_flow", "task": "draw", "prompt": "a"}, "task must be one of .*got 'draw'"),
        ({"backbone": "janus_pro", "task": "generation", "prompt": "a"}, "for backbone 'janus_pro', this"),
    ],
)
def test_requests_that_are_not_whole(pipeline, request_, message):
    """Stops: a misspelt field that is silently ignored, and work done for another backbone."""
    with pytest.raises(ValueError, match=message):
        pipeline.run(request_)


@pytest.mark.parametrize("request_", [None, "generation", ["janus_flow", "generation"], 5])
def test_what_is_no_request(pipeline, request_):
    """Stops: an AttributeError from inside."""
    with pytest.raises(TypeError, match="a request is an InferenceRequest or a dict, not"):
        pipeline.run(request_)


@pytest.mark.parametrize("name", ["janusflow", "janus_pro", "", None])
def test_another_backbone_s_name_is_refused(name):
    """Stops: another model's benchmark run with this one; refused before anything is loaded."""
    with pytest.raises(ValueError, match="backbone_name must be 'janus_flow'"):
        InferencePipeline(name, {"model_path": "/nowhere"})


@pytest.mark.parametrize("prompt", [None, "", " \n"])
def test_a_generation_needs_a_prompt(pipeline, prompt):
    """Stops: a sample generated from nothing that enters a benchmark's average."""
    with pytest.raises(ValueError, match="needs a prompt"):
        generate(pipeline, prompt)
    with pytest.raises(ValueError, match="prompt"):
        pipeline.backbone.generation(prompt)


def test_editing_is_not_implemented(pipeline, image):
    """Stops: another exception than the one that TorchUMM's runners catch."""
    with pytest.raises(NotImplementedError, match="does not edit"):
        pipeline.run(InferenceRequest("janus_flow", "editing", "make it red", images=[image("wide")]))


def test_editing_that_is_turned_on(parity_dir, image, tmp_path):
    """Stops: settings that do not reach the edit, a file that is not there, a seed that depends on the run's order."""
    cfg = {"strength": 0.6, "num_inference_steps": 2, "source_prompt": "a square"}
    pipeline, path = make(parity_dir, editing_cfg=cfg), tmp_path / "edited.png"

    def edit(output_path=path, **params) -> dict:
        asked = dict(
            backbone="janus_flow", task="editing", prompt="a red square", images=[image("wide"), "?"]
        )
        return pipeline.run(asked | {"output_path": output_path, "params": params})

    once, again = edit(), edit()
    assert pixels(once) == pixels(again) and once["saved_paths"] == [str(path)]
    assert Image.open(path).tobytes() == once["image"].tobytes() and once["images"] == [once["image"]]
    assert pixels(edit(seed=1)) != pixels(edit(seed=2)) != pixels(edit(seed=2, method="sdedit"))
    expected = pipeline.backbone.pipe.edit(image("wide"), "a red square", seed=3, cfg_weight=2, **cfg)
    assert pixels(edit(None, seed=3, cfg_weight=2)) == [expected[0].tobytes()]
    for wrong, message in ((dict(prompt=" "), "an image and a prompt"), (dict(images=[]), "0 images")):
        with pytest.raises(ValueError, match=message):
            pipeline.run(
                dict(backbone="janus_flow", task="editing", prompt="a", images=[image("wide")]) | wrong
            )
    with pytest.raises(ValueError, match="method must be one of"):
        edit(method="magic")


def test_videos_are_not_implemented(pipeline, image):
    """Stops: a video that is ignored and answered about."""
    with pytest.raises(NotImplementedError, match="not videos"):
        pipeline.run(InferenceRequest("janus_flow", "understanding", "What?", videos=["a.mp4"]))


def test_a_missing_image_is_named(pipeline, image, tmp_path):
    """Stops: an answer that is about the other image."""
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        ask(pipeline, "What?", [image("wide"), str(tmp_path / "gone.jpg")])


# Understanding --------------------------------------------------------------------------------------------------


def test_all_images_are_used(pipeline, image):
    """Stops: the published demo's habit of reading the first image only."""
    answers = [
        ask(pipeline, "What is it?", [image(n) for n in names])
        for names in (["tall"], ["tall", "square"], ["tall", "rgba"])
    ]
    assert [a["sft_format"].count("<image_placeholder>") for a in answers] == [1, 2, 2]
    assert len({a["text"] for a in answers}) == 3


def test_an_answer_is_the_public_call_s(pipeline, image):
    """Stops: another prompt form, or other options, than `Pipeline.understand` has."""
    expected = pipeline.backbone.pipe.understand("What?", images=[image("wide")], max_new_tokens=6)
    result = ask(pipeline, "What?", [image("wide")])
    assert result == {"text": expected.text, "sft_format": expected.sft_format}


@pytest.mark.parametrize("prompt", [None, "", "  "])
def test_images_without_a_question_are_described(pipeline, image, prompt):
    """Stops: an error, or an empty question, for TorchUMM's prompts that may be left out."""
    result = ask(pipeline, prompt, [image("wide")])
    assert f"User: <image_placeholder>\n{DEFAULT_QUESTION}\n\n" in result["sft_format"]


def test_neither_question_nor_image(pipeline):
    """Stops: a made-up description of an image that is not there."""
    with pytest.raises(ValueError, match="prompt is empty and there is no image"):
        ask(pipeline)


def test_images_in_other_forms(pipeline, image):
    """Stops: a single path taken apart into letters, and images in memory refused."""
    path, opened = image("square"), Image.open(image("square")).convert("RGB")
    forms = ([path], path, (path,), Path(path), [opened], opened, [np.asarray(opened)])
    backbone = pipeline.backbone
    texts = {
        backbone.understanding("What?", form, understanding_cfg={"max_new_tokens": 4})["text"]
        for form in forms
    }
    assert len(texts) == 1
