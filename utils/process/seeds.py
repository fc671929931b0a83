"""Random draws by name: every generator is seeded by what it is for."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


# ------------------------------------------------------------------------------------------------ seeds


def named_seed(*parts: Any) -> int:
    """63-bit seed that depends on `parts` only: the same on every machine, Python and numpy version.

    Parts are None, bool, int, float, str, bytes or tuples/lists of them; numpy scalars count as the Python number they
    hold. Anything else raises TypeError, because its `repr` need not be stable (it may contain an address).
    """
    # ascii(), not repr(): which characters repr() escapes changes with Python's Unicode tables
    digest = hashlib.blake2b(ascii(tuple(_stable(p) for p in parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _stable(part: Any) -> Any:
    if type(part) in (type(None), bool, int, float, str, bytes):
        return part
    if isinstance(part, (tuple, list)):
        return tuple(_stable(p) for p in part)
    if getattr(part, "shape", None) == () and hasattr(part, "item"):
        return _stable(part.item())  # numpy 1 and 2 print their scalars differently
    raise TypeError(f"named_seed takes numbers, text, None and tuples of them, not {type(part).__name__}")


def named_generator(*parts: Any) -> torch.Generator:
    """CPU generator seeded with `named_seed(*parts)`."""
    import torch

    return torch.Generator().manual_seed(named_seed(*parts))


def seed_everything(*parts: Any) -> int:
    """Seed python, numpy and torch (all its devices) from `parts`, each with a stream of its own; returns torch's."""
    import numpy as np
    import torch

    seed = named_seed(*parts, "torch")
    random.seed(named_seed(*parts, "python"))
    np.random.seed(named_seed(*parts, "numpy") % 2**32)
    torch.manual_seed(seed)  # seeds CUDA as well, lazily where it is not initialised yet
    return seed


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of the generators of python, numpy, torch and, on a GPU, CUDA, as numbers, lists and tensors."""
    import numpy as np
    import torch

    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Inverse of `rng_state`, also after a way through JSON; without a CUDA state that generator stays as it is."""
    import numpy as np
    import torch

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
