"""Pictures of what the model sees and predicts: masks, gaze, HOG as line glyphs, error.

All are `matplotlib.figure.Figure` objects without pyplot's global state, so that they can be drawn
anywhere (TensorBoard's add_figure, a file). Nothing here is random.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor, nn

from util.figures import fit_lines
from util.masking import foreground_of, mask_cells, significant_patches

# Colours told apart by every common kind of colour vision (Okabe and Ito 2008).
SIGNIFICANT = "#E69F00"  # orange
MASKED = "#0072B2"  # blue
ENLARGED = "#CC79A7"  # purple
GAZE_MAP = "inferno"  # perceptually uniform
ERROR_MAP = "viridis"
KEY = (
    "significant: at least half of the patch is gaze foreground (Otsu). Glyphs: lines along the edges of a cell, "
    "brighter where more of its gradient has that direction."
)
GLYPH_PIXELS = 896  # least side of a drawn HOG panel


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` found, as NumPy arrays. B images, h x w patches, scale k has h_k x w_k cells.

    Attributes:
        gray: float [B, H, W] in 0..1, the radiograph.
        attention: float [B, H, W] in 0..1.
        significant, masked: bool [B, h, w].
        targets, predictions: for each scale float [B, h_k, w_k, nbins], mean of the colour channels.
        predicted: for each scale bool [B, h_k, w_k], cells that touch a masked patch.
        error: float [B, h, w], squared error of the patch's cells, averaged over cells and channels
            and summed over scales: the unweighted loss of the patch.
        references: by name, float [B, h, w]: the same error of a prediction that sees no image. "one constant for
            all cells" is the mean target of a scale; "the mean of each place", if means were given, of each cell.
        cell_sizes: px of each scale.
    """

    gray: np.ndarray
    attention: np.ndarray
    significant: np.ndarray
    masked: np.ndarray
    targets: list[np.ndarray]
    predictions: list[np.ndarray]
    predicted: list[np.ndarray]
    error: np.ndarray
    references: dict[str, np.ndarray]
    cell_sizes: list[int]


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


@torch.no_grad()
def reconstruct(
    model: nn.Module, batch: Mapping[str, Tensor], mask: Tensor, means: Sequence[Tensor] | None = None
) -> Reconstruction:
    """Run the model on a batch with a given mask and collect everything that a picture shows.

    Args:
        model: unwrapped; its training mode is restored.
        batch: as `CXRMIM.prepare_batch` takes it.
        mask: [B, L], 1 = masked.
        means: `mean_targets` of the training images, for both references; without it the constant is that of `batch`.
    """
    training = model.training
    model.eval()
    batch = model.prepare_batch(batch)
    mask = mask.to(batch["img"].device)
    predictions = model.forward_decoder(model.forward_encoder(batch["img"], mask), mask)
    targets = model.hog_targets(batch.get("gray", batch["img"]))
    model.train(training)

    height, width = model.grid_size
    grid_mask = mask.view(-1, 1, height, width).float()
    constants = [level.mean(0) for level in means or [target.mean(0) for target in targets]]
    guesses = {"model": predictions, "one constant for all cells": constants}
    if means:
        guesses["the mean of each place"] = means
    errors = {name: torch.zeros_like(grid_mask) for name in guesses}
    shown_targets, shown_predictions, predicted = [], [], []
    for k, (scale, target, prediction) in enumerate(zip(model.scale_list, targets, predictions, strict=True)):
        shape = (-1, int(height * scale), int(width * scale))
        for name, guess in guesses.items():
            cell_error = (guess[k].float() - target).square().mean(2).view(shape)[:, None]
            # Cells back to patches: the inverse of bringing a mask to the cells.
            errors[name] += mask_cells(cell_error, 1 / scale)
        by_channel = (*shape, 3, model.hog.nbins)
        shown_targets.append(target.float().view(by_channel).mean(3).cpu().numpy())
        shown_predictions.append(prediction.float().view(by_channel).mean(3).cpu().numpy())
        predicted.append((mask_cells(grid_mask, scale)[:, 0] > 0).cpu().numpy())
    significant = significant_patches(foreground_of(batch), model.patch_size).view(-1, height, width)
    by_patch = {name: error[:, 0].cpu().numpy() for name, error in errors.items()}
    return Reconstruction(
        gray=gray_image(model, batch),
        attention=batch["attention"].float().cpu().numpy(),
        significant=significant.cpu().numpy(),
        masked=(grid_mask[:, 0] > 0).cpu().numpy(),
        targets=shown_targets,
        predictions=shown_predictions,
        predicted=predicted,
        error=by_patch.pop("model"),
        references=by_patch,
        cell_sizes=list(model.hog.cell_sizes),
    )


