"""Evaluate encoders on labelled images. `python run_downstream.py --help` lists every flag; the code is in downstream/."""

from __future__ import annotations

from downstream.main import get_args_parser, main
from util.errors import run_cli

__all__ = ["get_args_parser", "main"]

if __name__ == "__main__":
    run_cli(main)
