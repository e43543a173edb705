"""What a downstream run leaves: results.csv, predictions.csv and table.md from the scores of the test images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from downstream.jobs import digest
from util.bootstrap import bootstrap_aucs, bootstrap_means, interval, mean_of_known, n_drawn
from util.files import atomic_write

MEAN = "mean"
MULTICLASS = "multiclass"
# Images to train and validate with, and test images, that published results are of.
PUBLISHED_IMAGES = {"rsna": (22_681, 4_003), "nih": (86_524, 25_596)}
# Of VP-MIM, the same group's follow-up (J-SMU 2026, 46(4):946), on all training data; percent.
PUBLISHED = {
    ("rsna", "linear"): [("VP-MIM, pretrained on REFLACX's 2,616 images", 86.83)],
    ("nih", "linear"): [("VP-MIM, pretrained on REFLACX's 2,616 images", 72.82)],
    ("nih", "finetune"): [("VP-MIM, pretrained on more images with predicted gaze", 85.49)],
}


@dataclass(frozen=True)
class Outcome:
    """The scores that one encoder, label fraction and seed gave the test images.

    Attributes:
        ids, subjects: of the N test images.
        label_names: C.
        targets: float32 [N, C], NaN where unknown; of classes one-hot.
        scores: float32 [N, C] between 0 and 1.
        min_count: fewest images with and without a label that counts in the mean.
        draws: of the bootstrap.
        not_in_mean: labels that hold others, e.g. "Any finding".
        folds: int [N] of grouped folds: which model scored each image; the AUC is the mean of the folds'.
        note: what a reader of the results must know of these.
        study: says which images, parts and labels: only results of the same belong into one column.
        as_published: whether these are all those of the published results.
    """

    weights: str
    dataset: str
    method: str
    fraction: float
    seed: int
    task: str
    label_names: Sequence[str]
    ids: Sequence[str]
    subjects: np.ndarray
    targets: np.ndarray
    scores: np.ndarray
    min_count: int = 1
    draws: int = 1000
    not_in_mean: Sequence[str] = ()
    note: str = ""
    folds: np.ndarray | None = None
    study: str = ""
    as_published: bool = False

    @property
    def measure(self) -> str:
        return "accuracy" if self.task == MULTICLASS else "auc"

    @cached_property
    def counts(self) -> np.ndarray:
        """Test images with (first row) and without each label: [2, C]."""
        return np.stack([(self.targets == value).sum(0) for value in (1, 0)])

    @property
    def judged(self) -> np.ndarray:
        """Which labels count in the mean: bool [C]; both kinds must be there `min_count` times."""
        if self.task == MULTICLASS:
            return self.counts[0] > 0
        single = np.array([name not in self.not_in_mean for name in self.label_names])
        enough = (self.counts >= max(1, self.min_count)).all(0) & np.isfinite(self.aucs[0])
        return enough & single if (enough & single).any() else enough

    @property
    def lone(self) -> np.ndarray:
        """Which labels have test images of one subject at most with, or, of AUCs, without: bool [C]. Their draws would
        make an interval that is too narrow."""
        kinds = (1,) if self.task == MULTICLASS else (1, 0)
        subjects = [[self.subjects[column == kind] for kind in kinds] for column in self.targets.T]
        return np.array([any((own == own[:1]).all() for own in label) for label in subjects])

    @cached_property
    def aucs(self) -> np.ndarray:
        return bootstrap_aucs(self.targets, self.scores, self.subjects, self.folds, draws=self.draws, seed=0)

    @cached_property
    def values(self) -> np.ndarray:
        """AUC of each label, or share of each class that is told right, and last the mean (of classes: over
        images): float64 [1 + draws, C + 1], the first row on the data, the others on draws of subjects (NaN of
        `lone` labels). A draw's mean is over the labels that it has both kinds of."""
        if self.task == MULTICLASS:
            right = (self.scores.argmax(1) == self.targets.argmax(1)).astype(float)
            of_class = np.where(self.targets == 1, right[:, None], np.nan)
            columns = np.column_stack([of_class, right])
            values = bootstrap_means(columns, self.subjects, draws=self.draws, seed=0)
            values[1:, np.r_[self.lone, False]] = np.nan
            return values
        values = np.column_stack([self.aucs, mean_of_known(self.aucs[:, self.judged], 1)])
        values[1:, np.r_[self.lone, self.lone[self.judged].all()]] = np.nan
        return values


