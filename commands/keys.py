"""Writes docs/keys.md, the tables of every key of an experiment file, from the methods' Settings: `python -m commands.keys`.

With `--check` nothing is written, and the exit code is 1 if the page is out of date.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import models
from utils.config import common_names
from utils.config.groups import COMMON, SPEED
from utils.config.schema import WITHOUT_EFFECT, Experiment, Trained
from utils.engines.settings import Cluster

PAGE = Path(__file__).resolve().parent.parent / "docs" / "keys.md"
Schema = type[Experiment]

INTRODUCTION = """\
<!-- written by python -m commands.keys: do not edit -->
# Keys of an experiment file

An experiment is one flat JSON file. A key has the name it has in SEMA-CL or LAMDA-PILOT where those know it; files of SEMA-CL
and Nested-LoRA load unchanged.
`python main.py --config FILE --check all` prints every key of the file's method with its value, its meaning and its unit.
A run says at its start which keys of the file have no effect with the others; an unknown key is refused."""

COMMON_NAMES = """\
## One name for epochs and rank

`epochs` and `rank` are read as the method's key, in files, sweeps and with `--set`: a run has the same folder whichever name is
written. Where both are set in one place, that is an error; `--set epochs=3` replaces the file's key by either name.

| method | `epochs` | `rank` |
|---|---|---|
{rows}"""

NAMES = """\
## Names of other programs

