"""An expert of a run as an adapter of the `peft` library: `python -m commands.export_peft RUN EXPERT OUT`.

RUN is a run of dylora_moe with `lora_target`; the experts its newest checkpoint has are taken. EXPERT is the number that the
run's pictures and `gates` rows have for it: experts are counted from 0 in order of birth, and keep their number when others
are merged away. OUT gets `adapter_config.json` and `adapter_model.safetensors`, which
`PeftModel.from_pretrained(vit, OUT)` puts on the same timm model. It adds there what the expert adds in the run with gate 1:
the router is no part of it, nor are the head and the backbone's input normalisation.
Exit codes: 0 written; 2 not such a run, no such expert, or OUT is not free.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from backbone.adapters.peft_format import save_peft
from backbone.experts.routed import RoutedLinears, loras_of, routed_layers
from commands import saved
from utils.evaluation import routing
from utils.report.results import load_rows
from utils.text import printable


def export(folder: Path | str, expert: int, out: Path | str, data_root: str | None = None) -> str:
    """Writes the expert and tells in a line what was written.

    Raises ValueError for a run without LoRA experts, for an expert it has not, and if `out` is there and no empty folder;
    and what `saved.load` raises."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; name one that does not exist")
    run = saved.load(folder, data_root=data_root)
    cfg, backbone = run.learner.cfg, run.learner.backbone
    if not any(isinstance(slot, RoutedLinears) for slot in routed_layers(backbone)):
        raise ValueError(
            f"{folder} is a run of {cfg.model_name} without LoRA experts; dylora_moe has them if lora_target is set"
        )
    numbers = numbers_of(run)
    if expert not in numbers:
        known = ", ".join(map(str, numbers))
        raise ValueError(f"expert {expert} does not exist after task {run.task + 1} of {folder}, there are: {known}")
    loras = loras_of(backbone, numbers.index(expert))
    save_peft(out, loras, cfg.backbone_type)
    layers, targets = (dict.fromkeys(column) for column in zip(*loras, strict=True))
    where = f"{', '.join(targets)} of layers {', '.join(map(str, layers))} of {cfg.backbone_type}"
    size = sum(p.numel() for lora in loras.values() for p in lora.parameters())
    done = f"{out}: expert {expert} after task {run.task + 1}, on {where}, {size:,} parameters"
    return "; ".join([done, *run.notes])


def numbers_of(run: saved.SavedRun) -> list[int]:
    """The lasting numbers of the experts there are: 0, 1, .. without a router, since only routed experts are ever merged, else
    those of the task's `gates` row. Raises ValueError if that is lost."""
    if not run.learner.routed_layers():
        return list(range(len(routed_layers(run.learner.backbone)[0])))
    path = run.folder / "metrics.jsonl"
    rows = routing.of_task(load_rows(path) if path.is_file() else [], "gates", run.task)
    if not rows:
        raise ValueError(f"{path} has no `gates` row of task {run.task + 1}, which tells the numbers of the experts")
    return list(rows[-1]["experts"])


def main(argv: list[str] | None = None) -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("run", type=Path, metavar="RUN", help="folder of a run: OUT/<config name>/<hash>/seed_<seed>")
    ask.add_argument("expert", type=int, metavar="EXPERT", help="its number, as in the run's pictures")
    ask.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    ask.add_argument("--data-root", help="where the data are, if not where the run had them")
    args = ask.parse_args(argv)
    try:
        print(printable(export(args.run, args.expert, args.out, args.data_root)))
    except (ValueError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
