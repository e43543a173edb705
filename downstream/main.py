"""Judge pretrained encoders on labelled chest X-rays. See docs/downstream.md; `--help` lists every flag."""

from __future__ import annotations

import argparse
import filecmp
import json
import tempfile
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import torch

from downstream.data import add_arguments, read_from_args
from downstream.data.choices import AUTO, PUBLISHED
from downstream.data.images import Reading, Views, add_image_arguments, deep_note, open_squares, reading_from_args
from downstream.data.labelled import (
    TEST,
    LabelledImages,
    check_classes,
    check_min_positives,
    files_digest,
    lone_in_fractions,
    split_table,
    study_digest,
    write_split,
)
from downstream.data.partition import folds_of, in_folds, partitions
from downstream.data.tree import ANY_FINDING
from downstream.encoders import DEFAULT_MODEL, Candidate, describe, read_candidates
from downstream.evaluate import evaluate, read_models
from downstream.figure import results_figure
from downstream.finetune import RECIPES, Tuning, finetune_all
from downstream.frozen import Frozen, linear, probe
from downstream.heads import ENCODE_BATCH, HeadOptions, Stopped, steps_per_epoch
from downstream.heeded import METHODS, without_effect
from downstream.jobs import Jobs, digest
from downstream.results import (
    PUBLISHED_IMAGES,
    Outcome,
    left_out,
    markdown_table,
    results_table,
    write_predictions,
    write_results,
    write_text,
)
from util import distributed
from util.bootstrap import MIN_DRAWS
from util.cli import Parser, check_least, check_positive, finite_float, seed_number
from util.errors import UserError
from util.export import stored_weights
from util.figures import save_figure
from util.files import replace_together
from util.output import hold_output, writing_results
from util.precision import set_tf32
from util.stop import StopSignals, exit_status
from util.subjects import overlap_note

SPLIT, RESULTS = "split.csv", ("results.csv", "predictions.csv", "table.md", "results.png")
RECIPE_HELP = {
    "epochs": "where training ends at the latest",
    "batch_size": "training images per step, over all processes",
    "lr": "highest learning rate",
    "weight_decay": "weight decay",
    "warmup": "share of all steps in which the learning rate rises",
    "patience": "epochs without a lower validation loss before stopping",
    "layer_decay": "finetune: learning rate of a block over that of the next one",
    "drop_path": "finetune: stochastic depth of the last block",
    "pool": "finetune: what the head sees: token (cls) or avg (mean of the patches)",
}
NARROW = (
    "AUCs of grouped folds are the mean of the folds'; their intervals are too narrow, since the folds share their "
    "training images: on made-up features of 240 images, 95% intervals held the truth in 77% to 89% of the runs"
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default where the help does not tell it already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = "(default" in action.help or action.default in (None, False)
        return action.help if told else super()._get_help_string(action)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("run_downstream.py", description=__doc__, formatter_class=HelpFormatter)
    add_arguments(parser)
    add_image_arguments(parser)
    # fmt: off
    parser.add_argument("--dry_run", action="store_true",
        help="read the tables and --weights, write split.csv, and stop")

    add = parser.add_argument_group("encoders").add_argument
    add("--weights", nargs="+", default=[], metavar="NAME=FILE",
        help="encoders to compare: NAME=FILE of a plain ViT, NAME=FILE@TIMM_MODEL, NAME=FOLDER of transformers, imagenet, "
             f"random (as the first file, or {DEFAULT_MODEL}), random@TIMM_MODEL, or pixels (no encoder)")
    add("--imagenet", default=f"preTrain/{stored_weights(DEFAULT_MODEL).name}", help="file of the imagenet weights")
    add("--tap", default="last", help="of a pretraining checkpoint: last, or which tap's norm, from 0")

    add("--img_size", type=int, help="side of an encoder's input in px (default: as it was trained)")
    add("--num_heads", type=int, help="attention heads, for files that don't say how many they have")

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="linear", help="how the encoders are judged")
    add("--fractions", nargs="+", type=finite_float, default=[1.0], help="shares of the training images to use")
    add("--seeds", nargs="+", type=seed_number, default=[43, 44, 45], help="of heads, order and folds")
    add("--folds", type=int, default=5, help="grouped folds of --split folds")
    add("--views", type=int, default=10, help="linear: augmented views per training image, cycled through")
    add("--recipe", choices=tuple(RECIPES), default="published",
        help="finetune: as published, or layer_decay: AdamW with layer-wise decay, mean of patches")
    for name, helped in RECIPE_HELP.items():
        default = getattr(RECIPES["published"], name)
        values = ", ".join(f"{getattr(recipe, name)} {title}" for title, recipe in RECIPES.items())
        add(f"--{name}", type=type(default), default=None, help=f"{helped} (default: {values})")

    add = parser.add_argument_group("output and machine").add_argument
    add("--output_dir", default="output_dir/downstream", help="results.csv, predictions.csv, table.md, results.png")
    add("--features_dir", help="features of frozen encoders (default: OUTPUT_DIR/features)")
    add("--cache_dir", help="decoded images (default: OUTPUT_DIR/cache)")
    add("--no_cache", action="store_false", dest="use_cache", help="decode the image files in every view")
    add("--bootstrap", type=int, default=1000, help="draws of subjects for the intervals")
    add("--min_positives", type=int, default=1,
        help="the mean leaves out labels with fewer test images with or without them")
    batches = ", ".join(f"{batch} on {device.upper()}" for device, batch in ENCODE_BATCH.items())
    add("--encode_batch", type=int,
        help=f"images per forward pass of an encoder that is not trained (default: {batches})")
    add("--num_workers", type=int, default=4, help="processes that read images")
    add("--device", default="cuda", help="cuda or cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None,
        help="autocast type (default: bfloat16 on CUDA, float32 on CPU)")
    add("--max_minutes", type=finite_float, help="stop after so long, exit status 75; the same command goes on")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    useless = without_effect(args, parser)
    check_args(args)
    with StopSignals(args.max_minutes) as signals:
        with signals.default_handlers():
            ranks = distributed.start(args.device)
        if useless:
            ranks.say(f"warning: without effect here: {', '.join(useless)}")
        status = run(args, ranks, signals)
        distributed.stop()
    return status


