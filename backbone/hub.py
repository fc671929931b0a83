"""Where timm's pretrained weights come from: the cache of the hub's client, else one download, not tried without a connection.

A download is announced with its size, shows a bar, and ends in the cache, so that it happens once. Weights that are in the
cache are read from there, without asking a server for newer ones.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from backbone.timm_vit import PretrainedCfg

PATIENCE = (
    4.0  # seconds until a server must have answered; the hub's client would try twelve times, for a minute or longer
)
MEGABYTE = 10**6
T = TypeVar("T")


class Silent(Exception):
    """Nobody has answered in time."""


def cached(pretrained: PretrainedCfg) -> Path | None:
    """The weights' file on this machine, None if it must be downloaded."""
    if not pretrained.hf_hub_id:  # a few are at their makers' only
        file = _torch_folder() / str(pretrained.url).rpartition("/")[2]
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    repository, revision, files = _place(pretrained)
    for name in files:
        if isinstance(path := try_to_load_from_cache(repository, name, revision=revision), str):
            return Path(path)
    return None


def missing(pretrained: PretrainedCfg, tag: str) -> str | None:
    """None if the weights of timm's model `tag` are on this machine, else where they were looked for and how to get them."""
    if cached(pretrained):
        return None
    if not pretrained.hf_hub_id:
        return f"weights of {tag}: not in {_torch_folder()}; they are downloaded from {pretrained.url} on the first run"
    from huggingface_hub import constants

    repository, _, files = _place(pretrained)
    return (
        f"weights of {tag}: not in {constants.HF_HUB_CACHE}; they are downloaded from the Hugging Face "
        f"hub ({repository}) on the first run, or fetch {files[0]} elsewhere and set backbone_weights to its path"
    )


def fetch(pretrained: PretrainedCfg, tag: str, say: Callable[[str], None], patience: float = PATIENCE) -> Path | None:
    """The file of weights, downloaded if it is not in the cache; `say` is called with its size before. None where timm has to
    fetch the file itself, since its hub has none.

    Raises ValueError in one line if there is no connection, which takes at most `patience` seconds, or the download fails."""
    if (file := cached(pretrained)) is not None:
        return file
    if cause := unreachable(pretrained, patience):
        raise ValueError(failed(tag, cause))
    if not pretrained.hf_hub_id:
        say(f"weights of {tag}: downloaded once, from {pretrained.url} to {_torch_folder()}")
        return None
    from huggingface_hub import constants, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    from huggingface_hub.file_download import get_hf_file_metadata

    repository, revision, files = _place(pretrained)
    last = ""
    try:
        for name in files:
            url = hf_hub_url(repository, name, revision=revision)
            try:
                size = _within(patience, lambda url=url: get_hf_file_metadata(url, timeout=patience)).size  # type: ignore[misc]
            except EntryNotFoundError as error:
                last = str(error)
                continue
            amount = f"{size / MEGABYTE:,.1f} MB" if size else "size not known"
            say(f"weights of {tag}: {amount}, downloaded once, from {repository} to {constants.HF_HUB_CACHE}")
            path = hf_hub_download(repository, name, revision=revision, etag_timeout=patience)
            return Path(path)
    except Silent:
        raise ValueError(failed(tag, f"{urlsplit(constants.ENDPOINT).hostname} does not answer")) from None
    except _errors_of_transport(HfHubHTTPError) as error:
        last = str(error)
    raise ValueError(failed(tag, (last.strip() or "no file of weights").splitlines()[0]))


def unreachable(pretrained: PretrainedCfg, patience: float = PATIENCE) -> str | None:
    """Why a download cannot begin, None if its server takes a connection or a proxy stands between; after `patience` seconds
    at the latest."""
    if not pretrained.hf_hub_id:
        address = str(pretrained.url)
    else:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set"
        address = constants.ENDPOINT
    place = urlsplit(address)
    if getproxies().keys() & {place.scheme, "all"} or place.hostname is None:
        return None
    where = (place.hostname, place.port or (80 if place.scheme == "http" else 443))

    def connect() -> str | None:
        try:
            with socket.create_connection(where, patience):
                return None
        except OSError as error:
            return error.strerror or str(error)

    try:
        cause = _within(patience, connect)
    except Silent:
        cause = f"no answer within {patience:g} seconds"
    return f"no connection to {place.hostname}: {cause}" if cause else None


def failed(tag: str, cause: str) -> str:
    """The line for a download that failed for this `cause`."""
    return (
        f"the weights of {tag} could not be loaded from the Hugging Face hub ({cause}); on a "
        f"machine without internet set backbone_weights to a local .safetensors file, or backbone_type to 'embedded'"
    )


def damaged(tag: str, file: Path, cause: str) -> str:
    """The line for a file in the cache that cannot be read for this `cause`."""
    return (
        f"the weights of {tag} in {file} are damaged or do not fit ({cause}); delete that file, and the next run downloads it "
        f"again, or set backbone_weights to a file of weights"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block the hub's client does not print its attempts; what fails at last is an exception."""
    client = logging.getLogger("huggingface_hub")
    before = client.level
    client.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        client.setLevel(before)


def _place(pretrained: PretrainedCfg) -> tuple[str, str | None, list[str]]:
    """(repository on the hub, its revision, the names that a file of weights may have, in timm's order)."""
    repository, _, revision = str(pretrained.hf_hub_id).partition("@")
    repository += f"{pretrained.architecture}.{pretrained.tag}" if repository.endswith("/") else ""
    if (named := pretrained.hf_hub_filename) is None:
        return repository, revision or None, ["model.safetensors", "pytorch_model.bin"]
    safe = [f"{named.removesuffix('.bin')}.safetensors"] if named.endswith(".bin") else []
    return repository, revision or None, [*safe, named]


def _errors_of_transport(error: type[Exception]) -> tuple[type[Exception], ...]:
    """What the hub's client raises without a connection. Its versions have different transports, whose errors have no common
    base; the base of its `error` of an HTTP status is always one of them."""
    bases = tuple(base for base in error.__bases__ if issubclass(base, Exception))
    return (*bases, OSError, RuntimeError, ValueError)


def _torch_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; Silent if that takes longer: a look-up of a name knows no limit of its own."""
    outcome: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # raised again below, in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not outcome:
        raise Silent
    return outcome[0]