def gray_image(model: nn.Module, prepared: Mapping[str, Tensor]) -> np.ndarray:
    """Undo the normalisation of a prepared batch: float [B, H, W] in 0..1, mean of the channels."""
    image = (prepared["img"].float() * model.std + model.mean).mean(1)
    return image.clamp(0, 1).cpu().numpy()


def hog_glyphs(hog: np.ndarray, cell: int) -> np.ndarray:
    """Draw histograms of oriented gradients as lines along the *edges*.

    A gradient's bin is drawn as a line through the cell's centre, perpendicular to the gradient, i.e.
    along the edge that has this gradient, so that the lines trace the contours of the image (as
    scikit-image draws HOG). The brightness of a line is the value of its bin, cut to 0..1: 1 is a cell
    with one orientation only, 1/sqrt(nbins) a cell with all alike.

    Args:
        hog: float [h, w, nbins]; bin k has gradient angles from k to k+1 times pi/nbins, measured from
            the x axis (right) towards the y axis (down).
        cell: side of a drawn cell in output pixels.

    Returns:
        float32 [h*cell, w*cell] in 0..1.
    """
    height, width, nbins = hog.shape
    centre = np.arange(cell) - (cell - 1) / 2
    x, y = centre[None, :], centre[:, None]
    thickness = max(2.4, cell / 12)  # a panel is often shown at half its pixels
    length = 0.46 * cell
    drawn = np.zeros((height, cell, width, cell), np.float32)
    for k in range(nbins):
        angle = (k + 0.5) * math.pi / nbins + math.pi / 2  # of the edge
        along = np.abs(x * math.cos(angle) + y * math.sin(angle))
        across = np.abs(x * math.sin(angle) - y * math.cos(angle))
        line = np.clip(thickness / 2 + 0.5 - across, 0, 1) * np.clip(length + 0.5 - along, 0, 1)  # [cell, cell]
        value = np.clip(hog[:, :, k], 0, 1).astype(np.float32)
        np.maximum(drawn, value[:, None, :, None] * line.astype(np.float32)[None, :, None, :], out=drawn)
    return drawn.reshape(height * cell, width * cell)


