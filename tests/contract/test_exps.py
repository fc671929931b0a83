"""Every shipped experiment loads, explains itself, passes --check here, and differs from its twin where it says so."""

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import main
import models
from backbone import catalogue
from benchmarks import experiments
from commands import keys
from utils import data
from utils.config.resolve import resolve
from utils.config.strict_json import ConfigError, read_json

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "exps").glob("*.json"))
NAMES = [path.stem for path in FILES]
# of the methods' twins on other sets, those on digits stand for all in the fast part of the tests
# and of the files that benchmarks/experiments.py writes, one of each method: tests/benchmarks checks the settings of all
ALIKE = experiments.experiments().keys() - {"simplecil_ridge_cub", "ranpac_cars", "slca_cub"}
CHECKED = [
    pytest.param(path, id=path.stem, marks=() if path.stem.endswith("_digits") else pytest.mark.slow)
    for path in FILES
    if path.stem not in ALIKE
]
# the keys that undo faults of the original SEMA (README, "Methods")
CORRECTIONS = {
    "ffn_adapter_scalar": 0.1, "ffn_adapter_dropout": 0.1, "train_first_router_column": True, "detect_scope": "task",
    "detect_sign": "signed", "detect_std_floor": 0.001, "record_when": "end", "decay_other_rows": False,
    "input_normalisation": "backbone",
}  # fmt: skip


def test_the_promised_files_are_there():
    sets = ("digits", "glyphs", "fractals")
    published = ("cifar", "inr_5task", "inr_10task", "inr_20task", "ina", "vtab")
    expected = {
        "quickstart",
        "sema_digits_short",
        *(f"{m}_{s}" for m in ("finetune", "joint", "simplecil") for s in sets),
    }
    expected |= {f"{m}_{s}" for m in ("sema", "sema_corrected") for s in sets + published}
    nested = ("nested_lora", "moe_parallel")
    expected |= {f"{m}_{s}" for m in nested for s in (*sets, "cifar", "inr_10task")} | {f"debug_{m}" for m in nested}
    expected |= {f"dylora_moe_{s}" for s in (*sets, "cifar", "inr_10task")}
    baselines = ("aper_adapter", "ranpac", "ease", "inflora", "sd_lora", "slca", "l2p", "dualprompt", "coda_prompt")
    expected |= {f"{m}_{s}" for m in baselines for s in (*sets, "cifar")}
    ablations = ("alpha", "interval", "rate_ratio", "experts", "consolidation", "chain_or_sema")
    expected |= {f"ablate_{name}_digits" for name in ablations}
    assert expected <= set(NAMES)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_about_says_what_a_reader_needs(path):
    about = read_json(path)[0]["about"]
    assert len(about) > 150
    for word in ("Shows", "Source:", "Expected:", "Time:"):
        assert word in about, f"{path.name}: about lacks {word!r}"


@pytest.mark.parametrize("path", CHECKED)
def test_check_accepts_every_file(path, capsys, tmp_path):
    assert main.main(["--config", str(path), "--check", "headers", "--data-root", str(tmp_path)]) == 0
    shown, errors = capsys.readouterr()
    values, faults = read_json(path)
    assert not faults and not errors
    assert "the settings are valid" in shown and "trainable parameters" in shown
    cells = values.pop("sweep", None)
    if cells is not None:  # shown as cell 1 in full, then a line for each
        assert "the above is cell 1 of" in shown
    for key in values:
        (line,) = [x for x in shown.splitlines() if x.startswith(f"  {key} ")]
        assert line.endswith("(default)") is False, key
    info = data.DATASETS[values["dataset"]]
    if info.kind == "embedded":
        one_class = values.get("increment") == 1 and values["model_name"] != "simplecil"  # shown for what happens there
        left_out = any(key in arm for arm in cells or () for key in ("shots", "imbalance"))  # shown with their numbers
        assert ("note:" in shown) == (one_class or left_out)
    else:  # what is missing is listed with the place looked in and the way to get it
        assert str(tmp_path) in shown and "https://" in shown
        assert "what is missing on this machine is listed above" in shown


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("sema_corrected_")])
def test_corrected_twin_differs_in_the_corrections_only(name):
    twin, original = (read_json(ROOT / "exps" / f"{n}.json")[0] for n in (name, name.replace("corrected_", "")))
    changed = {k: twin.get(k) for k in twin.keys() | original.keys() if twin.get(k) != original.get(k)}
    assert changed.pop("about")
    changed.pop("expected", None)
    published = data.DATASETS[twin["dataset"]].kind != "embedded"  # the embedded backbone normalises anyway
    assert changed == {k: v for k, v in CORRECTIONS.items() if published or k != "input_normalisation"}


def test_list_shows_every_experiment(capsys):
    assert main.main(["--list"]) == 0
    shown = capsys.readouterr().out
    for word in (*(f"exps/{name}.json" for name in NAMES), *data.DATASETS, "sema", "joint", "embedded"):
        assert word in shown


def test_files_are_written_alike():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.startswith('{\n  "about": ') and text.endswith("\n}\n"), path.name
        assert json.loads(text)


def arms(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings of every cell of a file, as far as the file states them; of a grid all values of a key count as one."""
    sweep = values.get("sweep", {})
    for changes in sweep if isinstance(sweep, list) else [sweep]:
        yield values | changes


def stating_class(settings: type, key: str) -> type:
    """The class that states this key of a method: the method's Settings, or one it shares with other methods."""
    return next(cls for cls in settings.__mro__ if key in inspect.get_annotations(cls))


# Keys of the data and of measuring, which are no choice of a method.
DATA = {"data_root", "data_path", "test_ratio", "image_size", "class_order", "class_order_seed", "data_split"}
DATA |= {"skip_broken", "grey_bits"}


def test_every_key_of_a_method_has_a_user():
    """A key is set by a shipped experiment or a benchmark, or it goes: those of the machine and of the data apart."""
    settings = {name: models.settings_of(name) for name in models.available()}
    used = set()
    for path in FILES:
        for arm in arms(read_json(path)[0]):
            names = arm["model_name"] if isinstance(arm["model_name"], list) else [arm["model_name"]]
            schemas = [settings[name] for name in names]
            used |= {(stating_class(s, key), key) for s in schemas for key in arm if key in s.model_fields}
    in_benchmarks = set()
    for path in (ROOT / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.keyword):
                in_benchmarks.add(node.value if isinstance(node, ast.Constant) else node.arg)
    unused = [
        f"{key} of {name}"
        for name, schema in settings.items()
        for key in schema.model_fields
        if not keys.is_machine_key(key)
        and key not in DATA | in_benchmarks
        and (stating_class(schema, key), key) not in used
    ]
    assert not unused, "write an exps/ablate_*.json that sweeps these keys, or remove them"


@pytest.mark.parametrize("method", [m for m in models.available() if models.settings_of(m).only])
def test_a_key_with_one_legal_value_is_accepted_with_it_alone(method):
    schema = models.settings_of(method)
    plain = {"model_name": method, "dataset": "digits", "init_cls": 2, "increment": 2}

    def resolved(values):
        known = {"methods": models.available(), "backbones": catalogue.names, "settings_of": models.settings_of}
        return resolve(values, source="file", **known)

    assert not schema.only.keys() & schema.model_fields.keys()
    assert resolved(plain | schema.only).hash == resolved(plain).hash
    for key, value in schema.only.items():
        other = not value if isinstance(value, bool) else "other"
        with pytest.raises(ConfigError, match=f"{key}: {method} implements only {json.dumps(value)}"):
            resolved(plain | {key: other})