def run(args: argparse.Namespace, ranks: distributed.Ranks, signals: StopSignals) -> int:
    """Read, judge and report; returns the exit status (util/stop.py)."""
    if ranks.world_size > 1 and args.method != "finetune":
        raise UserError(f"--method {args.method} runs in one process; start it without torchrun")
    with signals.exit_at_signal():  # so far there is nothing to save
        images = read_from_args(args, need_images=not args.dry_run)
    ranks.say("\n".join([*images.notes, split_table(images)]))
    if not args.weights and not args.dry_run:
        raise UserError("--weights: name at least one encoder: NAME=FILE, imagenet, random or pixels")
    with hold_output(args.output_dir, ranks=ranks):
        output_dir = Path(args.output_dir)
        distributed.on_main(ranks, lambda: start_output(output_dir, images, args))
        if args.dry_run:
            ranks.say(f"wrote {output_dir / 'split.csv'}")
        # After the table and split.csv, which show where a class lacks.
        if args.method != "evaluate":
            for line in [*check_classes(images), *lone_in_fractions(images, args.fractions)]:
                ranks.say(line)
            tested = images.indices("" if in_folds(images) else TEST)
            check_min_positives(args.min_positives, images, images.labels[tested])
        if args.dry_run:
            with signals.exit_at_signal():
                for line in look_ahead(args, images):
                    ranks.say(line)
            return 0
        try:
            outcomes = judge(args, images, ranks, signals)
        except Stopped:
            ranks.say("stopped; the same command goes on from here")
            return exit_status(max(ranks.gather(signals.request)))
        distributed.on_main(ranks, lambda: report(args, images, outcomes))
    return 0