Files of SEMA-CL load unchanged. In files of [Nested-LoRA](https://github.com/motsun1/Nested-LoRA) these names are read as ours
(files alone: `--set` takes this program's names), and a note says so:

| there | here |
|---|---|
| `nb_tasks` | `num_experts` |
| `model_name` `nested_lora` with `moe_mode` `parallel` | `model_name` `moe_parallel` |
| `nested_lora_eval_ablation` `none`, `fast_only`, `slow_only` | `nested_lora_eval` `combined`, `fast`, `slow` |
| `nested_lora_consolidation_method` `pam` | `pam_lite` |
| `backbone_type` `pretrained_vit_b16_224_nested_lora` | `pretrained_vit_b16_224_adapter` |

Where such a file is silent, that program's defaults hold; its faults stay off, and a note names the keys that bring them back.

Files of [LAMDA-PILOT](https://github.com/sun-hailong/LAMDA-PILOT) for the methods that are here load (those with `memory_size`,
`memory_per_class`, `fixed_memory` or `convnet_type`, which all of them have):

| there | here |
|---|---|
| `convnet_type`, `get_original_convnet` (until 2023) | `backbone_type`, `get_original_backbone` |
| `backbone_type` `vit_base_patch16_224`, `..._in21k` | `pretrained_vit_b16_224`, `..._in21k`: the AugReg weights of timm 0.6 |
| `model_name` `adam_adapter`, `dual_prompt` | `aper_adapter`, `dualprompt` |
| `model_name` `ranpac_adapter`, `ranpac-phase2` | `ranpac` |
| `model_name` `finetune` | with `trainable` `"backbone"` and `mask_old_classes` true, which that code does |

What has no counterpart (`aper_finetune`, `aper_ssf`, `aper_vpt`, `ranpac_ssf`, dropout in the ViT, convolutional networks) is
refused in one line.

No rehearsal-free method ever read {never}: every method accepts these and ignores them, with a note."""


def page() -> str:
    """The whole page as Markdown."""
    schemas = {name: models.settings_of(name) for name in models.available()}
    shared = _shared(schemas.values())
    titles = {cls: _title(cls) for cls in shared}
    headings = ["Keys of every method", "Keys of every method that trains", "Cluster and speed"]
    headings += [*titles.values(), *(f"`{name}`" for name in schemas)]
    headings += ["One name for epochs and rank", "Names of other programs"]
    blocks = [INTRODUCTION, "\n".join(f"- {_link(heading)}" for heading in headings), *_common(), *_speed()]
    for cls, title in titles.items():
        names = ", ".join(f"`{name}`" for name, schema in schemas.items() if issubclass(schema, cls))
        blocks += [f"## {title}", f"{_about(cls)} Methods: {names}.", _table(cls, _defined_in(cls))]
    for name, summary in models.summaries().items():
        blocks += _method(name, summary, schemas[name], titles)
    blocks.append(COMMON_NAMES.format(rows="\n".join(_common_row(name, schemas[name]) for name in schemas)))
    blocks.append(NAMES.format(never=_listed(sorted(WITHOUT_EFFECT))))
    return "\n\n".join(map(_wrapped, blocks)) + "\n"


def _wrapped(block: str) -> str:
    """A paragraph on lines of at most 120 columns; anything of several lines, or a heading, as it is."""
    if "\n" in block or block.startswith("#"):
        return block
    return textwrap.fill(block, 120, break_long_words=False, break_on_hyphens=False)


def _common_row(name: str, schema: Schema) -> str:
    """The keys of one method that the common names stand for; a dash where it has none."""
    keys = {common: common for common in common_names.NAMES if common in schema.model_fields}
    keys |= common_names.of(schema.model_fields)
    return f"| {_link(f'`{name}`')} | {' | '.join(f'`{keys[c]}`' if c in keys else '-' for c in common_names.NAMES)} |"


def _common() -> list[str]:
    keys = [key for key in Experiment.model_fields if not is_machine_key(key)]
    named = {key for group in COMMON.values() for key in group}
    last = [*COMMON][-1]
    blocks = ["## Keys of every method"]
    for title, group in COMMON.items():
        rest = [key for key in keys if key not in named] if title == last else []
        blocks += [f"### {title}", _table(Experiment, [*(key for key in group if key in keys), *rest])]
    about = "These belong to every method that takes gradient steps: all but `simplecil`."
    return [*blocks, "## Keys of every method that trains", about, _table(Trained, _defined_in(Trained))]


def _speed() -> list[str]:
    """The keys of the machine and of the cluster."""
    about = "These say where and how fast a run happens. They change numbers by rounding alone, except `batch_per_process`, "
    about += "which changes the batch."
    blocks = ["## Cluster and speed", about, "### Speed", _table(Experiment, SPEED)]
    for title, start in (("SLURM (`--engine slurm`)", "slurm_"), ("Ray (`--engine ray`)", "ray_")):
        blocks += [f"### {title}", _table(Cluster, [k for k in Cluster.model_fields if k.startswith(start)])]
    return blocks


def _method(name: str, summary: str, schema: Schema, titles: dict[type, str]) -> list[str]:
    """The section of one method: what it is, which shared tables hold for it, and the keys that are its alone."""
    blocks = [f"## `{name}`", summary]
    if links := [_link(title) for cls, title in titles.items() if issubclass(schema, cls)]:
        blocks.append(f"Shared keys: {', '.join(links)}.")
    alone = [
        cls for cls in schema.__mro__ if _is_settings(cls) and cls not in titles and cls not in (Experiment, Trained)
    ]
    for cls in [*alone[1:][::-1], schema]:  # from the general to the particular
        keys = _defined_in(cls)
        if keys and cls is not schema:
            blocks += [f"### {_title(cls)}", _about(cls)]
        elif keys and len(blocks) > 3:
            blocks.append(f"### Other keys of `{name}`")
        blocks += [_table(schema, keys)] if keys else []
    if only := schema.only:
        values = ", ".join(f"`{key}` {_text(value)}" for key, value in sorted(only.items()))
        blocks.append(f"Accepted with one value only, since this program implements no other: {values}.")
    if schema.ignored:
        blocks.append(f"Accepted from other programs' files, without effect: {_listed(sorted(schema.ignored))}.")
    return blocks


def _shared(schemas: Iterable[Schema]) -> list[Schema]:
    """The settings classes that have keys and that several methods extend, the general before the particular."""
    users: dict[Schema, int] = {}
    for schema in schemas:
        for cls in reversed(schema.__mro__):
            if _is_settings(cls) and cls not in (Experiment, Trained) and _defined_in(cls):
                users[cls] = users.get(cls, 0) + 1
    return [cls for cls, count in users.items() if count > 1]


def _is_settings(cls: type) -> bool:
    return issubclass(cls, Experiment)


def is_machine_key(key: str) -> bool:
    """Whether a key belongs to the cluster or to speed, not to the method."""
    return key in SPEED or key in Cluster.model_fields


def _defined_in(cls: Schema) -> list[str]:
    """The keys that this very class states, or states anew with another default or meaning."""
    return [key for key in inspect.get_annotations(cls) if key in cls.model_fields]


def _title(cls: type) -> str:
    """A settings class's docstring begins with its title, a sentence of a few words."""
    return (cls.__doc__ or cls.__name__).split(".")[0].replace("\n", " ")


def _about(cls: type) -> str:
    """The rest of that docstring's first paragraph."""
    paragraph = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return paragraph.partition(". ")[2]


def _link(title: str) -> str:
    """A link to a heading of this page, as GitHub names its anchors."""
    anchor = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return f"[{title}](#{anchor.replace(' ', '-')})"


def _table(schema: type[BaseModel], keys: Iterable[str]) -> str:
    """A Markdown row a key: name, default, meaning with unit and source."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key in keys:
        field = schema.model_fields[key]
        default = "required" if field.is_required() else _text(field.get_default(call_default_factory=True))
        rows.append(f"| `{key}` | {default} | {(field.description or '').replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def _text(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)}`"


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    args = parser.parse_args()
    text = page()
    if args.check:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
