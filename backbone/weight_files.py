"""Weight files as people have them: read by content, taken out of their wrappings; nothing is unpickled.

Training code saves more than weights, and under other names: `{"state_dict": ..., "epoch": 3}`, `module.blocks.0...`. `read`
takes such wrappings off and says so in a line. What it cannot decide it refuses, with the line of Python that decides it.
"""

from __future__ import annotations

import json
import re
import shlex
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from utils.text import shortened

State = dict[str, Tensor]
ANCHOR = "patch_embed.proj.weight"  # every ViT of timm has it: what stands before it is a prefix of all names
DEEPEST = 3  # levels of mappings in which weights are looked for: {"checkpoint": {"model": {"state_dict": ...}}}
# Whatever the reader of a .pth file stumbles over when its bytes are no tensors.
TORCH_LOAD_ERRORS = (
    torch.serialization.pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
# First bytes of files that are no tensors, and what to do.
FOREIGN = {
    b"version https://git-lfs": "is a pointer of git-lfs, the weights are not there yet: git lfs pull fetches them",
    b"\x89HDF": "is HDF5, as Keras writes it: weights of PyTorch are needed",
    b"\x1f\x8b": "is compressed: unpack it first",
    b"{": "is JSON, perhaps an index of several files: give a file of weights",
    b"<": "is a web page, so the download gave an error page in place of the weights",
    b"GGUF": "is GGUF, a format for language models: weights of PyTorch are needed",
}
# Modules whose functions a file of weights has no use for: a file that calls them is an attack, not a checkpoint. torch.save
# writes them by the names that Python 2 had.
ATTACKS = re.compile(
    r"(os|posix|nt|subprocess|commands|sys|runpy|socket|shutil|importlib|pty|code)\.|"
    r"(builtins|__builtin__)\.(eval|exec|execfile|compile|open|__import__)$"
)
# In Python: the tensors of a whole pickled model, or of a mapping its tensors and its mappings of tensors.
TENSORS = (
    'c.state_dict() if hasattr(c, "state_dict") else {k: v for k, v in c.items() if torch.is_tensor(v) or '
    "isinstance(v, dict) and all(map(torch.is_tensor, v.values()))}"
)


class Found(NamedTuple):
    """Weights inside a file: the keys that lead to their mapping, and what stands before each name."""

    place: tuple[str, ...]
    prefix: str
    tensors: State

    def __str__(self) -> str:
        place = f"{'.'.join(self.place)!r}" if self.place else "the file"
        return f"{place} under the prefix {self.prefix!r}" if self.prefix else place


def read(path: Path, fits: Callable[[State], bool] = lambda state: True) -> tuple[State, list[str]]:
    """(the tensors of a ViT by timm's names, a line if they were taken out of wrappings).

    Where the file holds several ViTs, the one that `fits` is taken. Raises ValueError in one line with the path if the file is
    damaged, no tensor file, holds more than tensors, or several ViTs fit."""
    content, notes = _content(path)
    sets = list(_sets(content)) if isinstance(content, Mapping) else []
    if not sets:
        raise ValueError(f"backbone_weights: {path} holds no mapping of names to tensors")
    candidates = [found for place, tensors in sets for found in _by_prefix(place, tensors)]
    if not candidates:  # no ViT of timm: whoever asked says what is missing
        return max((tensors for _, tensors in sets), key=len), notes
    fitting = [found for found in candidates if fits(found.tensors)] or candidates[:1]
    if len(fitting) > 1 and not all(_equal(fitting[0].tensors, other.tensors) for other in fitting[1:]):
        raise ValueError(_choice(path, fitting))
    taken = fitting[0]
    if taken.place or taken.prefix:
        rest = len(dict(sets)[taken.place]) - len(taken.tensors)
        more = f"; {rest} other tensors there are left out" if rest else ""
        notes.append(f"backbone_weights: {path.name}: the weights in {taken} are taken{more}")
    return taken.tensors, notes


def _sets(content: Mapping[Any, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], State]]:
    """Every mapping of names to tensors in `content`, with the keys that lead there."""
    if tensors := {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}:
        yield place, tensors
    if len(place) < DEEPEST:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping):
                yield from _sets(value, (*place, key))


def _by_prefix(place: tuple[str, ...], tensors: State) -> Iterator[Found]:
    """The ViTs in a mapping: one for each prefix that ANCHOR has in it."""
    for prefix in [name.removesuffix(ANCHOR) for name in tensors if name.endswith(ANCHOR)]:
        if not prefix or prefix.endswith("."):
            yield Found(place, prefix, {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})


def _equal(one: State, other: State) -> bool:
    """Whether two mappings have the same names and values, as an average that is stored twice."""
    return one.keys() == other.keys() and all(
        one[name] is other[name]
        or (kind(one[name]) is None is kind(other[name]) and torch.equal(one[name], other[name]))
        for name in one
    )


