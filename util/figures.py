"""What all figures share: text that is shown as it is and fits its figure, and files that are whole or not there."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure, SubFigure

from util.errors import UserError
from util.files import atomic_write

PICTURE_SUFFIXES = (".png", ".pdf", ".svg", ".jpg")
# Mean width of a letter of matplotlib's own font, wide letters in mind.
LETTER_PER_POINT = 0.6


def plain(text: str) -> str:
    """Text as matplotlib shows it letter by letter: "$" starts no formula, "_" hides no legend entry."""
    text = text.replace("$", r"\$")
    return f"\u200a{text}" if text.startswith("_") else text


def fit_lines(text: str, inches: float, points: float) -> list[str]:
    """`text` in as many `plain` lines as it takes to fit a width at a font size; nothing is cut."""
    letters = max(10, int(inches * 72 / (LETTER_PER_POINT * points)))
    return [plain(part) for line in text.split("\n") for part in textwrap.wrap(line, letters) or [""]]


def set_title(figure: Figure, text: str, points: float) -> None:
    """The title above all panels of a figure, in as many lines as it takes; nothing in it is cut."""
    figure.suptitle("\n".join(fit_lines(text, figure.get_figwidth(), points)), fontsize=points)


def show_panels(
    figure: Figure | SubFigure,
    lines: Sequence[Sequence[tuple[str, np.ndarray]]],
    *,
    points: float,
    pad: float | None = None,
    **shown: Any,
) -> np.ndarray:
    """Lines of pictures in 0..1, each below its title, without frames. Returns the axes, [lines, columns].

    Args:
        lines: (title, gray [H, W] or RGB [H, W, 3]) of each panel; lines may be of different lengths.
        points, pad: font size of the titles, and their distance from the pictures (None: matplotlib's).
        shown: further options of `matplotlib.axes.Axes.imshow`.
    """
    # Ticks would take half of the time of drawing, and be hidden.
    ticks = {"xticks": [], "yticks": []}
    grid = figure.subplots(len(lines), max(map(len, lines)), squeeze=False, subplot_kw=ticks)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, line in zip(grid, lines):
        for axes, (title, picture) in zip(row, line):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, **shown)
            axes.set_title(title, fontsize=points, pad=pad)
    return grid


def check_picture_path(path: str | os.PathLike) -> Path:
    """The path, if a picture can be written there.

    Raises:
        UserError: unknown suffix, its folder does not exist, or it is a folder itself.
    """
    path = Path(path)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"{path}: pictures are written as {', '.join(PICTURE_SUFFIXES)}; choose such a name")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder to write {path.name} into")
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name a picture to write")
    return path


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure, whole or not at all, in the format of the suffix; equal figures give equal bytes."""
    path = check_picture_path(path)
    kind = path.suffix.lower()[1:]
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind, {})
    with matplotlib.rc_context({"svg.hashsalt": "cxr-mim"}), atomic_write(path) as file:
        figure.savefig(file, format=kind, metadata=metadata if kind != "jpg" else None)


# Told apart by every common kind of colour vision (Okabe and Ito 2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


LINE_STYLES = ("-", "--", ":", "-.")
