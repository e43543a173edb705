"""`downstream.data.read_from_args` from code: a data set, its folder, and options by name."""

from __future__ import annotations

import argparse
from pathlib import Path

from downstream.data import read_from_args
from downstream.data.choices import add_arguments
from downstream.data.labelled import LabelledImages


def read_dataset(name: str, path: Path | list[Path], *, need_images: bool = True, **chosen: object) -> LabelledImages:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    paths = path if isinstance(path, list) else [path]
    args = parser.parse_args(["--dataset", name, "--data_path", *map(str, paths)])
    assert chosen.keys() <= vars(args).keys()
    vars(args).update(chosen)
    return read_from_args(args, need_images=need_images)
