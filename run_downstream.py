"""Judge pretrained encoders on labelled chest X-rays. See docs/downstream.md; `--help` lists every flag."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch

from datasets.downstream import add_arguments, read_from_args
from datasets.downstream.images import (
    Views,
    add_image_arguments,
    deep_note,
    normalisation,
    open_squares,
    reading_from_args,
)
from datasets.downstream.labelled import LabelledImages, check_classes, split_table, write_split
from datasets.downstream.partition import in_folds
from engine_downstream import HeadOptions
from engine_frozen import Frozen, Stopped, linear, probe
from util.encoders import IMAGENET, PIXELS, Candidate, read_candidates
from util.errors import UserError, run_cli
from util.files import atomic_write
from util.jobs import Jobs, digest
from util.locks import file_lock
from util.pictures import save_figure
from util.pretrained import weights_name
from util.results import (
    Outcome,
    left_out,
    markdown_table,
    results_table,
    write_predictions,
    write_results,
    write_text,
)
from util.results_figure import results_figure
from util.stop import StopSignals, exit_status
from util.weights import summarize_keys

METHODS = ("linear", "probe", "finetune", "evaluate")
NARROW = (
    "intervals of grouped folds are too narrow, since the folds share their training images: with features that "
    "tell nothing, 95% intervals held 0.5 in 86% of 160 runs"
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "run_downstream.py",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    add_image_arguments(parser)
    parser.add_argument("--dry_run", action="store_true", help="read the tables, write split.csv, and stop")

    add = parser.add_argument_group("encoders").add_argument
    add("--weights", nargs="+", default=[], metavar="NAME=FILE",
        help="encoders to compare: NAME=FILE, imagenet, random, or pixels (no encoder)")  # fmt: skip
    add("--imagenet", default=f"preTrain/{weights_name('base')}", help="file of the imagenet weights")
    add("--tap", default="last", help="of a pretraining checkpoint: last, or which tap's norm, from 0")

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="linear", help="how the encoders are judged")
    add("--fractions", nargs="+", type=float, default=[1.0], help="shares of the training images to use")
    add("--seeds", nargs="+", type=int, default=[43, 44, 45], help="of heads, order and folds")
    add("--folds", type=int, default=5, help="grouped folds of --split folds")
    add("--views", type=int, default=10, help="linear: augmented views per training image, cycled through")
    add("--epochs", type=int, default=50, help="where training ends at the latest")
    add("--batch_size", type=int, default=64, help="training images per step")
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add("--weight_decay", type=float, default=1e-5, help="weight decay")
    add("--warmup", type=float, default=0.4, help="share of all steps in which the learning rate rises")
    add("--patience", type=int, default=10, help="epochs without a lower validation loss before stopping")

    add = parser.add_argument_group("output and machine").add_argument
    add(
        "--output_dir",
        default="output_dir/downstream",
        help="results.csv, predictions.csv, table.md, results.png",
    )
    add("--features_dir", help="features of frozen encoders (default: OUTPUT_DIR/features)")
    add("--cache_dir", help="decoded images (default: OUTPUT_DIR/cache)")
    add("--no_cache", action="store_false", dest="use_cache", help="decode the image files in every view")
    add("--bootstrap", type=int, default=1000, help="draws of subjects for the intervals")
    add("--min_positives", type=int, default=1,
        help="the mean leaves out labels with fewer test images with or without them")  # fmt: skip
    add("--encode_batch", type=int, default=64, help="images per forward pass of a frozen encoder")
    add("--num_workers", type=int, default=4, help="processes that read images")
    add("--device", default="cuda", help="cuda or cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None,
        help="autocast type (default: bfloat16 on CUDA, float32 on CPU)")  # fmt: skip
    add("--max_minutes", type=float, help="stop after so long, exit status 75; the same command goes on")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    check_args(args)
    images = read_from_args(args, need_images=not args.dry_run)
    for line in [*images.notes, *check_classes(images), split_table(images)]:
        print(line)
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_split(images, output_dir / "split.csv")
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: can't be written: {error.strerror}") from None
    if args.dry_run:
        print(f"wrote {output_dir / 'split.csv'}")
        return 0
    if not args.weights:
        raise UserError("--weights: name at least one encoder: NAME=FILE, imagenet, random or pixels")
    mend = "wait for it, or choose another --output_dir"
    with (
        file_lock(output_dir / "lock", what=f"output_dir {output_dir}", mend=mend),
        StopSignals(args.max_minutes) as signals,
    ):
        check_same_study(output_dir, images, args.method)
        candidates = read_candidates(args.weights, imagenet=args.imagenet, tap=args.tap)
        for candidate in candidates:
            print(describe(candidate))
        try:
            outcomes = judge(args, images, candidates, signals)
        except Stopped:
            print("stopped; the same command goes on from here")
            return exit_status(signals.request)
        report(args, images, outcomes)
    return 0


def check_args(args: argparse.Namespace) -> None:
    """Refuse values that can't work, by the flag's name, before anything is read."""
    for name in ("views", "epochs", "batch_size", "patience", "encode_batch", "bootstrap", "min_positives"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in ("num_workers", "weight_decay"):
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: must not be negative")
    if not 0 < args.lr < math.inf:
        raise UserError(f"--lr {args.lr}: must be above 0")
    if not 0 <= args.warmup < 1:
        raise UserError(f"--warmup {args.warmup}: must be at least 0 and below 1")
    for name, values, fine in (
        ("fractions", args.fractions, lambda value: 0 < value <= 1),
        ("seeds", args.seeds, lambda value: 0 <= value < 2**32),
    ):
        for value in values:
            if not fine(value):
                raise UserError(
                    f"--{name} {value}: must be {'above 0, at most 1' if name == 'fractions' else '0 or more'}"
                )
            if values.count(value) > 1:
                raise UserError(f"--{name}: {value} is named twice")
    if args.max_minutes is not None and not args.max_minutes >= 0:
        raise UserError(f"--max_minutes {args.max_minutes}: must not be negative")
    if args.device not in ("cuda", "cpu"):
        raise UserError(f"--device {args.device}: use cuda or cpu (CUDA_VISIBLE_DEVICES chooses GPUs)")


def check_same_study(output_dir: Path, images: LabelledImages, method: str) -> None:
    """One output_dir holds one data set and method: `UserError` where it has results of another."""
    path = output_dir / "study.json"
    study = {"dataset": images.name, "method": method}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != study:
            raise UserError(
                f"--output_dir {output_dir}: holds results of {found.get('dataset')}, {found.get('method')}, not of "
                f"{images.name}, {method}; choose another"
            )
    with atomic_write(path, "w") as file:
        json.dump(study, file)


def describe(candidate: Candidate) -> str:
    """What was found in a file, or what stands in for one."""
    backbone = candidate.backbone
    if candidate.kind == PIXELS:
        return f"{candidate.name}: no encoder, gray values of 56 x 56 px"
    if backbone is None or candidate.kind == "random":
        shape = (
            "vit_base_patch16_224" if backbone is None else f"{backbone.timm_name} of {backbone.depth} blocks"
        )
        return f"{candidate.name}: random weights, {shape}"
    lines = [f"{candidate.name}: {backbone.source.path}, {backbone.timm_name}"
             + (f", prefix {backbone.prefix}" if backbone.prefix else "")]  # fmt: skip
    for title, names in (
        ("matched", list(backbone.state)),
        ("missing", []),
        ("ignored", list(backbone.ignored)),
    ):
        lines.append(f"  {title:8s}{len(names):4d}  {summarize_keys(names)[:160]}".rstrip())
    return "\n".join(lines)


def judge(
    args: argparse.Namespace, images: LabelledImages, candidates: list[Candidate], signals: StopSignals
) -> list[Outcome]:
    """Scores of the test images by every encoder, fraction and seed. Raises `Stopped`, `UserError`."""
    device = torch.device("cuda" if args.device == "cuda" and torch.cuda.is_available() else "cpu")
    if device.type != args.device:
        print("warning: no CUDA device is available, working on the CPU instead (--device cpu)", flush=True)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    output_dir = Path(args.output_dir)
    reading = reading_from_args(args)
    for note in deep_note(images.files, reading):
        print(note)
    plane = None
    if args.use_cache:
        place = args.cache_dir or output_dir / "cache"
        plane = open_squares(images, place, reading=reading, num_workers=args.num_workers)
    views = Views(images, plane=plane, reading=reading)
    frozen = Frozen(
        images=images, views=views, views_key=[asdict(reading), images.strong_augmentation], files_key=files_digest(images),
        study_key=study_digest(images), fractions=args.fractions, seeds=args.seeds, n_folds=args.folds,
        n_views=args.views, features_dir=Path(args.features_dir or output_dir / "features"),
        heads=HeadOptions(args.epochs, args.batch_size, args.lr, args.weight_decay, args.warmup, args.patience),
        jobs=Jobs(output_dir / "jobs"), device=device, dtype=getattr(torch, dtype), batch_size=args.encode_batch,
        num_workers=args.num_workers, signals=signals,
    )  # fmt: skip
    outcomes = []
    for candidate in candidates:
        # timm's configuration of the ImageNet weights says 0.5, whatever ours were pretrained with.
        mean, std = normalisation("half" if candidate.kind == IMAGENET else args.normalisation)
        if args.method == "linear":
            found = {("", *place): value for place, value in linear(frozen, candidate, mean, std).items()}
        else:
            found = probe(frozen, candidate, mean, std)
        for (kind, fraction, seed), (rows, scores) in found.items():
            outcomes.append(
                Outcome(
                    weights=f"{candidate.name}, {kind}" if kind else candidate.name, dataset=images.name,
                    method=args.method, fraction=fraction, seed=seed, task=images.task,
                    label_names=images.label_names, ids=[images.ids[row] for row in rows],
                    subjects=images.subjects[rows], targets=images.labels[rows], scores=scores,
                    min_count=args.min_positives, draws=args.bootstrap,
                )
            )  # fmt: skip
    return outcomes


def report(args: argparse.Namespace, images: LabelledImages, outcomes: list[Outcome]) -> None:
    """Write and print the results."""
    output_dir = Path(args.output_dir)
    notes = [NARROW] if in_folds(images) else []
    table = results_table(outcomes)
    text = markdown_table(outcomes, notes)
    first = outcomes[0]
    title = [f"{first.dataset}, {first.method}: {len(first.ids):,} test images", left_out(first), *notes]
    write_predictions(outcomes, output_dir / "predictions.csv")
    write_results(table, output_dir / "results.csv")
    write_text(text, output_dir / "table.md")
    save_figure(results_figure(table, [line for line in title if line]), output_dir / "results.png")
    print(text)
    print(f"wrote results.csv, predictions.csv, table.md and results.png into {output_dir}")


def files_digest(images: LabelledImages) -> str:
    """Of all image files in order, by place, size and time of change."""
    stats = [(file, file.stat()) for file in images.files]
    return digest([[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats])


def study_digest(images: LabelledImages) -> str:
    """Of what is to be learnt: ids, subjects, parts and labels."""
    labels = hashlib.sha256(images.labels.tobytes()).hexdigest()
    return digest([images.ids, images.subjects.tolist(), images.parts.tolist(), images.label_names, labels])


if __name__ == "__main__":
    run_cli(main)
