"""Files that are whole or not there: every write goes to another name first, and what is read again carries checksums.

A saved state is two files: `X.safetensors` holds tensors, `X.json` everything else and the checksums of both. Nothing is ever
unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2


class Damaged(ValueError):
    """A saved state is not as it was written, or not one of this program."""


class OtherFormat(ValueError):
    """A saved state of another version of this program: whole, so nothing may be written over it."""


@contextlib.contextmanager
def add_path_to_errors(path: Path) -> Iterator[None]:
    """Adds the path to errors of the system that lack it: writing to an open file fails without its name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """`write_file` of these bytes."""
    write_file(path, lambda file: file.write(data), durable=durable)


def write_file(path: Path, fill: Callable[[BinaryIO], object], *, durable: bool = True) -> None:
    """Replace `path` by what `fill` writes, in one step: a crash leaves the old file or the new one, never a part.

    `durable`: also after a power cut. Without, a power cut may leave a damaged file, which a checksum tells."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with add_path_to_errors(path), open(temporary, "wb") as file:
            fill(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        try:
            os.replace(temporary, path)
        except OSError as error:
            if error.filename is not None:
                error.filename = str(path)  # not the temporary file, which the user never sees
            raise
    finally:
        temporary.unlink(missing_ok=True)
    if durable and os.name == "posix":  # the rename is durable only once the folder is; Windows cannot open folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON through `write_bytes`; NaN or infinity raises ValueError add_path_to_errors file and field."""
    try:
        text = json.dumps(plain(value), allow_nan=False, ensure_ascii=False, indent=1)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error
    # a file name that is not UTF-8, as in the command line, has lone surrogates, which JSON can hold as escapes alone
    write_bytes(path, (text + "\n").encode(errors="backslashreplace"))


# A digest within a file -------------------------------------------------------------------------------------------------


def digest_of(values: Mapping[str, Any]) -> str:
    """32 hex digits of SHA-256 over JSON values, the key `digest` apart, whatever their order and the file's layout."""
    rest = plain({key: value for key, value in values.items() if key != "digest"})
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:32]


def with_digest(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with their `digest_of` under the key `digest`, last."""
    rest = {key: value for key, value in values.items() if key != "digest"}
    return {**rest, "digest": digest_of(rest)}


def write_sealed(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Writes `data` behind its SHA-256, so that `read_sealed` tells whether it is as it was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, hashlib.sha256(data).digest() + data, durable=durable)


def read_sealed(path: Path) -> bytes:
    """The data of `write_sealed`. Raises Damaged if a bit differs, OSError if the file cannot be read."""
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise Damaged(f"{path} is damaged: its checksum does not match")
    return content[32:]


def clear_temporary(folder: Path) -> None:
    """Removes what a killed process was about to write in `folder`; its writer must be gone."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


# Saved states ----------------------------------------------------------------------------------------------------------


def write_state(
    head: Path, facts: Any, tensors: Mapping[str, Tensor], *, durable: bool = True, share: Path | None = None
) -> None:
    """Writes `facts`, plain JSON data, to `head` (X.json) and the tensors beside it, the JSON last.

    `share`: the .safetensors file to use; if it has just these tensors already it is not written again."""
    from safetensors.torch import save  # heavy, and programs that only write text need it not

    head.parent.mkdir(parents=True, exist_ok=True)
    data = save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})
    path, digest = share or head.with_suffix(".safetensors"), hashlib.sha256(data).hexdigest()
    if share is None or not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        write_bytes(path, data, durable=durable)
    inner = {"format": FORMAT, "tensors": path.name, "sha256": digest, "facts": plain(facts, "checkpoint")}
    body = json.dumps(inner, allow_nan=False)
    outer = {"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}
    write_bytes(head, json.dumps(outer).encode(), durable=durable)


def read_state(head: Path) -> tuple[Any, dict[str, Tensor]]:
    """(facts, tensors on the CPU) as written. Raises Damaged with path and cause if any bit is not, OtherFormat for a state
    that another version of this program wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    name = head.with_suffix(".safetensors").name
    try:
        outer = json.loads(head.read_bytes())
        body = outer["body"]
        if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
            raise ValueError("its checksum does not match")
        inner = json.loads(body)
        if inner["format"] != FORMAT:
            raise OtherFormat(
                f"checkpoint {head} has format {inner['format']}, this program reads format {FORMAT}: run the version that "
                "wrote it, or start afresh with --resume never, which keeps the old folder"
            )
        name = inner["tensors"]
        data = (head.parent / Path(name).name).read_bytes()
        if hashlib.sha256(data).hexdigest() != inner["sha256"]:
            raise ValueError(f"the checksum of {name} does not match")
        return inner["facts"], load(data)
    except OtherFormat:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        gone = isinstance(error, FileNotFoundError)
        cause = f"{name} is missing" if gone else str(error) or type(error).__name__
        raise Damaged(f"checkpoint {head} cannot be used: {cause}") from None


def remove_state(head: Path) -> None:
    """Removes both files; the JSON first, so that no half is ever taken for a whole."""
    head.unlink(missing_ok=True)
    head.with_suffix(".safetensors").unlink(missing_ok=True)


def plain(value: Any, where: str = "") -> Any:
    """`value` as strict JSON data: numpy and torch numbers and arrays become Python's, paths text, tuples lists.

    NaN and infinity raise ValueError, other types TypeError; both name the field, as in `seconds.train` or `scores[2]`.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"field '{where}' is {float(value)}, not a finite number (did the training diverge?)")
        return float(value)
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, (str, int)) or isinstance(key, bool)]:
            raise TypeError(f"field '{where}': key {bad[0]!r} is neither text nor a whole number")
        return {str(key): plain(item, f"{where}.{key}" if where else str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist") and hasattr(value, "shape"):  # numpy scalar or array, torch tensor
        return plain(value.tolist(), where)
    raise TypeError(f"field '{where}': {type(value).__name__} cannot be written as JSON")
