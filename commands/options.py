"""The command line of main.py: its flags, and which of them go together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from utils.text import printable

EXAMPLES = """five commands to start with:
  python main.py --config exps/quickstart.json
  python main.py --config exps/sema_glyphs.json --check
  python main.py --config exps/sema_digits_short.json --set exp_threshold=1 --set seed=[1,2,3]
  python main.py --config exps/sema_cifar.json --data-root ~/data --device cuda
  python main.py --list"""

PROFILED_NOTHING = " (--profile has nothing to measure: --resume never runs it anew)"
# What one can ask for instead of a run, and the flags that have an effect beside it. --debug goes with everything.
COMMANDS = {
    "list": (),
    "explain": (),
    "report": ("figures",),
    "verify": (),
    "evaluate": ("data_root", "device", "out"),
    "export": ("data_root", "out", "format"),
    "predict": ("out", "top_k", "device"),
    "extend": ("set", "out", "device", "resume"),
    "compare": ("out", "columns", "figures"),
    "data": ("data_root",),
    "tune": ("config", "set", "out", "data_root", "device"),
    "check": ("config", "set", "out", "data_root", "device", "resume", "jobs", "engine"),
}
OUT = Path("logs")
SHIPPED = Path(__file__).resolve().parents[1]
RESERVED = ("", ".", "..", "latest")  # names in OUT that are no folder of an experiment
USES_SETTINGS_OF_RUN = ("evaluate", "export", "explain", "predict", "report", "verify")


def parse(argv: Sequence[str] | None, about: str) -> argparse.Namespace:
    """The flags; `command` is what is asked for: a key of COMMANDS, "run", or without any flag "help".

    Raises ValueError for flags that do not go together."""
    ask = parser(about)
    args = ask.parse_args(argv)
    stated = [key for key, value in vars(args).items() if value != ask.get_default(key)]
    asked = [key for key in stated if key in COMMANDS]
    if len(asked) > 1:
        raise ValueError(f"{_flag(asked[0])} and {_flag(asked[1])} are two things: ask for one at a time")
    if not stated or stated == ["debug"]:
        args.command, args.help = "help", ask.format_help()
        return args
    args.command = asked[0] if asked and asked[0] != "extend" else "run"
    if args.command in USES_SETTINGS_OF_RUN and set(stated) & {"config", "set"}:
        raise ValueError(
            f"{_flag(args.command)} RUN takes the settings of that run: --config and --set do not go with it"
        )
    if args.profile and (args.config is None or asked):
        raise ValueError("--profile measures a run: it goes with --config FILE alone")
    if idle := [key for key in stated if asked and key not in (*asked, *COMMANDS[asked[0]], "debug")]:
        raise ValueError(f"{_flag(idle[0])} has no effect with {_flag(asked[0])}: leave it out")
    for key, needed in (("columns", "--compare"), ("figures", "--report or --compare")):
        if key in stated and not asked:
            raise ValueError(f"{_flag(key)} has an effect beside {needed} alone: leave it out")
    if args.command in ("run", "check", "tune") and args.extend is None:
        if args.config is None:
            raise ValueError(f"--config FILE is needed beside {_flag(stated[0])}")
        if args.config.parts[:1] == ("exps",) and not args.config.exists() and (SHIPPED / args.config).is_file():
            args.config = SHIPPED / args.config  # the experiments that come with the program, from any folder
        if args.config.stem in RESERVED:
            raise ValueError(
                f"--config {args.config}: the folder of its runs would be called {args.config.stem!r}, which "
                "has another meaning; rename the file"
            )
    if args.command == "predict" and len(args.predict) < 2:
        raise ValueError("--predict RUN PATH...: name the images or folders of images behind the run")
    for key, command in (("format", "export"), ("top_k", "predict")):
        if key in stated and args.command != command:
            raise ValueError(f"{_flag(key)} has no effect without {_flag(command)}: leave it out")
    if args.command not in ("evaluate", "export", "predict"):
        args.out = args.out or OUT
    return args


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


class _Parser(argparse.ArgumentParser):
    """argparse repeats what it does not understand."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def parser(about: str) -> argparse.ArgumentParser:
    """Options of main.py; `about` opens the help."""
    ask = _Parser(
        prog="main.py", description=about, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("--config", type=Path, metavar="FILE", help="experiment JSON")
    ask.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key (JSON value, else string)"
    )
    ask.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"where run folders go (default: {OUT}); with --export, the new folder; with --predict and "
        "--evaluate, the file",
    )
    ask.add_argument("--data-root", metavar="DIR", help="folder that holds the data sets (overrides the key data_root)")
    ask.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (overrides the key device)")
    ask.add_argument(
        "--check",
        nargs="?",
        choices=("short", "all", "headers", "full"),
        const="short",
        help="look at all that a run needs, the header of every image too, show it in short, and stop: settings that are not "
        "the defaults, tasks, data, weights, parameters; all: every key with its meaning, every task, and the time "
        "and memory of a measured step; headers: the same without measuring; full: as headers, and decode every image",
    )
    ask.add_argument(
        "--tune",
        nargs="*",
        metavar="KEY=[VALUES]",
        help="choose among settings (these, or the key tune of the file) on held-out training images of the first task, and "
        "write the best as an experiment file; no test image is read",
    )
    ask.add_argument(
        "--resume", choices=("auto", "never"), default="auto", help="never: start afresh, old folders stay"
    )
    ask.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="runs at a time, for a sweep or several seeds (default: one for each free core where the backbone is the embedded "
        "one and computes on the CPU, else 1)",
    )
    ask.add_argument(
        "--engine",
        choices=("local", "slurm", "ray"),
        default="local",
        help="where the runs of a sweep go: this machine, or a cluster as the keys slurm_* and ray_* say",
    )
    ask.add_argument(
        "--evaluate",
        type=Path,
        metavar="RUN",
        help="score a saved run's model again on every task it learned, and compare; --out FILE.npz: also write prediction and "
        "scores of every test image",
    )
    ask.add_argument(
        "--export",
        type=Path,
        metavar="RUN",
        help="write a saved run's adapted model as model.safetensors and config.json into RUN/export, or --out",
    )
    ask.add_argument(
        "--format",
        choices=("onnx", "torchscript"),
        help="with --export: also write the model for programs without this one, checked on the test images",
    )
    ask.add_argument(
        "--predict",
        nargs="+",
        type=Path,
        metavar=("RUN", "PATH"),
        help="the classes of images (files, or folders of any depth) by a run's or an export's model, as CSV",
    )
    ask.add_argument(
        "--top-k",
        type=_positive,
        default=1,
        metavar="K",
        help="with --predict: classes an image, best first (default: 1)",
    )
    ask.add_argument(
        "--extend",
        type=Path,
        metavar="RUN",
        help="new classes after a finished run: --set data_path=FOLDER names them, --set increment=N or a list the tasks; RUN "
        "stays as it is, the new run has a folder of its own",
    )
    ask.add_argument("--explain", type=Path, metavar="RUN", help="say in plain sentences what happened in a run")
    ask.add_argument(
        "--report",
        type=Path,
        metavar="RUN",
        help="write the report.html of a finished run, or of a folder of runs, again",
    )
    ask.add_argument(
        "--verify", type=Path, metavar="RUN", help="compare a run of a shipped experiment with its expected numbers"
    )
    ask.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="finished runs side by side: a table and a page (--out FILE.html, or the table alone as FILE.txt, .csv, .md "
        "or .tex; default: compare.html in --out's folder). RUN: "
        "a seed's folder, or any folder with runs below it",
    )
    ask.add_argument(
        "--figures",
        action="store_true",
        help="with --report or --compare, also write each picture as SVG and PDF for papers",
    )
    ask.add_argument(
        "--columns",
        metavar="NAME,NAME",
        help="with --compare, the columns of the table: last, average, forgetting, parameters, adapters, time, memory, "
        "trained, task_mean, task_known, transfer, learning, ece, operations, cpu_hours, gpu_hours (default: the first three)",
    )
    ask.add_argument(
        "--data",
        nargs="+",
        metavar=("fetch", "NAME"),
        help="download published data sets to --data-root: sizes, checksums, goes on after an interruption",
    )
    ask.add_argument(
        "--list",
        nargs="*",
        metavar="WORD",
        help="show methods, data sets, backbones and experiment files; --list methods, data, backbones or exps: those alone "
        "with what they are, data with images, licence and download; a further word: those that have it",
    )
    ask.add_argument(
        "--profile",
        action="store_true",
        help="measure where the time of each task goes: a table, a picture, no other number",
    )
    ask.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return ask


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is expected, got {text!r}")
    return int(text)
