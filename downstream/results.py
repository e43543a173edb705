"""What a downstream run leaves: results.csv, predictions.csv and table.md from the scores of the test images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from downstream.data.labelled import MULTICLASS, LabelledImages
from downstream.data.tree import ANY_FINDING
from downstream.jobs import digest
from util.bootstrap import bootstrap_aucs, bootstrap_means, interval, mean_of_known
from util.files import atomic_write

MEAN = "mean"
# Images to train and validate with, and test images, that published results are of.
PUBLISHED_IMAGES = {"rsna": (22_681, 4_003), "nih": (86_524, 25_596)}
# Of VP-MIM, the same group's follow-up (J-SMU 2026, 46(4):946), on all training data; percent.
PUBLISHED = {
    ("rsna", "linear"): "published for VP-MIM, pretrained on REFLACX's 2,616 images: 86.83",
    ("nih", "linear"): "published for VP-MIM, pretrained on REFLACX's 2,616 images: 72.82",
    ("nih", "finetune"): "published for VP-MIM, pretrained on more images with predicted gaze: 85.49",
}


@dataclass(frozen=True)
class Outcome:
    """The scores that one encoder, label fraction and seed gave the test images.

    Attributes:
        run: weights, dataset, method, fraction, seed: what rows of results.csv begin with.
        images: the N test images, with the C labels that are judged.
        scores: float32 [N, C] between 0 and 1.
        folds: int [N] of grouped folds: which model scored each image; the AUC is the mean of the folds'.
        min_count: fewest images with and without a label that counts in the mean.
        draws: of the bootstrap.
        note: what a reader of the results must know of these.
        study: says which images, parts and labels: only results of the same belong into one column.
        as_published: whether these are all those of the published results.
    """

    run: dict[str, Any]
    images: LabelledImages
    scores: np.ndarray
    folds: np.ndarray | None = None
    min_count: int = 1
    draws: int = 1000
    note: str = ""
    study: str = ""
    as_published: bool = False

    @property
    def measure(self) -> str:
        return "accuracy" if self.images.task == MULTICLASS else "auc"

    @cached_property
    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """Which labels count in the mean, bool [C], and values, float64 [1 + draws, C + 1]: AUC of each label, or share
        of each class that is predicted right, and last the mean (for classes over all images).

        The first row is on the data, the others on draws of subjects; a draw's mean is over the labels that it has both
        kinds of. If the images with a label, or, of AUCs, those without it, are of one subject, its draws are NaN: their
        interval would be too narrow.
        """
        targets, subjects, how = self.images.labels, self.images.subjects, {"draws": self.draws, "seed": 0}
        kinds = (1,) if self.measure == "accuracy" else (1, 0)
        lone = np.array([min(len(set(subjects[column == kind])) for kind in kinds) < 2 for column in targets.T])
        if self.measure == "accuracy":
            judged, right = np.ones(len(lone), bool), (self.scores.argmax(1) == targets.argmax(1)).astype(float)
            of_class = np.where(targets == 1, right[:, None], np.nan)
            values = bootstrap_means(np.column_stack([of_class, right]), subjects, **how)
            lone = [*lone, False]
        else:
            aucs = bootstrap_aucs(targets, self.scores, subjects, self.folds, **how)
            counts = np.stack([(targets == kind).sum(0) for kind in kinds])
            enough = (counts >= max(1, self.min_count)).all(0) & np.isfinite(aucs[0])
            single = enough & (np.array(self.images.label_names) != ANY_FINDING)
            judged = single if single.any() else enough
            values = np.column_stack([aucs, mean_of_known(aucs[:, judged], 1)])
            lone = [*lone, lone[judged].all()]
        values[1:, lone] = np.nan
        return judged, values


def results_table(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One row for each outcome and label, and one for the mean: weights, dataset, method, fraction, seed,
    label, auc or accuracy with its 95% interval over subjects (low, high), n known images, n_positive, draws (how many
    draws of subjects had a value, which the interval is taken from), study, as_published and, of the mean, note
    (`Outcome`; study and as_published are of the mean's labels, too), with a published number if all images, parts and
    labels are the published ones."""
    tables = []
    for outcome in outcomes:
        names, labels, (judged, values) = outcome.images.label_names, outcome.images.labels, outcome.found
        published = outcome.as_published and bool(judged.all()) and outcome.run["fraction"] == 1
        number = published and PUBLISHED.get((outcome.run["dataset"], outcome.run["method"]))
        value, low, high = np.transpose([interval(column) for column in values.T])
        columns = {
            **outcome.run,
            "label": [*names, MEAN],
            outcome.measure: value,
            "low": low,
            "high": high,
            "n": [*np.isfinite(labels).sum(0), len(labels)],
            "n_positive": pd.array([*(labels == 1).sum(0), None], "Int64"),
            "draws": np.isfinite(values[1:]).sum(0),
            "study": digest([outcome.study, names, judged.tolist()]),
            "as_published": published,
            "note": [""] * len(names) + ["; ".join(filter(None, [outcome.note, number]))],
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def write_predictions(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write weights, fraction, seed, fold (of grouped folds), id, label, target (empty: unknown), score: every test
    image and label once."""
    with atomic_write(path, "w") as file:
        for i, outcome in enumerate(outcomes):
            images, (n, c) = outcome.images, outcome.scores.shape
            columns = {
                **{name: outcome.run[name] for name in ("weights", "fraction", "seed")},
                **({} if outcome.folds is None else {"fold": np.repeat(outcome.folds + 1, c)}),
                "id": np.repeat(images.ids, c),
                "label": np.tile(images.label_names, n),
                "target": pd.array(images.labels.ravel(), dtype="Int8"),
                "score": outcome.scores.ravel(),
            }
            pd.DataFrame(columns).to_csv(file, index=False, header=i == 0, float_format="%.9g")


def left_out(outcome: Outcome) -> str:
    """What the mean leaves out, as text; "" where it holds every label."""
    names = ", ".join(np.array(outcome.images.label_names)[~outcome.found[0]])
    return (
        names and f"the mean leaves out {names}: with or without it are too few test images, or it holds other labels"
    )


def markdown_table(outcomes: Sequence[Outcome], table: pd.DataFrame, notes: Sequence[str]) -> str:
    """The paper's table: percent, mean +- standard deviation over seeds, per label and mean, per weights and
    fraction, with the mean's 95% interval over test subjects.

    Args:
        outcomes: of the same test images and labels.
        table: their `results_table`.
    """
    first, images = outcomes[0], outcomes[0].images
    cells = _cells(table, "label", first.measure)
    cells.insert(0, "seeds", table.groupby(["weights", "fraction"], sort=False)["seed"].nunique().astype(str))
    for key in cells.index:
        own = [outcome for outcome in outcomes if (outcome.run["weights"], outcome.run["fraction"]) == key]
        _, low, high = interval(np.mean([outcome.found[1][:, -1] for outcome in own], axis=0))
        cells.loc[key, "95% interval"] = "" if np.isnan(low) else f"{100 * low:.2f} to {100 * high:.2f}"
    text = (
        f"{first.measure.upper()} in percent, of each label and their mean (of classes: of all images), on {len(images):,} test images of {len(set(images.subjects)):,} subjects, mean ± standard "
        "deviation over seeds. The 95% interval is over test subjects (bootstrap), of the mean averaged over seeds."
    )
    return _page("{dataset}, {method}".format_map(first.run), text, notes, cells)


def summary_table(means: pd.DataFrame) -> str:
    """One table of several runs: a row per weights and share of labels, a column per study and method.

    Args:
        means: rows of the mean over labels of `results_table` of any runs, with its value in the column `value`,
            "auc" or "accuracy" in `measure`, and the title of its column, one per study and method, in `run`.

    Returns:
        Markdown; percent, mean ± standard deviation over seeds.
    """
    cells = _cells(means, "run", "value")
    text = (
        "Percent on the test images: AUC (its mean over labels), or accuracy where a column says so; mean ± standard "
        "deviation over seeds."
    )
    notes = [f"{run}: {note}" for run, note in means[["run", "note"]].drop_duplicates().to_numpy() if note]
    return _page("Downstream results", text, notes, cells)


def write_text(text: str, path: Path) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path, "w") as file:
        file.write(text)


def _cells(table: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    """Text of mean ± standard deviation over seeds, in percent: a row per weights and fraction, in the table's order, and
    a column for each value of `column`."""

    def spread(values):
        mean, std = (100 * values).mean(skipna=False), (100 * values).std()
        return "" if np.isnan(mean) else f"{mean:.2f}" + f" ± {std:.2f}" * (len(values) > 1)

    return table.pivot_table(value, ["weights", "fraction"], column, aggfunc=spread, sort=False)


def _page(title: str, text: str, notes: Sequence[str], cells: pd.DataFrame) -> str:
    """Markdown of `_cells` under a title, a text, and notes, of which empty ones are left out."""
    cells = cells.fillna("").reset_index()
    cells.insert(1, "labels used", [f"{100 * fraction:g}%" for fraction in cells.pop("fraction")])
    table = [list(cells), ["---"] * cells.shape[1], *cells.to_numpy().tolist()]
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([f"# {title}", "", text, *[f"\n{note}." for note in notes if note], "", *lines, ""])