def _choice(path: Path, fitting: list[Found]) -> str:
    """Names the ViTs of a file, and the command that writes the first of them to its own file."""
    first, names = fitting[0], [str(found) for found in fitting]
    load = f"from safetensors.torch import load_file; c = load_file({_quoted(path)})"
    if not _is_safetensors(path):
        load = f"c = torch.load({_quoted(path)}, weights_only=True)" + "".join(f"[{_quoted(k)}]" for k in first.place)
    word = re.sub(r"\W+", "_", "_".join([*first.place[-1:], first.prefix])).strip("_")
    part = "c" if not first.prefix else f"{{k: v for k, v in c.items() if k.startswith({_quoted(first.prefix)})}}"
    code = f"import torch; {load}; torch.save({part}, {_quoted(path.with_name(f'{path.stem}_{word}.pth'))})"
    return (
        f"backbone_weights: {path} holds {len(fitting)} sets of weights that fit, {', '.join(names[:4])}: choose one. "
        f"This writes the first alone: python -c {shlex.quote(code)}"
    )


def _quoted(text: Any) -> str:
    """A text as Python has it in double quotes, which a shell's single quotes leave alone."""
    return json.dumps(str(text), ensure_ascii=False)


# The content of a file -------------------------------------------------------------------------------------------------


def _content(path: Path) -> tuple[Any, list[str]]:
    """What the file holds, read by its first bytes, and a note if its name says otherwise."""
    try:
        if _is_safetensors(path):
            note = f"backbone_weights: {path.name} holds safetensors, whatever its name says, and is read as such"
            return load_file(path), [] if path.suffix == ".safetensors" else [note]
        with open(path, "rb") as file:
            head = file.read(100)
        archive = head.startswith(b"PK")
        for sign, what in FOREIGN.items():
            if head.lstrip().startswith(sign):
                raise ValueError(f"backbone_weights: {path} is no tensor file: it {what}")
        if path.suffix == ".safetensors" and not archive and not head.startswith(b"\x80"):
            load_file(path)  # damaged: it says where
    except (SafetensorError, OSError) as error:
        cause = shortened(str(error).splitlines()[0], 150) if str(error) else type(error).__name__
        raise ValueError(f"backbone_weights: {path} is damaged or cannot be read ({cause})") from None
    note = f"backbone_weights: {path.name} is a file of torch.save, whatever its name says, and is read as such"
    return _from_torch(path), [note] if path.suffix == ".safetensors" else []


def _is_safetensors(path: Path) -> bool:
    """Whether the file begins as safetensors do: the length of a header of JSON, and the header."""
    with open(path, "rb") as file:
        head = file.read(9)
    size = path.stat().st_size
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _from_torch(path: Path) -> Any:
    try:
        _check_sums(path)
        with open(path, "rb") as file:  # given a path, torch would choose the format by the file's name
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"backbone_weights: {path} is damaged or cannot be read ({error.strerror})") from None
    except TORCH_LOAD_ERRORS as error:  # torch's text advises to switch the protection off
        raise ValueError(f"backbone_weights: {path} {_reason(path, str(error))}") from None


def _check_sums(path: Path) -> None:
    """ValueError if a part of a .pth archive is not as it was written: torch does not look at the checksums it stores."""
    if not zipfile.is_zipfile(path):
        return  # the format before torch 1.6 has none
    with zipfile.ZipFile(path) as archive:
        if any(part.CRC for part in archive.infolist()) and (bad := archive.testzip()):  # all 0: written without them
            raise ValueError(bad)


def _reason(path: Path, error: str) -> str:
    """Why torch does not read the file, and where it can be converted, how."""
    if zipfile.is_zipfile(path) and _is_numpy(path):
        code = "import timm, torch; m = timm.create_model(NAME, num_classes=0); "
        code += f"m.load_pretrained({_quoted(path)}); torch.save(m.state_dict(), {_quoted(path.with_suffix('.pth'))})"
        return (
            "is an archive of numpy, as Google's ViTs are. timm converts it, with NAME the backbone_type in quotes: "
            f"python -c {shlex.quote(code)}"
        )
    try:
        names = list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except TORCH_LOAD_ERRORS:
        names = re.findall(r"GLOBAL ([\w.]+)", error)[:1]
    if not names:
        return "is damaged or foreign: it is no plain tensor file; pickled code is never run"
    attacks = [name for name in names if ATTACKS.match(name)]
    what = f"is no plain tensor file: it calls for {shortened(', '.join(sorted(attacks or names)[:3]), 150)}"
    if attacks:
        return f"{what}, which no weights need; pickled code is never run, and this file should be trusted by nobody"
    code = f'import torch; c = torch.load({_quoted(path)}, map_location="cpu", weights_only=False); '
    code += f"torch.save({TENSORS}, {_quoted(path.with_name(f'{path.stem}_tensors.pth'))})"
    return f"{what}; pickled code is never run. If you trust its source, write its tensors alone: python -c {shlex.quote(code)}"


def _is_numpy(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


# Tensors ---------------------------------------------------------------------------------------------------------------


def kind(tensor: Tensor) -> str | None:
    """Why a tensor is no plain array of real numbers, None if it is one."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_quantized:
        return "quantised"
    if tensor.device.type == "meta":
        return "without values"
    if not tensor.is_floating_point():
        return str(tensor.dtype).removeprefix("torch.")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"{tensor.numel():,} numbers in {tensor.untyped_storage().nbytes():,} bytes"
    return None
