"""utils/data/fetch.py and --data fetch: from a server in this process; no test reaches beyond this machine."""

import gzip
import hashlib
import io
import re
import shutil
import tarfile
import threading
import time
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torchvision.datasets

import main
from commands.data import fetch_set
from utils import data
from utils.data import fetch
from utils.data.dataset import DatasetInfo, File


@pytest.fixture
def server():
    """Serves `files` {path: bytes}, with ranges; `cut`: bytes after which the next answer breaks off; `asked`: headers."""
    state = SimpleNamespace(files={}, cut=None, tag='"one"', asked=[], wait=0.0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.asked.append((self.path, self.headers.get("Range")))
            time.sleep(state.wait)
            content, wanted = state.files.get(self.path), self.headers.get("Range")
            if content is None:
                return self.send_error(404)
            first = int(wanted[6:-1]) if wanted and self.headers.get("If-Range", state.tag) == state.tag else 0
            if first and first >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206 if first else 200)
            self.send_header("ETag", state.tag)
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            end = None if state.cut is None else first + state.cut
            state.cut = None
            self.wfile.write(content[first:end])
            return None

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    state.address = f"http://127.0.0.1:{http.server_address[1]}"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def served(server, name, content, places, md5=""):
    server.files[f"/{name}"] = content
    digest = hashlib.md5(content).hexdigest() if md5 == "" else md5
    return File(f"{server.address}/{name}", len(content), digest, places)


def fetched(files, root, **options):
    seen = []
    return fetch.fetch(tuple(files), root, lambda file: lambda done, size: seen.append((done, size)), **options), seen


def tar(entries):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def zipped(entries):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return out.getvalue()


def tree(root):
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and ".fetch" not in p.parts
    }


def test_archives_of_every_kind_come_to_their_places(server, tmp_path):
    files = [
        served(server, "plain.mat", b"matlab", {"plain.mat": "svhn/plain.mat"}),
        served(server, "idx.gz", gzip.compress(b"idx"), {"idx.gz": "MNIST/raw/idx"}),
        served(
            server, "a.tar.gz", tar({"dtd/a/1.jpg": b"1", "dtd/b/2.jpg": b"2", "other/3": b"3"}), {"dtd": "dtd/dtd"}
        ),
        served(server, "t.zip", zipped({"G/Train/x": b"x", "G/More/y": b"y"}), {"G/Train": "gtsrb/G/Train"}),
        served(
            server, "e.zip", zipped({"z/u.gz": gzip.compress(b"u"), "z/v.gz": b"not wanted"}), {"z/u.gz": "E/raw/u"}
        ),
    ]
    assert fetched(files, tmp_path) == (5, [(f.size, f.size) for f in files])
    expected = {"svhn/plain.mat": b"matlab", "MNIST/raw/idx": b"idx", "dtd/dtd/a/1.jpg": b"1", "dtd/dtd/b/2.jpg": b"2"}
    assert tree(tmp_path) == expected | {"gtsrb/G/Train/x": b"x", "E/raw/u": b"u"}
    assert fetched(files, tmp_path) == (0, []) and len(server.asked) == 5  # nothing is asked for again
    assert {p.name for p in (tmp_path / ".fetch").iterdir()} <= {".lock"}


def test_a_download_goes_on_where_it_broke_off(server, tmp_path):
    file = served(server, "a.mat", bytes(range(256)) * 40, {"a.mat": "a.mat"})
    server.cut = 3000
    with pytest.raises(
        ValueError, match=r"a\.mat: stopped after 3,000 of 10,240 bytes \(.+\); the same command goes on"
    ):
        fetched([file], tmp_path)
    assert not tree(tmp_path)
    assert fetched([file], tmp_path)[1][-1] == (10240, 10240)
    assert server.asked == [("/a.mat", None), ("/a.mat", "bytes=3000-")]
    assert tree(tmp_path) == {"a.mat": server.files["/a.mat"]}


def test_a_file_that_the_server_replaced_comes_anew(server, tmp_path):
    file = served(server, "a.mat", b"old" * 100, {"a.mat": "a.mat"}, md5=None)
    server.cut = 100
    with pytest.raises(ValueError, match="stopped after 100 of 300"):
        fetched([file], tmp_path)
    server.files["/a.mat"], server.tag = b"new" * 100, '"two"'
    fetched([file], tmp_path)
    assert tree(tmp_path) == {"a.mat": b"new" * 100}


def test_a_complete_part_is_not_downloaded_again(server, tmp_path):
    file = served(server, "a.mat", b"content", {"a.mat": "a.mat"})
    (tmp_path / ".fetch").mkdir()
    (tmp_path / ".fetch" / "a.mat.part").write_bytes(b"content")
    assert fetched([file], tmp_path) == (1, []) and tree(tmp_path) == {"a.mat": b"content"}


def test_other_content_is_removed_and_fetched_again(server, tmp_path):
    file = served(server, "a.mat", b"content", {"a.mat": "a.mat"}, md5="0" * 32)
    with pytest.raises(
        ValueError, match=f"has the MD5 sum {hashlib.md5(b'content').hexdigest()}, expected 0{{32}}; it was"
    ):
        fetched([file], tmp_path)
    assert not tree(tmp_path) and not (tmp_path / ".fetch" / "a.mat").exists()
    for name, content, why in (
        ("b.zip", b"<html>no zip</html>", "not a zip"),
        ("b.tar.gz", tar({"dtd/1": b"1" * 9999})[:-20], ""),
        ("c.zip", zipped({"elsewhere/x": b""}), "lacks dtd"),
        ("d.tar.gz", tar({"dtd/../../out": b"1"}), "outside"),
    ):
        with pytest.raises(ValueError, match=rf"cannot be unpacked \(.*{why}.*\); it was removed"):
            fetched([served(server, name, content, {"dtd": "dtd"})], tmp_path / "root")
        assert not tree(tmp_path), name


