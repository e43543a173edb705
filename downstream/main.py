"""Judge pretrained encoders on labelled chest X-rays. See docs/downstream.md; `--help` lists every flag."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from downstream.data import add_arguments, read_from_args
from downstream.data.choices import FOLDS
from downstream.data.images import add_image_arguments, leave_out_damaged, reading_from_args
from downstream.data.labelled import LabelledImages, check_labels, split_table, write_split
from downstream.data.partition import in_folds, partitions
from downstream.driver import Method, Work, judge
from downstream.encoders import DEFAULT_MODEL, describe, read_candidates
from downstream.evaluate import Evaluate, read_models
from downstream.figure import results_figure
from downstream.finetune import FineTune
from downstream.forward import FORWARD_BATCH, Stopped
from downstream.frozen import Linear, Probe
from downstream.heads import RECIPES, steps_per_epoch
from downstream.results import Outcome, left_out, markdown_table, results_table, write_predictions, write_text
from util import distributed
from util.bootstrap import MIN_DRAWS
from util.cli import Parser, check_least, check_positive, finite_float, seed_number
from util.errors import UserError
from util.export import stored_weights
from util.figures import save_figure
from util.output import hold_output
from util.precision import set_tf32
from util.stop import StopSignals

METHODS: dict[str, type[Method]] = {"linear": Linear, "probe": Probe, "finetune": FineTune, "evaluate": Evaluate}
RECIPE_HELP = {
    "epochs": "where training ends at the latest",
    "batch_size": "training images per step, over all processes",
    "lr": "highest learning rate",
    "weight_decay": "weight decay",
    "warmup": "share of all steps in which the learning rate rises",
    "patience": "epochs without a lower validation loss before stopping",
    "layer_decay": "finetune: learning rate of a block over that of the next one",
}
# Flags that only some methods use.
USED_BY = {
    "views": ("linear",),
    "recipe": ("finetune",),
    "layer_decay": ("finetune",),
    **dict.fromkeys(("epochs", "batch_size", "lr", "weight_decay", "warmup", "patience"), ("linear", "finetune")),
    "features_dir": ("linear", "probe"),
    **dict.fromkeys(
        ("fractions", "seeds", "folds", "normalisation", "imagenet", "tap", "img_size", "num_heads"),
        ("linear", "probe", "finetune"),
    ),
}
NARROW = (
    "AUCs of grouped folds are the mean of the folds'; their intervals are too narrow, since the folds share their "
    "training images: on made-up features of 240 images, 95% intervals held the truth in 77% to 89% of the runs"
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default unless the help text does."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = "(default" in action.help or action.default in (None, False)
        return action.help if shown else super()._get_help_string(action)


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
    add("--method", choices=tuple(METHODS), default="linear", help="how the encoders are judged")
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
    batches = ", ".join(f"{batch} on {device.upper()}" for device, batch in FORWARD_BATCH.items())
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
    check_args(args)
    with StopSignals(args.max_minutes) as signals:
        with signals.default_handlers():
            ranks = distributed.start(args.device)
        if ignored := ignored_flags(args, parser):
            ranks.say(f"warning: without effect here: {', '.join(ignored)}")
        status = run(args, ranks, signals)
        distributed.stop()
    return status


def run(args: argparse.Namespace, ranks: distributed.Ranks, signals: StopSignals) -> int:
    """Read, judge and report; returns the exit status (util/stop.py)."""
    if ranks.world_size > 1 and args.method not in ("finetune", "evaluate"):
        raise UserError(f"--method {args.method} runs in one process; start it without torchrun")
    with hold_output(args.output_dir, ranks=ranks):
        with signals.exit_at_signal():  # so far there is nothing to save
            images = read_from_args(args, need_images=not args.dry_run)
            ranks.say("\n".join([*images.notes, split_table(images)]))
            if args.skip_damaged and not args.dry_run:
                images = without_damaged(args, images, ranks)
            work = Work(args, images, ranks, signals)
            distributed.on_main(ranks, lambda: start_output(work))
            # After the table and split.csv, which show what a class lacks.
            if args.method != "evaluate":
                for line in check_labels(images, fractions=args.fractions, min_positives=args.min_positives):
                    ranks.say(line)
            makers = read_weights(work)
        if args.dry_run:
            ranks.say(f"wrote {Path(args.output_dir, 'split.csv')}")
            return 0
        set_tf32(False)
        folder = Path(args.output_dir)
        if args.method != "evaluate":  # whose models may read images otherwise
            _ = work.views  # decodes: damaged images end the run before it is kept as a study of them all
        distributed.on_main(ranks, lambda: write_text(json.dumps(study_of(work)), folder / "study.json"))
        try:
            outcomes = [outcome for make in makers for outcome in judge(work, make())]
        except Stopped:
            ranks.say("stopped; the same command goes on from here")
            return max(ranks.gather(signals.request))
        distributed.on_main(ranks, lambda: report(work, outcomes))
    return 0


def read_weights(work: Work) -> list[Callable[[], Method]]:
    """A maker of the method for each of --weights, which are printed.

    Raises:
        UserError: weights that can't be read or judged, folds that can't be drawn, or a share of the training images
            that is less than a batch.
    """
    args, images = work.args, work.images
    if args.method == "evaluate":
        models = read_models(work)
        for name, _, labels in models:
            work.ranks.say(f"{name}: judged by {', '.join(labels)}")
        return [partial(Evaluate, work, model) for model in models]
    for fraction in args.fractions:
        for seed in args.seeds if in_folds(images) else args.seeds[:1]:
            validates = METHODS[args.method].validates
            for rows in partitions(images, fraction, seed=seed, n_folds=args.folds, validate=validates):
                if validates:
                    steps_per_epoch(len(rows.train), work.recipe.batch_size)
    if args.method == "finetune" and work.recipe.batch_size % work.ranks.world_size:
        raise UserError(
            f"--batch_size {work.recipe.batch_size}: {work.ranks.world_size} processes can't share it; it is the whole "
            "step's"
        )
    names = ("imagenet", "tap", "img_size", "num_heads")
    candidates = read_candidates(args.weights, **{name: getattr(args, name) for name in names})
    for candidate in candidates:
        if args.method == "finetune" and candidate.encoder is None:
            what = (
                "transformers' encoders aren't fine-tuned" if candidate.folder else "there is no encoder to fine-tune"
            )
            raise UserError(f"--weights {candidate.name}: {what}; use --method linear or probe")
        work.ranks.say(describe(candidate, args.normalisation))
    return [partial(METHODS[args.method], work, candidate) for candidate in candidates]


def check_args(args: argparse.Namespace) -> None:
    """Refuse values that can't work, by the flag's name, before anything is read."""
    check_least(args, 1, "views", "epochs", "batch_size", "patience", "encode_batch", "min_positives", "folds")
    check_least(args, MIN_DRAWS, "bootstrap")
    check_least(args, 0, "num_workers", "weight_decay", "max_minutes")
    check_positive(args, "lr")
    if args.skip_damaged and not args.use_cache:
        raise UserError("--skip_damaged: damaged files are found while the cache is made; leave --no_cache out")
    if args.warmup is not None and not 0 <= args.warmup < 1:
        raise UserError(f"--warmup {args.warmup}: must be at least 0 and below 1")
    shares = [("fractions", value) for value in args.fractions]
    if args.layer_decay is not None:
        shares.append(("layer_decay", args.layer_decay))
    for name, value in shares:
        if not 0 < value <= 1:
            raise UserError(f"--{name} {value}: must be above 0, at most 1")
    for name in ("fractions", "seeds"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            raise UserError(f"--{name} {' '.join(map(str, values))}: a value is named twice")
    if not args.weights and not args.dry_run:
        raise UserError("--weights: name at least one encoder: NAME=FILE, imagenet, random or pixels")


def ignored_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Flags that differ from their defaults and that the method does not use."""
    given = [name for name in vars(args) if getattr(args, name) != parser.get_default(name)]
    ignored = [f"--{name}" for name in given if args.method not in USED_BY.get(name, METHODS)]
    if "folds" in given and args.split != FOLDS and "--folds" not in ignored:
        ignored.append("--folds (without --split folds)")
    return [] if args.dry_run else ignored


