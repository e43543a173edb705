"""Pictures of what the model sees and predicts: masks, gaze, HOG as line glyphs, error. Arrays in, arrays out; nothing here
is random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from torch import Tensor, nn

from util.masking import foreground_of, mask_cells, significant_patches

# Colours that every common kind of colour vision distinguishes (Okabe and Ito 2008).
SIGNIFICANT = "#E69F00"  # orange
MASKED = "#0072B2"  # blue
GAZE_MAP = "inferno"  # perceptually uniform
ERROR_MAP = "viridis"
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
        references: by name, float [B, h, w]: the same error of a prediction that sees no image.
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

    @property
    def largest_error(self) -> float:
        """Of a masked patch: full scale of `error_picture`."""
        return max(float(self.error[self.masked].max(initial=0)), 1e-12)


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    mask: Tensor,
    references: Mapping[str, Sequence[Tensor]] | None = None,
) -> Reconstruction:
    """Run the model on a batch with a given mask and collect everything that a picture shows.

    Args:
        model: unwrapped; its training mode is restored.
        batch: as `CXRMIM.prepare_batch` takes it.
        mask: [B, L], 1 = masked.
        references: by name, what sees no image would predict: for each scale float, as its target [cells_k, 3*nbins].
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

    def patch_errors(guess: Sequence[Tensor]) -> np.ndarray:
        total = torch.zeros_like(grid_mask)
        for scale, guessed, target in zip(model.scale_list, guess, targets, strict=True):
            cells = (guessed.float() - target).square().mean(2).view(-1, 1, int(height * scale), int(width * scale))
            total += mask_cells(cells, 1 / scale)  # cells back to patches: the inverse of bringing a mask to the cells
        return total[:, 0].cpu().numpy()

    def histograms(levels: Sequence[Tensor]) -> list[np.ndarray]:
        shapes = [(-1, int(height * scale), int(width * scale), 3, model.hog.nbins) for scale in model.scale_list]
        return [level.float().view(shape).mean(3).cpu().numpy() for level, shape in zip(levels, shapes, strict=True)]

    significant = significant_patches(foreground_of(batch), model.patch_size).view(-1, height, width)
    return Reconstruction(
        gray=gray_image(model, batch),
        attention=batch["attention"].float().cpu().numpy(),
        significant=significant.cpu().numpy(),
        masked=(grid_mask[:, 0] > 0).cpu().numpy(),
        targets=histograms(targets),
        predictions=histograms(predictions),
        predicted=[(mask_cells(grid_mask, scale)[:, 0] > 0).cpu().numpy() for scale in model.scale_list],
        error=patch_errors(predictions),
        references={name: patch_errors(guess) for name, guess in (references or {}).items()},
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
    large = enlarge(masked, patch)
    colors = np.where(enlarge(significant, patch)[..., None], to_rgb(SIGNIFICANT), to_rgb(MASKED))
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
    cell = glyph_cell(prediction.shape[0], pixels)
    shown = hog_glyphs(np.where(predicted[..., None], prediction, 0), cell)
    rows, columns = np.indices(shown.shape)
    hatch = np.where((rows + columns) % 16 < 3, 0.45, 0.22)[..., None] * np.array(to_rgb(MASKED))
    return np.where(enlarge(predicted, cell)[..., None], shown[..., None], hatch)


def glyph_cell(cells: int, pixels: int) -> int:
    return max(7, math.ceil(pixels / cells))


def enlarge(grid: np.ndarray, factor: int) -> np.ndarray:
    return grid.repeat(factor, 0).repeat(factor, 1)


def error_picture(gray: np.ndarray, error: np.ndarray, masked: np.ndarray, largest: float) -> np.ndarray:
    """Colour the masked patches of a radiograph by their error, [h, w], of at most `largest`: RGB [H, W, 3]; visible
    patches are dim."""
    patch = gray.shape[0] // masked.shape[0]
    colours = matplotlib.colormaps[ERROR_MAP](error / largest)[..., :3]
    return np.where(enlarge(masked, patch)[..., None], enlarge(colours, patch), 0.35 * gray[..., None])


def reconstruction_panels(found: Reconstruction, i: int, pixels: int = GLYPH_PIXELS) -> list[list]:
    """Two lines of (title, picture) of image i: radiograph, gaze, the targets of the scales; mask, error of the masked
    patches, the predictions. Pictures are [H, W] or [H, W, 3] in 0..1, glyphs of at least `pixels`."""
    gray, masked = found.gray[i], found.masked[i]
    error = error_picture(gray, found.error[i], masked, found.largest_error)
    above = [("radiograph", gray), ("gaze heatmap (bright: looked at longer)", gaze_overlay(gray, found.attention[i]))]
    below = [("mask", mask_picture(gray, found.significant[i], masked)), ("squared error of masked patches", error)]
    scales = zip(found.cell_sizes, found.targets, found.predictions, found.predicted, strict=True)
    for size, target, prediction, predicted in scales:
        glyphs = hog_glyphs(target[i], glyph_cell(target.shape[1], pixels))
        above.append((f"HOG target, {size} px cells", glyphs))
        below.append((f"HOG prediction, {size} px cells", prediction_picture(prediction[i], predicted[i], pixels)))
    return [above, below]


def reconstruction_grid(found: Reconstruction, side: int = 448) -> np.ndarray:
    """`reconstruction_panels` of all images: RGB uint8 [2B * side, (2 + K) * side, 3]."""
    lines = [line for i in range(len(found.gray)) for line in reconstruction_panels(found, i, side)]
    return np.concatenate([np.concatenate([_panel(picture, side) for _, picture in line], 1) for line in lines])


def _panel(picture: np.ndarray, side: int) -> np.ndarray:
    """[H, W] or [H, W, 3] in 0..1 -> RGB uint8 [side, side, 3]."""
    levels = Image.fromarray((picture * 255).round().astype(np.uint8)).convert("RGB")
    return np.asarray(levels.resize((side, side), Image.Resampling.BILINEAR))
