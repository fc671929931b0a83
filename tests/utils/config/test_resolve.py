"""Experiment files: everything wrong is refused, all at once, before heavy imports; SEMA-CL's own files load unchanged."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

import models
from backbone import catalogue
from utils.config import hashing, strict_json, sweep
from utils.config import resolve as config_resolve
from utils.config import schema as config
from utils.config.strict_json import ConfigError, parse_set, read_json
from utils.engines.settings import Cluster

ROOT = Path(__file__).resolve().parents[3]
GOOD = {"model_name": "sema", "dataset": "digits", "init_cls": 2, "increment": 2}

# The keys of SEMA-CL's files, in its own spelling.
SEMA_CL = {
    "prefix": "reproduce", "dataset": "cifar224", "memory_size": 0, "memory_per_class": 0, "fixed_memory": False,
    "shuffle": True, "init_cls": 10, "increment": 10, "model_name": "sema",
    "backbone_type": "pretrained_vit_b16_224_adapter", "device": ["0"], "seed": [1993], "batch_size": 32,
    "weight_decay": 0.0005, "min_lr": 0, "ffn_adapter_type": "adaptmlp", "ffn_num": 16, "optimizer": "sgd",
    "vpt_type": "shallow", "prompt_token_num": 5, "func_epoch": 5, "rd_epoch": 20, "init_lr": 0.005, "rd_lr": 0.01,
    "rd_dim": 128, "buffer_size": 500, "detect_batch_size": 128, "exp_threshold": 2, "adapt_start_layer": 9,
    "adapt_end_layer": 11,
}  # fmt: skip
SIX = {
    "sema_cifar": {},
    "sema_inr_5task": {"dataset": "imagenetr", "init_cls": 40, "increment": 40, "func_epoch": 20},
    "sema_inr_10task": {"dataset": "imagenetr", "init_cls": 20, "increment": 20, "func_epoch": 20},
    "sema_inr_20task": {"dataset": "imagenetr", "func_epoch": 20},
    "sema_ina": {"dataset": "imageneta", "func_epoch": 20},
    "sema_vtab": {"dataset": "vtab", "func_epoch": 20},
}


def resolve(values, faults=()):
    return config_resolve.resolve(
        values,
        source="x.json",
        settings_of=models.settings_of,
        methods=models.available(),
        backbones=catalogue.names,
        faults=faults,
        beside=Cluster,
    )


def faults_of(**changes):
    values = {k: v for k, v in (GOOD | changes).items() if v is not ...}
    with pytest.raises(ConfigError) as caught:
        resolve(values)
    return caught.value.faults


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", SIX)
def test_sema_cl_files_load_unchanged(name, tmp_path):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(SEMA_CL | SIX[name], indent=4), encoding="utf-8")
    values, faults = read_json(path)
    found = resolve(values, faults)
    assert found.notes == (
        "these keys have no effect for sema and are ignored: "
        "fixed_memory, memory_per_class, memory_size, prompt_token_num, vpt_type",
    )
    for key, value in (SEMA_CL | SIX[name]).items():
        if key not in config.WITHOUT_EFFECT | {"seed", "device"}:
            assert getattr(found.settings, key) == value, key
    assert found.settings.seed == (1993,) and found.settings.device == "cuda:0"
    shipped = resolve(read_json(ROOT / "exps" / f"{name}.json")[0]).settings
    assert shipped.model_dump(exclude={"about", "prefix", "device"}) == found.settings.model_dump(
        exclude={"about", "prefix", "device"}
    )


def test_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_json(path) == (GOOD, [])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b'{"a": 1,\n\n}', "no comma before }: line 1; remove"),
        (b'{"a": [1,\n 2,]}', r"no comma before ]: line 2; remove"),
        (b'{"a": 1,\n // why\n "b": 2}', "JSON has no comments: line 2"),
        (b'{"a": 1}\n\n# why', "JSON has no comments: line 3"),
        (b"{'a': 1}", r"straight double quotes \("),
        (b'{"a": "b\nc"}', r"goes on over the end of its line: line 1; write \\n"),
        (b'{"a": "b\tc"}', r'control character "\\t": line 1, column 9'),
        (b'{"a": True}', "writes true for True: line 1"),
        (b'{"a": 1\n "b": 2}', "a comma or a closing bracket is missing at or before line 2"),
        (b'{"a": "x\ny"}', "over the end of its line: line 1"),
        (b"[" * 500 + b"]" * 500, "nested too deep"),
        (b"[1, 2]", "an object"),
        (b"7", "an object"),
        (b'{"a": "\xff"}', "UTF-8"),
        (json.dumps(GOOD).encode("utf-16"), "UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "thousands of digits"),
    ],
)
def test_unreadable_files_are_refused_with_their_path(content, words, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_directory_instead_of_a_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json(tmp_path)


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "exps").mkdir()
    (tmp_path / "exps" / "quickstart.json").write_text("{}")
    for path in (tmp_path / "exps" / "quickstrat.json", tmp_path / "quickstart.json"):
        with pytest.raises(ConfigError, match=r"no such file; did you mean .*quickstart\.json"):
            read_json(path)


def test_strange_numbers_and_doubled_keys_are_all_found(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(
        '{"a": 1, "a": 2, "b": NaN, "c": [-Infinity], "d": 1e999, "e": {"x": 1, "x": 2}, "f": 1%s}' % ("0" * 30)
    )
    text = "\n".join(read_json(path)[1])
    for words in (
        "a: the key is there twice, with 1 and 2",
        "x: the key is there twice",
        "b: nan",
        "c: -inf",
        "d: inf",
        "f: ",
    ):
        assert words in text


# ---------------------------------------------------------------- values


def test_all_faults_are_reported_at_once():
    found = faults_of(
        dataset="digit", init_cls=0, increment=..., batch_size="32", optimizer="adm", func_epch=5, init_lr=float("inf"),
        seed=[], device="gpu", backbone_type="vit_bas_patch16_224", min_lr=3, rd_lr=1, adapt_start_layer=5, adapt_end_layer=4,
    )  # fmt: skip
    keys = [fault.partition(":")[0] for fault in found]
    expected = {
        "dataset", "init_cls", "increment", "batch_size", "optimizer", "func_epch", "init_lr", "seed", "device",
        "backbone_type", "min_lr", "adapt_start_layer",
    }  # fmt: skip
    assert set(keys) == expected and len(keys) == len(expected)
    text = "\n".join(found)
    for near in ("'digits'", "'func_epoch'", "'adam'", "'vit_base_patch16_224'"):
        assert f"did you mean {near}" in text
    assert "known: digits, glyphs, fractals, icons, fashion, domains, cifar10" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", True), ("batch_size", "32"), ("batch_size", 1.5), ("batch_size", 0), ("batch_size", None),
        ("batch_size", [32]), ("batch_size", {"a": 1}), ("shuffle", 1), ("shuffle", "true"), ("init_lr", "0.1"),
        ("init_lr", True), ("init_lr", 0), ("init_lr", -1.0), ("dataset", 5), ("model_name", None), ("model_name", ["sema"]),
        ("seed", True), ("seed", "1993"), ("seed", [1.5]), ("seed", [True]), ("seed", []), ("seed", [1, 1]), ("seed", [-1]),
        ("seed", [2**32]), ("seed", None), ("device", ["0", "1"]), ("device", []), ("device", "gpu"), ("device", 1.5),
        ("init_cls", 11), ("increment", 0), ("increment", [3, 3]), ("increment", [8, 0]), ("increment", "8"),
        ("increment", [[8]]), ("increment", True), ("increment", None),
        ("class_order_seed", -1), ("test_ratio", 1.0), ("data_path", "somewhere"),
        ("input_normalisation", "imagenet"), ("buffer_size", 2), ("ffn_adapter_dropout", 1.0), ("about", 5),
    ],
)  # fmt: skip
def test_wrong_values_give_one_fault_that_starts_with_the_key(key, value):
    (fault,) = faults_of(**{key: value})
    assert fault.startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("given", "stored"),
    [(["0"], "cuda:0"), (["-1"], "cpu"), (1, "cuda:1"), ("cpu", "cpu"), ("cuda", "cuda"), ("auto", "auto")],
)
def test_device_spellings(given, stored):
    assert resolve(GOOD | {"device": given}).settings.device == stored


def test_one_seed_may_stand_without_a_list():
    assert resolve(GOOD | {"seed": 7}).settings.seed == (7,)


def test_ragged_and_one_class_splits_are_allowed():
    for init_cls, increment in ((10, 1), (1, 1), (3, 4), (4, 100)):
        settings = resolve(GOOD | {"init_cls": init_cls, "increment": increment}).settings
        assert (settings.init_cls, settings.increment) == (init_cls, increment)


def test_unknown_method_lists_the_known_and_still_judges_common_keys():
    found = faults_of(model_name="semma", batch_size=0, func_epoch=3, nonsense=1)
    assert f"did you mean 'sema'? (known: {', '.join(models.available())})" in found[0]
    assert {f.partition(":")[0] for f in found} == {"model_name", "batch_size", "nonsense"}


def test_key_of_another_method_is_named_as_such():
    (fault,) = faults_of(lrate=3)
    owners = [m for m in models.available() if "lrate" in models.settings_of(m).model_fields]
    assert fault.startswith(f"lrate: unknown key of sema, it belongs to {', '.join(owners)}")


def test_folder_needs_its_path_and_counts_its_classes(tmp_path):
    assert "data_path" in faults_of(dataset="folder")[0]
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"")
    folder = {"dataset": "folder", "data_path": str(tmp_path)}
    resolve(GOOD | folder | {"init_cls": 3})
    assert "has only 3" in faults_of(**folder, init_cls=4)[0]


class Pair:
    """Settings with two keys of one legal value: once as fields, once as `only`."""

    class Fields(config.Experiment):
        use_pool: Literal[True] = True
        layout: Literal["plain"] = "plain"
        width: int = 3

    class Only(config.Experiment):
        only: ClassVar[dict[str, Any]] = config.Experiment.only | {"use_pool": True, "layout": "plain"}
        width: int = 3


def resolve_as(schema, **changes):
    """`changes` resolved where the method `one` has `schema` and the method `two` has no keys beside the common ones."""
    return config_resolve.resolve(
        GOOD | {"model_name": "one"} | changes,
        source="x.json",
        settings_of={"one": schema, "two": config.Experiment}.__getitem__,
        methods=["one", "two"],
        backbones=catalogue.names,
    )


def test_a_key_with_one_legal_value_is_accepted_refused_otherwise_and_no_field():
    resolved = resolve_as(Pair.Only, use_pool=True, layout="plain", width=4)
    assert resolved.settings.width == 4 and resolved.notes == ()
    assert resolved.values.keys() == config.Experiment.model_fields.keys() | {"width"}
    with pytest.raises(ConfigError) as caught:
        resolve_as(Pair.Only, use_pool=1, layout="mixed", width=4)
    assert caught.value.faults == [
        "use_pool: one implements only true; got 1",
        'layout: one implements only "plain"; got "mixed"',
    ]
    with pytest.raises(ConfigError, match="use_pool: unknown key of two, it belongs to one"):
        resolve_as(Pair.Only, model_name="two", use_pool=True)
    with pytest.raises(ConfigError) as caught:
        resolve_as(Pair.Only, model_name="three", use_pool=True)
    assert len(caught.value.faults) == 1  # the method is unknown, its key is not


def test_the_settings_hash_is_the_same_whether_a_key_is_a_field_or_only():
    assert resolve_as(Pair.Only).hash == resolve_as(Pair.Fields).hash == resolve_as(Pair.Only, layout="plain").hash
    assert resolve_as(Pair.Only, width=4).hash == resolve_as(Pair.Fields, width=4).hash != resolve_as(Pair.Only).hash


def test_settings_cannot_be_changed():
    settings = resolve(GOOD).settings
    with pytest.raises(ValueError):
        settings.init_cls = 5


# ---------------------------------------------------------------- overrides and hash


def test_set_reads_json_else_text():
    values, faults = parse_set(
        ["seed=[1, 2]", "init_lr=1e-3", "shuffle=false", "dataset=digits", "about=a=b", "data_path=null"]
    )
    assert values == {
        "seed": [1, 2],
        "init_lr": 1e-3,
        "shuffle": False,
        "dataset": "digits",
        "about": "a=b",
        "data_path": None,
    }
    assert faults == []


def test_set_faults():
    _, faults = parse_set(["seed", "=1", "a=1", "a=2", "b=NaN", "c=1e999"])
    assert [f.partition(":")[0] for f in faults] == ["--set seed", "--set =1", "a", "b", "c"]
    assert parse_set(["a=" + "[" * 500 + "]" * 500])[1] == [
        "a: is not usable JSON: nested too deep; an experiment is flat"
    ]


@pytest.mark.parametrize("key", sorted(hashing.NOT_HASHED))
def test_hash_ignores_where_and_how(key):
    values = {"seed": [5], "device": "cpu", "num_workers": 2, "eval_batch_size": 7}
    card = {"weights": "", "settings": "", "tolerance": 0.0, "top1_curve": {}}
    values |= {
        "prefix_cache": "off",
        "prefix_cache_gb": 0.5,
        "tracker": "tensorboard",
        "predictions": "last",
        "expected": card,
    }
    values |= {"slurm_cluster": "local", "slurm_setup": ["true"], "slurm_extra": {"hold": 1}}
    values |= {f"slurm_{key}": 9 for key in ("time", "gpus", "cpus", "mem_gb", "array_parallelism")}
    values |= {"ray_gpus": 0.5, "ray_cpus": 2.0}
    origin = {"space": {}, "chosen": {}, "scores": [], "tasks": 1, "seeds": [1], "held_out": {}}
    values["tuned"] = origin | {"data": "", "weights": "", "commit": None, "changed": False}
    other = values.get(key, "other")
    assert resolve(GOOD | {key: other}).hash == resolve(GOOD).hash


def test_keys_of_a_cluster_are_checked_beside_the_settings():
    resolved = resolve(GOOD | {"slurm_gpus": 2, "slurm_setup": ["true"]})
    assert (resolved.beside.slurm_gpus, resolved.beside.slurm_setup) == (2, ("true",))
    assert "slurm_gpus" in resolved.given and "slurm_gpus" not in resolved.values
    assert resolved.all_values["slurm_gpus"] == 2 and resolved.all_values["slurm_setup"] == ["true"]
    assert sorted(faults_of(slurm_gpus="2", ray_cpu=1, slurm_cluster="slum", exp_threshold="x")) == sorted(
        [
            'slurm_gpus: a whole number is expected, written without quotes; got "2" (GPUs of each job)',
            *faults_of(slurm_cluster="slum"),
            *faults_of(exp_threshold="x"),
            "ray_cpu: unknown key; did you mean 'ray_cpus' or 'ray_gpus'?",
        ]
    )
    assert "must be 'slurm' or 'local'; did you mean 'slurm'?" in faults_of(slurm_cluster="slum")[0]


def test_no_key_of_a_cluster_adds_a_line_to_the_jobs_script():
    lines = "one line of printable text is expected, without line breaks"
    for key, value in (
        ("slurm_partition", "gpu\nrm x"),
        ("slurm_account", "a\x1b[2J"),
        ("slurm_qos", "a\u2028b"),
        ("slurm_setup", ["module load cuda", "x\nrm y"]),
        ("slurm_extra", {"constraint": "a\nrm x"}),
        ("ray_address", "host\n"),
    ):
        faults = faults_of(**{key: value})
        assert any(fault.startswith(f"{key}: {lines}; got ") for fault in faults)
    assert "name of an option of sbatch is expected" in faults_of(slurm_extra={"x\nrm": "a"})[0]
    assert resolve(GOOD | {"slurm_extra": {"mem-per-cpu": "3G"}, "slurm_setup": ["\tmodule load x && y"]})


def test_hash_sees_everything_else():
    schema, base = models.settings_of("sema"), resolve(GOOD).settings
    assert schema.model_fields.keys() | Cluster.model_fields.keys() > hashing.NOT_HASHED > Cluster.model_fields.keys()
    seen = {resolve(GOOD).hash}
    for key in schema.model_fields.keys() - hashing.NOT_HASHED:
        value = getattr(base, key)
        if value is None:  # an optional whole number, text or list
            other = {
                "data_path": "x",
                "data_split": "x",
                "class_order": (1, 0),
                "nested_lora_level_lrs": (0.1,),
                "nested_lora_level_intervals": (2,),
            }.get(key, 40)
        else:
            other = (
                not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else f"{value}x"
            )
        changed = config_resolve.Resolved(base.model_copy(update={key: other}), frozenset(), ())
        assert changed.hash not in seen, key
        seen.add(changed.hash)
    # a default written out is the same run; so is the order of keys
    assert resolve(dict(reversed(GOOD.items())) | {"batch_size": 32}).hash == resolve(GOOD).hash


# ---------------------------------------------------------------- before anything heavy

HEAVY = ("torch", "timm", "torchvision", "matplotlib", "sklearn", "scipy")
PROBE = """
import sys, main
code = main.main(sys.argv[1:])
heavy = [name for name in {heavy} if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else code)
"""


@pytest.mark.parametrize(
    "change", ["model_name=semma", "func_epch=3", "init_cls=11", "backbone_type=vit_bas", "lrate=2", "dataset=x"]
)
def test_refused_before_heavy_imports(change):
    command = [sys.executable, "-c", PROBE.format(heavy=HEAVY), "--config", "exps/sema_digits.json", "--set", change]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2, done.stderr
    assert change.split("=")[0] in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------- Settings read from the method's source


@pytest.fixture
def method_file(tmp_path, monkeypatch):
    """Writes models/<name>.py into a folder of its own and makes it importable."""
    monkeypatch.setattr(models, "_FOLDER", tmp_path)
    monkeypatch.setattr(models, "__path__", [str(tmp_path)])

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        models.settings_of.cache_clear()
        return models.settings_of(name)

    yield write
    models.settings_of.cache_clear()
    for name in [n for n in sys.modules if n.startswith(("models.toy", "models._settings.toy"))]:
        del sys.modules[name]


START = """from __future__ import annotations
import math
import heavy_and_absent as heavy
from utils.config.schema import Experiment
"""


def test_settings_do_not_need_the_rest_of_the_file(method_file):
    text = START + "LIMIT = math.floor(3.5)\n\ndef double(x):\n    return 2 * x\n\nOTHER = heavy.constant\n\n"
    text += "class Settings(Experiment):\n    width: int = double(LIMIT)\n\n\nclass Learner(heavy.Base):\n    pass\n"
    assert method_file("toy_light", text).model_fields["width"].default == 6


def test_settings_that_use_a_heavy_import_are_read_from_the_whole_file(method_file):
    text = START.replace("heavy_and_absent", "numpy")
    text += "DEEP = heavy.int64(4)\n\n\nclass Settings(Experiment):\n    width: int = int(DEEP)\n"
    assert method_file("toy_heavy", text).model_fields["width"].default == 4


@pytest.mark.parametrize(
    ("text", "words"), [("x = 1\n", "must define `class Settings"), ("def broken(:\n", "line 1: ")]
)
def test_a_broken_method_file_is_named(text, words, method_file):
    with pytest.raises(ValueError, match=words) as caught:
        method_file("toy_broken", text)
    assert "toy_broken.py" in str(caught.value)


@pytest.mark.parametrize(
    ("method", "keys", "why"),
    [
        ("ranpac", {"use_RP": False, "M": 50}, "use_RP false: M"),
        ("ranpac", {"tuned_epoch": 0, "ffn_num": 8, "init_lr": 0.5}, "tuned_epoch 0: init_lr, ffn_num"),
        ("aper_adapter", {"tuned_epoch": 0, "optimizer": "adam"}, "tuned_epoch 0: optimizer"),
        ("finetune", {"trainable": "head", "ffn_num": 8}, "trainable head: ffn_num"),
        ("slca", {"lrate": 0.1, "init_lr": 0.2}, "lrate: init_lr"),
        ("slca", {"lrate_decay": 0.5}, "milestones null: lrate_decay"),
        ("slca", {"ca_epochs": 0, "ca_samples": 8}, "ca_epochs 0: ca_samples"),
        ("sd_lora", {"init_lr_decay": 0.5}, "no milestones in the first task: init_lr_decay"),
        (
            "l2p",
            {"pull_constraint": False, "pull_constraint_coeff": 0.5},
            "pull_constraint false: pull_constraint_coeff",
        ),
        ("coda_prompt", {"scheduler": "constant", "cosine_off_by_one": True}, "scheduler constant: cosine_off_by_one"),
        ("simplecil", {"batch_size": 8}, "simplecil, which trains nothing: batch_size"),
    ],
)
def test_keys_without_effect_are_named(method, keys, why):
    found = resolve({"model_name": method, "dataset": "digits", "init_cls": 2, "increment": 2} | keys)
    assert found.notes == (f"these keys have no effect with {why}",)
    acting = resolve({"model_name": method, "dataset": "digits", "init_cls": 2, "increment": 2})
    assert acting.notes == ()


# ---------------------------------------------------------------- absurd input: bounded time and text


@pytest.mark.parametrize("depth", [101, 500, 1000, 10**5])
def test_deep_json_is_refused_alike_at_any_depth(depth, tmp_path):
    text = "[" * depth + "]" * depth
    (tmp_path / "x.json").write_text(f'{{"seed": {text}}}')
    with pytest.raises(ConfigError) as error:
        read_json(tmp_path / "x.json")
    assert error.value.faults == [strict_json.TOO_DEEP]
    assert parse_set([f"seed={text}"])[1] == [f"seed: {strict_json.TOO_DEEP}"]


def test_absurdly_many_keys_and_values_are_refused_soon():
    start = time.monotonic()
    foreign = {f"{'x' * 100}{n}": 1 for n in range(30_000)}
    for method in ("simplecil", "simplecl"):
        faults = faults_of(**foreign, model_name=method)
        assert len(faults) >= 30_000 and len(str(ConfigError("x", faults))) < 40_000
    (fault,) = faults_of(seed=list(range(300_000)))
    assert fault == "seed: each of the 300000 seeds is a separate run; at most 1000 are allowed"
    assert len(faults_of(class_order=list(range(300_000)))[0]) < 300
    labels = ["one", "two"]
    lines = [[f"{n}: unknown key" for n in range(50_000)]] * 2
    assert len(sweep.gather(labels, lines)) == 50_000
    assert time.monotonic() - start < 15  # a few seconds; without bounds it is minutes


def test_a_file_of_absurd_size_is_not_read(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(strict_json.MOST_BYTES + 1)
    with pytest.raises(ConfigError, match=r"has 10,000,001 bytes; at most 10,000,000 are read"):
        read_json(tmp_path / "x.json")


def test_a_broken_method_file_is_no_fault_of_another_methods_experiment():
    def settings_of(name):
        if name == "dualprompt":
            raise ValueError("dualprompt.py, line 1: invalid syntax")
        return models.settings_of(name)

    def check(**values):
        return config_resolve.resolve(
            GOOD | values, source="x", settings_of=settings_of, methods=models.available(), backbones=catalogue.names
        )

    assert check().settings.model_name == GOOD["model_name"]
    with pytest.raises(ConfigError, match=r"bach_size: unknown key; did you mean 'batch_size'"):
        check(bach_size=3)
    with pytest.raises(ConfigError, match=r"'sma' is not a method; did you mean 'sema'"):
        check(model_name="sma")
    with pytest.raises(ValueError, match=r"dualprompt.py, line 1"):
        check(model_name="dualprompt")


def test_a_broken_method_file_is_listed_with_its_fault(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text('"""A method."""\n')
    (tmp_path / "bad.py").write_text("x = (\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr(models, "_FOLDER", tmp_path)
    listed = models.summaries()
    assert listed["good"] == "A method." and "bad.py, line 1: '(' was never closed" in listed["bad"]
    assert "latin.py is not UTF-8 text (byte 5)" in listed["latin"]
