"""Picture what a checkpoint sees and predicts: radiograph, gaze, mask, HOG target and prediction, error.

Samples of a data set, the exact batch of a training step (--epoch and --step), or one image (--image).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.replay import chosen_samples, training_batch, training_dataset
from datasets.single_image import single_image
from models_cxrmim import CXRMIM
from util.architecture import build_model
from util.cli import Parser, check_device, finite_float, seed_number
from util.download import local_file
from util.errors import UserError, run_cli
from util.figures import check_picture_path, page_path, save_figure
from util.masking import MASKINGS
from util.pictures import contact_sheet, reconstruction_figure
from util.radiograph import MIMIC_CXR_JPG, add_dicom_contrast
from util.weights import read_state_dict

# Options whose default is what the checkpoint stores.
STORED = ("masking", "mask_ratio", "clinical_ratio", "seed", "id_list", "scale_list", "num_heads", "decoder_num_heads")

# Of the options that a batch is made from.
KINDS = {
    **dict.fromkeys(("seed", "epochs", "batch_size", "accum_iter", "cache_size"), Integral),
    **dict.fromkeys(("mask_ratio", "clinical_ratio", "min_crop_ratio"), Real),
    "data_path": (str, list, tuple),
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__,
        epilog="Options that are not given are those stored in the checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # fmt: off
    add = parser.add_argument
    add("checkpoint", help="checkpoint of pretraining, or a published one")
    add("--data_path", nargs="+", help="processed tree or trees (default: where the run had its data)")
    add("--index", type=int, nargs="+", help="samples of the data set; with --epoch, places in the batch")
    add("--epoch", type=int, help="with --step: the batch of this training epoch, from 0")
    add("--step", type=int, help="step of that epoch, from 0")
    add("--rank", type=int, default=0, help="process whose batch it is")
    add("--image", help="one radiograph instead of a data set: JPG, PNG or DICOM")
    add("--heatmap", help="its gaze heatmap, 8-bit gray, of the same size")
    add("--fixations", help="its fixations as CSV, with REFLACX's columns or x, y, duration, sigma_x, ...")
    add_dicom_contrast(parser)
    add("--masking", choices=MASKINGS, help="what chooses the masked patches")
    add("--mask_ratio", type=finite_float, help="share of masked patches")
    add("--clinical_ratio", type=finite_float, help="share of masked ones among the attended patches")
    add("--seed", type=seed_number, help="of the masks, and of the crops of --epoch and --step")
    add("--id_list", type=int, nargs="+", help="for a file that doesn't say: blocks that it decodes")
    add("--scale_list", type=finite_float, nargs="+", help="for a file that doesn't say: scale of each")
    add("--num_heads", type=int, help="for a file that doesn't say: attention heads of the encoder")
    add("--decoder_num_heads", type=int, help="for a file that doesn't say: attention heads of the decoders")
    add("--sheet", action="store_true", help="contact sheet: gaze and mask only, many images on a page")
    add("--per_page", type=int, help="images on a page (default: 4, with --sheet 64)")
    add("--device", default="cpu", help="replaying masks of a run on CUDA needs cuda")
    add("--out", default="picture.png", help=".png, .pdf, .svg or .jpg; several pages are numbered")
    # fmt: on
    return parser


def check_options(options: Mapping[str, Any], path: Path) -> None:
    """Refuse stored options that no run has: the file may be another program's."""
    for name, kind in KINDS.items():
        if name in options and not isinstance(options[name], kind):
            raise UserError(f"{path}: its stored {name} is {str(options[name])[:60]!r}, of which no batch can be made")


def _listed(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    out = check_picture_path(args.out)
    if (args.epoch is None) != (args.step is None):
        raise UserError("--epoch and --step belong together")
    if args.image and (args.data_path or args.index or args.epoch is not None):
        raise UserError("--image shows one image; leave out --data_path, --index, --epoch and --step")
    if not args.image and (args.heatmap or args.fixations):
        raise UserError("--heatmap and --fixations belong to --image")
    if not args.image and args.dicom_contrast != MIMIC_CXR_JPG:
        raise UserError("--dicom_contrast belongs to --image; images of a tree are 8-bit")
    if args.heatmap and args.fixations:
        raise UserError("--heatmap and --fixations: give one of them")
    if args.per_page is not None and args.per_page < 1:
        raise UserError(f"--per_page {args.per_page}: must be at least 1")
    check_device(args.device)

    state, info = read_state_dict(local_file(args.checkpoint))
    given = {name: value for name, value in vars(args).items() if name in STORED and value is not None}
    options = {**info.args, **given}
    check_options(options, info.path)
    model = build_model(CXRMIM, state, info, given).to(args.device)

    if args.image:
        gaze = {"heatmap": args.heatmap, "fixations": args.fixations}
        shown = single_image(model, options, args.image, **gaze, dicom_contrast=args.dicom_contrast)
        if model.masking == "attention" and not (args.heatmap or args.fixations):
            print("no --heatmap or --fixations: no patch is significant, the mask is random")
    else:
        replay = args.epoch is not None
        dataset = training_dataset(options, args.data_path, model.img_size, augment=replay)
        if replay:
            if info.samples not in (None, dataset.identity()):
                raise UserError(
                    "--data_path: holds other images or heatmaps than the run trained on, in another order, or cached "
                    "otherwise, so its steps can't be shown; leave out --epoch and --step"
                )
            if (args.epoch, args.step) < info.unchanged_since:
                raise UserError(
                    f"--epoch {args.epoch} --step {args.step}: the run went on with other options or data from epoch "
                    "{} step {} on; earlier steps need a checkpoint from before that".format(*info.unchanged_since)
                )
            if info.device not in (None, args.device):
                raise UserError(
                    f"--device {args.device}: the run drew its masks on {info.device}; pass --device {info.device}"
                )
            place = {"epoch": args.epoch, "step": args.step, "rank": args.rank, "world_size": info.world_size}
            shown = training_batch(model, dataset, options, **place)
            if args.index:
                shown = shown.take(args.index)
        else:
            indices = args.index or range(min(4, len(dataset)))
            shown = chosen_samples(model, dataset, options, indices, max(info.epoch or 0, 0))

    data = args.image or " ".join(args.data_path or [str(path) for path in _listed(info.args.get("data_path"))])
    where = f"training step {args.step} of epoch {args.epoch}" if args.epoch is not None else "whole images"
    trained = "" if info.epoch is None else f" after {info.epoch + 1} epochs"
    title = f"{Path(args.checkpoint).resolve().parent.name}/{info.path.name}{trained}, {data}, {where}"
    draw = contact_sheet if args.sheet else reconstruction_figure
    per_page = args.per_page or (64 if args.sheet else 4)
    starts = range(0, len(shown.names), per_page)
    for page, start in enumerate(starts):
        some = shown.take(range(start, min(start + per_page, len(shown.names))))
        path = page_path(out, page, len(starts))
        save_figure(draw(model, some.batch, some.mask, names=some.names, title=title), path)
        print(f"wrote {path}: {', '.join(some.names)}")
    return 0


if __name__ == "__main__":
    run_cli(main)
