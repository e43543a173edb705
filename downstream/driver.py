"""One driver for all methods: what is not done yet is trained and predicted, and its scores are kept."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from downstream.data.choices import AUTO, PUBLISHED
from downstream.data.partition import Rows, folds_of, in_folds, partitions
from downstream.data.tree import ANY_FINDING
from downstream.encoders import PIXELS, describe, read_candidates
from downstream.evaluate import Evaluate, read_models
from downstream.finetune import CHECKPOINT, FineTune
from downstream.frozen import Linear, Probe
from downstream.heads import steps_per_epoch
from downstream.jobs import digest, load_array, save_array
from downstream.results import PUBLISHED_IMAGES, Outcome
from downstream.work import Method, Work
from util.distributed import on_main
from util.errors import UserError
from util.subjects import overlap_note

METHODS: dict[str, type[Method]] = {"linear": Linear, "probe": Probe, "finetune": FineTune, "evaluate": Evaluate}


def read_weights(work: Work) -> list:
    """What --weights names, each for its method's class, printed.

    Raises:
        UserError: weights that can't be read or judged, folds that can't be drawn, or a share of the training images
            that is less than a batch.
    """
    args, images = work.args, work.images
    if args.method == "evaluate":
        models = read_models(work)
        for name, _, labels in models:
            work.ranks.say(f"{name}: judged by {', '.join(labels)}")
        return models
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
    names = ("imagenet", "random_model", "tap", "img_size", "num_heads")
    candidates = read_candidates(args.weights, **{name: getattr(args, name) for name in names})
    if args.method == "finetune" and any(candidate.kind == PIXELS for candidate in candidates):
        raise UserError("--weights pixels: there is no encoder to fine-tune; use --method linear or probe")
    for candidate in candidates:
        work.ranks.say(describe(candidate))
    return candidates


def judge(work: Work, models: list) -> list[Outcome]:
    """Scores of the test images by every model of `read_weights`, label fraction and seed. Raises `Stopped`, `UserError`."""
    return [outcome for model in models for outcome in judge_one(work, METHODS[work.args.method](work, model))]


def judge_one(work: Work, method: Method) -> list[Outcome]:
    """Scores of the test images by a model, for every kind of scores, label fraction and seed."""
    args, images = work.args, work.images
    found: dict[tuple[float, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    for fraction in method.fractions:
        # With the data's own parts all seeds train on the same images and go side by side.
        for seeds in [[seed] for seed in method.seeds] if in_folds(images) else [method.seeds]:
            parts = method.partitions(fraction, seeds[0])
            for k, rows in enumerate(parts, 1):
                fold = k if len(parts) > 1 else 0
                names = {seed: run_name(work, method, fraction, seed, fold) for seed in seeds}
                what = f"{method.name}, {fraction:g} of the labels{f', fold {fold}' * bool(fold)}"
                for seed, scores in scores_of(work, method, rows, names, fraction, what).items():
                    found.setdefault((fraction, seed), []).append((rows.test, scores))
    tested = {k: np.concatenate([rows for rows, _ in pieces]) for k, pieces in found.items()}
    note = overlap_note(method.name, method.seen, images.subjects[next(iter(tested.values()))], images.study)
    if note:
        work.ranks.say(note)
    columns = [images.label_names.index(label) for label in method.label_names]
    return [
        Outcome(
            weights=f"{method.name}, {kind}" if kind else method.name,
            dataset=images.name,
            method=args.method,
            fraction=fraction,
            seed=seed,
            task=images.task,
            label_names=method.label_names,
            ids=[images.ids[row] for row in rows],
            subjects=images.subjects[rows],
            targets=images.labels[rows][:, columns],
            scores=np.concatenate([scores[k] for _, scores in found[fraction, seed]]),
            min_count=args.min_positives,
            draws=args.bootstrap,
            not_in_mean=(ANY_FINDING,) if args.dataset == "tree" else (),
            folds=folds_of(images, seed, args.folds)[rows] if in_folds(images) else None,
            note=note,
            study=work.study,
            as_published=as_published(work),
        )
        for k, kind in enumerate(method.kinds)
        for (fraction, seed), rows in tested.items()
    ]


def run_name(work: Work, method: Method, fraction: float, seed: int, fold: int) -> str:
    """A readable name of a run, with a digest of all that its scores depend on."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", method.name)
    key = digest([work.args.method, work.study, method.key, fraction, seed, fold])
    return f"{plain}-{fraction:g}-{seed}{f'-fold{fold}' * bool(fold)}-{key[:12]}"


def scores_of(
    work: Work, method: Method, rows: Rows, names: dict[int, str], fraction: float, what: str
) -> dict[int, np.ndarray]:
    """Scores [K, n, C] of `rows.test` by the run of each seed: kept ones, or else new ones, which are then kept."""
    ranks, output_dir = work.ranks, Path(work.args.output_dir)
    paths = {seed: output_dir / "scores" / f"{name}.npy" for seed, name in names.items()}
    shape = (len(method.kinds), len(rows.test), len(method.label_names))
    kept = on_main(ranks, lambda: {seed: load_array(path, shape) for seed, path in paths.items()})
    left = {seed: name for seed, name in names.items() if kept[seed] is None}
    if left:
        for seed, scores in method.scores(rows, left, fraction, what):
            kept[seed] = scores
            on_main(ranks, lambda seed=seed, scores=scores: save_array(paths[seed], scores))

    def remove_checkpoints() -> None:
        for name in names.values():
            (output_dir / "runs" / name / CHECKPOINT).unlink(missing_ok=True)

    on_main(ranks, remove_checkpoints)
    return kept


def as_published(work: Work) -> bool:
    """Whether images, parts and labels are all those of the published results."""
    args, images = work.args, work.images
    tests = int((images.parts == "test").sum())
    chosen = args.split not in (AUTO, PUBLISHED) or args.labels or args.where
    return not chosen and PUBLISHED_IMAGES.get(images.name) == (len(images) - tests, tests)
