"""Judge pretrained encoders on labelled chest X-rays. See docs/downstream.md; `--help` lists every flag."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from downstream.data import read_from_args
from downstream.data.choices import add_arguments
from downstream.data.images import add_image_arguments, leave_out_damaged, reading_from_args
from downstream.data.labelled import LabelledImages, check_labels, split_table, write_split
from downstream.data.partition import in_folds
from downstream.driver import RECIPES, Method, Work, judge, main_first
from downstream.encoders import DEFAULT_MODEL, describe, read_candidates
from downstream.evaluate import read_models
from downstream.figure import results_figure
from downstream.finetune import FineTune
from downstream.forward import Stopped
from downstream.frozen import Linear, Probe, steps_per_epoch
from downstream.results import Outcome, left_out, markdown_table, results_table, write_predictions, write_text
from util import distributed
from util.bootstrap import MIN_DRAWS
from util.cli import Parser, check_least, finite_float, seed_number
from util.errors import UserError
from util.figures import save_figure
from util.output import hold_output
from util.precision import set_tf32
from util.stop import StopSignals

METHODS = {"linear": Linear, "probe": Probe, "finetune": FineTune}
RECIPE_HELP = {
    "epochs": "where training ends at the latest",
    "batch_size": "training images per step, over all processes",
    "lr": "highest learning rate",
    "weight_decay": "weight decay",
    "warmup": "share of all steps in which the learning rate rises",
    "patience": "epochs without a lower validation loss before stopping",
    "layer_decay": "finetune: learning rate of a block over that of the next one",
}
IGNORED = {  # flags that a method does not use
    "linear": "recipe layer_decay",
    "probe": "views recipe epochs batch_size lr weight_decay warmup patience layer_decay",
    "finetune": "views features_dir",
    "evaluate": "views recipe epochs batch_size lr weight_decay warmup patience layer_decay features_dir fractions seeds folds "
    "normalisation imagenet img_size num_heads",
}
NARROW = (
    "AUCs of grouped folds are the mean of the folds'; their intervals are too narrow, since the folds share their "
    "training images: on made-up features of 240 images, 95% intervals held the truth in 77% to 89% of the runs"
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("run_downstream.py", description=__doc__)
    add_arguments(parser)
    add_image_arguments(parser)
    # fmt: off
    parser.add_argument("--dry_run", action="store_true",
        help="read the tables and --weights, write split.csv, and stop")

    add = parser.add_argument_group("encoders").add_argument
    add("--weights", nargs="+", default=[], metavar="NAME=FILE",
        help="encoders to compare: NAME=FILE of a plain ViT, NAME=FILE@TIMM_MODEL, NAME=FOLDER of transformers, imagenet, "
             f"random (as the first file, or {DEFAULT_MODEL}), random@TIMM_MODEL, or pixels (no encoder)")
    add("--imagenet", default="preTrain/vit_base_p16_224_timm.pth", help="file of the imagenet weights (default: %(default)s)")

    add("--img_size", type=int, help="side of an encoder's input in px (default: as it was trained)")
    add("--num_heads", type=int, help="attention heads, for files that don't say how many they have")

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=(*METHODS, "evaluate"), default="linear", help="how the encoders are judged (default: %(default)s)")
    add("--fractions", nargs="+", type=finite_float, default=[1.0], help="shares of the training images to use (default: %(default)s)")
    add("--seeds", nargs="+", type=seed_number, default=[43, 44, 45], help="seeds of heads, order and folds (default: %(default)s)")
    add("--folds", type=int, default=5, help="grouped folds of --split folds (default: %(default)s)")
    add("--views", type=int, default=10, help="linear: augmented views per training image, cycled through (default: %(default)s)")
    add("--recipe", choices=tuple(RECIPES), default="published",
        help="finetune: as published, or layer_decay: AdamW with layer-wise decay, mean of patches (default: %(default)s)")
    for name, helped in RECIPE_HELP.items():
        default = getattr(RECIPES["published"], name)
        values = ", ".join(f"{getattr(recipe, name)} {title}" for title, recipe in RECIPES.items())
        add(f"--{name}", type=type(default), help=f"{helped} (default: {values})")

    add = parser.add_argument_group("output and machine").add_argument
    add("--output_dir", default="output_dir/downstream", help="results.csv, predictions.csv, table.md, results.png (default: %(default)s)")
    add("--features_dir", help="features of frozen encoders (default: OUTPUT_DIR/features)")
    add("--cache_dir", help="decoded images (default: OUTPUT_DIR/cache)")
    add("--bootstrap", type=int, default=1000, help="draws of subjects for the intervals (default: %(default)s)")
    add("--min_positives", type=int, default=1,
        help="the mean leaves out labels with fewer test images with or without them (default: %(default)s)")
    add("--encode_batch", type=int,
        help="images per forward pass of an encoder that is not trained (default: 16 on CPU, 64 on CUDA)")
    add("--num_workers", type=int, default=4, help="processes that read images (default: %(default)s)")
    add("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None,
        help="autocast type (default: bfloat16 on CUDA, float32 on CPU)")
    add("--max_minutes", type=finite_float, help="stop after this many minutes, with exit status 75; the same command continues")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_least(args, 1, "views", "epochs", "batch_size", "patience", "encode_batch", "min_positives", "folds")
    check_least(args, MIN_DRAWS, "bootstrap")
    check_least(args, 0, "num_workers", "weight_decay", "max_minutes")
    for name in ("lr", "intensity_max"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise UserError(f"--{name} {value:g}: must be above 0")
    if not args.weights and not args.dry_run:
        raise UserError("--weights: name at least one encoder: NAME=FILE, imagenet, random or pixels")
    with StopSignals(args.max_minutes) as signals:
        with signals.default_handlers():
            ranks = distributed.start(args.device)
        useless = [flag for flag in IGNORED[args.method].split() if getattr(args, flag) != parser.get_default(flag)]
        if useless:
            ranks.say(f"warning: --method {args.method} does not use --{', --'.join(useless)}")
        args.cache_dir = args.cache_dir or Path(args.output_dir, "cache")
        with hold_output(args.output_dir, ranks=ranks):
            status = run(args, ranks, signals)
        distributed.stop()
    return status


def run(args: argparse.Namespace, ranks: distributed.Ranks, signals: StopSignals) -> int:
    """Read, judge and report; returns the exit status (util/stop.py)."""
    with signals.exit_at_signal():  # so far there is nothing to save
        images = read_from_args(args, need_images=not args.dry_run)
        ranks.say("\n".join([*images.notes, split_table(images)]))
        if args.skip_damaged and not args.dry_run:
            decode = partial(leave_out_damaged, images, args.cache_dir, reading=reading_from_args(args))
            images, damaged = main_first(ranks, decode)
            ranks.say("\n".join([*damaged, f"{len(damaged)} damaged images are left out", split_table(images)]))
        work = Work(args, images, ranks, signals)
        study = json.dumps({"dataset": images.name, "method": args.method, "study": work.study})
        distributed.on_main(ranks, lambda: start_output(images, Path(args.output_dir), study))
        methods = read_weights(work)  # after the table and split.csv, which show what a class lacks
    if args.dry_run:
        ranks.say("wrote split.csv")
        return 0
    set_tf32(False)
    if args.method != "evaluate":  # whose models may read images otherwise
        _ = work.views  # decodes: damaged images end the run before it is kept as a study of them all
    distributed.on_main(ranks, lambda: write_text(study, Path(args.output_dir, "study.json")))
    try:
        outcomes = [outcome for make in methods for outcome in judge(work, make())]
    except Stopped:
        ranks.say("stopped; the same command continues from here")
        return ranks.largest(signals.request)
    distributed.on_main(ranks, lambda: report(work, outcomes))
    return 0


def start_output(images: LabelledImages, folder: Path, study: str) -> None:
    """Write split.csv. `UserError` if the directory holds another study."""
    path = folder / "study.json"
    if path.exists() and (found := path.read_text(encoding="utf-8")) != study:
        raise UserError(
            f"--output_dir {folder}: holds results of {found}, not of this method, or these images, parts and labels; "
            "choose another"
        )
    write_split(images, folder / "split.csv")


def read_weights(work: Work) -> list[Callable[[], Method]]:
    """A maker of the method for each of --weights, which are printed.

    Raises:
        UserError: weights that can't be read or judged, labels that can't be learnt or judged, folds that can't be drawn,
            or a share of the training images that is less than a batch.
    """
    args, ranks = work.args, work.ranks
    if args.method == "evaluate":
        return read_models(work)
    method, batch_size = METHODS[args.method], work.recipe.batch_size
    for line in check_labels(work.images, fractions=args.fractions, min_positives=args.min_positives):
        ranks.say(line)
    for part in work.plan(trains=method.trains):
        if method.trains:
            steps_per_epoch(len(part.rows.train), batch_size)
    if method is not FineTune and ranks.world_size > 1:
        raise UserError(f"--method {args.method} runs in one process; start it without torchrun")
    if batch_size % ranks.world_size:
        raise UserError(f"--batch_size {batch_size}: {ranks.world_size} processes can't share it")
    options = {name: getattr(args, name) for name in ("imagenet", "img_size", "num_heads")}
    candidates = read_candidates(args.weights, **options)
    for candidate in candidates:
        if method is FineTune and candidate.module:
            raise UserError(
                f"--weights {candidate.name}: only timm's encoders are fine-tuned; use --method linear or probe"
            )
        ranks.say(describe(candidate, args.normalisation))
    return [partial(method, work, candidate) for candidate in candidates]


def report(work: Work, outcomes: list[Outcome]) -> None:
    """Write and print the results."""
    folder, first, table = Path(work.args.output_dir), outcomes[0], results_table(outcomes)
    notes = [left_out(first), *[NARROW] * in_folds(work.images), *table["note"].unique()]
    text = markdown_table(outcomes, table, notes)
    title = [f"{work.images.name}, {work.args.method}: {len(first.images):,} test images", *notes]
    write_predictions(outcomes, folder / "predictions.csv")
    write_text(table.to_csv(index=False, float_format="%.9g"), folder / "results.csv")
    write_text(text, folder / "table.md")
    save_figure(results_figure(table, "\n".join(filter(None, title))), folder / "results.png")
    print(text)
    print(f"wrote results.csv, predictions.csv, table.md and results.png into {folder}")
