"""Random draws by name: the seed of every generator comes from what the draw is for."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def named_seed(*names: Any) -> int:
    """A 63-bit seed that depends on `names` alone: the same on every machine, Python and numpy version.

    A name is None, a bool, int, float, str, bytes or a tuple or list of names; a numpy scalar counts as its Python number.
    Anything else raises TypeError, because its `repr` need not be stable (it may contain an address).
    """
    # ascii(), not repr(): which characters repr() escapes changes with Python's Unicode tables
    digest = hashlib.blake2b(ascii(tuple(_stable(n) for n in names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _stable(name: Any) -> Any:
    if type(name) in (type(None), bool, int, float, str, bytes):
        return name
    if isinstance(name, (tuple, list)):
        return tuple(_stable(n) for n in name)
    if getattr(name, "shape", None) == () and hasattr(name, "item"):
        return _stable(name.item())  # numpy 1 and 2 print their scalars differently
    raise TypeError(f"named_seed takes numbers, text, None and tuples of them, not {type(name).__name__}")


def named_generator(*names: Any) -> torch.Generator:
    """A CPU generator seeded with `named_seed(*names)`."""
    import torch

    return torch.Generator().manual_seed(named_seed(*names))


def seed_everything(*names: Any) -> int:
    """Seeds the global generators of python, numpy and torch (all devices) from `names`, each differently; returns torch's
    seed."""
    import numpy as np
    import torch

    seed = named_seed(*names, "torch")
    random.seed(named_seed(*names, "python"))
    np.random.seed(named_seed(*names, "numpy") % 2**32)
    torch.manual_seed(seed)  # seeds CUDA as well, lazily where it is not initialised yet
    return seed


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of the global generators of python, numpy, torch and, on a GPU, CUDA: numbers, texts and lists, as JSON."""
    import numpy as np
    import torch

    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Inverse of `rng_state`, also after a way through JSON; without a CUDA state that generator stays as it is."""
    import numpy as np
    import torch

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.asarray(_numbers(keys), dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.as_tensor(_numbers(state["torch"]), dtype=torch.uint8))
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(torch.as_tensor(_numbers(state["cuda"]), dtype=torch.uint8), device)


def _numbers(saved: Any) -> Any:
    """Older versions saved a tensor, or {"bytes": [...]} in a run of several processes."""
    return next(iter(saved.values())) if isinstance(saved, dict) else saved
