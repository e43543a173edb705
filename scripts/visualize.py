"""Picture what a checkpoint sees and predicts: radiograph, gaze, mask, HOG target and prediction, error.

Samples of a data set, the exact batch of a training step (--epoch and --step), or one image (--image).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor, nn
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.replay import take, training_batch
from datasets.shown import chosen_samples, training_dataset
from datasets.single_image import single_image
from models_cxrmim import CXRMIM
from util.cli import Parser, check_device, finite_float, seed_number
from util.download import local_file
from util.errors import UserError, run_cli
from util.export import build_model
from util.figures import check_picture_path, fit_lines, save_figure, set_title, show_panels
from util.masking import MASKINGS
from util.pictures import (
    MASKED,
    SIGNIFICANT,
    Reconstruction,
    gaze_overlay,
    mask_picture,
    reconstruct,
    reconstruction_panels,
)
from util.radiograph import add_dicom_contrast
from util.weights import WeightsInfo, read_state_dict

# The mean of each place is taken over at most this many images, spread over the data set.
REFERENCE_IMAGES = 100

ENLARGED = "#CC79A7"  # purple
LEGEND = {  # a contact sheet needs the first three
    "masked": {"fc": MASKED, "alpha": 0.8},
    "masked, significant (gazed at)": {"fc": SIGNIFICANT, "alpha": 0.8},
    "visible, significant": {"fc": "none", "ec": SIGNIFICANT, "lw": 1.2},
    "in predictions: visible, not predicted": {"fc": "#001927", "ec": "#003350", "hatch": "//////"},
    "enlarged at the right": {"fc": "none", "ec": ENLARGED, "lw": 1.4},
}
SHEET_KEY = "significant: at least half of the patch is gaze foreground (Otsu)."
KEY = (
    " Glyphs: lines along the edges of a cell, brighter where more of its gradient has that direction. Squared error: "
    "of a patch, summed over scales; dark 0, bright {:.3g}."
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog="Options that are not given are those stored in the checkpoint.")
    # fmt: off
    add = parser.add_argument
    add("checkpoint", help="checkpoint of pretraining, or a published one")
    add("--data_path", nargs="+", help="processed tree or trees (default: where the run had its data)")
    add("--index", type=int, nargs="+",
        help="samples of the data set, or with --epoch places in the batch (default: the first 4, with --sheet 64)")
    add("--epoch", type=int, help="with --step: the batch of this training epoch, from 0")
    add("--step", type=int, help="step of that epoch, from 0")
    add("--rank", type=int, default=0, help="process whose batch it is")
    add("--image", help="one radiograph instead of a data set: JPG, PNG or DICOM")
    gaze = parser.add_mutually_exclusive_group().add_argument
    gaze("--heatmap", help="its gaze heatmap, 8-bit gray, of the same size")
    gaze("--fixations", help="its fixations as CSV, with REFLACX's columns or x, y, duration, sigma_x, ...")
    add_dicom_contrast(parser)
    add("--masking", choices=MASKINGS, help="what chooses the masked patches")
    add("--mask_ratio", type=finite_float, help="share of masked patches")
    add("--clinical_ratio", type=finite_float, help="share of the significant patches that are masked")
    add("--seed", type=seed_number, help="seed of the masks, and of the crops of --epoch and --step")
    add("--num_heads", type=int, help="attention heads of the encoder, if the file doesn't say")
    add("--sheet", action="store_true", help="contact sheet: gaze and mask only, many images")
    add("--device", default="cpu", help="replaying masks of a run on CUDA needs cuda")
    add("--out", default="picture.png", help=".png, .pdf, .svg or .jpg")
    # fmt: on
    return parser


def chosen_indices(args: argparse.Namespace, n: int) -> Sequence[int]:
    """What --index names among `n`, or the first few. Raises UserError."""
    chosen = args.index or range(min(64 if args.sheet else 4, n))
    if not 0 <= min(chosen) <= max(chosen) < n:
        raise UserError(f"--index {' '.join(map(str, chosen))}: there are images 0 to {n - 1}")
    return chosen


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    out, replay = check_picture_path(args.out), args.epoch is not None
    if replay != (args.step is not None):
        raise UserError("--epoch and --step belong together")
    if any([args.data_path, args.index, replay] if args.image else [args.heatmap, args.fixations]):
        raise UserError(
            "--heatmap and --fixations go with --image; --data_path, --index, --epoch and --step without it"
        )
    state, info = read_state_dict(local_file(args.checkpoint))
    options = info.args | {name: value for name, value in vars(args).items() if value is not None}
    model = build_model(CXRMIM, state, info, options).to(check_device(args.device))

    where, references = "whole images", {}
    if args.image:
        shown = single_image(
            model,
            options,
            args.image,
            heatmap=args.heatmap,
            fixations=args.fixations,
            dicom_contrast=args.dicom_contrast,
        )
        names, data = [Path(args.image).name], args.image
    else:
        path = options.get("data_path")
        if not path:
            raise UserError("--data_path is needed: the checkpoint does not say where its data were")
        dataset = training_dataset(options, path, model.img_size, augment=replay)
        if replay:
            check_unchanged(args, info, dataset.identity())
            where = f"training step {args.step} of epoch {args.epoch}"
            shown = training_batch(
                model,
                dataset,
                options,
                epoch=args.epoch,
                step=args.step,
                rank=args.rank,
                world_size=info.entries.get("world_size", 1),
            )
            shown = take(shown, chosen_indices(args, len(shown.indices)))
        else:
            indices = chosen_indices(args, len(dataset))
            shown = chosen_samples(model, dataset, options, indices, max(info.epoch or 0, 0))
        names = [picture_name(dataset, index) for index in shown.indices]
        data = path if isinstance(path, str) else " ".join(path)
        if not args.sheet:
            spread = range(0, len(dataset), math.ceil(len(dataset) / REFERENCE_IMAGES))
            references = mean_targets(model, default_collate([dataset[args.epoch or 0, i] for i in spread]))

    found = reconstruct(model, shown.batch, shown.mask, references)
    save_figure(reconstruction_figure(found, names, f"{args.checkpoint}, {data}, {where}", args.sheet), out)
    print(
        f"wrote {out}: {', '.join(names)}\n"
        f"mean squared error of masked patches, {len(names)} images: {errors(found, ...)}"
    )
    return 0


def picture_name(dataset, index: int) -> str:
    """A sample's name for a picture, with its split and a mark if its gaze is simulated or predicted."""
    entry = dataset.entries[index]
    marks = [
        entry.get("split"),
        entry.get("simulated") and "SIMULATED GAZE",
        entry.get("gaze") == "predicted" and "PREDICTED GAZE",
    ]
    return ", ".join([dataset.sample_name(index), *map(str, filter(None, marks))])


