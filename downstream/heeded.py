"""Which flags of run_downstream.py a call heeds, so that none is passed over in silence."""

from __future__ import annotations

import argparse

from downstream.encoders import IMAGENET, PIXELS, RANDOM

METHODS = ("linear", "probe", "finetune", "evaluate")
# Flags that only some methods heed. What all training methods share may stand in a loop over methods, so that these are
# told, not refused.
HEEDED_BY = {
    "views": ("linear",),
    "recipe": ("finetune",),
    **dict.fromkeys(("epochs", "batch_size", "lr", "weight_decay", "warmup", "patience"), ("linear", "finetune")),
    **dict.fromkeys(("layer_decay", "drop_path", "pool"), ("finetune",)),
    "features_dir": ("linear", "probe"),
    **dict.fromkeys(
        ("fractions", "seeds", "folds", "normalisation", "imagenet", "tap", "img_size", "num_heads"),
        ("linear", "probe", "finetune"),
    ),
}


def without_effect(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Flags that differ from their defaults and that nothing heeds, with the reason where it is not the method."""
    given = [name for name in vars(args) if getattr(args, name) != parser.get_default(name)]
    found = [f"--{name}" for name in given if args.method not in HEEDED_BY.get(name, METHODS)]
    files = any(text.partition("@")[0] not in (RANDOM, IMAGENET, PIXELS) for text in args.weights)
    needs = {
        "folds": (args.split == "folds", "--split folds"),
        "imagenet": (IMAGENET in args.weights, "imagenet in --weights"),
        "tap": (files, "a file in --weights"),
        "num_heads": (files, "a file in --weights"),
        "img_size": (files or IMAGENET in args.weights, "a file in --weights"),
    }
    for name, (there, what) in needs.items():
        if name in given and f"--{name}" not in found and not there:
            found.append(f"--{name} (without {what})")
    return [] if args.dry_run else found
