# SPDX-License-Identifier: MIT
"""`push_to_hub`: a pipeline as a repository of the Hugging Face hub, with a card that says how it came about."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks import shown
from .files import expand
from .loading import save
from .official import INDEX, SHARDS, WEIGHTS

if TYPE_CHECKING:
    from .pipeline import Pipeline

USE = """# {name}

A [JanusFlow](https://arxiv.org/abs/2411.07975) model: it generates images from text and answers questions about images.

```python
import janusflow_min as jf

pipe = jf.load("{repository}")
pipe.generate("a photo of a red star").images[0].save("star.png")
print(pipe.understand("What is in the image?", images="star.png").text)
```
"""
LICENCE = "\nLicence: {license}; that of the base model and of the data holds as well.\n"
TRAINING = """
## Training

Base model: {model}. {kind}, {steps:,} steps of {batch} samples; the lowest validation loss was {best}.

{samples}
<details><summary>Data and every setting</summary>

```toml
{toml}```

</details>
"""


def push_to_hub(
    pipe: Pipeline, repository: str, *, run: str | Path | None = None, license: str | None = None,
    private: bool | None = None, message: str = "A model of janusflow-min",
) -> str:  # fmt: skip
    """Upload the model, its VAE and a model card as one commit; returns the commit's URL.

    repository: "owner/name", made if it is not there, `private` or public. run: the OUTPUT folder of the training that
    made the model: from it the card has base model, data, settings, validation and samples, of files on this machine
    the names alone. license: the hub's word for it ("mit", "other"). Other files of the repository stay. Raises
    ValueError or FileNotFoundError for bad arguments; ConnectionError where the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise HFValidationError("the owner is missing")
    except HFValidationError as error:
        raise ValueError(f"repository must be owner/name, got {shown(repository)} ({error})") from None
    card, samples = model_card(repository, None if run is None else expand(run), license)
    api = HfApi()
    with explained(repository):
        api.whoami()  # before the weights are written
    with tempfile.TemporaryDirectory() as temporary:
        folder = save(pipe, Path(temporary) / "model")
        (folder / "README.md").write_text(card, encoding="utf-8")
        if samples is not None:
            shutil.copyfile(samples, folder / "samples.png")
        with explained(repository):
            api.create_repo(repository, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=message,
                delete_patterns=[WEIGHTS, SHARDS, INDEX],  # of these what is not part of the model now
            )  # fmt: skip
    return done.commit_url


@contextmanager
def explained(repository: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's client raises a family of its own
        raise ConnectionError(
            f"{repository!r} was not written ({type(error).__name__}: {error}). It needs a network, and a token that "
            "may write there: `hf auth login`"
        ) from error


def model_card(repository: str, run: Path | None, license: str | None) -> tuple[str, Path | None]:
    """The card, and the image of samples that it shows."""
    from huggingface_hub import ModelCardData

    text = USE.format(name=repository.rpartition("/")[2], repository=repository)
    text += LICENCE.format(license=license or "not stated")
    base, samples = None, None
    if run is not None:
        from .training.config import load_config
        from .training.metrics import read_lines
        from .training.settings import to_toml

        config = load_config(run / "config.toml")
        rows, steps = read_lines(run / "samples.jsonl"), len(read_lines(run / "metrics.jsonl"))
        sheets = [run / row["sheet"] for row in rows if row.get("sheet")]
        samples = sheets[-1] if sheets and sheets[-1].is_file() else None
        public = without_paths(config)
        base = public.model if "/" in public.model else None
        text += TRAINING.format(
            model="the default of janusflow-min" if public.model == "tiny" else public.model,
            kind=f"LoRA of rank {config.lora.rank}, merged" if config.lora.rank else "Full fine-tuning",
            steps=steps, batch=config.batch, toml=to_toml(public),
            best=min((row["loss"] for row in rows if row.get("loss") is not None), default="not measured"),
            samples="" if samples is None else "Samples of the last step, seeds 0, 1, …:\n\n![Samples](samples.png)\n",
        )  # fmt: skip
    about = ModelCardData(
        license=license, base_model=base, library_name="janusflow-min", pipeline_tag="any-to-any",
        tags=["janusflow", "text-to-image", "image-text-to-text"],
    )  # fmt: skip
    return f"---\n{about}\n---\n\n{text}", samples


def without_paths(settings: Any) -> Any:
    """Settings, or what is in them, with a path of this machine cut to its last part; hub ids and names stay."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return dataclasses.replace(
            settings,
            **{f.name: without_paths(getattr(settings, f.name)) for f in dataclasses.fields(settings)},
        )
    if isinstance(settings, tuple):
        return tuple(map(without_paths, settings))
    path = Path(settings) if isinstance(settings, str) else None
    return path.name if path is not None and path.is_absolute() else settings
