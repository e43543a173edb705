"""Figures of what a checkpoint sees and predicts, for scripts/visualize.py: panels of `util.pictures` with captions.

All are `matplotlib.figure.Figure` objects without pyplot's global state. Nothing here is random.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor, nn

from util.figures import fit_lines
from util.masking import foreground_of, significant_patches
from util.pictures import (
    ERROR_MAP,
    MASKED,
    SIGNIFICANT,
    Reconstruction,
    gaze_overlay,
    gray_image,
    mask_picture,
    reconstruct,
    reconstruction_panels,
)

ENLARGED = "#CC79A7"  # purple
KEY = (
    "significant: at least half of the patch is gaze foreground (Otsu). Glyphs: lines along the edges of a cell, "
    "brighter where more of its gradient has that direction."
)


@torch.no_grad()
def mean_targets(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """Mean HOG target of each cell over all images of the batches: for each scale float [cells_k, 3*nbins]."""
    sums, count = None, 0
    for batch in batches:
        prepared = model.prepare_batch(batch)
        targets = [target.double().sum(0) for target in model.hog_targets(prepared.get("gray", prepared["img"]))]
        sums = targets if sums is None else [old + new for old, new in zip(sums, targets, strict=True)]
        count += len(prepared["img"])
    if sums is None:
        raise ValueError("no images to take the mean of")
    return [(total / count).float() for total in sums]


def reconstruction_figure(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    mask: Tensor,
    *,
    means: Sequence[Tensor] | None = None,
    names: Sequence[str] | None = None,
    title: str = "",
    panel_inches: float = 2.2,
) -> Figure:
    """Figure with one band per image, of two lines: radiograph, gaze, targets; mask, error, predictions.

    Args:
        model: unwrapped CXRMIM.
        batch: B images as the data sets give them, or prepared.
        mask: [B, L], 1 = masked.
        means: `mean_targets` of the training images under the same view, for the reference of each place.
        names, title: a line of text per image; what is shown: run, data, epoch.
        panel_inches: side of a panel.

    The last column enlarges the finest cells where most is masked: target above, prediction below.

    Returns:
        A figure of about (3 + K) x 2B panels; save it with `save_figure`.
    """
    found = reconstruct(model, batch, mask, means)
    count, columns = len(found.gray), 3 + len(found.cell_sizes)
    width = columns * (panel_inches + 0.06)
    lines = fit_lines(", ".join(filter(None, [title, _count(count)])), width, 10)
    captions = [_caption(found, i, names[i] if names else "", width) for i in range(count)]
    heights = [2 * (panel_inches + 0.25) + 0.2 * len(caption) for caption in captions]
    foot = 0.55
    finest = max(target.shape[1] for target in found.targets)
    dpi = float(np.clip(10 * finest / panel_inches, 110, 200))  # ten pixels for a glyph
    figure = Figure((width, sum(heights) + 0.2 * len(lines) + foot + 0.5), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("\n".join(lines), fontsize=10)
    errors = Normalize(0, found.largest_error)
    *bands, below = figure.subfigures(count + 1, 1, height_ratios=[*heights, foot])
    for i, band in enumerate(bands):
        band.suptitle("\n".join(captions[i]), fontsize=8.5, x=0.005, ha="left")
        _draw_band(band.subplots(2, columns), found, i)
    bar = below.colorbar(
        matplotlib.cm.ScalarMappable(errors, ERROR_MAP), cax=below.subplots(), orientation="horizontal"
    )
    bar.ax.tick_params(labelsize=7)
    bar.set_label("squared error of a patch, summed over scales", fontsize=7.5)
    hatched = {"fc": 0.22 * np.array(to_rgb(MASKED)), "ec": 0.45 * np.array(to_rgb(MASKED)), "hatch": "//////"}
    visible = Patch(**hatched, label="in predictions: visible, not predicted")
    framed = Patch(fc="none", ec=ENLARGED, lw=1.4, label="enlarged at the right")
    _legend(figure, [*_mask_key(), visible, framed], 5, KEY, width)
    return figure


def _caption(found: Reconstruction, i: int, name: str, width: float) -> list[str]:
    """Lines above an image: its name, its counts, and its error beside what needs no image."""
    significant, masked = found.significant[i], found.masked[i]
    references = "".join(f"; of {what} {error[i][masked].mean():.3f}" for what, error in found.references.items())
    text = (
        f"Mean squared error of masked patches: {found.error[i][masked].mean():.3f}{references}. "
        f"{significant.sum()} of {masked.size} patches significant; masked: {masked.sum()}, of which significant: "
        f"{(masked & significant).sum()}"
    )
    return fit_lines(f"{name}\n{text}" if name else text, width, 8.5)


def _draw_band(panels: np.ndarray, found: Reconstruction, i: int) -> None:
    """Draw image i into axes [2, 3 + K]."""
    masked, finest = found.masked[i], 2 + int(np.argmin(found.cell_sizes))
    side = min(4, *masked.shape)
    counts = np.lib.stride_tricks.sliding_window_view(masked, (side, side)).sum((2, 3))
    corner = np.array(np.unravel_index(counts.argmax(), counts.shape))  # row and column of where most is masked
    for axes, line, what in zip(panels, reconstruction_panels(found, i), ("target", "prediction"), strict=True):
        picture = line[finest][1]
        start = (corner * picture.shape[0] / masked.shape[0]).astype(int)
        stop = ((corner + side) * picture.shape[0] / masked.shape[0]).astype(int)
        enlarged = picture[start[0] : stop[0], start[1] : stop[1]]
        for place, (text, shown) in zip(axes, [*line, (f"{what}, framed part enlarged", enlarged)], strict=True):
            place.imshow(shown, cmap="gray", vmin=0, vmax=1)
            place.set_title(text, fontsize=8, pad=2.5)
            place.set_xticks([])
            place.set_yticks([])
    _outline(panels[1, 0], found.significant[i] & ~masked, found.gray.shape[1] // masked.shape[0])
    for axes in (panels[1, 0], *panels[:, finest]):  # where the enlarged region is
        size = axes.get_images()[0].get_array().shape[0] / masked.shape[0]
        row, column = corner * size - 0.5
        axes.add_patch(Rectangle((column, row), side * size, side * size, fill=False, ec=ENLARGED, lw=1.4))


def contact_sheet(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    mask: Tensor,
    *,
    names: Sequence[str] | None = None,
    title: str = "",
    columns: int = 4,
    panel_inches: float = 1.5,
) -> Figure:
    """Figure of many images, two panels each: gaze heatmap, and mask with significant patches.

    Arguments as for `reconstruction_figure`; `columns` images stand side by side.
    """
    batch = model.prepare_batch(batch)
    gray = gray_image(model, batch)
    attention = batch["attention"].float().cpu().numpy()
    shape = (len(gray), *model.grid_size)
    significant = significant_patches(foreground_of(batch), model.patch_size).view(shape).cpu().numpy()
    masked = (mask.view(shape) > 0).cpu().numpy()

    columns = min(columns, len(gray))
    rows = math.ceil(len(gray) / columns)
    width = max(columns * 2 * (panel_inches + 0.1), 4.5)
    wrapped = [fit_lines(name, 2 * panel_inches, 5.5) for name in names] if names else [[]] * len(gray)
    caption = 0.2 + 0.085 * max(map(len, wrapped))
    figure = Figure(figsize=(width, rows * (panel_inches + caption) + 1), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    title = ", ".join(filter(None, [title, _count(len(gray))]))
    figure.suptitle("\n".join(fit_lines(title, width - 0.3, 8)), fontsize=8)
    panels = figure.subplots(rows, 2 * columns, squeeze=False).reshape(-1, 2)
    for axes in panels.flat:
        axes.set_axis_off()
    for i, (left, right) in enumerate(panels[: len(gray)]):
        text = f"{significant[i].sum()} significant, {(significant[i] & masked[i]).sum()} of them masked"
        left.set_title("\n".join([*wrapped[i], text]), loc="left", fontsize=5.5, pad=2)
        left.imshow(gaze_overlay(gray[i], attention[i]))
        right.imshow(mask_picture(gray[i], significant[i], masked[i]), interpolation="nearest")
        _outline(right, significant[i] & ~masked[i], gray.shape[1] // masked.shape[1])
    key = f"left: gaze, brighter where longer; right: mask. {KEY.partition(' Glyphs')[0]}"
    _legend(figure, _mask_key(), 3, key, width - 0.3, 6)
    return figure


def _legend(figure: Figure, handles: list[Patch], columns: int, key: str, width: float, points: float = 7.5) -> None:
    title = "\n".join(fit_lines(key, width, points))
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False, "columnspacing": 1.2}
    figure.legend(handles=handles, **place, fontsize=points, title=title, title_fontsize=points)


def _count(images: int) -> str:
    return f"{images} image{'s' if images > 1 else ''}"


def _outline(axes, patches: np.ndarray, size: int) -> None:
    """Outline each true patch of [h, w] in the colour of significant patches."""
    for row, column in np.argwhere(patches):
        axes.add_patch(
            Rectangle((column * size + 0.5, row * size + 0.5), size - 2, size - 2, fill=False, ec=SIGNIFICANT, lw=0.8)
        )


def _mask_key() -> list[Patch]:
    return [
        Patch(fc=MASKED, alpha=0.8, label="masked"),
        Patch(fc=SIGNIFICANT, alpha=0.8, label="masked, significant (gazed at)"),
        Patch(fc="none", ec=SIGNIFICANT, lw=1.2, label="visible, significant"),
    ]
