"""Linear probe: how much a frozen backbone's features tell about findings, with honest intervals."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from tqdm import tqdm

from datasets.downstream.labels import ANY_FINDING, TEST, LabelledImages, Squares, normalize
from util.curves import COLORS
from util.errors import UserError
from util.export import Backbone, build_backbone, sha256
from util.files import atomic_write
from util.loading import SampleLoader

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C of the logistic regression, chosen on training images
PIXEL_SIDE = 64  # of the raw-pixel baseline
PIXEL_COMPONENTS = 64


@dataclass(frozen=True)
class Features:
    """One way to describe images: name, array [N, D], and whether it is reduced by PCA inside each fit."""

    name: str
    values: np.ndarray
    pca: bool = False


@torch.no_grad()
def extract_features(
    model: nn.Module,
    paths: Sequence[Path],
    size: int,
    *,
    device: str = "cpu",
    batch_size: int = 32,
    workers: int = 2,
) -> tuple[np.ndarray, np.ndarray]:
    """Features of a timm ViT after its norm: cls token [N, D] and mean of the patch tokens [N, D]."""
    model = model.to(device).eval()
    cls, mean = [], []
    loader = SampleLoader(Squares(paths, size), batch_size, num_workers=workers)
    for gray in tqdm(loader, "features", disable=None):
        images = normalize(gray.to(device, non_blocking=True), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        tokens = model.forward_features(images)  # [B, 1+L, D]
        cls.append(tokens[:, 0].float().cpu())
        mean.append(tokens[:, 1:].mean(1).float().cpu())
    return torch.cat(cls).numpy(), torch.cat(mean).numpy()


def backbone_features(
    name: str,
    backbone: Backbone,
    images: LabelledImages,
    cache: Path,
    *,
    random_seed: int | None = None,
    **options,
) -> list[Features]:
    """Cls and mean features of a backbone, from the cache where they were computed before.

    Args:
        cache: folder; a file there is named by all that the features depend on.
        random_seed: use random weights in the same architecture instead of the backbone's.
        options: of `extract_features`.
    """
    size = backbone.timm_args.get("img_size", 224)
    if random_seed is None:
        weights = f"{sha256(backbone.source.path)} tap {backbone.tap}"
    else:
        weights = f"random {random_seed} {backbone.timm_name} {sorted(backbone.timm_args.items())}"
    path = cache / f"features-{_key(weights, size, images.paths)}.npz"
    if path.is_file():
        with np.load(path) as stored:
            cls, mean = stored["cls"], stored["mean"]
    else:
        if random_seed is None:
            model = build_backbone(backbone)
            if backbone.block is not None:
                model.blocks = model.blocks[
                    : backbone.block + 1
                ]  # a tap's norm belongs to its block's output
        else:
            torch.manual_seed(random_seed)
            model = timm.create_model(backbone.timm_name, num_classes=0, **backbone.timm_args)
        cls, mean = extract_features(model, images.paths, size, **options)
        with atomic_write(path) as file:
            np.savez(file, cls=cls, mean=mean)
    return [Features(f"{name}, mean of patches", mean), Features(f"{name}, cls", cls)]


def pixel_features(images: LabelledImages, *, workers: int = 2) -> Features:
    """Gray values at `PIXEL_SIDE` px, reduced by PCA when fitted: the baseline without a network."""
    loader = SampleLoader(Squares(images.paths, PIXEL_SIDE), 64, num_workers=workers)
    return Features("pixels, PCA", torch.cat(list(loader)).flatten(1).float().numpy() / 255, pca=True)


def _key(weights: str, size: int, paths: Sequence[Path]) -> str:
    digest = hashlib.sha256(f"{weights} {size}".encode())
    for path in paths:
        stat = os.stat(path)
        digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- fitting


def folds(images: LabelledImages, labels: np.ndarray, *, split: str, n_folds: int, seed: int) -> list:
    """(training rows, test rows) of the evaluation; no subject stands on both sides.

    Args:
        labels: [N] of one finding; rows with NaN are in neither part.
        split: "column": the data's own test images against all others; "kfold": grouped and
            stratified folds, each image tested once.
    """
    known = np.flatnonzero(~np.isnan(labels))
    if split == "column":
        test = images.splits[known] == TEST
        return [(known[~test], known[test])]
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a class rarer than folds; checked by min_positives
        parts = list(splitter.split(known, labels[known], images.subjects[known]))
    return [(known[train], known[test]) for train, test in parts]


def _describe(features: Features, train: np.ndarray, seed: int) -> np.ndarray:
    """Features of all images, scaled by the training rows: [N, D].

    Network features are standardised one by one. Principal components keep their proportions, since
    equal scales would blow up the last ones, which are noise.
    """
    if not features.pca:
        return StandardScaler().fit(features.values[train]).transform(features.values)
    pca = PCA(min(PIXEL_COMPONENTS, len(train) - 1), random_state=seed).fit(features.values[train])
    values = pca.transform(features.values)
    return values / values[train].std()


def _fit(values: np.ndarray, labels: np.ndarray, strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=1000).fit(values, labels)


def choose_strength(
    features: Features, rows: np.ndarray, labels: np.ndarray, subjects: np.ndarray, seed: int
) -> float:
    """C with the best AUC in three grouped folds of the training rows; the smallest if they are too few."""
    n_folds = min(3, int(min(labels[rows].sum(), (1 - labels[rows]).sum())), len(np.unique(subjects[rows])))
    if n_folds < 2:
        return STRENGTHS[0]
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    scores = []
    for inner, outer in splitter.split(rows, labels[rows], subjects[rows]):
        train, test = rows[inner], rows[outer]
        if len(np.unique(labels[train])) < 2 or len(np.unique(labels[test])) < 2:
            continue
        values = _describe(features, train, seed)
        fits = [_fit(values[train], labels[train], strength) for strength in STRENGTHS]
        scores.append([roc_auc_score(labels[test], fit.decision_function(values[test])) for fit in fits])
    return STRENGTHS[int(np.argmax(np.mean(scores, 0)))] if scores else STRENGTHS[0]


def held_out_scores(
    features: Features, images: LabelledImages, labels: np.ndarray, parts: Sequence, seed: int
) -> np.ndarray:
    """Probability of the finding from a fit that saw no image of the subject: [N], NaN where not tested."""
    scores = np.full(len(images), np.nan)
    for train, test in parts:
        strength = choose_strength(features, train, labels, images.subjects, seed)
        values = _describe(features, train, seed)
        scores[test] = _fit(values[train], labels[train], strength).predict_proba(values[test])[:, 1]
    return scores


# ---------------------------------------------------------------- AUC with intervals


def weighted_auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for many weightings of the same images at once; ties count half.

    Args:
        labels: 0/1 [N]; scores: [N]; weights: [R, N], e.g. how often a bootstrap drew each image.

    Returns:
        [R], NaN where a weighting leaves one class only.
    """
    order = np.argsort(scores, kind="stable")
    _, starts, counts = np.unique(scores[order], return_index=True, return_counts=True)
    positive = weights[:, order] * labels[order]
    negative = weights[:, order] * (1 - labels[order])
    below = np.cumsum(negative, 1)  # [R, N]
    upto = below[:, starts + counts - 1]  # negatives not above each distinct score
    before = np.concatenate([np.zeros((len(weights), 1)), upto[:, :-1]], 1)
    midrank = np.repeat((upto + before) / 2, counts, 1)
    total = positive.sum(1) * negative.sum(1)
    with np.errstate(invalid="ignore"):
        return np.where(total > 0, (positive * midrank).sum(1) / np.where(total > 0, total, 1), np.nan)


