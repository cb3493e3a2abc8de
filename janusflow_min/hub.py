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
from .weights import Header, Stored, read_header, read_index

TINY = Path(__file__).parent / "assets" / "tiny"
SDXL_VAE = "stabilityai/sdxl-vae"


def resolve(
    source: str | Path, progress: bool = True, weights: bool = True, revision: str | None = None
) -> Path:
    """The folder of a checkpoint: "tiny" (inside the package), a folder, or a hub id, which is downloaded.

    A connection that breaks is taken up where it broke, and files that have arrived are not fetched again; without a
    network the cache is enough. `config.json` is checked before the weights are fetched; weights=False leaves them.
    revision: a branch, tag or commit of a hub id. Raises FileNotFoundError, and ValueError for the configuration of
    another model.
    """
    if str(source) == "tiny" and revision is None:
        return TINY
    small = [CONFIG, INDEX, *PROCESSOR_FILES, f"vae/{CONFIG}"]
    if (local := _local("source", source, revision)) is not None:
        return local
    folder = _download("source", str(source), small, progress, revision)
    read_config(folder)
    if not weights:
        return folder
    files = sorted(set(read_index(folder).values())) if (folder / INDEX).is_file() else [WEIGHTS]
    files += [f"vae/{name}" for name in VAE_FILES]
    return _download("source", str(source), files, progress, revision)


def find_folder(
    name: str, source: str | Path, files: list[str], progress: bool = True, revision: str | None = None
) -> Path:
    """A folder as it is, or that of a hub id with these files of it downloaded. name: the argument, for errors."""
    local = _local(name, source, revision)
    return _download(name, str(source), files, progress, revision) if local is None else local


def resolve_vae(
    folder: Path, vae_path: str | Path | None = None, progress: bool = True, weights: bool = True
) -> Path:
    """The folder of the VAE for a checkpoint's folder: `vae_path` (a folder or a hub id), else `vae/` inside the
    checkpoint, else SDXL's from the hub. weights=False leaves its weights there. Raises FileNotFoundError."""
    if vae_path is None and (folder / "vae").is_dir():
        return folder / "vae"
    source = SDXL_VAE if vae_path is None else vae_path
    names = VAE_FILES if weights else (CONFIG,)
    found = find_folder("vae_path", source, [*names, *(f"vae/{name}" for name in names)], progress)
    return found / "vae" if (found / "vae" / CONFIG).is_file() else found


def header_reader(source: str | Path) -> Header:
    """What reads the headers of `source`'s weights: of a hub id, those that are not in the cache come by an HTTP
    range, and nothing else of the file does. It raises FileNotFoundError or ValueError, as loading does."""
    if str(source) == "tiny" or _local("source", source) is not None:
        return read_header

    def read(path: Path) -> dict[str, Stored] | None:
        if path.is_file():
            return read_header(path)
        if path.name == WEIGHTS and (path.parent / INDEX).is_file():
            return None  # the shards are what `resolve` downloads
        return _fetch_header(str(source), path)

    return read


def _fetch_header(repository: str, path: Path) -> dict[str, Stored] | None:
    """Of a file that the hub has at the commit whose snapshot `path` lies in; None where it has none."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import EntryNotFoundError

    snapshot = next(parent for parent in path.parents if parent.parent.name == "snapshots")
    name = path.relative_to(snapshot).as_posix()
    try:
        found = HfApi().parse_safetensors_file_metadata(repository, name, revision=snapshot.name)
        return {n: Stored(path, n, tuple(t.shape), str(t.dtype)) for n, t in found.tensors.items()}
    except EntryNotFoundError:
        return None
    except OSError as error:  # offline, or the network fails
        raise FileNotFoundError(
            f"the header of {name} in {repository!r} could not be read ({type(error).__name__}: {error})"
        ) from error
    except Exception as error:  # whatever a broken header makes the hub's client raise
        raise ValueError(f"{name} in {repository!r} is not a whole safetensors file ({error})") from error


def _local(name: str, source: str | Path, revision: str | None = None) -> Path | None:
    """A folder that is there; None for a hub id."""
    path, text = expand(source), str(source)
    if path.is_dir() or text == "tiny":
        if revision is not None:
            raise ValueError(f"revision {revision!r} is for hub ids; {name} {text!r} is on this machine")
        return path
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or path.exists():
        hint = "; it is a file: give the folder that holds it" if path.is_file() else ""
        raise FileNotFoundError(
            f"{name} {text!r} is neither a folder nor a hub id of the form owner/name{hint}"
        )
    return None


def _download(
    name: str, repository: str, files: list[str], progress: bool, revision: str | None = None
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub import utils as hub

    try:
        with _bars(progress and is_terminal()):
            return Path(snapshot_download(repository, allow_patterns=files, revision=revision))
    except Exception as error:  # the hub's client raises a family of its own
        causes = {
            hub.GatedRepoError: f"ask for access on https://huggingface.co/{repository}, then `hf auth login`",
            hub.RepositoryNotFoundError: "check its name; a private one needs `hf auth login`",
            hub.RevisionNotFoundError: f"it has no branch, tag or commit {revision!r}",
        }
        other = "Without a network, copy the repository's files (*.json, *.safetensors) to a folder and pass its path"
        what = next((text for kind, text in causes.items() if isinstance(error, kind)), other)
        raise FileNotFoundError(
            f"{name} {repository!r} is no folder here, and could not be downloaded ({type(error).__name__}: "
            f"{error}). {what[0].upper()}{what[1:]}"
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
