"""Pictures of what the model sees and predicts: masks, gaze, HOG as line glyphs, error.

All are `matplotlib.figure.Figure` objects without pyplot's global state, so that they can be drawn
anywhere (TensorBoard's add_figure, a file). Nothing here is random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
        reference: float [B, h, w], the same of a constant prediction, the mean target of these images
            at each scale: what a model that learnt nothing else would have.
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
    reference: np.ndarray
    cell_sizes: list[int]


@torch.no_grad()
def reconstruct(model: nn.Module, batch: Mapping[str, Tensor], mask: Tensor) -> Reconstruction:
    """Run the model on a batch with a given mask and collect everything that a picture shows.

    Args:
        model: unwrapped; its training mode is restored.
        batch: as `CXRMIM.prepare_batch` takes it.
        mask: [B, L], 1 = masked.
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
    error, reference = torch.zeros_like(grid_mask), torch.zeros_like(grid_mask)
    shown_targets, shown_predictions, predicted = [], [], []
    for scale, target, prediction in zip(model.scale_list, targets, predictions, strict=True):
        shape = (-1, int(height * scale), int(width * scale))
        cell_error = (prediction.float() - target).square().mean(2).view(shape)[:, None]
        # Cells back to patches: the inverse of bringing a mask to the cells.
        error += mask_cells(cell_error, 1 / scale)
        mean_error = (target - target.mean((0, 1))).square().mean(2).view(shape)[:, None]
        reference += mask_cells(mean_error, 1 / scale)
        by_channel = (*shape, 3, model.hog.nbins)
        shown_targets.append(target.float().view(by_channel).mean(3).cpu().numpy())
        shown_predictions.append(prediction.float().view(by_channel).mean(3).cpu().numpy())
        predicted.append((mask_cells(grid_mask, scale)[:, 0] > 0).cpu().numpy())
    significant = significant_patches(foreground_of(batch), model.patch_size).view(-1, height, width)
    return Reconstruction(
        gray=gray_image(model, batch),
        attention=batch["attention"].float().cpu().numpy(),
        significant=significant.cpu().numpy(),
        masked=(grid_mask[:, 0] > 0).cpu().numpy(),
        targets=shown_targets,
        predictions=shown_predictions,
        predicted=predicted,
        error=error[:, 0].cpu().numpy(),
        reference=reference[:, 0].cpu().numpy(),
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
    names: Sequence[str] | None = None,
    title: str = "",
    panel_inches: float = 2.2,
) -> Figure:
    """Figure with one band per image, of two lines: radiograph, gaze, targets; mask, error, predictions.

    Args:
        model: unwrapped CXRMIM.
        batch: B images as the data sets give them, or prepared.
        mask: [B, L], 1 = masked.
        names, title: a line of text per image; what is shown: run, data, epoch.
        panel_inches: side of a panel.

    The last column enlarges the finest cells where most is masked: target above, prediction below.

    Returns:
        A figure of about (3 + K) x 2B panels; save it with `save_figure`.
    """
    found = reconstruct(model, batch, mask)
    count, scales = len(found.gray), len(found.cell_sizes)
    columns = 3 + scales
    gap, caption, footer, left = 0.06, 0.24, 0.8, 0.06
    width = left + columns * (panel_inches + gap)
    lines = fit_lines(", ".join(filter(None, [title, _count(count)])), width, 10)
    wrapped = [fit_lines(name, width, 8.5) for name in names] if names else [[]] * count
    top = 0.14 + 0.2 * len(lines)
    header = 0.26 + 0.15 * max(map(len, wrapped))
    band = header + 2 * (caption + panel_inches)
    height = top + count * band + footer
    figure = Figure(figsize=(width, height), dpi=200)
    FigureCanvasAgg(figure)
    error_scale = Normalize(0, max(float(found.error[found.masked].max(initial=0)), 1e-12))

    def panel(row: int, line: int, column: int, text: str, picture: np.ndarray, **options):
        x = left + column * (panel_inches + gap)
        y = height - top - row * band - header - line * (caption + panel_inches) - caption - panel_inches
        axes = figure.add_axes((x / width, y / height, panel_inches / width, panel_inches / height))
        axes.imshow(picture, **options)
        axes.set_title(text, fontsize=8, pad=2.5)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_linewidth(0.4)
        return axes

    figure.text(left / width, 1 - 0.5 * top / height, "\n".join(lines), fontsize=10, va="center")
    finest = int(np.argmin(found.cell_sizes))
    for i in range(count):
        gray, significant, masked = found.gray[i], found.significant[i], found.masked[i]
        counts = (
            f"{significant.sum()} of {masked.size} patches significant; "
            f"masked: {masked.sum()}, of which significant: {(masked & significant).sum()}. "
            f"Mean squared error of masked patches: {found.error[i][masked].mean():.3f}; "
            f"had each cell the mean target: {found.reference[i][masked].mean():.3f}"
        )
        line = height - top - i * band - header + 0.06
        figure.text(left / width, line / height, counts, fontsize=8, va="bottom")
        line += 0.15
        figure.text(left / width, line / height, "\n".join(wrapped[i]), fontsize=8.5, weight="bold", va="bottom")

        panel(i, 0, 0, "radiograph", gray, cmap="gray", vmin=0, vmax=1)
        panel(i, 0, 1, "gaze heatmap (bright: looked at longer)", gaze_overlay(gray, found.attention[i]))
        axes = panel(i, 1, 0, "mask", mask_picture(gray, significant, masked), interpolation="nearest")
        _outline(axes, significant & ~masked, gray.shape[0] // masked.shape[0])
        error = matplotlib.colormaps[ERROR_MAP](error_scale(found.error[i]))[..., :3]
        patch = gray.shape[0] // masked.shape[0]
        dim = np.repeat(0.35 * gray[..., None], 3, 2)
        shown = np.where(_enlarge(masked, patch)[..., None], error.repeat(patch, 0).repeat(patch, 1), dim)
        panel(i, 1, 1, "squared error of masked patches", shown, interpolation="nearest")
        finest_panels = []
        for k, cell in enumerate(found.cell_sizes):
            target, prediction = found.targets[k][i], found.predictions[k][i]
            glyphs = hog_glyphs(target, _glyph_cell(target.shape[0], GLYPH_PIXELS))
            above = panel(i, 0, 2 + k, f"HOG target, {cell} px cells", glyphs, cmap="gray", vmin=0, vmax=1)
            shown = prediction_picture(prediction, found.predicted[k][i])
            below = panel(i, 1, 2 + k, f"HOG prediction, {cell} px cells", shown)
            if k == finest:
                finest_panels = [above, below]
        side = min(4, *masked.shape)
        place = _finest_masked(masked, side)
        for framed in (axes, *finest_panels):  # where the enlarged region is
            size = framed.get_images()[0].get_array().shape[0] / masked.shape[0]
            corner = (place[1] * size - 0.5, place[0] * size - 0.5)
            framed.add_patch(Rectangle(corner, side * size, side * size, fill=False, ec=ENLARGED, lw=1.4))
        shown = [
            hog_glyphs(found.targets[finest][i], GLYPH_PIXELS // 32 + 4)[..., None].repeat(3, 2),
            prediction_picture(found.predictions[finest][i], found.predicted[finest][i]),
        ]
        for line, (what, picture) in enumerate(zip(("target", "prediction"), shown, strict=True)):
            step = picture.shape[0] // masked.shape[0]
            rows, cols = (slice(start * step, (start + side) * step) for start in place)
            panel(i, line, 2 + scales, f"{what}, framed part enlarged", picture[rows, cols])

    visible = Patch(
        fc=0.22 * np.array(to_rgb(MASKED)),
        ec=0.45 * np.array(to_rgb(MASKED)),
        hatch="//////",
        label="in predictions: visible, not predicted",
    )
    framed = Patch(fc="none", ec=ENLARGED, lw=1.4, label="enlarged at the right")
    axes = figure.add_axes((left / width, 0.28 / height, 0.6, (footer - 0.4) / height))
    axes.set_axis_off()
    handles = [*_mask_key(), visible, framed]
    axes.legend(
        handles=handles, loc="center left", ncols=5, fontsize=7.5, columnspacing=1.2, frameon=False, borderpad=0
    )
    figure.text(left / width, 0.1 / height, KEY, fontsize=7.5)
    axes = figure.add_axes(
        (1 - (2.2 * panel_inches) / width, (footer - 0.22) / height, 2 * panel_inches / width, 0.09 / height)
    )
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(error_scale, ERROR_MAP), cax=axes, orientation="horizontal")
    bar.ax.tick_params(labelsize=7, length=2, pad=1)
    bar.set_label("squared error of a patch, summed over scales", fontsize=7.5, labelpad=1)
    bar.outline.set_linewidth(0.4)
    return figure


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
    key = "\n".join(fit_lines(key, width - 0.3, 6))
    place = {"loc": "outside lower center", "ncols": 3, "frameon": False}
    figure.legend(handles=_mask_key(), **place, fontsize=6, columnspacing=1.2, title=key, title_fontsize=6)
    return figure


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