def bootstrap_weights(subjects: np.ndarray, repeats: int, seed: int) -> np.ndarray:
    """How often each image is drawn when subjects are drawn with replacement: [1 + repeats, N].

    The first row is 1 everywhere: the data themselves.
    """
    _, index = np.unique(subjects, return_inverse=True)
    count = index.max() + 1
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=repeats)
    return np.concatenate([np.ones((1, len(subjects))), drawn[:, index]])


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Value on the data (first), and the 2.5 and 97.5 percentiles of the bootstrap (the others)."""
    low, high = (
        np.nanpercentile(values[1:], [2.5, 97.5]) if np.isfinite(values[1:]).any() else (np.nan, np.nan)
    )
    return float(values[0]), float(low), float(high)


def testable_findings(
    images: LabelledImages, *, split: str, n_folds: int = 5, min_positives: int = 10, seed: int = 0
) -> tuple[list[tuple[int, str, list]], list[str]]:
    """Findings with at least `min_positives` images with and without them in each part.

    Returns:
        (column, name, `folds`) of each, and the others by name with their smallest count.

    Raises:
        UserError: there is none, or the split can't be made.
    """
    if split == "column":
        images.check_splits()
    else:
        if n_folds < 2:
            raise UserError(f"--folds {n_folds}: must be at least 2")
        if (count := len(np.unique(images.subjects))) < n_folds:
            raise UserError(f"--folds {n_folds}: there are only {count} subjects")
    least = n_folds if split == "kfold" else 1
    if min_positives < least:
        raise UserError(f"--min_positives {min_positives}: must be at least {least}")
    kept, left_out = [], []
    for j, finding in enumerate(images.findings):
        labels = images.labels[:, j]
        known = ~np.isnan(labels)
        sides = (
            [known & (images.splits == TEST), known & (images.splits != TEST)]
            if split == "column"
            else [known]
        )
        fewest = min(int((labels[side] == value).sum()) for side in sides for value in (0, 1))
        parts = (
            [] if fewest < min_positives else folds(images, labels, split=split, n_folds=n_folds, seed=seed)
        )
        if parts and all(len(np.unique(labels[train])) == 2 for train, _ in parts):
            kept.append((j, finding, parts))
        else:
            left_out.append(f"{finding} ({fewest})")
    if not kept:
        raise UserError(
            f"no finding has {min_positives} images with and without it on both sides of the split "
            f"({', '.join(left_out)}); more images, --split kfold or a lower --min_positives are needed"
        )
    return kept, left_out


def probe(
    feature_sets: Sequence[Features],
    images: LabelledImages,
    *,
    split: str,
    n_folds: int = 5,
    min_positives: int = 10,
    bootstrap: int = 1000,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """AUC per finding and feature set, with 95% intervals from a bootstrap over subjects.

    A finding is left out, by name, if fewer than `min_positives` images have it, or lack it, in the
    training or in the test part. The row "mean" is the mean over the single findings kept, its interval
    from the same draws.

    Returns:
        Columns finding, features, auc, low, high, positives, images (of the tested ones).

    Raises:
        UserError: nothing is left to test, or the split can't be made.
    """
    kept, left_out = testable_findings(
        images, split=split, n_folds=n_folds, min_positives=min_positives, seed=seed
    )
    if left_out:
        say(f"left out, fewer than {min_positives} images (count) with or without it: {', '.join(left_out)}")
    weights = bootstrap_weights(images.subjects, bootstrap, seed)
    rows = []
    for features in feature_sets:
        draws = {}
        for j, finding, parts in tqdm(kept, features.name, disable=None):
            labels = images.labels[:, j]
            with threadpool_limits(1):  # the problems are small; more threads only get into each other's way
                scores = held_out_scores(features, images, labels, parts, seed)
            tested = np.flatnonzero(~np.isnan(scores))
            draws[finding] = weighted_auc(labels[tested], scores[tested], weights[:, tested])
            counts = int(labels[tested].sum()), len(tested)
            rows.append([finding, features.name, *interval(draws[finding]), *counts])
        single = [values for finding, values in draws.items() if finding != ANY_FINDING]
        if len(single) > 1:
            rows.append(["mean", features.name, *interval(np.mean(single, 0)), pd.NA, pd.NA])
    return pd.DataFrame(rows, columns=["finding", "features", "auc", "low", "high", "positives", "images"])


def format_table(table: pd.DataFrame) -> str:
    """The table of `probe` as text, findings against feature sets; the fewer of them in columns."""
    cells = table.assign(text=[f"{r.auc:.3f} ({r.low:.3f}-{r.high:.3f})" for r in table.itertuples()])
    wide = cells.pivot(index="finding", columns="features", values="text")
    wide = wide.loc[list(dict.fromkeys(table["finding"])), list(dict.fromkeys(table["features"]))]
    wide.index.name = wide.columns.name = None
    return (wide if len(wide.columns) <= len(wide) else wide.T).to_string()


def probe_figure(table: pd.DataFrame) -> Figure:
    """AUC with intervals: a line of marks per finding, a colour per feature set."""
    findings, sets = list(dict.fromkeys(table["finding"])), list(dict.fromkeys(table["features"]))
    figure = Figure(
        figsize=(7, 1.1 + len(findings) * (0.16 * len(sets) + 0.14)), dpi=200, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, name in enumerate(sets):
        part = table[table["features"] == name].set_index("finding").loc[findings]
        place = np.arange(len(findings)) + (i - (len(sets) - 1) / 2) * 0.8 / len(sets)
        auc = part["auc"].to_numpy(float)
        # A percentile interval may leave the value outside where there are few images.
        spread = np.clip([auc - part["low"].to_numpy(float), part["high"].to_numpy(float) - auc], 0, None)
        style = dict(color=COLORS[i % len(COLORS)], fmt="os^vDPX<>"[i % 9], ms=3.5, lw=1, label=name)
        axes.errorbar(auc, place, xerr=spread, **style)
    axes.axvline(0.5, color="0.6", lw=0.8, zorder=0)
    axes.set_yticks(range(len(findings)), findings, fontsize=8)
    axes.set_ylim(len(findings) - 0.5, -0.5)
    axes.set_xlabel("area under the ROC curve, 95% bootstrap interval over subjects", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7.5, frameon=False)
    return figure


def seed_table(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Gather runs that differ in their seed only.

    Args:
        table: of `probe`, where the features are named "SETTING_sSEED, PART".
        reference: the setting that the others are compared with, seed by seed.

    Returns:
        For each finding, part and setting: seeds, mean AUC with a 95% interval (Student's t over the
        seeds: training noise, for these test images), and the mean paired difference with its interval.

    Raises:
        UserError: the reference isn't among the settings.
    """
    names = table["features"].str.extract(r"^(?P<setting>.+)_s(?P<seed>\d+), (?P<part>.+)$")
    runs = pd.concat([table[["finding", "auc"]], names], axis=1).dropna()
    if reference not in set(runs["setting"]):
        raise UserError(
            f"--reference {reference}: not among the settings {', '.join(sorted(set(runs['setting'])))}"
        )
    rows = []
    for (part, finding), group in runs.groupby(["part", "finding"], sort=False):
        wide = group.pivot(index="seed", columns="setting", values="auc")
        for setting in dict.fromkeys(group["setting"]):
            differences = (wide[setting] - wide[reference]).dropna().to_numpy()
            compared = [np.nan] * 3 if setting == reference else _t_interval(differences)
            rows.append(
                [
                    part,
                    finding,
                    setting,
                    wide[setting].count(),
                    *_t_interval(wide[setting].dropna()),
                    *compared,
                ]
            )
    columns = [
        "features",
        "finding",
        "setting",
        "seeds",
        "auc",
        "low",
        "high",
        "difference",
        "diff_low",
        "diff_high",
    ]
    return pd.DataFrame(rows, columns=columns)


def format_seed_table(table: pd.DataFrame) -> str:
    """The table of `seed_table` as text: for each part one block of AUCs and one of differences."""
    blocks = []
    for part in dict.fromkeys(table["features"]):
        rows = table[table["features"] == part]
        for title, names in (
            ("AUC", ("auc", "low", "high")),
            ("difference", ("difference", "diff_low", "diff_high")),
        ):
            sign = "" if title == "AUC" else "+"
            texts = [
                f"{a:{sign}.3f} ({b:{sign}.3f} to {c:{sign}.3f})" for a, b, c in rows[list(names)].to_numpy()
            ]
            cells = rows.assign(text=texts)[rows[names[0]].notna()]
            wide = cells.pivot(index="setting", columns="finding", values="text")
            wide = wide.loc[list(dict.fromkeys(cells["setting"])), list(dict.fromkeys(cells["finding"]))]
            wide.index.name = wide.columns.name = None
            blocks.append(f"{part}, {title}\n{wide.to_string()}")
    return "\n\n".join(blocks)


def _t_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95% interval by Student's t; without an interval for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, np.nan, np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return mean, float(mean - half), float(mean + half)