def gaze_overlay(gray: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Lay a heatmap over a radiograph, [H, W] each in 0..1 -> RGB [H, W, 3].

    Opacity grows with attention: where nobody looked the radiograph is left exactly as it is.
    """
    attention = np.clip(attention, 0, 1)[..., None]
    # Without the map's darkest part, which would hide what is below it.
    color = matplotlib.colormaps[GAZE_MAP](0.25 + 0.75 * attention[..., 0])[..., :3]
    alpha = 0.85 * (1 - (1 - attention) ** 2)
    return (1 - alpha) * gray[..., None] + alpha * color


def mask_picture(gray: np.ndarray, significant: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """Colour the masked patches of a radiograph: orange where significant, else blue.

    Args:
        gray: [H, W] in 0..1.
        significant, masked: bool [h, w].

    Returns:
        RGB [H, W, 3]; visible patches are the radiograph itself.
    """
    patch = gray.shape[0] // masked.shape[0]
    picture = np.repeat(gray[..., None], 3, 2)
    large = _enlarge(masked, patch)
    colors = np.where(_enlarge(significant, patch)[..., None], to_rgb(SIGNIFICANT), to_rgb(MASKED))
    picture[large] = (0.3 * picture + 0.7 * colors)[large]
    return picture


def prediction_picture(prediction: np.ndarray, predicted: np.ndarray, pixels: int = GLYPH_PIXELS) -> np.ndarray:
    """Glyphs of the prediction in cells that touch a masked patch; visible cells are hatched, without glyphs.

    Args:
        prediction: [h, w, nbins].
        predicted: bool [h, w].
        pixels: least side of the result.

    Returns:
        RGB [H, W, 3] in 0..1.
    """
    cell = _glyph_cell(prediction.shape[0], pixels)
    shown = hog_glyphs(np.where(predicted[..., None], prediction, 0), cell)
    rows, columns = np.indices(shown.shape)
    hatch = np.where((rows + columns) % 16 < 3, 0.45, 0.22)[..., None] * np.array(to_rgb(MASKED))
    return np.where(_enlarge(predicted, cell)[..., None], shown[..., None], hatch)


def _finest_masked(masked: np.ndarray, side: int) -> tuple[int, int]:
    """Row and column of the square of side x side patches that holds most masked ones."""
    height, width = masked.shape
    places = [(row, column) for row in range(height - side + 1) for column in range(width - side + 1)]
    return max(places, key=lambda place: masked[place[0] : place[0] + side, place[1] : place[1] + side].sum())


def _glyph_cell(cells: int, pixels: int) -> int:
    return max(7, math.ceil(pixels / cells))


def _enlarge(grid: np.ndarray, factor: int) -> np.ndarray:
    return grid.repeat(factor, 0).repeat(factor, 1)


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
    errors = Normalize(0, max(float(found.error[found.masked].max(initial=0)), 1e-12))
    *bands, below = figure.subfigures(count + 1, 1, height_ratios=[*heights, foot])
    for i, band in enumerate(bands):
        band.suptitle("\n".join(captions[i]), fontsize=8.5, x=0.005, ha="left")
        _draw_band(band.subplots(2, columns), found, i, errors)
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


def _draw_band(panels: np.ndarray, found: Reconstruction, i: int, errors: Normalize) -> None:
    """Draw image i into axes [2, 3 + K]."""
    gray, significant, masked = found.gray[i], found.significant[i], found.masked[i]
    patch = gray.shape[0] // masked.shape[0]

    def show(axes, text: str, picture: np.ndarray, **options) -> None:
        axes.imshow(picture, **options)
        axes.set_title(text, fontsize=8, pad=2.5)
        axes.set_xticks([])
        axes.set_yticks([])

    show(panels[0, 0], "radiograph", gray, cmap="gray", vmin=0, vmax=1)
    show(panels[0, 1], "gaze heatmap (bright: looked at longer)", gaze_overlay(gray, found.attention[i]))
    show(panels[1, 0], "mask", mask_picture(gray, significant, masked), interpolation="nearest")
    _outline(panels[1, 0], significant & ~masked, patch)
    colours = matplotlib.colormaps[ERROR_MAP](errors(found.error[i]))[..., :3]
    shown = np.where(_enlarge(masked, patch)[..., None], _enlarge(colours, patch), 0.35 * gray[..., None])
    show(panels[1, 1], "squared error of masked patches", shown, interpolation="nearest")
    for k, cell in enumerate(found.cell_sizes):
        drawn = _glyph_cell(found.targets[k].shape[1], GLYPH_PIXELS)
        glyphs = hog_glyphs(found.targets[k][i], drawn)
        show(panels[0, 2 + k], f"HOG target, {cell} px cells", glyphs, cmap="gray", vmin=0, vmax=1)
        guess = prediction_picture(found.predictions[k][i], found.predicted[k][i])
        show(panels[1, 2 + k], f"HOG prediction, {cell} px cells", guess)

    finest = int(np.argmin(found.cell_sizes))
    side = min(4, *masked.shape)
    row, column = _finest_masked(masked, side)
    for axes in (panels[1, 0], *panels[:, 2 + finest]):  # where the enlarged region is
        size = axes.get_images()[0].get_array().shape[0] / masked.shape[0]
        corner = (column * size - 0.5, row * size - 0.5)
        axes.add_patch(Rectangle(corner, side * size, side * size, fill=False, ec=ENLARGED, lw=1.4))
    for line, (what, axes) in enumerate(zip(("target", "prediction"), panels[:, -1], strict=True)):
        picture = panels[line, 2 + finest].get_images()[0].get_array()
        step = picture.shape[0] / masked.shape[0]
        rows, columns = (slice(int(start * step), int((start + side) * step)) for start in (row, column))
        show(axes, f"{what}, framed part enlarged", picture[rows, columns], cmap="gray", vmin=0, vmax=1)


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
