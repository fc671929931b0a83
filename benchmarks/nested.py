"""Do slow and fast adapters, merging and competition help? `python -m benchmarks.nested` runs all arms with every head.

Arms have equal numbers of trainable parameters where possible (rank 32 a layer in all). Each arm is trained once a seed; its
linear head, the nearest class mean and the ridge head are then scored on the same features, since the last two do not train.
A class's statistics are gathered once, when its task ends; after the last task they are compared with recomputed ones. Results
are stored in one file a run, so the command can be stopped and started; `--kept` takes the runs behind nested.md from
nested.jsonl. Prints Markdown (benchmarks/nested.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import study
from benchmarks.study import RANDOM, Run, by_arm, cell

SETS = ("digits", "glyphs", "fractals", f"digits{RANDOM}")
KEPT = Path(__file__).with_suffix(".jsonl")  # the runs behind nested.md, one a line

# What an arm changes against the shipped file of the data set named first.
CONCAT: dict[str, Any] = {"nested_lora_consolidation_method": "concat", "nested_lora_consolidation_alpha": 1.0}
CHAIN: dict[str, Any] = CONCAT | {"nested_lora_rank": 16}
FAITHFUL = {  # the original's choices, faults included
    "nested_lora_consolidation_alpha": 0.1,
    "nested_lora_reset": "zero",
    "decay_other_rows": True,
}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sema": ("sema", {}),
    "nested in sema": ("sema", CONCAT | {"ffn_adapter_type": "nested_lora", "nested_lora_rank": 8}),
    "single LoRA": ("nested_lora", {"nested_lora_levels": 1, "nested_lora_rank": 32}),
    "chain, concat": ("nested_lora", CHAIN),
    "chain, svd": ("nested_lora", CHAIN | {"nested_lora_consolidation_method": "svd"}),
    "chain, ties, no relu": (
        "nested_lora",
        CHAIN | {"nested_lora_consolidation_method": "ties", "nested_lora_activation": "none"},
    ),
    "chain, ema 0.5": (
        "nested_lora",
        CHAIN | {"nested_lora_consolidation_method": "ema", "nested_lora_consolidation_alpha": 0.5},
    ),
    "chain, pam": ("nested_lora", CHAIN | {"nested_lora_consolidation_method": "pam"}),
    "chain, task arithmetic": ("nested_lora", CHAIN | {"nested_lora_consolidation_method": "task_arithmetic"}),
    "chain, pam_lite": ("nested_lora", CHAIN | {"nested_lora_consolidation_method": "pam_lite"}),
    "chain, task arithmetic, faithful": (
        "nested_lora",
        CHAIN | FAITHFUL | {"nested_lora_consolidation_method": "task_arithmetic"},
    ),
    "competition K=1": ("moe_parallel", CONCAT | {"num_experts": 1, "nested_lora_rank": 16}),
    "competition K=2": ("moe_parallel", CONCAT | {"num_experts": 2, "nested_lora_rank": 11}),
    "competition K=4": ("moe_parallel", CONCAT | {"num_experts": 4, "nested_lora_rank": 6}),
    "competition K=4, faithful": (
        "moe_parallel",
        FAITHFUL
        | {
            "num_experts": 4,
            "nested_lora_rank": 6,
            "nested_lora_consolidation_method": "pam_lite",
            "moe_loss": "mean",
            "selection_split": "test",
            "moe_reset": "winner",
            "moe_eval": "sum",
        },
    ),
}


def values_of(arm: str, name: str) -> dict[str, Any]:
    """The settings of an arm on a set, with the chain's rates and as many passes as the chain."""
    model, overrides = ARMS[arm]
    base, chain = study.shipped(model, name), study.shipped("nested_lora", name)
    if model == "nested_lora" and overrides.get("nested_lora_levels") == 1:
        base = {k: v for k, v in base.items() if not k.startswith("nested_lora_")}
        base["nested_lora_lr_slow"] = chain["nested_lora_lr_fast"]
    if overrides.get("ffn_adapter_type") == "nested_lora":
        base |= {k: v for k, v in chain.items() if k.startswith("nested_lora_") and k != "nested_lora_rank"}
    if model == "sema":
        base["func_epoch"] = chain["epochs"]
        if name.endswith(RANDOM):
            base["adapt_start_layer"] = 0
    return base | overrides


def facts(learner: Any, rows: list[Any]) -> Run:
    shares = [r["fast_share"] for r in rows if r["kind"] == "consolidation" and r["fast_share"] is not None]
    return {
        "fast_share": sum(shares) / len(shares) if shares else None,
        "winners": [r["winner"] for r in rows if r["kind"] == "selection"],
        "margins": [r["margin"] for r in rows if r["kind"] == "selection"],
    }


def run_one(arm: str, name: str, seed: int) -> Run:
    return study.train(values_of(arm, name), seed, facts, drift=True)


def table(results: Mapping[study.Key, Run], name: str, arms: Sequence[str]) -> str:
    """Last accuracies in percent, mean and standard deviation over seeds; then paired differences to sema and single LoRA."""
    runs_of = by_arm(results, name, arms)
    head = ["arm", "n", "trained", "linear", "ncm", "ncm recomputed", "ridge", "ridge recomputed"]
    head += ["fast share", "adapters"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm, by_seed in runs_of.items():
        runs = list(by_seed.values())
        row: list[Any] = [arm, len(runs), f"{max(max(r['trained']) for r in runs):,}"]
        row += [cell(100 * r["last"]["linear"] for r in runs)]
        for kind in ("ncm", "ridge"):
            row += [cell(100 * r["last"][kind] for r in runs), cell(100 * r["recomputed"][kind] for r in runs)]
        row += [cell((r["fast_share"] for r in runs), 2), cell(float(sum(r["adapters"])) for r in runs)]
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join([*lines, "", study.differences(runs_of, ("sema", "single LoRA"))])


def main() -> None:
    args = study.parser(__doc__ or "", SETS, list(ARMS), "nested").parse_args()
    keys = [(name, arm, seed) for seed in args.seeds for name in args.sets for arm in args.arms]
    results = study.run_all(run_one, values_of, keys, args, KEPT)
    if args.keep:
        study.keep(results, KEPT)
    for name in args.sets:
        print(f"\n## {name}\n\n{table(results, name, args.arms)}")


if __name__ == "__main__":
    main()