def test_an_incomplete_folder_is_completed(server, tmp_path):
    file = served(server, "a.tar.gz", tar({"cifar/train.bin": b"whole", "cifar/test.bin": b"test"}), {"cifar": "cifar"})
    info = DatasetInfo("x", 1, 32, "", "torchvision", None, "cifar", files=(file,))
    (tmp_path / "cifar").mkdir()
    (tmp_path / "cifar" / "train.bin").write_bytes(b"half")
    fetched(info.files, tmp_path, anew=True)
    assert tree(tmp_path) == {"cifar/train.bin": b"whole", "cifar/test.bin": b"test"}


def test_too_little_room_is_said_before_the_download(server, tmp_path, monkeypatch):
    file = served(server, "a.mat", b"x" * 3_000_000, {"a.mat": "a.mat"})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 4_000_000))
    with pytest.raises(ValueError, match=r"has 4 MB of room, .+a\.mat needs 6 MB to download and unpack; free space"):
        fetched([file], tmp_path)
    assert not (tmp_path / ".fetch" / "a.mat.part").exists()


def test_without_a_server_there_is_one_line_at_once(server, tmp_path):
    missing = File(f"{server.address}/nothing.zip", 1, None, {"x": "x"})
    with pytest.raises(
        ValueError, match=r"nothing\.zip cannot be fetched: the server answers 404 Not Found; without inter"
    ):
        fetched([missing], tmp_path)
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9/a\.zip cannot be fetched: Connection refused"):
        fetched([File("http://127.0.0.1:9/a.zip", 1, None, {"x": "x"})], tmp_path)
    slow = served(server, "a.mat", b"content", {"a.mat": "a.mat"})
    server.wait = 1.0
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot be fetched: no answer within 0\.1 s"):
        fetched([slow], tmp_path, patience=0.1)
    assert time.monotonic() - start < 0.9


def test_the_command_says_what_it_does(server, tmp_path, monkeypatch, capsys):
    file = served(server, "cifar.tar.gz", tar({"cifar/1": b"1"}), {"cifar": "cifar"})
    info = DatasetInfo("svhn", 10, 32, "", "torchvision", None, "small", (1, 1), "MIT", (file,), "SVHN")
    monkeypatch.setitem(data.DATASETS, "svhn", info)
    for _ in range(2):
        fetch_set(info, tmp_path)
    first, last, again = capsys.readouterr().out.splitlines()
    assert first == f"svhn: 1 file, 1 MB, to {tmp_path}; licence: MIT"
    assert re.fullmatch(r"svhn: complete, 1 file fetched and checked in 0:00", last)
    assert again == f"svhn: is complete in {tmp_path}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fetch", "mnst"], "error: --data fetch \"mnst\": not known; did you mean 'mnist'"),
        (
            ["fetch", "cub"],
            "error: --data fetch cub: it cannot be fetched by a program; it is needed as CUB-200-2011, train/",
        ),
        (["fetch", "digits"], "error: --data fetch digits: the set is part of this program"),
        (["fetch"], "error: --data fetch: --data fetch NAME is expected, such as --data fetch cifar100"),
        (["get", "mnist"], "error: --data get: --data fetch NAME is expected"),
    ],
)
def test_what_cannot_be_fetched_is_refused(words, message, tmp_path, capsys):
    assert main.main(["--data", *words, "--data-root", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(message) and not list(tmp_path.iterdir())


def test_the_table_has_torchvisions_addresses_and_checksums():
    official = torchvision.datasets
    table = {info.name: info.files for info in data.PUBLISHED}
    for name, cls in (("mnist", official.MNIST), ("kmnist", official.KMNIST), ("fashion_mnist", official.FashionMNIST)):
        assert [(f.address.rpartition("/")[2], f.md5) for f in table[name]] == cls.resources
        assert {f.address.rpartition("/")[0] + "/" for f in table[name]} <= set(cls.mirrors)
    one = {
        "emnist": (official.EMNIST.url, official.EMNIST.md5),
        "dtd": (official.DTD._URL, official.DTD._MD5),
        "food101": (official.Food101._URL, official.Food101._MD5),
        "country211": (official.Country211._URL, official.Country211._MD5),
        "fgvc_aircraft": (official.FGVCAircraft._URL, None),
    }
    assert {name: [(f.address, f.md5) for f in table[name]] for name in one} == {n: [pair] for n, pair in one.items()}
    assert [(f.address, f.md5) for f in table["oxford_pets"]] == list(official.OxfordIIITPet._RESOURCES)
    parts = [official.SVHN.split_list[part] for part in ("train", "test")]
    assert [[f.address, f.address.rpartition("/")[2], f.md5] for f in table["svhn"]] == parts
    flowers = official.Flowers102
    assert [(f.address, f.md5) for f in table["flowers102"]] == [
        (flowers._download_url_prefix + name, md5) for name, md5 in flowers._file_dict.values()
    ]
