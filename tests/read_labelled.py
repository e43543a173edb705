"""Labelled images: read by `downstream.data.read_from_args` with options by name, or made up."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

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


def make_labelled(labels, parts="", **others: object) -> LabelledImages:
    """Images named by their places with labels [N, C]; each is its own subject, unless `others` have subjects."""
    labels = np.asarray(labels, np.float32)
    ids = [str(i) for i in range(len(labels))]
    facts = {"files": [Path(f"{name}.png") for name in ids], "subjects": np.array(ids)} | others
    names = [f"L{k}" for k in range(labels.shape[1])]
    return LabelledImages(
        name="made up", ids=ids, parts=np.broadcast_to(parts, len(ids)), label_names=names, labels=labels, **facts
    )
