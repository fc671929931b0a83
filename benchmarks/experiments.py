"""Experiment files of published sets, written from one table with the authors' recipes: `python -m benchmarks.experiments`.

A file stands here if its authors publish the settings and the number. Recipes and numbers of RanPAC and of the nearest class
mean: `args/<set>_publish.csv` (rows 2, 4 and 7) and `paper_tables/` of github.com/RanPAC/RanPAC; of SLCA: `exps/slca/` and
`models/slca.py` of github.com/GengDavid/SLCA. Files that exist from elsewhere are not written again.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXPS = Path(__file__).resolve().parent.parent / "exps"
IN1K, IN21K = "pretrained_vit_b16_224", "pretrained_vit_b16_224_in21k"


@dataclass(frozen=True)
class Protocol:
    """A set as the authors of RanPAC split it, and the backbone that they take."""

    dataset: str
    title: str
    init_cls: int
    increment: int
    backbone: str
    adapts: str = "SSF"  # what their first task trains; we have the adapter alone
    shuffle: bool = True

    def tasks(self, classes: int) -> str:
        first = f"a first task of {self.init_cls} classes and " if self.init_cls != self.increment else ""
        return f"{first}{(classes - self.init_cls) // self.increment + (not first)} tasks of {self.increment}"


SETS = {
    "cifar": Protocol("cifar224", "CIFAR-100 at 224 px", 10, 10, IN21K, "adapter"),
    "inr_10task": Protocol("imagenetr", "ImageNet-R", 20, 20, IN1K),
    "ina": Protocol("imageneta", "ImageNet-A", 20, 20, IN1K),
    "cub": Protocol("cub", "CUB-200", 20, 20, IN1K, "adapter"),
    "omnibenchmark": Protocol("omnibenchmark", "OmniBenchmark", 30, 30, IN21K, "VPT"),
    "vtab": Protocol("vtab", "VTAB", 10, 10, IN1K, shuffle=False),
    "cars": Protocol("stanford_cars", "Stanford Cars", 16, 20, IN21K, "VPT"),
}
# last accuracy in percent, paper_tables/Table_data_main_<set>.csv: "NCM only", "No Phase 1", "Algorithm 1"
NUMBERS = {
    "cifar": (83.4, 89.0, 92.2),
    "inr_10task": (61.2, 71.8, 77.9),
    "ina": (49.3, 58.2, 62.4),
    "cub": (85.1, 88.7, 90.3),
    "omnibenchmark": (73.1, 78.2, 79.9),
    "vtab": (88.4, 92.2, 92.2),
    "cars": (37.7, 66.0, 77.5),
}
# (first part of the file's name, what it shows, row of their file, column of NUMBERS, keys beside those of the set)
RECIPES: tuple[tuple[str, str, int, int, dict[str, Any]], ...] = (
    ("simplecil", "the nearest class mean on frozen features, nothing trained,", 2, 0, {"model_name": "simplecil"}),
    (
        *(
            "simplecil_ridge",
            "ridge regression on 10,000 random features of the frozen backbone (RanPAC without phase 1)",
        ),
        *(4, 1, {"model_name": "simplecil", "head": "ridge", "head_projection_dim": 10_000}),
    ),
    (
        *(
            "ranpac",
            "RanPAC, an adapter trained in the first task, then ridge regression on 10,000 random features,",
            7,
            2,
        ),
        {
            **{"model_name": "ranpac", "batch_size": 48, "optimizer": "sgd", "init_lr": 0.01, "min_lr": 0.0},
            **{"weight_decay": 0.0005, "ffn_num": 64, "tuned_epoch": 20, "use_RP": True, "M": 10_000},
        },
    ),
)
ELSEWHERE = ("simplecil_cifar", "simplecil_inr_10task", "ranpac_cifar", "ranpac_inr_10task")  # written by hand before
TIME = "Time: not measured, not for a CPU; images and weights must be at hand, see --check."


def experiments() -> dict[str, dict[str, Any]]:
    """{name of the file: its values}."""
    files = {}
    for suffix, where in SETS.items():
        for method, shows, row, column, keys in RECIPES:
            if (name := f"{method}_{suffix}") in ELSEWHERE:
                continue
            trained = method == "ranpac"
            other = f" (theirs trains {where.adapts} in the first task)" * (trained and where.adapts != "adapter")
            csv = {"inr_10task": "imagenetr", "ina": "imageneta", "cifar": "cifar224"}.get(suffix, suffix)
            about = (
                f"Shows {shows} on {where.title}, {where.tasks(_classes(where.dataset))}. Source: McDonnell et al., "
                f"NeurIPS 2023 (arXiv 2307.02251), row {row} of args/{csv}_publish.csv in github.com/RanPAC/RanPAC. "
                f"Expected: last {NUMBERS[suffix][column]} percent in its paper_tables{other}; not run here. {TIME}"
            )
            files[name] = {
                "about": about,
                "model_name": keys["model_name"],
                **_tasks(where),
                "backbone_type": where.backbone + "_adapter" * trained,
                **{key: value for key, value in keys.items() if key != "model_name"},
            }
    where = SETS["cub"]
    files["slca_cub"] = {
        "about": "Shows the whole backbone trained slowly and the classifier aligned on features drawn from class Gaussians, "
        "on CUB-200, 10 tasks of 20. Source: Zhang et al., ICCV 2023 (arXiv 2303.05118); exps/slca/slca_cub.json and "
        f"models/slca.py of github.com/GengDavid/SLCA. Expected: not known, not run here. {TIME}",
        **{"model_name": "slca", **_tasks(where), "backbone_type": IN21K, "batch_size": 128, "optimizer": "sgd"},
        **{"lrate": 0.01, "bcb_lrscale": 0.01, "weight_decay": 0.0005, "epochs": 50, "milestones": [40]},
        **{"lrate_decay": 0.1, "ca_epochs": 5, "ca_with_logit_norm": 0.1},
    }
    return files


def _tasks(where: Protocol) -> dict[str, Any]:
    sizes = {"dataset": where.dataset, "init_cls": where.init_cls, "increment": where.increment}
    return {**sizes, "shuffle": where.shuffle, "seed": [1993], "device": "auto"}


def _classes(dataset: str) -> int:
    from utils.data import DATASETS

    return DATASETS[dataset].num_classes or 0


def text_of(values: dict[str, Any]) -> str:
    """An experiment file as the others are written: two spaces, lists in one line."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    return re.sub(r"\[\s+([^\]]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def main() -> None:
    for name, values in experiments().items():
        (EXPS / f"{name}.json").write_text(text_of(values), encoding="utf-8")
    print(f"{len(experiments())} files in {EXPS}")


if __name__ == "__main__":
    main()
