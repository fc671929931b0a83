"""The help of main.py, printed when nothing is asked for."""

from __future__ import annotations

import argparse


def run(args: argparse.Namespace) -> int:
    print(args.help, end="")
    return 0
