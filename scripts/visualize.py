"""Picture what a checkpoint sees and predicts: radiograph, gaze, mask, HOG target and prediction, error.

Samples of a data set, the exact batch of a training step (--epoch and --step), or one image (--image).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
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
from util.figures import check_picture_path, fit_lines, save_figure
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

# Options whose default is what the checkpoint stores.
STORED = ("masking", "mask_ratio", "clinical_ratio", "seed", "num_heads")

# Of a large data set, so many images spread over it give the mean of each place.
REFERENCE_IMAGES = 100

ENLARGED = "#CC79A7"  # purple
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
    add("--num_heads", type=int, help="for a file that doesn't say: attention heads of the encoder")
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
    if args.image and (args.data_path or args.index or replay):
        raise UserError("--image shows one image; leave out --data_path, --index, --epoch and --step")
    if not args.image and (args.heatmap or args.fixations):
        raise UserError("--heatmap and --fixations belong to --image")
    check_device(args.device)
    state, info = read_state_dict(local_file(args.checkpoint))
    given = {name: vars(args)[name] for name in STORED if vars(args)[name] is not None}
    options = {**info.args, **given}
    model = build_model(CXRMIM, state, info, given).to(args.device)

    if args.image:
        gaze = {"heatmap": args.heatmap, "fixations": args.fixations}
        shown = single_image(model, options, args.image, **gaze, dicom_contrast=args.dicom_contrast)
        names = [Path(args.image).name]
        if model.masking == "attention" and not (args.heatmap or args.fixations):
            print("no --heatmap or --fixations: no patch is significant, the mask is random")
    else:
        path = args.data_path or options.get("data_path")
        if not path:
            raise UserError("--data_path is needed: the checkpoint does not say where its data were")
        dataset = training_dataset(options, path, model.img_size, augment=replay)
        if replay:
            check_unchanged(args, info, dataset.identity())
            place = {"epoch": args.epoch, "step": args.step, "rank": args.rank}
            world_size = info.entries.get("world_size", 1)
            shown = training_batch(model, dataset, options, **place, world_size=world_size)
            shown = take(shown, chosen_indices(args, len(shown.indices)))
        else:
            indices = chosen_indices(args, len(dataset))
            shown = chosen_samples(model, dataset, options, indices, max(info.epoch or 0, 0))
        names = [picture_name(dataset, index) for index in shown.indices]
        chosen = range(0, len(dataset), math.ceil(len(dataset) / REFERENCE_IMAGES))

    references = {}
    if not args.sheet:
        several = [shown.batch] if args.image else (default_collate([dataset[args.epoch or 0, i]]) for i in chosen)
        means = mean_targets(model, several)
        references["one constant for all cells"] = [level.mean(0) for level in means]
        if not args.image:
            references["the mean of each place"] = means
    found = reconstruct(model, shown.batch, shown.mask, references)
    data = args.image or (path if isinstance(path, str) else " ".join(path))
    where = f"training step {args.step} of epoch {args.epoch}" if replay else "whole images"
    title = f"{args.checkpoint}, {data}, {where}"
    save_figure(reconstruction_figure(found, names, title, args.sheet), out)
    print(f"wrote {out}: {', '.join(names)}")
    if not (args.image or args.sheet):
        values = {"the model": found.error} | found.references
        told = ", ".join(f"{error[found.masked].mean():.4f} of {name}" for name, error in values.items())
        print(f"mean squared error of masked patches, {len(names)} images: {told} ({len(chosen)} images)")
    return 0


def picture_name(dataset, index: int) -> str:
    """A sample's name for a picture: with its split, and with a mark where its gaze is no reader's."""
    entry = dataset.entries[index]
    marks = [str(entry.get("split") or "")]
    marks += ["SIMULATED GAZE"] * bool(entry.get("simulated")) + ["PREDICTED GAZE"] * (entry.get("gaze") == "predicted")
    return ", ".join([dataset.sample_name(index), *filter(None, marks)])


def check_unchanged(args: argparse.Namespace, info: WeightsInfo, samples: str) -> None:
    """Refuse a training step that this checkpoint's run did not see so: with other data, options or device."""
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
def mean_targets(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """Mean HOG target of each cell over all images of the batches: for each scale float [cells_k, 3*nbins]."""
    targets = [model.hog_targets(model.prepare_batch(batch)["img"]) for batch in batches]
    return [torch.cat(level).double().mean(0).float() for level in zip(*targets)]


def reconstruction_figure(found: Reconstruction, names: Sequence[str], title: str, sheet: bool = False) -> Figure:
    """Figure of B images, each with its caption: two lines of panels, radiograph, gaze, targets; mask, error,
    predictions, and last the finest cells enlarged where most is masked; or with `sheet` gaze and mask alone, four
    images side by side.

    Args:
        names, title: a line of text per image; what is shown: checkpoint, data, step.
    """
    images, side, points = len(found.gray), 1.5 if sheet else 2.26, 5.5 if sheet else 8.5
    columns = min(4, images) if sheet else 1
    inches = side * (2 if sheet else 3 + len(found.cell_sizes))  # of an image
    width = max(columns * inches, 5)
    captions = [fit_lines(f"{name}\n{caption(found, i, sheet)}", inches, points) for i, name in enumerate(names)]
    height = (1 if sheet else 2) * (side + 0.2) + points / 45 * max(map(len, captions))
    rows = math.ceil(images / columns)
    figure = Figure((width, rows * height + 1.1), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("\n".join(fit_lines(f"{title}, {images} image{'s' * (images > 1)}", width, 9)), fontsize=9)
    for i, band in zip(range(images), figure.subfigures(rows, columns, squeeze=False).flat):
        band.suptitle("\n".join(captions[i]), fontsize=points, x=0.005, ha="left")
        draw_image(band, found, i, sheet)
    key = SHEET_KEY if sheet else SHEET_KEY + KEY.format(found.largest_error)
    handles = [
        Patch(fc=MASKED, alpha=0.8, label="masked"),
        Patch(fc=SIGNIFICANT, alpha=0.8, label="masked, significant (gazed at)"),
        Patch(fc="none", ec=SIGNIFICANT, lw=1.2, label="visible, significant"),
        Patch(fc="#001927", ec="#003350", hatch="//////", label="in predictions: visible, not predicted"),
        Patch(fc="none", ec=ENLARGED, lw=1.4, label="enlarged at the right"),
    ][: 3 if sheet else 5]
    key = {"title": "\n".join(fit_lines(key, width, 7)), "fontsize": 7, "title_fontsize": 7, "frameon": False}
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), **key)
    return figure