def check_args(args: argparse.Namespace) -> None:
    """Refuse values that can't work, by the flag's name, before anything is read."""
    for name in RECIPE_HELP:
        if getattr(args, name) is None:
            setattr(args, name, getattr(RECIPES[args.recipe if args.method == "finetune" else "published"], name))
    check_least(args, 1, "views", "epochs", "batch_size", "patience", "encode_batch", "min_positives", "folds")
    check_least(args, MIN_DRAWS, "bootstrap")
    check_least(args, 0, "num_workers", "weight_decay", "max_minutes")
    check_positive(args, "lr")
    if not 0 <= args.warmup < 1:
        raise UserError(f"--warmup {args.warmup}: must be at least 0 and below 1")
    for value in args.fractions:
        if not 0 < value <= 1:
            raise UserError(f"--fractions {value}: must be above 0, at most 1")
    for name in ("fractions", "seeds"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            raise UserError(f"--{name} {' '.join(map(str, values))}: a value is named twice")
    if not 0 < args.layer_decay <= 1:
        raise UserError(f"--layer_decay {args.layer_decay}: must be above 0, at most 1")
    if not 0 <= args.drop_path < 1:
        raise UserError(f"--drop_path {args.drop_path}: must be at least 0 and below 1")
    if args.pool not in ("token", "avg"):
        raise UserError(f"--pool {args.pool}: expected token or avg")


def start_output(output_dir: Path, images: LabelledImages, args: argparse.Namespace) -> None:
    """Write split.csv and study.json. `UserError` where `output_dir` has results of another data set or method."""
    path = output_dir / "study.json"
    study = {"dataset": images.name, "method": args.method}
    if path.exists() and not args.dry_run:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path}: damaged; move it away") from None
        if found != study:
            raise UserError(
                f"--output_dir {output_dir}: holds results of {found.get('dataset')}, {found.get('method')}, not of "
                f"{images.name}, {args.method}; choose another"
            )
    try:
        if not _holds_other_results(output_dir, images):
            write_split(images, output_dir / SPLIT)
        elif args.dry_run:
            raise UserError(
                f"--output_dir {output_dir}: holds results of another split; choose another for this --dry_run"
            )
        else:
            print(f"{output_dir} holds results of another split: they stay, with its split.csv, until these are made")
        if not args.dry_run:
            write_text(json.dumps(study), path)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: can't be written: {error.strerror}") from None


def _holds_other_results(output_dir: Path, images: LabelledImages) -> bool:
    """Whether results are there, and split.csv beside them is not that of `images`."""
    if not any((output_dir / name).exists() for name in RESULTS):
        return False
    if not (output_dir / SPLIT).exists():
        return True
    with tempfile.TemporaryDirectory() as folder:
        write_split(images, Path(folder, SPLIT))
        return not filecmp.cmp(Path(folder, SPLIT), output_dir / SPLIT, shallow=False)


def candidates_of(args: argparse.Namespace) -> list[Candidate]:
    """The encoders of --weights, read. Raises `UserError`."""
    return read_candidates(
        args.weights, imagenet=args.imagenet, tap=args.tap, img_size=args.img_size, num_heads=args.num_heads
    )


def look_ahead(args: argparse.Namespace, images: LabelledImages) -> list[str]:
    """What --weights are, for a --dry_run. `UserError` for what a run would refuse after reading many images: weights
    that can't be read, and shares of the training images that are less than a batch."""
    if args.method != "evaluate":
        heads = args.method != "probe"
        for fraction in args.fractions:
            for seed in args.seeds if in_folds(images) else args.seeds[:1]:
                for rows in partitions(images, fraction, seed=seed, n_folds=args.folds, validate=heads):
                    if heads:
                        steps_per_epoch(len(rows.train), args.batch_size)
    if args.method == "evaluate":
        return [f"{name}: {', '.join(model.labels)}" for name, model in read_models(args, images)[0].items()]
    return [describe(candidate, args.normalisation) for candidate in candidates_of(args)]


