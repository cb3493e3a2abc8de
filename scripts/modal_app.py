# SPDX-License-Identifier: MIT
"""The benchmarks on Modal's GPUs. Written after Modal's documentation and **not run on Modal itself**: what is tested
is each function through its local call, and the arguments that it is given (`tests/test_modal_app.py`).

    pip install -e '.[modal]' && modal setup                          # once: an account and a token
    modal volume put janusflow-min-data evaluation_metadata.jsonl geneval/evaluation_metadata.jsonl
    modal run scripts/modal_app.py --model janus_flow --eval-config geneval --limit 4        # a few prompts first
    modal run scripts/modal_app.py --model janus_flow --eval-config geneval --gpus 4 --mode full
    modal volume get janusflow-min-outputs geneval/janus_flow .

--model: janus_flow (deepseek-ai/JanusFlow-1.3B), tiny, or a hub id. --eval-config: geneval, dpg_bench, wise,
uni_mmmu or shapes. --mode: generate, score, report, or full for all three. --gpus N: N containers of one GPU, each one
a rank of N; they share the outputs volume, so a container that dies leaves the others' work, and the same command
again fills the holes. --options "…" goes to the first stage that is run, as on the command line of
`janusflow-min bench`. JANUSFLOW_MODAL_GPU names another GPU than H100.

Image: Debian with Python 3.11, this checkout copied in and installed with its extra `bench`. It is built at the first
run and again when the checkout changes; torch is in a layer of its own below, which stays.

Volumes, made when first used: `janusflow-min-models` at /models, the hub's cache, filled by `fetch` on a machine
without a GPU; `janusflow-min-data` at /data, the benchmarks' files, which you put there (INPUTS says where);
`janusflow-min-outputs` at /outputs, one folder for each benchmark and model.

WISE and Uni-MMMU are judged by chat endpoints: score them with `--mode score --options "--judge-url …"` (Uni-MMMU:
`--vl-model … --vl-url …`, and the same for text) or on your own machine. A key comes from Modal's secret
`janusflow-min-judge` (OPENAI_API_KEY), which is asked for only where the variable JANUSFLOW_MODAL_SECRET names it.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import modal

CHECKOUT = Path(__file__).resolve().parents[1]
MODELS = {"janus_flow": "deepseek-ai/JanusFlow-1.3B", "tiny": "tiny"}
VAE = "stabilityai/sdxl-vae"
INPUTS = {  # benchmark -> its --data on the data volume
    "geneval": "/data/geneval/evaluation_metadata.jsonl",
    "dpg_bench": "/data/dpg_bench/prompts",
    "wise": "/data/wise",
    "uni_mmmu": "/data/uni_mmmu/data",
    "shapes": None,
}
JUDGES = {  # benchmark -> what `score` needs, where a judge can be had from the hub
    "geneval": ["--detector", "facebook/mask2former-swin-small-coco-instance"],
    "dpg_bench": [
        "--questions",
        "/data/dpg_bench/dpg_bench.csv",
        "--vqa",
        "Salesforce/blip-vqa-capfilt-large",
    ],
}
MODES = {
    "generate": ["generate"],
    "score": ["score"],
    "report": ["report"],
    "full": ["generate", "score", "report"],
}
HOURS = 60 * 60

app = modal.App("janusflow-min")
image = (
    modal.Image.debian_slim(python_version="3.11")
    .pip_install("torch>=2.7", "diffusers>=0.31", "transformers>=4.46")
    .add_local_dir(
        CHECKOUT,
        "/root/janusflow-min",
        copy=True,
        ignore=[".git", ".venv", "outputs", "**/__pycache__", "**/*.egg-info"],
    )
    .run_commands("pip install '/root/janusflow-min[bench]'")
    .env({"HF_HOME": "/models"})
)
models = modal.Volume.from_name("janusflow-min-models", create_if_missing=True)
data = modal.Volume.from_name("janusflow-min-data", create_if_missing=True)
outputs = modal.Volume.from_name("janusflow-min-outputs", create_if_missing=True)
volumes = {"/models": models, "/data": data, "/outputs": outputs}
secret = os.environ.get("JANUSFLOW_MODAL_SECRET")
secrets = [modal.Secret.from_name(secret)] if secret else []
gpu = os.environ.get("JANUSFLOW_MODAL_GPU", "H100")


@app.function(image=image, volumes={"/models": models}, timeout=2 * HOURS)
def fetch(sources: list[str]) -> None:
    """Download hub repositories into the models volume; what is there already is not fetched again."""
    from huggingface_hub import snapshot_download

    for source in sources:
        twice = "sdxl_vae.safetensors"  # what SDXL's VAE has under diffusers' name as well
        snapshot_download(source, allow_patterns=["*.json", "*.safetensors"], ignore_patterns=twice)
    _commit(models)


@app.function(image=image, gpu=gpu, volumes=volumes, secrets=secrets, timeout=24 * HOURS)
def stage(arguments: list[str], rank: int = 0, world: int = 1) -> None:
    """`janusflow-min ARGUMENTS` as one rank of `world`. RuntimeError where it fails."""
    from janusflow_min.cli import main as janusflow_min

    before = dict(os.environ)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}  # one GPU in a container
    try:
        code = janusflow_min(arguments)
    finally:
        os.environ.clear()
        os.environ.update(before)
        _commit(outputs)  # what is finished stays, whatever happened
    if code:
        raise RuntimeError(f"janusflow-min {shlex.join(arguments)} failed with exit code {code}")


@app.local_entrypoint()
def main(
    model: str = "janus_flow",
    eval_config: str = "geneval",
    mode: str = "generate",
    gpus: int = 1,
    limit: int = 0,
    options: str = "",
) -> None:
    plan = stages(model, eval_config, mode, limit, options)
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    source = hub_id(model)
    if plan[0][2] == "generate" and source != "tiny":
        fetch.remote([source, VAE])
    for arguments in plan:
        ranks = gpus if arguments[2] == "generate" else 1
        print(f"{ranks} x janusflow-min {shlex.join(arguments)}")
        calls = [(arguments, rank, ranks) for rank in range(ranks)]
        failed = [r for r in stage.starmap(calls, return_exceptions=True) if isinstance(r, BaseException)]
        if failed:
            raise RuntimeError(
                f"{len(failed)} of {ranks} failed, the others' work is kept; the same command goes on: {failed[0]}"
            )
    print(f"modal volume get janusflow-min-outputs {folder(model, eval_config)} .")


def stages(model: str, eval_config: str, mode: str, limit: int = 0, options: str = "") -> list[list[str]]:
    """The command lines to run, one a stage. ValueError for a benchmark, mode or model that is not known."""
    if eval_config not in INPUTS:
        raise ValueError(f"--eval-config must be one of {', '.join(INPUTS)}, got {eval_config!r}")
    if mode not in MODES:
        raise ValueError(f"--mode must be one of {', '.join(MODES)}, got {mode!r}")
    plan = []
    for name in MODES[mode]:
        arguments = ["bench", eval_config, name, "--out", f"/outputs/{folder(model, eval_config)}"]
        if name != "report" and INPUTS[eval_config]:
            arguments += ["--data", INPUTS[eval_config]]
        if name == "generate":
            arguments += ["--model", hub_id(model)]
            arguments += ["--limit", str(limit)] if limit else []
        if name == "score":
            arguments += JUDGES.get(eval_config, [])
        plan.append(arguments)
    plan[0] += shlex.split(options)
    return plan


def hub_id(model: str) -> str:
    """What `--model` of janusflow-min gets."""
    if model not in MODELS and model.count("/") != 1:
        raise ValueError(
            f"--model must be one of {', '.join(MODELS)} or a hub id like owner/name, got {model!r}"
        )
    return MODELS.get(model, model)


def folder(model: str, eval_config: str) -> str:
    """On the outputs volume."""
    return f"{eval_config}/{model.replace('/', '--')}"


def _commit(volume: modal.Volume) -> None:
    if not modal.is_local():
        volume.commit()
