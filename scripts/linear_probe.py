"""Judge frozen backbones: logistic regression on their features, AUC per finding with 95% intervals.

The table has, for each backbone, the mean of the patch tokens and the cls token, and as baselines random
weights of the same architecture, ImageNet weights where they are there, and raw pixels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.downstream.options import add_label_arguments, read_labels
from util.cli import check_device
from util.curves import run_names
from util.errors import UserError, run_cli
from util.export import read_backbone
from util.files import atomic_write
from util.pictures import save_figure
from util.pretrained import weights_name
from util.probe import backbone_features, format_table, pixel_features, probe, probe_figure, testable_findings

REPOSITORY = Path(__file__).resolve().parents[1]
BASELINES = ("random", "imagenet", "pixels")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "backbones",
        nargs="+",
        metavar="BACKBONE",
        help="export of export_backbone.py, or any checkpoint it takes",
    )
    add("--names", nargs="+", help="names of the backbones in the table (default: their file names)")
    add_label_arguments(parser)
    helped = "column: test on the data's own test images; kfold: grouped folds; auto: column if there"
    add("--split", choices=("auto", "column", "kfold"), default="auto", help=helped)
    add("--folds", type=int, default=5, help="number of folds of kfold")
    add(
        "--min_positives",
        type=int,
        default=10,
        help="leave out findings with fewer images with or without it",
    )
    add("--tap", default="last", help="for a pretraining checkpoint: which tap's LayerNorm")
    add("--img_size", type=int, help="input size in px (default: as trained)")
    add("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES), help="what to compare with")
    add("--imagenet", help="ImageNet weights (default: preTrain/vit_SIZE_p16_224_timm.pth)")
    add("--bootstrap", type=int, default=1000, help="draws of the bootstrap")
    add("--seed", type=int, default=0, help="of folds, bootstrap and random weights")
    add("--batch_size", type=int, default=32, help="images per forward pass")
    add("--num_workers", type=int, default=2, help="processes that read images")
    add("--device", default="cpu", help="cpu or cuda")
    add("--out", default="output_dir/probe", help="folder for probe.csv, probe.png and cached features")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    names = args.names or (["backbone"] if len(args.backbones) == 1 else run_names(args.backbones))
    if len(names) != len(args.backbones) or len(set(names)) != len(names):
        raise UserError(
            f"--names: {len(names)} names for {len(args.backbones)} backbones; one different name each"
        )
    check_device(args.device)
    images = read_labels(args)
    backbones = [read_backbone(path, tap=args.tap, img_size=args.img_size) for path in args.backbones]
    split = args.split
    if split == "auto":
        split = "kfold" if images.splits is None else "column"
    subjects = len(set(images.subjects))
    print(f"{len(images)} images of {subjects} subjects, {len(images.findings)} findings, split: {split}")

    how = {"split": split, "n_folds": args.folds, "min_positives": args.min_positives, "seed": args.seed}
    testable_findings(images, **how)  # before the features, which take long
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    options = {"device": args.device, "batch_size": args.batch_size, "workers": args.num_workers}
    sets = []
    for name, backbone in zip(names, backbones, strict=True):
        sets += backbone_features(name, backbone, images, out, **options)
    first = backbones[0]
    if "random" in args.baselines:
        sets += backbone_features("random weights", first, images, out, random_seed=args.seed, **options)
    if "imagenet" in args.baselines:
        size = first.timm_name.split("_")[1]
        path = Path(args.imagenet or REPOSITORY / "preTrain" / weights_name(size))
        if path.exists() or args.imagenet:
            img_size = first.timm_args.get("img_size", 224)
            sets += backbone_features(
                "ImageNet", read_backbone(path, img_size=img_size), images, out, **options
            )
        else:
            print(f"no ImageNet baseline: {path} is not there (scripts/fetch_weights.py makes it)")
    if "pixels" in args.baselines:
        sets.append(pixel_features(images, workers=args.num_workers))

    table = probe(sets, images, **how, bootstrap=args.bootstrap)
    with atomic_write(out / "probe.csv", "w") as file:
        table.to_csv(file, index=False, float_format="%.4f")
    save_figure(probe_figure(table), out / "probe.png")
    print(format_table(table))
    print(f"wrote {out / 'probe.csv'} and {out / 'probe.png'}")
    return 0


if __name__ == "__main__":
    run_cli(main)