def check_unchanged(args: argparse.Namespace, info: WeightsInfo, samples: str) -> None:
    """Refuse a training step that the run took with other data or options, or on another device."""
    if info.entries.get("samples") not in (None, samples):
        raise UserError(
            "--data_path: holds other images or heatmaps than the run trained on, in another order, or cached "
            "otherwise, so its steps can't be shown; leave out --epoch and --step"
        )
    since = tuple(info.entries.get("unchanged_since", (0, 0)))
    if (args.epoch, args.step) < since:
        raise UserError(
            f"--epoch {args.epoch} --step {args.step}: the run went on with other options or data from epoch "
            "{} step {} on; earlier steps need a checkpoint from before that".format(*since)
        )
    drawn_on = "cuda" if info.entries.get("threads", 1) is None else "cpu"
    if "threads" in info.entries and drawn_on != args.device:
        raise UserError(f"--device {args.device}: the run drew its masks on {drawn_on}; pass --device {drawn_on}")


@torch.no_grad()
def mean_targets(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Two predictions that use no image: the mean HOG target of a batch over all cells of a scale, and for each cell.
    For each scale float [3*nbins], and [cells_k, 3*nbins]."""
    targets = model.hog_targets(model.prepare_batch(batch)["gray"])
    means = [level.double().mean(0).float() for level in targets]
    return {"one constant for all cells": [level.mean(0) for level in means], "the mean of each place": means}


def errors(found: Reconstruction, images) -> str:
    """Mean squared error of the masked patches of `images` (an index, or `...` for all), for the model and for the
    predictions of `mean_targets`."""
    values = {"the model": found.error} | found.references
    masked = found.masked[images]
    return ", ".join(f"{error[images][masked].mean():.4f} of {name}" for name, error in values.items())


def reconstruction_figure(found: Reconstruction, names: Sequence[str], title: str, sheet: bool = False) -> Figure:
    """Figure of B images. Each has a caption and two rows of panels: radiograph, gaze, targets; mask, error,
    predictions. The last column enlarges the finest cells where most patches are masked. With `sheet`: gaze and mask
    alone, four images side by side.

    Args:
        names: a line of text per image.
        title: what is shown: checkpoint, data, step.
    """
    images = len(names)
    # Side of a panel in inches, font size of captions, images side by side, rows and columns of an image's panels.
    side, points, across, lines, columns = 2.26, 8.5, 1, 2, 3 + len(found.cell_sizes)
    if sheet:
        side, points, across, lines, columns = 1.5, 5.5, min(4, images), 1, 2
    inches, rows = side * columns, math.ceil(images / across)
    captions = [fit_lines(f"{name}\n{caption(found, i)}", inches, points) for i, name in enumerate(names)]
    height = lines * (side + 0.2) + points / 45 * max(map(len, captions))
    figure = Figure((max(across * inches, 5), rows * height + 1.1), dpi=110, layout="constrained")
    set_title(figure, f"{title}, {images} image{'s' * (images > 1)}", 9)
    for i, band in zip(range(images), figure.subfigures(rows, across, squeeze=False).flat):
        band.suptitle("\n".join(captions[i]), fontsize=points, x=0.005, ha="left")
        draw_image(band, found, i, sheet)
    key = SHEET_KEY if sheet else SHEET_KEY + KEY.format(found.largest_error)
    handles = [Patch(label=label, **style) for label, style in LEGEND.items()][: 3 if sheet else 5]
    key = {"title": "\n".join(fit_lines(key, figure.get_figwidth(), 7)), "title_fontsize": 7}
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7, frameon=False, **key)
    return figure


def caption(found: Reconstruction, i: int) -> str:
    """Error and counts of an image."""
    significant, masked = found.significant[i], found.masked[i]
    return (
        f"Mean squared error of masked patches: {errors(found, i)}. "
        f"{significant.sum()} of {masked.size} patches significant; masked: {masked.sum()}, of which significant: "
        f"{(masked & significant).sum()}"
    )


def draw_image(band, found: Reconstruction, i: int, sheet: bool) -> None:
    """Draw the panels of image i into a subfigure. Their axes count patches."""
    gray, significant, masked = found.gray[i], found.significant[i], found.masked[i]
    grid = len(masked)
    if sheet:
        mask = mask_picture(gray, significant, masked)
        lines = [[("", gaze_overlay(gray, found.attention[i])), ("", mask)]]
    else:
        lines, finest = reconstruction_panels(found, i), 2 + int(np.argmin(found.cell_sizes))
        for line, what in zip(lines, ("target", "prediction")):
            line.append((f"{what}, framed part enlarged", line[finest][1]))
    panels = show_panels(band, lines, points=8, pad=2.5, extent=(0, grid, grid, 0))
    mask_axes = panels[-1, int(sheet)]
    for row, column in np.argwhere(significant & ~masked):
        mask_axes.add_patch(Rectangle((column, row), 1, 1, fill=False, ec=SIGNIFICANT, lw=0.8))
    if sheet:
        return
    side = min(4, grid)
    counts = np.lib.stride_tricks.sliding_window_view(masked, (side, side)).sum((2, 3))
    top, left = np.unravel_index(counts.argmax(), counts.shape)  # of the window with most masked patches
    for axes in (mask_axes, *panels[:, finest]):
        axes.add_patch(Rectangle((left, top), side, side, fill=False, ec=ENLARGED, lw=1.4))
    for axes in panels[:, -1]:
        axes.set(xlim=(left, left + side), ylim=(top + side, top))


if __name__ == "__main__":
    run_cli(main)
