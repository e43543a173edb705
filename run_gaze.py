"""Train and judge a gaze predictor: images to heatmaps. `python run_gaze.py --help` lists every flag; the code is in gaze/."""

from __future__ import annotations

from gaze.main import get_args_parser, main
from util.errors import run_cli

__all__ = ["get_args_parser", "main"]

if __name__ == "__main__":
    run_cli(main)