def judge(
    args: argparse.Namespace, images: LabelledImages, ranks: distributed.Ranks, signals: StopSignals
) -> list[Outcome]:
    """Scores of the test images by every encoder, fraction and seed. Raises `Stopped`, `UserError`."""
    output_dir = Path(args.output_dir)
    set_tf32(False)
    dtype = getattr(torch, args.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32"))
    encode_batch = args.encode_batch or ENCODE_BATCH[ranks.device.type]
    study_key = study_digest(images)
    common = dict(
        task=images.task,
        dataset=images.name,
        method=args.method,
        min_count=args.min_positives,
        draws=args.bootstrap,
        not_in_mean=(ANY_FINDING,) if args.dataset == "tree" else (),
        study=digest([study_key, args.folds if in_folds(images) else 0]),
        as_published=as_published(args, images),
    )
    if args.method == "evaluate":
        with signals.exit_at_signal():
            tuned, labels, readings = read_models(args, images)
            views = {reading: open_views(args, images, ranks, reading) for reading in dict.fromkeys(readings.values())}
        options = dict(dtype=dtype, batch_size=encode_batch, num_workers=args.num_workers, ranks=ranks, signals=signals)
        return [
            evaluate(name, model, images, labels, views[readings[name]], common, **options)
            for name, model in tuned.items()
        ]
    with signals.exit_at_signal():
        candidates = candidates_of(args)
        ranks.say("\n".join(describe(candidate, args.normalisation) for candidate in candidates))
        views = open_views(args, images, ranks, reading_from_args(args))
    jobs = Jobs(output_dir / "jobs")
    views_key = [asdict(views.reading), images.strong_augmentation]
    files_key = files_digest(images)
    settings = {name: getattr(args, name) for name in RECIPE_HELP}
    outcomes = []
    for candidate in candidates:
        mean, std = candidate.normalisation(args.normalisation)
        if args.method == "finetune":
            tuning = Tuning(
                images=images,
                open_views=lambda seed: Views(images, seed=seed, plane=views.plane, reading=views.reading),
                recipe=replace(RECIPES[args.recipe], **settings),
                mean=mean,
                std=std,
                dtype=dtype,
                test_batch=encode_batch,
                num_workers=args.num_workers,
                ranks=ranks,
                signals=signals,
            )
            found = finetune_all(
                tuning,
                candidate,
                fractions=args.fractions,
                seeds=args.seeds,
                n_folds=args.folds,
                jobs=jobs,
                runs=output_dir / "runs",
                key=[files_key, views_key, study_key],
            )
        else:
            heads = HeadOptions(**{field.name: settings[field.name] for field in fields(HeadOptions)})
            frozen = Frozen(
                images=images,
                views=views,
                views_key=views_key,
                files_key=files_key,
                study_key=study_key,
                fractions=args.fractions,
                seeds=args.seeds,
                n_folds=args.folds,
                n_views=args.views,
                heads=heads,
                features_dir=Path(args.features_dir or output_dir / "features"),
                jobs=jobs,
                device=ranks.device,
                dtype=dtype,
                batch_size=encode_batch,
                num_workers=args.num_workers,
                signals=signals,
            )
            found = (linear if args.method == "linear" else probe)(frozen, candidate, mean, std)
        tested = images.subjects[images.indices("" if in_folds(images) else TEST)]
        if note := overlap_note(candidate.name, candidate.seen, tested, images.study):
            ranks.say(note)
        for (kind, fraction, seed), (rows, scores) in found.items():
            outcomes.append(
                Outcome(
                    **common,
                    weights=f"{candidate.name}, {kind}" if kind else candidate.name,
                    fraction=fraction,
                    seed=seed,
                    label_names=images.label_names,
                    ids=[images.ids[row] for row in rows],
                    subjects=images.subjects[rows],
                    targets=images.labels[rows],
                    scores=scores,
                    folds=folds_of(images, seed, args.folds)[rows] if in_folds(images) else None,
                    note=note,
                )
            )
    return outcomes


def as_published(args: argparse.Namespace, images: LabelledImages) -> bool:
    """Whether images, parts and labels are all those of the published results."""
    chosen, tests = args.split not in (AUTO, PUBLISHED) or args.labels or args.where, len(images.indices(TEST))
    return not chosen and PUBLISHED_IMAGES.get(images.name) == (len(images) - tests, tests)


def open_views(args: argparse.Namespace, images: LabelledImages, ranks: distributed.Ranks, reading: Reading) -> Views:
    """The images' views, from the cache of decoded images unless --no_cache; rank 0 builds it."""
    for note in deep_note(images.files, reading):
        ranks.say(note)
    plane = None
    if args.use_cache:
        place = args.cache_dir or Path(args.output_dir) / "cache"
        open_plane = partial(open_squares, images, place, reading=reading, num_workers=args.num_workers)
        distributed.on_main(ranks, lambda: open_plane() and None)
        plane = open_plane()
    return Views(images, plane=plane, reading=reading)


def report(args: argparse.Namespace, images: LabelledImages, outcomes: list[Outcome]) -> None:
    """Write and print the results."""
    output_dir = Path(args.output_dir)
    notes = [NARROW] * in_folds(images) + list(dict.fromkeys(outcome.note for outcome in outcomes if outcome.note))
    table = results_table(outcomes)
    text = markdown_table(outcomes, notes)
    first = outcomes[0]
    title = [f"{first.dataset}, {first.method}: {len(first.ids):,} test images", left_out(first), *notes]
    figure = results_figure(table, [line for line in title if line])
    with writing_results(output_dir), replace_together(output_dir, first=SPLIT) as fresh:
        write_split(images, fresh / SPLIT)
        write_predictions(outcomes, fresh / "predictions.csv")
        write_results(table, fresh / "results.csv")
        write_text(text, fresh / "table.md")
        save_figure(figure, fresh / "results.png")
    print(text)
    print(f"wrote results.csv, predictions.csv, table.md and results.png into {output_dir}")
