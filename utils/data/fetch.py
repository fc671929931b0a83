"""Downloads the files of a published data set: checked, resumed after an interruption, and in place as a whole or not at all.

Only `--data fetch NAME` calls this, never a run. A download lies in the folder `.fetch` of the data root until its checksum
holds and it is unpacked; a rename puts it in place. Names of sets and addresses come from the table utils/data/published.py.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import os
import shutil
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from utils.data.dataset import DatasetInfo, File
from utils.files import lock
from utils.text import shell

PATIENCE = 5.0  # seconds until the server has answered
STALLED = 30.0  # seconds without a byte after which a download is given up
PIECE = 1 << 20  # bytes read at a time
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError)
Progress = Callable[[int, int], None]  # (bytes done, all)


def command(info: DatasetInfo, root: Path) -> str:
    """The command that fetches a set to `root`."""
    return shell(["python", "main.py", "--data", "fetch", info.name, "--data-root", str(root)])


def absent(info: DatasetInfo, root: Path, what: str) -> str:
    """The line for a set of which something is missing under `root`: `what`, and how to get it."""
    if not info.files:
        return f"dataset {info.name}: {what}; it cannot be fetched: {info.source}"
    return (
        f"dataset {info.name}: {what}; `{command(info, root)}` fetches it ({megabytes(sum(f.size for f in info.files))}), or "
        f"unpack it there by hand ({info.source})"
    )


def megabytes(size: int) -> str:
    """A size in whole MB, at least 1."""
    return f"{max(round(size / 1e6), 1):,} MB"


def fetch(
    files: tuple[File, ...],
    root: Path,
    progress: Callable[[File], Progress],
    patience: float = PATIENCE,
    anew: bool = False,
) -> int:
    """Puts every file that is not in place under `root`, with `anew` every file; returns how many were downloaded.

    `progress(file)` is the function to call while that file arrives. Processes that fetch to one root wait for each other.
    Raises ValueError, in one line, if a server does not answer within `patience` seconds, sends something else than expected,
    or if there is no room: the same command then goes on where this one stopped."""
    root.mkdir(parents=True, exist_ok=True)
    work = root / ".fetch"
    with lock.alone(work):
        wanted = [file for file in files if anew or not in_place(file, root)]
        for file in wanted:
            path = work / file.address.rpartition("/")[2]
            if not path.is_file():
                _download(file, path, progress(file), patience)
            _verify(file, path)
            _unpack(file, path, root, work / "unpacked")
            path.unlink()
    return len(wanted)


def in_place(file: File, root: Path) -> bool:
    """Whether everything that the file becomes is under `root`."""
    return all((root / place).exists() for place in file.places.values())


def _download(file: File, path: Path, progress: Progress, patience: float) -> None:
    """Writes the file to `path`. What an earlier attempt got is in `path`.part, the version the server named in .version."""
    part, version = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.version")
    first = part.stat().st_size if part.is_file() else 0
    tag = version.read_text(encoding="utf-8") if first and version.is_file() else ""
    with _answer(file.address, path.parent, first, tag, patience) as answer:
        if answer is None:  # all bytes are here already
            part.replace(path)
            return
        first = first if answer.status == 206 else 0  # 200: the whole file, from its beginning
        length = answer.headers.get("Content-Length", "")
        size = first + int(length) if length.isdecimal() else 0
        _needs_room(file, path.parent, (size or file.size) - first)
        version.write_text(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "", encoding="utf-8")
        done = first
        with open(part, "ab" if first else "wb") as out:
            try:
                while piece := answer.read(PIECE):
                    done += out.write(piece)
                    progress(done, max(size or file.size, done))
            except (OSError, http.client.HTTPException) as error:
                raise ValueError(_stopped(file, done, size, _reason(error))) from None
    if size and done != size:
        raise ValueError(_stopped(file, done, size, "the connection ended"))
    part.replace(path)
    version.unlink()


@contextlib.contextmanager
def _answer(
    address: str, folder: Path, first: int, tag: str, patience: float
) -> Iterator[http.client.HTTPResponse | None]:
    """The server's answer from byte `first` on, None if there are no more; a file of another version than `tag` comes whole.

    In a thread, since looking up a name has no limit of time."""
    headers = {"User-Agent": "class-incremental-runner"}
    if first:
        headers |= {"Range": f"bytes={first}-"} | ({"If-Range": tag} if tag and not tag.startswith("W/") else {})
    outcome: list[http.client.HTTPResponse | Exception] = []

    def ask() -> None:
        try:
            outcome.append(urlopen(Request(address, headers=headers), timeout=max(patience, STALLED)))
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and HTTPError are OSErrors
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    answer = outcome[0] if outcome else TimeoutError(f"no answer within {patience:g} s")
    if (
        isinstance(answer, HTTPError)
        and answer.code == 416
        and answer.headers.get("Content-Range") == f"bytes */{first}"
    ):
        yield None
    elif isinstance(answer, Exception):
        raise ValueError(
            f"{address} cannot be fetched: {_reason(answer)}; without internet get the file elsewhere, put it into {folder}, "
            "and run the same command"
        )
    else:
        with answer:
            yield answer


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, URLError):
        return str(getattr(error.reason, "strerror", None) or error.reason)
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def _stopped(file: File, done: int, size: int, why: str) -> str:
    of = f" of {size:,}" if size else ""
    return f"{file.address}: stopped after {done:,}{of} bytes ({why}); the same command goes on from there"


def _needs_room(file: File, folder: Path, left: int) -> None:
    """ValueError if the disk has less room than the rest of the download and the unpacked file take."""
    needed, free = left + (file.unpacked or file.size), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder}: has {megabytes(free)} of room, {file.address} needs {megabytes(needed)} to download and unpack; free "
            "space or give another --data-root"
        )


def _verify(file: File, path: Path) -> None:
    """ValueError, and the file is removed, if it has another MD5 sum than published."""
    if file.md5 is None:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as opened:
        while piece := opened.read(PIECE):
            digest.update(piece)
    if digest.hexdigest() != file.md5:
        path.unlink()
        raise ValueError(
            f"{file.address}: has the MD5 sum {digest.hexdigest()}, expected {file.md5}; it was removed, the same command "
            "fetches it again"
        )


def _unpack(file: File, path: Path, root: Path, work: Path) -> None:
    """Unpacks what `file.places` names below `work` and puts it in place under `root`."""
    if not hasattr(tarfile, "data_filter"):
        raise ValueError("this Python cannot unpack archives safely: update it to 3.10.12, 3.11.4 or newer")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        if path.name.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:  # strips absolute paths and ".."
                archive.extractall(work, [name for name in archive.namelist() if _wanted(file, name)])
        elif path.name.endswith((".tar.gz", ".tgz")):
            with tarfile.open(path) as tape:
                members = (member for member in tape if _wanted(file, member.name.removeprefix("./")))
                tape.extractall(work, members, filter="data")  # refuses paths and links that lead out
        else:
            shutil.copyfile(path, work / path.name)
        for inside, place in file.places.items():
            source = work / inside
            if not source.exists():
                raise ValueError(f"lacks {inside}")
            if inside.endswith(".gz") and not place.endswith(".gz"):
                with gzip.open(source) as packed, open(work / "plain", "wb") as out:
                    shutil.copyfileobj(packed, out, PIECE)
                source = work / "plain"
            _put(source, root / place)
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk is full, or not writable
        path.unlink()
        raise ValueError(
            f"{file.address}: what arrived cannot be unpacked ({error}); it was removed, the same command fetches it again"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _wanted(file: File, name: str) -> bool:
    return any(name == inside or name.startswith(f"{inside}/") for inside in file.places)


def _put(source: Path, place: Path) -> None:
    """Renames `source` to `place`, so that it appears whole; what is in an incomplete folder there is replaced file by file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir() and place.is_dir():
        for name in sorted(os.listdir(source)):
            _put(source / name, place / name)
    else:
        os.replace(source, place)