def caption(found: Reconstruction, i: int, sheet: bool) -> str:
    """Counts of an image, and its error beside what needs no image."""
    significant, masked = found.significant[i], found.masked[i]
    if sheet:
        return f"{significant.sum()} significant, {(masked & significant).sum()} of them masked"
    references = "".join(f"; of {what} {error[i][masked].mean():.3f}" for what, error in found.references.items())
    return (
        f"Mean squared error of masked patches: {found.error[i][masked].mean():.3f}{references}. "
        f"{significant.sum()} of {masked.size} patches significant; masked: {masked.sum()}, of which significant: "
        f"{(masked & significant).sum()}"
    )


def draw_image(band, found: Reconstruction, i: int, sheet: bool) -> None:
    """Draw the panels of image i into a subfigure. Their axes count patches."""
    masked, (height, width) = found.masked[i], found.masked[i].shape
    if sheet:
        mask = mask_picture(found.gray[i], found.significant[i], masked)
        lines = [[("", gaze_overlay(found.gray[i], found.attention[i])), ("", mask)]]
    else:
        lines, finest = reconstruction_panels(found, i), 2 + int(np.argmin(found.cell_sizes))
        for line, what in zip(lines, ("target", "prediction"), strict=True):
            line.append((f"{what}, framed part enlarged", line[finest][1]))
    panels = band.subplots(len(lines), len(lines[0]), squeeze=False)
    for axes, (text, picture) in zip(panels.flat, [panel for line in lines for panel in line], strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
        axes.set_title(text, fontsize=8, pad=2.5)
        axes.set_axis_off()
    mask_axes = panels[-1, 1 if sheet else 0]
    for row, column in np.argwhere(found.significant[i] & ~masked):
        mask_axes.add_patch(Rectangle((column, row), 1, 1, fill=False, ec=SIGNIFICANT, lw=0.8))
    if not sheet:
        side = min(4, height, width)
        counts = np.lib.stride_tricks.sliding_window_view(masked, (side, side)).sum((2, 3))
        top, left = np.unravel_index(counts.argmax(), counts.shape)  # of where most is masked
        for axes in (mask_axes, *panels[:, finest]):
            axes.add_patch(Rectangle((left, top), side, side, fill=False, ec=ENLARGED, lw=1.4))
        for axes in panels[:, -1]:
            axes.set(xlim=(left, left + side), ylim=(top + side, top))


if __name__ == "__main__":
    run_cli(main)
