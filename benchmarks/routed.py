"""What do routed experts gain? `python -m benchmarks.routed` trains every arm once a seed and scores three heads on it.

The arms have about as many parameters as a dense adapter of rank 37 in each layer (`added`: all but the head).
Prints Markdown (benchmarks/routed.md); `--keep` also draws benchmarks/routed.png, the loss of routed and dense arms by epoch.
Runs are stored in one file each, so the command can be stopped and started; `--kept` takes those in routed.jsonl as done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import models
from benchmarks import study
from benchmarks.study import RANDOM, Run, by_arm, cell
from utils.evaluation.metrics import summarise

SETS = ("digits", "glyphs", "fractals", "domains", f"digits{RANDOM}")
KEPT = Path(__file__).with_suffix(".jsonl")  # the runs behind routed.md, one a line

# What an arm changes against the shipped file of its method for the set.
DENSE: dict[str, Any] = {"nested_lora_levels": 1}
FIXED: dict[str, Any] = {"novelty_threshold_mode": "fixed", "novelty_threshold": 0.5}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "simplecil": ("simplecil", {}),
    "sema": ("sema", {}),
    "sema, equal parameters": ("sema", {}),  # and EQUAL of the set
    "dense adapter": ("nested_lora", DENSE | {"nested_lora_rank": 37}),
    "dense adapter, active size": ("nested_lora", DENSE | {"nested_lora_rank": 18}),
    "sparse": ("sparse_moe", {}),
    "sparse top-1": ("sparse_moe", {"top_k_experts": 1}),
    "sparse top-1, no centre": ("sparse_moe", {"top_k_experts": 1, "router_centre": False}),
    "sparse dense gates": ("sparse_moe", {"top_k_experts": 4}),
    "sparse no losses": ("sparse_moe", {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}),
    "sparse no balance": ("sparse_moe", {"router_aux_loss_coef": 0.0}),
    "sparse no z": ("sparse_moe", {"router_z_loss_coef": 0.0}),
    "sparse bias balancing": ("sparse_moe", {"router_aux_loss_coef": 0.0, "router_bias_rate": 0.01}),
    "sparse uniform": ("sparse_moe", {"fixed_routing": "uniform"}),
    "sparse one expert": ("sparse_moe", {"fixed_routing": "expert", "top_k_experts": 1}),
    "sparse router rate 0.5": ("sparse_moe", {"router_lr": 0.5}),
    "sparse E=2": ("sparse_moe", {"num_experts": 2, "expert_hidden": 12}),
    "sparse E=8": ("sparse_moe", {"num_experts": 8, "expert_hidden": 3}),
    "sparse rank x4": ("sparse_moe", {"expert_hidden": 24}),
    "dylora": ("dylora_moe", {}),
    "dylora never spawns": ("dylora_moe", {"novelty_threshold_mode": "fixed", "novelty_threshold": -2.0}),
    "dylora always spawns": ("dylora_moe", {"novelty_threshold_mode": "fixed", "novelty_threshold": 2.0}),
    "dylora fixed 0.5": ("dylora_moe", FIXED),
    "dylora adaptive": ("dylora_moe", {"novelty_threshold_mode": "adaptive", "novelty_threshold": 0.6}),
    "dylora median": ("dylora_moe", {"novelty_similarity": "median"}),
    "dylora four from the start": ("dylora_moe", {"grow_experts": False}),
    "dylora quantile 0.25": ("dylora_moe", {"novelty_quantile": 0.25}),
    "dylora quantile 0.75": ("dylora_moe", {"novelty_quantile": 0.75}),
    "dylora no interval": ("dylora_moe", {"novelty_confidence": 0.0}),
    "dylora cooldown 1": ("dylora_moe", {"novelty_cooldown": 1}),
    "dylora from 500 images on": ("dylora_moe", {"novelty_min_samples": 500}),
    "dylora fixed 0.5, cooldown 1": ("dylora_moe", FIXED | {"novelty_cooldown": 1}),
    "dylora fixed 0.5, from 288 images on": ("dylora_moe", FIXED | {"novelty_min_samples": 288}),
}
# SEMA in about the parameters of the dense adapter of rank 37, with rd_dim about twice ffn_num, as shipped. Chosen by counting
# the parameters of trial runs, without looking at their accuracy: how many adapters grow depends on rd_dim too.
EQUAL: dict[str, dict[str, Any]] = {
    "digits": {"ffn_num": 4, "rd_dim": 8},
    "glyphs": {"ffn_num": 6, "rd_dim": 12},
    "fractals": {"ffn_num": 9, "rd_dim": 18},
    "domains": {"ffn_num": 4, "rd_dim": 9},
    f"digits{RANDOM}": {"ffn_num": 10, "rd_dim": 20},
}
# Arms below: where there are experts to route among, one a task.
SPAWNS: dict[str, Any] = {"novelty_threshold_mode": "fixed", "novelty_threshold": 2.0}
SPAWNING: dict[str, dict[str, Any]] = {
    "top-1": {"top_k_experts": 1},
    "dense": {"top_k_experts": 4},
    "no losses": {"router_aux_loss_coef": 0.0, "router_entropy_coef": 0.0, "router_z_loss_coef": 0.0},
    "no balance": {"router_aux_loss_coef": 0.0, "router_entropy_coef": 0.0},
    "no z": {"router_z_loss_coef": 0.0},
    "target alone learns": {"train_experts": "target"},
    "router rate 0.5": {"router_lr": 0.5},
    "router a layer": {"router_scope": "layer"},
    "aimed columns": {"router_column_start": "prototype"},
    "aimed, by sample, target alone": {
        "router_column_start": "prototype",
        "router_granularity": "sample",
        "train_experts": "target",
    },
    "mature after two tasks": {"maturity_tasks": 2},
    "mature after 20 steps": {"maturity_tasks": None, "maturity_steps": 20},
    "all columns learn": {"train_columns": "all"},
    "distilled on scores": {"distill_coef": 1.0, "distill_on": "logits"},
    "by sample": {"router_granularity": "sample"},
    "constant temperature": {"router_temperature_start": 1.0},
    "no router": {"use_moe_routing": False},
    "never frozen": {"freeze_on_convergence": False},
    "distilled": {"distill_coef": 10.0},
    "rank grows": {"ffn_num": 4, "expert_rank_max": 8},
    "merged below 0.1": {"merge_below": 0.1},
    "replay of 5": {"replay_per_class": 5},
    "on qkv": {"lora_target": ["qkv"], "ffn_num": 4},
    "rank 2": {"ffn_num": 2},
    "rank 32": {"ffn_num": 32},
    "E=2": {"num_experts": 2},
    "E=8": {"num_experts": 8},
}
ARMS |= {f"spawning, {name}": ("dylora_moe", SPAWNS | keys) for name, keys in SPAWNING.items()}
# All arms run over the untrained backbone, where adapters have something to learn; elsewhere those that answer a question.
FEW = ["simplecil", "sema", "sema, equal parameters", "dense adapter", "sparse", "dylora", "dylora always spawns"]
# Over the untrained backbone these decide as `dylora` does and would be the same runs: only where there is a shift.
AT_SHIFT = [
    *("dylora quantile 0.25", "dylora quantile 0.75", "dylora no interval", "dylora cooldown 1"),
    "dylora from 500 images on",
]
MORE = [*FEW, "sparse no losses", "dylora four from the start", "spawning, target alone learns"]
ON_DIGITS = [*MORE, "dense adapter, active size", "sparse top-1", "sparse uniform", "spawning, replay of 5"]
ON_DOMAINS = [
    *MORE,
    *("dylora never spawns", "dylora fixed 0.5", "dylora adaptive", "dylora median", "spawning, distilled"),
    *AT_SHIFT,
    "dylora fixed 0.5, cooldown 1",
]
CURVES = ("dense adapter", "dense adapter, active size", "sparse", "sparse top-1", "dylora always spawns")


def arms_on(name: str) -> list[str]:
    inside = [*FEW, "dylora quantile 0.75"]
    few = {"digits": ON_DIGITS, "glyphs": inside, "fractals": inside, "domains": ON_DOMAINS}
    return few.get(name, [arm for arm in ARMS if arm not in AT_SHIFT])


def values_of(arm: str, name: str) -> dict[str, Any]:
    """The settings of an arm on a set, with as many passes as the routed methods; the dense adapter at their rate."""
    model, overrides = ARMS[arm]
    routed = study.shipped("sparse_moe", name)
    if model == "nested_lora":
        sparse_only = (
            models.settings_of("sparse_moe").model_fields.keys() - models.settings_of(model).model_fields.keys()
        )
        shared = {k: v for k, v in routed.items() if k not in sparse_only}
        return shared | {"model_name": model, "nested_lora_lr_slow": routed["init_lr"]} | overrides
    base = study.shipped(model, name)
    if model == "sema":
        base["func_epoch"] = routed["epochs"]
    if arm == "sema, equal parameters":
        overrides = overrides | EQUAL[name]
    return base | overrides


def facts(learner: Any, rows: list[Any]) -> Run:
    """Experts, spawns, use of experts in the last epoch, and the cross-entropy of every epoch of the first phase."""
    epochs = [r for r in rows if r["kind"] == "epoch" and r["phase"] == "func"]
    last = max((r["task"] for r in rows if r["kind"] == "experts"), default=None)
    used = [r for r in rows if r["kind"] == "experts" and r["task"] == last]
    final = [r for r in used if r["epoch"] == max(r["epoch"] for r in used)]
    return {
        "losses": [round(r.get("task_loss", r["loss"]), 4) for r in epochs],
        "spawned": [r["task"] for r in rows if r["kind"] == "novelty" and r["spawn"]],
        "least_used": min((min(r["gate"]) * len(r["gate"]) for r in final), default=None),
        "entropy": sum(r["token_entropy"] for r in final) / len(final) if final else None,
    }


def run_one(arm: str, name: str, seed: int) -> Run:
    return study.train(values_of(arm, name), seed, facts, drift=False)


def table(results: Mapping[study.Key, Run], name: str, arms: Sequence[str]) -> str:
    """Last accuracies in percent and what routing did; then paired differences to simplecil, SEMA of equal size and the dense
    adapter."""
    runs_of = by_arm(results, name, arms)
    head = ["arm", "n", "added", "linear", "ncm", "ridge", "experts a layer", "spawns", "least used", "entropy", "loss"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm, by_seed in runs_of.items():
        runs = list(by_seed.values())
        added = summarise(r["added"] for r in runs)
        spread = f" ± {added.std:,.0f}" if added.std else ""
        row = [arm, str(len(runs)), "-" if added.mean is None else f"{added.mean:,.0f}{spread}"]
        row += [cell(100 * r["last"][kind] if kind in r["last"] else None for r in runs) for kind in study.HEADS]
        row += [
            cell(float(max(r["adapters"])) if added.mean else None for r in runs),
            cell(float(len(r["spawned"]) - 1) if r["spawned"] else None for r in runs),
            cell((r["least_used"] for r in runs), 2),
            cell((r["entropy"] for r in runs), 2),
            cell((r["losses"][-1] if r["losses"] else None for r in runs), 3),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, "", study.differences(runs_of, ("simplecil", "sema, equal parameters", "dense adapter"))])


def draw(results: Mapping[study.Key, Run], sets: Sequence[str], target: Path) -> None:
    """Mean cross-entropy of every epoch over seeds, of routed arms and dense adapters, one panel a set."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 2.4 * len(sets)), layout="constrained")
    for place, name in enumerate(sets):
        axes = figure.add_subplot(len(sets), 1, place + 1)
        for arm, runs in by_arm(results, name, CURVES).items():
            curve = np.mean([run["losses"] for run in runs.values()], axis=0)
            axes.plot(range(1, len(curve) + 1), curve, color=f"C{CURVES.index(arm)}", label=arm, linewidth=1.2)
        axes.set(title=name, ylabel="cross-entropy", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epochs, task after task")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=8)
    figure.savefig(target, dpi=110)


def main() -> None:
    args = study.parser(__doc__ or "", SETS, list(ARMS), "routed").parse_args()
    keys = [(name, arm, seed) for seed in args.seeds for name in args.sets for arm in arms_on(name) if arm in args.arms]
    results = study.run_all(run_one, values_of, keys, args, KEPT)
    if args.keep:
        study.keep(results, KEPT)
        draw(results, args.sets, KEPT.with_suffix(".png"))
    for name in args.sets:
        print(f"\n## {name}\n\n{table(results, name, args.arms)}")


if __name__ == "__main__":
    main()