def start_output(work: Work) -> None:
    """Write split.csv. `UserError` if the directory holds another study."""
    folder = Path(work.args.output_dir)
    if (folder / "study.json").exists():
        found = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        if found != study_of(work):
            raise UserError(
                f"--output_dir {folder}: holds results of {found['dataset']}, {found['method']}, of another method, or "
                "of other images, parts or labels than these; choose another"
            )
    write_split(work.images, folder / "split.csv")


def without_damaged(args: argparse.Namespace, images: LabelledImages, ranks: distributed.Ranks) -> LabelledImages:
    """The images that can be read; rank 0 decodes them, and prints what is wrong with the others."""
    place = args.cache_dir or Path(args.output_dir) / "cache"
    decode = partial(leave_out_damaged, images, place, reading=reading_from_args(args))
    distributed.on_main(ranks, lambda: decode() and None)
    sound, damaged = decode()
    if damaged:
        ranks.say("\n".join([*damaged, f"{len(damaged)} damaged images are left out", split_table(sound)]))
    return sound


def study_of(work: Work) -> dict[str, str]:
    """What an output directory holds results of, as its study.json says."""
    return {"dataset": work.images.name, "method": work.args.method, "study": work.study}


def report(work: Work, outcomes: list[Outcome]) -> None:
    """Write and print the results."""
    folder = Path(work.args.output_dir)
    notes = [NARROW] * in_folds(work.images) + list(dict.fromkeys(outcome.note for outcome in outcomes))
    table, text, first = results_table(outcomes), markdown_table(outcomes, notes), outcomes[0]
    title = [f"{first.dataset}, {first.method}: {len(first.ids):,} test images", left_out(first), *notes]
    figure = results_figure(table, [line for line in title if line])
    write_predictions(outcomes, folder / "predictions.csv")
    write_text(table.to_csv(index=False, float_format="%.9g"), folder / "results.csv")
    write_text(text, folder / "table.md")
    save_figure(figure, folder / "results.png")
    print(text)
    print(f"wrote results.csv, predictions.csv, table.md and results.png into {folder}")
