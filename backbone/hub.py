"""Where timm's pretrained weights come from: the cache of the hub's client, else a download, not tried without a connection."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from backbone.timm_vit import PretrainedCfg

PATIENCE = 10.0  # seconds for a first connection; the hub's client would try twelve times, for a minute or longer


def missing(pretrained: PretrainedCfg, tag: str) -> str | None:
    """None if the weights of timm's model `tag` are on this machine, else where they were looked for and how to get them."""
    if not pretrained.hf_hub_id:  # a few are at their makers' only
        folder, url = Path(torch.hub.get_dir()) / "checkpoints", str(pretrained.url)
        if (folder / url.rpartition("/")[2]).is_file():
            return None
        return f"weights of {tag}: not in {folder}; they are downloaded from {url} on the first run"
    from huggingface_hub import constants, try_to_load_from_cache

    repository = pretrained.hf_hub_id
    repository += f"{pretrained.architecture}.{pretrained.tag}" if repository.endswith("/") else ""
    for file in ("model.safetensors", "pytorch_model.bin"):
        if isinstance(try_to_load_from_cache(repository, file), str):
            return None
    return (
        f"weights of {tag}: not in {constants.HF_HUB_CACHE}; they are downloaded from the Hugging Face "
        f"hub ({repository}) on the first run, or fetch model.safetensors elsewhere and set backbone_weights to its path"
    )


def unreachable(pretrained: PretrainedCfg) -> str | None:
    """Why a download cannot begin, None if its server answers or a proxy stands between."""
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
    try:
        with socket.create_connection(
            (place.hostname, place.port or (80 if place.scheme == "http" else 443)), PATIENCE
        ):
            return None
    except OSError as error:
        return f"no connection to {place.hostname}: {error.strerror or error}"


def failed(tag: str, cause: str) -> str:
    """The line for a download that failed for this `cause`."""
    return (
        f"the weights of {tag} could not be loaded from the Hugging Face hub ({cause}); on a "
        f"machine without internet set backbone_weights to a local .safetensors file, or backbone_type to 'embedded'"
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