def results_table(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One row for each outcome and label, and one for the mean: weights, dataset, method, fraction, seed,
    label, auc or accuracy with its 95% interval over subjects (low, high), n known images, n_positive, draws (how many
    draws of subjects had a value, which the interval is taken from), study, as_published and, of the mean, note
    (`Outcome`; study and as_published are of the mean's labels, too)."""
    rows = []
    for outcome in outcomes:
        names = [*outcome.label_names, MEAN]
        same = {name: getattr(outcome, name) for name in ("weights", "dataset", "method", "fraction", "seed")}
        last = {
            "study": digest([outcome.study, list(outcome.label_names), outcome.judged.tolist()]),
            "as_published": outcome.as_published and bool(outcome.judged.all()),
        }
        n_known, positives = [*outcome.counts.sum(0), len(outcome.ids)], [*outcome.counts[0], pd.NA]
        for label, n, positive, values in zip(names, n_known, positives, outcome.values.T, strict=True):
            value, low, high = interval(values)
            numbers = {outcome.measure: value, "low": low, "high": high, "n": n, "n_positive": positive}
            note = outcome.note if label == MEAN else ""
            rows.append({**same, "label": label, **numbers, "draws": n_drawn(values), **last, "note": note})
    return pd.DataFrame(rows).astype({"n_positive": "Int64"})


def write_predictions(outcomes: Sequence[Outcome], path: str | os.PathLike) -> None:
    """Write weights, fraction, seed, fold (of grouped folds), id, label, target (empty: unknown), score: every test
    image and label once."""
    with atomic_write(path, "w") as file:
        for i, outcome in enumerate(outcomes):
            n, c = outcome.scores.shape
            fold = {} if outcome.folds is None else {"fold": np.repeat(outcome.folds + 1, c)}
            long = pd.DataFrame(
                {
                    "weights": outcome.weights,
                    "fraction": outcome.fraction,
                    "seed": outcome.seed,
                    **fold,
                    "id": np.repeat(np.asarray(outcome.ids, object), c),
                    "label": np.tile(np.asarray(outcome.label_names, object), n),
                    "target": pd.array(outcome.targets.ravel(), dtype="Int8"),
                    "score": outcome.scores.ravel(),
                }
            )
            long.to_csv(file, index=False, header=i == 0, float_format="%.9g", chunksize=100_000)


def left_out(outcome: Outcome) -> str:
    """What the mean leaves out, as text; "" where it holds every label."""
    if outcome.task == MULTICLASS:
        return ""
    out = [name for name, kept in zip(outcome.label_names, outcome.judged, strict=True) if not kept]
    whole = [name for name in out if name in outcome.not_in_mean]
    rare = [name for name in out if name not in whole]
    texts = [f"{', '.join(whole)} (it holds the others)"] if whole else []
    if rare:
        fold = "" if outcome.folds is None else ", or no fold with both"
        texts.append(f"{', '.join(rare)} (fewer than {max(1, outcome.min_count)} test images with or without it{fold})")
    return f"the mean leaves out {' and '.join(texts)}" if texts else ""


def markdown_table(outcomes: Sequence[Outcome], notes: Sequence[str]) -> str:
    """The paper's table: percent, mean +- standard deviation over seeds, per label and mean, per weights and
    fraction, with the mean's 95% interval over test subjects; published numbers in rows of their own, if all images,
    parts and labels are the published ones.

    Args:
        outcomes: of the same test images and labels.
    """
    first = outcomes[0]
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.weights, outcome.fraction), []).append(outcome)
    measure, mean = ("Accuracy", "all images") if first.task == MULTICLASS else ("AUC", MEAN)
    shown = [*first.label_names, mean] if len(first.label_names) > 1 else list(first.label_names)
    rows = []
    for (weights, fraction), group in groups.items():
        values = np.stack([outcome.values for outcome in group])  # [S, 1 + draws, C + 1]
        cells = [_spread(100 * values[:, 0, j]) for j in range(len(shown))]
        _, low, high = interval(values[:, :, len(shown) - 1].mean(0))
        between = "" if np.isnan(low) else f"{100 * low:.2f} to {100 * high:.2f}"
        rows.append([weights, f"{100 * fraction:g}%", str(len(group)), *cells, between])
    if first.as_published and first.judged.all():
        for name, value in PUBLISHED.get((first.dataset, first.method), ()):
            rows.append([f"*{name} (published)*", "100%", "", *[""] * (len(shown) - 1), f"*{value:.2f}*", ""])
    text = (
        f"{measure} in percent on {len(first.ids):,} test images of {len(np.unique(first.subjects)):,} subjects, mean ± "
        "standard deviation over seeds. The 95% interval is over test subjects (bootstrap), of the "
        f"{'mean' if len(shown) > 1 else 'label'} averaged over seeds."
    )
    title, columns = f"{first.dataset}, {first.method}", ["weights", "labels used", "seeds", *shown, "95% interval"]
    return _page(title, text, [left_out(first), *notes], columns, rows)


