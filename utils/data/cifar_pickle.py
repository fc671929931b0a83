"""Reads the pickles of CIFAR's python version without numpy's help: plain values, and bytes that are looked at as uint8.

numpy's array and dtype restore themselves from whatever a pickle says, a dtype of object pointers included, and a file could
so have any address read. Here stand-ins take their place: they accept an array of bytes, as the official files have it, and
nothing else. Format: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np

MOST_BYTES = 2**30  # of a file; the largest official one has 155 MB
# Exceptions that unpickling a damaged file may raise.
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    AssertionError,
    struct.error,
)
# The instructions of a pickle that the official files and copies of them by Python 3 need.
_INSTRUCTIONS = (
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES"),
    *(
        "SHORT_BINBYTES",
        "EMPTY_LIST",
        "LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
    ),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT"),
    *("MEMOIZE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
)


def read(path: Path) -> dict[str, Any]:
    """The dict in a file of the python version; keys and strings as Python 2 wrote them, arrays as uint8.

    Raises ValueError with the path if it is anything else."""
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(
            f"{path}: has {size:,} bytes, no official CIFAR batch file is that large; unpack the archive again"
        )
    try:
        content = _PlainValues(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except _DAMAGE as error:
        cause = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: is not an official CIFAR batch file ({cause}); unpack the archive again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: contains a {type(content).__name__}, expected a dict; unpack the archive again")
    return {key: value.pixels() if isinstance(value, _Array) else value for key, value in content.items()}


class _PlainValues(pickle._Unpickler):
    """Builds plain containers and the stand-ins below; a pickle that asks for anything else is refused before it runs.

    The unpickler written in Python, not the one in C: that one stores its memo in an array, so a single damaged index can
    take up to 32 GB."""

    dispatch = {  # noqa: RUF012
        code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _INSTRUCTIONS)
    }

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _array
        if (module, name) == ("numpy", "ndarray"):
            return _NDARRAY
        if (module, name) == ("numpy", "dtype"):
            return _dtype
        if (module, name) == ("_codecs", "encode"):
            return _latin_bytes  # how Python 3 writes bytes in the old protocol
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


_NDARRAY = "numpy.ndarray"  # a name, which cannot be called


class _Type:
    """Stands for a numpy dtype; only that of bytes is accepted in an array."""

    def __init__(self, name: str):
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and flags: a byte has none."""


class _Array:
    """Stands for a numpy array of bytes: its shape and its content, nothing else."""

    shape: tuple[int, ...] = (0,)
    raw: bytes = b""
    columns_first: bool = False

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, columns_first, raw = state
        if not isinstance(kind, _Type) or kind.name != "u1":
            name = kind.name if isinstance(kind, _Type) else type(kind).__name__
            raise pickle.UnpicklingError(f"its array is of type {name} and should be uint8 [N, 3072]")
        content = raw.encode("latin-1") if isinstance(raw, str) else raw
        plain = isinstance(shape, tuple) and len(shape) <= 2 and all(type(n) is int and n >= 0 for n in shape)
        if not plain or not isinstance(content, bytes) or len(content) != int(np.prod(shape, dtype=object)):
            raise pickle.UnpicklingError("its array has another size than its bytes")
        self.shape, self.raw, self.columns_first = shape, content, bool(columns_first)

    def pixels(self) -> np.ndarray:
        """The bytes as uint8 in the array's shape."""
        return np.frombuffer(self.raw, dtype=np.uint8).reshape(self.shape, order="F" if self.columns_first else "C")


def _array(kind: Any, shape: Any, code: Any) -> _Array:
    """For numpy's _reconstruct, which creates an array before its content follows: empty ones alone."""
    if kind != _NDARRAY or shape != (0,):
        raise pickle.UnpicklingError("it builds something else than an array")
    return _Array()


def _dtype(name: Any, align: Any = 0, copy: Any = 1) -> _Type:
    if not isinstance(name, str):
        raise pickle.UnpicklingError("it builds something else than an array of bytes")
    return _Type(name)


def _latin_bytes(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it uses the encoding {encoding!r}")
    return text.encode("latin-1")
