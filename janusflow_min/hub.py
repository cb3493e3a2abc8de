# SPDX-License-Identifier: MIT
"""Where a checkpoint and its VAE lie: inside the package, in a folder, or on the Hugging Face hub.

Of a repository only the files that are read are downloaded: neither pickles nor the checkpoints of a training run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoint import read_config
from .files import expand
from .official import CONFIG, INDEX, PROCESSOR_FILES, VAE_FILES, WEIGHTS
from .progress import is_terminal
from .weights import read_index

TINY = Path(__file__).parent / "assets" / "tiny"
SDXL_VAE = "stabilityai/sdxl-vae"


def resolve(source: str | Path, progress: bool = True, weights: bool = True) -> Path:
    """The folder of a checkpoint: "tiny" (inside the package), a folder, or a hub id, which is downloaded.

    An interrupted download resumes; without a network the cache is enough. `config.json` is checked before the
    weights are fetched; weights=False leaves them. Raises FileNotFoundError, and ValueError for the configuration
    of another model.
    """
    if str(source) == "tiny":
        return TINY
    if (folder := _local("source", source)) is not None:
        return folder
    small = [CONFIG, INDEX, *PROCESSOR_FILES]
    folder = _download("source", str(source), small, progress)
    read_config(folder)
    if not weights:
        return folder
    files = sorted(set(read_index(folder).values())) if (folder / INDEX).is_file() else [WEIGHTS]
    return _download("source", str(source), [*files, *(f"vae/{name}" for name in VAE_FILES)], progress)


def resolve_vae(folder: Path, vae_path: str | Path | None = None, progress: bool = True) -> Path:
    """The folder of the VAE for a checkpoint's folder: `vae_path` (a folder or a hub id), else `vae/` inside the
    checkpoint, else SDXL's from the hub. Raises FileNotFoundError."""
    if vae_path is None and (folder / "vae").is_dir():
        return folder / "vae"
    source = SDXL_VAE if vae_path is None else vae_path
    found = _local("vae_path", source)
    if found is None:
        names = [*VAE_FILES, *(f"vae/{name}" for name in VAE_FILES)]
        found = _download("vae_path", str(source), names, progress)
    return found / "vae" if (found / "vae" / CONFIG).is_file() else found


def _local(name: str, source: str | Path) -> Path | None:
    """A folder that is there; None for a hub id."""
    path, text = expand(source), str(source)
    if path.is_dir():
        return path
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or path.exists():
        hint = "; it is a file: give the folder that holds it" if path.is_file() else ""
        raise FileNotFoundError(
            f"{name} {text!r} is neither a folder nor a hub id of the form owner/name{hint}"
        )
    return None


def _download(name: str, repository: str, files: list[str], progress: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with _bars(progress and is_terminal()):
            return Path(snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # offline, not found, gated: the hub's client raises a family of its own
        raise FileNotFoundError(
            f"{name} {repository!r} is no folder here, and could not be downloaded ({type(error).__name__}: "
            f"{error}). Without a network, copy the repository's files (*.json, *.safetensors) to a folder and pass "
            "its path"
        ) from error


@contextmanager
def _bars(progress: bool) -> Iterator[None]:
    """The hub's client shows its progress unless all of its bars are switched off, which is undone here."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if progress or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