def summary_table(means: pd.DataFrame) -> str:
    """One table of several runs: a row per weights and share of labels, a column per study and method.

    Args:
        means: rows of the mean over labels of `results_table` of any runs, with its value in the column `value`,
            "auc" or "accuracy" in `measure`, and the title of its column, one per study and method, in `run`.

    Returns:
        Markdown; percent, mean ± standard deviation over seeds, published numbers in rows of their own, beside results
        of all the same images, parts and labels only.
    """
    runs = means.drop_duplicates("run").set_index("run")
    rows = []
    for (weights, fraction), group in means.groupby(["weights", "fraction"], sort=False):
        cells = {run: _spread(100 * own.to_numpy(float)) for run, own in group.groupby("run")["value"]}
        rows.append([weights, f"{100 * fraction:g}%", *(cells.get(run, "") for run in runs.index)])
    published = [
        dict(PUBLISHED.get((run.dataset, run.method), ()) if run.as_published else ()) for run in runs.itertuples()
    ]
    for name in dict.fromkeys(name for numbers in published for name in numbers):
        cells = [f"*{numbers[name]:.2f}*" if name in numbers else "" for numbers in published]
        rows.append([f"*{name} (published)*", "100%", *cells])
    text = (
        "Percent on the test images: AUC (its mean over labels), or accuracy where a column says so; mean ± standard "
        "deviation over seeds."
    )
    noted = means[means["note"] != ""].drop_duplicates(["run", "note"])
    notes = [f"{run}: {note}" for run, note in zip(noted["run"], noted["note"], strict=True)]
    titles = [run.Index + " (accuracy)" * (run.measure != "auc") for run in runs.itertuples()]
    return _page("Downstream results", text, notes, ["weights", "labels used", *titles], rows)


def write_text(text: str, path: str | os.PathLike) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(Path(path), "w") as file:
        file.write(text)


def _page(title: str, text: str, notes: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown of a table under a title, a text, and notes, of which empty ones are left out."""
    table = [columns, ["---"] * len(columns), *rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    noted = [f"\n{note[0].upper()}{note[1:]}." for note in notes if note]
    return "\n".join([f"# {title}", "", text, *noted, "", *lines, ""])


def _spread(values: np.ndarray) -> str:
    if np.isnan(values).any():
        return ""
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")
