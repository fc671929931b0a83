"""Weights by timm's tag: downloaded once from a server of this machine, with their size; without an answer one line in time."""

import hashlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save

from backbone import hub, weights
from tests.helpers.vits import SMALL, small
from utils.config.schema import Experiment

TAG = "vit_base_patch16_dinov3.lvd1689m"
LIMIT = 5.0  # seconds: the bound that the documentation promises


def settings(**values) -> Experiment:
    plain = {"model_name": "simplecil", "dataset": "digits", "init_cls": 2, "increment": 2, "image_size": 32}
    return Experiment(**plain, **values)


class Hub(BaseHTTPRequestHandler):
    """The hub's answers to a question for a file and its size, for one file."""

    content, asked = b"", []

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        if self.answer():
            self.wfile.write(self.content)

    def answer(self) -> bool:
        if "/resolve/" in self.path:
            self.asked.append((self.command, self.path))
        there = self.path.endswith("/resolve/main/model.safetensors") and "mae" not in self.path
        self.send_response(200 if there else 404)
        if there:
            self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "a" * 40)
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(self.content) if there else 0))
        self.end_headers()
        return there

    def log_message(self, *args):
        pass


def point(monkeypatch, port: int) -> None:
    """The hub's address becomes that of a port here, as HF_ENDPOINT sets it."""
    here = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Sets the hub's address to a server here, its cache to an empty folder; returns the server's requests."""
    monkeypatch.setattr(hub, "getproxies", dict)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for spelt in (name, name.upper()):
            monkeypatch.delenv(spelt, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    running = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    point(monkeypatch, running.server_port)
    monkeypatch.setattr(Hub, "asked", [])
    yield Hub.asked
    running.shutdown()
    running.server_close()


# the second names a foreign file at its makers' beside the one on the hub
@pytest.mark.parametrize("tag", [TAG, "vit_tiny_patch16_224.augreg_in21k_ft_in1k"])
def test_weights_are_fetched_once_with_their_size_and_are_timms(tag, server, monkeypatch, capsys):
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **more: real(name, **{**SMALL, **more}))
    saved = small(tag.partition(".")[0]).state_dict()
    monkeypatch.setattr(Hub, "content", save(saved))
    monkeypatch.setenv("TQDM_POSITION", "-1")  # the client shows its bar outside a terminal too
    cfg, said = settings(backbone_type=tag), []
    assert "not in" in weights.missing(cfg)
    backbone, facts = weights.build(cfg, say=said.append)
    (line,) = said
    assert line.startswith(f"weights of {tag}: {len(Hub.content) / 1e6:.1f} MB, downloaded once, from timm/{tag} to ")
    assert "model.safetensors: 100%" in capsys.readouterr().err
    assert all(torch.equal(value, saved[key]) for key, value in backbone.vit.state_dict().items())
    assert facts.mean == timm.get_pretrained_cfg(tag).mean and facts.tag == tag and facts.source == "pretrained"
    assert sum(kind == "GET" for kind, _ in server) == 1
    server.clear()
    assert weights.missing(cfg) is None
    same = weights.build(cfg, say=said.append)[1]
    assert same.weight_hash == facts.weight_hash and len(said) == 1
    assert server == []  # nobody is asked about weights that are here: a run works without a connection


# timm loads the first strictly by itself, the second not, because it is used without its classifier
@pytest.mark.parametrize("tag", [TAG, "vit_tiny_patch16_224.augreg_in21k_ft_in1k"])
def test_a_file_that_lacks_a_tensor_is_refused_and_not_completed_at_random(tag, server, monkeypatch):
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **more: real(name, **{**SMALL, **more}))
    state = small(tag.partition(".")[0]).state_dict()
    lost = next(key for key in state if "mlp.fc1.weight" in key)
    monkeypatch.setattr(Hub, "content", save({key: value for key, value in state.items() if key != lost}))
    with pytest.raises(ValueError, match=rf"the weights of {tag} in .* do not fit \(.*{lost}.*\); delete that file"):
        weights.build(settings(backbone_type=tag), say=lambda line: None)


def test_a_repository_without_the_file_is_one_line(server):
    with pytest.raises(
        ValueError, match=r"could not be loaded from the Hugging Face hub \(.*404.*\); on a machine"
    ) as error:
        weights.build(settings(backbone_type="vit_base_patch16_224.mae"))
    assert "\n" not in str(error.value)
    assert [path.rpartition("/")[2] for _, path in server] == ["model.safetensors", "pytorch_model.bin"]


def refused() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return int(closed.getsockname()[1])


def test_offline_is_said_within_five_seconds(server, monkeypatch):
    assert hub.PATIENCE < LIMIT
    point(monkeypatch, refused())
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"no connection to 127\.0\.0\.1: Connection refused\); on a machine without"):
        weights.build(settings(backbone_type=TAG))
    assert time.monotonic() - started < LIMIT
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        weights.build(settings(backbone_type=TAG))


@pytest.mark.parametrize("what", ["a name that nobody resolves", "a server that takes connections and is silent"])
def test_nobody_waits_longer_than_the_patience(what, server, monkeypatch):
    pretrained, patience = timm.get_pretrained_cfg(TAG), 0.2
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        point(monkeypatch, silent.getsockname()[1])
        over = threading.Event()
        if what.startswith("a name"):
            monkeypatch.setattr(hub.socket, "create_connection", lambda *given: over.wait(60))
        started = time.monotonic()
        with pytest.raises(ValueError) as error:
            hub.fetch(pretrained, TAG, print, patience=patience)
        assert time.monotonic() - started < LIMIT
        over.set()
    answers = {"a name": "no connection to 127.0.0.1: no answer within 0.2 seconds", "a server": "timed out"}
    wanted = next(text for begin, text in answers.items() if what.startswith(begin))
    assert wanted in str(error.value) or "127.0.0.1 does not answer" in str(error.value)
    assert "set backbone_weights to a local .safetensors file" in str(error.value)


def test_a_proxy_may_know_a_way(monkeypatch):
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "proxy"})
    monkeypatch.setattr(hub.socket, "create_connection", None)  # not asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub.unreachable(timm.get_pretrained_cfg(TAG)) is None


def test_files_that_a_repository_may_have():
    named = timm.get_pretrained_cfg("vit_base_patch16_224.mae")
    assert hub._place(named) == ("timm/vit_base_patch16_224.mae", None, ["model.safetensors", "pytorch_model.bin"])
    named.hf_hub_filename = "open_clip_pytorch_model.bin"
    assert hub._place(named)[2] == ["open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"]
    named.hf_hub_id, named.hf_hub_filename = "maker/model@v2", "x.safetensors"
    assert hub._place(named) == ("maker/model", "v2", ["x.safetensors"])
