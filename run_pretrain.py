"""Pretrain CXR-MIM. See README.md; `python run_pretrain.py --help` lists every flag."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import models_cxrmim
from datasets.build import build_dataset
from datasets.check import check_data
from datasets.sampler import train_loader
from datasets.tree import entry_subject
from engine_pretrain import batch_losses, describe_run, finish_epoch, name_means
from util import distributed
from util.checkpoint import announce_resume, find_checkpoint, load_checkpoint, restoring, save_and_prune
from util.cli import Parser, add_launch_arguments, check_least, finite_float, seed_number
from util.download import local_file
from util.errors import UserError, run_cli
from util.files import check_folder_place
from util.lr_sched import parameter_groups
from util.masking import MASKINGS, masked_count
from util.output import hold_output
from util.precision import set_tf32
from util.resume import unchanged_since
from util.stop import GO_ON, StopSignals
from util.subjects import MIMIC, subject_marks
from util.training import Training
from util.weights import check_same_model, load_initial_weights

BASE_WEIGHTS = "preTrain/vit_base_p16_224_timm.pth"
# The least value of these options.
LEAST = {
    1: "batch_size epochs accum_iter input_size hog_nbins decoder_num_heads save_every keep print_every cache_size",
    0: "num_workers decoder_depth warmup_epochs weight_decay lr blr min_lr start_epoch skip_nonfinite image_every max_minutes",
}
# Options that are arguments of a function of the same name: of the model, of the data.
OF_MODEL = (
    "decoder_depth decoder_num_heads hog_nbins id_list scale_list gaze_weighted gaze_temperature masking"
).split()
OF_DATA = "preload use_cache cache_dir cache_size".split()


def get_args_parser() -> argparse.ArgumentParser:
    """The command line: the published flags with their names, meanings and defaults, and ours."""
    parser = Parser("run_pretrain.py", description="Pretrain CXR-MIM on chest X-rays with gaze heatmaps.")
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--data_path", nargs="+", default=["../data/reflacx-1.0.0/"], help="processed tree, or several")
    add("--preload", action="store_true", help="read the stored foreground instead of the Otsu of the crop")
    add("--input_size", type=int, default=224,
        help="side of the input in pixels, a multiple of the coarsest HOG cell (32 px as published)")
    add("--min_crop_ratio", type=finite_float, default=0.2, help="smallest area of a random crop")
    add("--num_workers", type=int, default=4, help="data loading processes per rank")
    add("--pin_mem", action="store_true", default=True, help="pin host memory for faster copies to the GPU (default)")
    add("--no_pin_mem", action="store_false", dest="pin_mem", help="don't pin host memory")
    add("--cache_dir", default=None, help="where decoded images are cached (default: inside the data tree)")
    add("--cache_size", type=int, default=512,
        help="short side of cached images in pixels; crops are cut from "
             "these, and below input_size / sqrt(min_crop_ratio), 501 by default, the smallest of them are enlarged")
    add("--no_cache", action="store_false", dest="use_cache", help="decode the files in every epoch")
    add("--check_data", action="store_true",
        help="read every file of the data and the cache, list the bad ones, and exit")

    add = parser.add_argument_group("model").add_argument
    add("--model", default="cxrmim_vit_base_patch16", choices=tuple(models_cxrmim.ENCODERS), help="encoder size")
    add("--pretrained", default=None, metavar="PATH|none",
        help=f"initial weights (default: {BASE_WEIGHTS} for the base model, random ones for other sizes)")
    add("--id_list", type=int, nargs="+", default=[1, 3, 9, 11], help="0-based encoder blocks to decode")
    add("--scale_list", type=finite_float, nargs="+", default=[4.0, 2.0, 1.0, 0.5], help="target scale of each")
    add("--decoder_depth", type=int, default=1, help="transformer blocks in each decoder")
    add("--decoder_num_heads", type=int, default=8, help="attention heads in each decoder")
    add("--hog_nbins", type=int, default=9, help="orientation bins of the HOG targets")

    add = parser.add_argument_group("masking and loss").add_argument
    add("--masking", default="attention", choices=tuple(MASKINGS), help="what chooses the masked patches")
    add("--mask_ratio", type=finite_float, default=0.75, help="share of masked patches")
    add("--clinical_ratio", type=finite_float, default=0.5, help="share of the significant patches that are masked")
    add("--gaze_weighted", action="store_true", help="weight the loss by gaze")
    add("--gaze_temperature", type=finite_float, default=0.1, help="temperature of that weighting")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", type=int, default=32, help="images per rank and step")
    add("--epochs", type=int, default=400, help="where training ends")
    add("--accum_iter", type=int, default=1, help="steps per optimiser step")
    add("--weight_decay", type=finite_float, default=0.05,
        help="weight decay, none on biases, norms and other 1-D parameters")
    add("--lr", type=finite_float, default=None, help="absolute learning rate (default: blr x effective batch / 256)")
    add("--blr", type=finite_float, default=1e-3, help="learning rate per 256 images")
    add("--min_lr", type=finite_float, default=1e-6, help="learning rate at the end")
    add("--warmup_epochs", type=int, default=40, help="linear warm-up from 0, then a half-cycle cosine")
    add("--clip_grad", type=finite_float, default=None, help="clip the gradient to this norm (default: no clipping)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None,
        help="autocast type (default: float16 on CUDA, float32 on CPU)")
    add("--tf32", action="store_true", help="TF32 in float32 products and convolutions on CUDA")
    add("--compile", action="store_true", help="compile the model with torch.compile")
    add("--skip_nonfinite", type=int, default=0, metavar="N",
        help="leave out up to N updates with a non-finite loss or gradient before stopping")
    add("--seed", type=seed_number, default=0, help="seed of initial weights, sample order, crops and masks")

    add = parser.add_argument_group("output and resuming").add_argument
    add("--output_dir", default="./output_dir", help="checkpoints, log.txt, args.json")
    add("--log_dir", default=None, help="TensorBoard events (default: in output_dir)")
    add("--save_every", type=int, default=50, help="epochs between checkpoints that are kept")
    add("--keep", type=int, default=None,
        help="keep only the last N checkpoints (default: all from ends of epochs, and the last 2)")
    add("--image_every", type=int, default=50,
        help="epochs between pictures of 4 fixed samples in TensorBoard, 0 for none")
    add("--print_every", type=int, default=20, help="steps between progress lines")
    add("--resume", default="", metavar="PATH", help="checkpoint to continue from, a file or an http(s) address")
    add("--auto_resume", action="store_true", default=True,
        help="continue from the newest checkpoint in output_dir (default)")
    add("--no_auto_resume", action="store_false", dest="auto_resume",
        help="start afresh; output_dir must hold no checkpoint")
    add("--max_minutes", type=finite_float, default=None,
        help="stop after this many minutes, with a checkpoint and exit status 75; a cache being built is finished first")
    add("--start_epoch", type=int, default=0, help="first epoch of a run that doesn't resume")
    # fmt: on

    add_launch_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    args.resume, args.pretrained = local_file(args.resume), local_file(args.pretrained)
    check_args(args)
    if args.check_data:
        return check(args)
    with StopSignals(args.max_minutes) as signals:
        return pretrain(args, signals)


def pretrain(args: argparse.Namespace, signals: StopSignals) -> int:
    """Train as `args` say, to the end or to a request to stop; returns the exit status (util/stop.py)."""
    with signals.default_handlers():
        ranks = distributed.start(
            args.device, local_rank=args.local_rank, world_size=args.world_size, dist_url=args.dist_url
        )
    settle_options(args, ranks)
    with hold_output(args.output_dir, ranks=ranks):
        with signals.exit_at_signal():  # so far there is nothing to save
            training = set_up(args, ranks, signals)
        request = training.run()
        training.log.close()
    distributed.stop()
    if request != GO_ON:
        ranks.say(f"stopped at epoch {training.epoch + 1}, step {training.step}; the same command continues from here")
    return request


def set_up(args: argparse.Namespace, ranks: distributed.Ranks, signals: StopSignals) -> Training:
    """Model, data, optimiser and logs, as they are at the start or as a checkpoint left them."""
    core = build_model(args).to(ranks.device)
    resumed = distributed.on_main(
        ranks, lambda: find_checkpoint(args.output_dir, resume=args.resume, auto_resume=args.auto_resume)
    )
    if resumed is not None:
        state = load_checkpoint(resumed)
        with restoring(resumed):
            check_same_model(state["model_config"], core.config, resumed)
    elif path := initial_weights(args):
        ranks.say(load_initial_weights(core, path))
    dataset = build_data(args)  # after what fails sooner: a cache may be built first, which takes minutes
    since = args.start_epoch, 0
    training = Training(
        core=core,
        optimizer=torch.optim.AdamW(parameter_groups(core, args.weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True),
        ranks=ranks,
        signals=signals,
        options=vars(args),
        n_values=len(core.scale_list) + 1,
        losses=partial(batch_losses, args=args),
        finish_epoch=partial(finish_epoch, args=args),
        name_means=partial(name_means, core),
        save_due=lambda: training.epoch % args.save_every == 0 or training.epoch == args.epochs,
        write=partial(save_and_prune, output_dir=args.output_dir, keep=args.keep),
        more_state=lambda: {"model_config": core.config, "seen": core.seen, "unchanged_since": list(since)},
        sample_name=dataset.sample_name,
        samples=dataset.identity(),
        epoch=args.start_epoch,
    )
    if resumed is not None:
        with restoring(resumed):
            since = unchanged_since(state, training.warn_of_changes(state, resumed))
            core.seen = list(state.get("seen", []))
        training.restore(state, resumed)
        announce_resume(resumed, state, args.output_dir, ranks, named=bool(args.resume))
    subjects = set(map(entry_subject, dataset.entries)) - {""}
    core.seen = sorted({*core.seen, *subject_marks(subjects, MIMIC)})
    loader = train_loader(dataset, vars(args), ranks, epoch=training.epoch, step=training.step)
    if args.compile:
        core.compile()
    training.start(loader)
    if ranks.is_main:
        print(describe_run(training, dataset, args), flush=True)
    return training


def settle_options(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    """Fill in the defaults that depend on the device and on the number of processes, and seed the weights."""
    args.dtype = args.dtype or ("float16" if ranks.device.type == "cuda" else "float32")
    if args.lr is None:
        args.lr = args.blr * (args.batch_size * args.accum_iter * ranks.world_size) / 256
    set_tf32(args.tf32)
    torch.manual_seed(args.seed)


def check_args(args: argparse.Namespace) -> None:
    """Refuse values that can't work, by the flag's name, before anything is loaded."""
    for least, flags in LEAST.items():
        check_least(args, least, *flags.split())
    if args.log_dir:
        check_folder_place(args.log_dir, "--log_dir")
    for holds, message in (
        (args.clip_grad is None or args.clip_grad > 0, f"--clip_grad {args.clip_grad or 0:g}: must be above 0"),
        (0 < args.min_crop_ratio <= 1, f"--min_crop_ratio {args.min_crop_ratio}: must be in (0, 1]"),
        (0 <= args.clinical_ratio <= 1, f"--clinical_ratio {args.clinical_ratio}: must be in [0, 1]"),
        (args.start_epoch < args.epochs, f"--start_epoch {args.start_epoch}: must be below --epochs {args.epochs}"),
        (
            args.cache_size >= args.input_size,
            f"--cache_size {args.cache_size}: below --input_size {args.input_size}; even whole images would be enlarged",
        ),
    ):
        if not holds:
            raise UserError(message)
    with torch.device("meta"):  # no memory, no numbers: do sizes, blocks, scales and heads fit together?
        build_model(args)


def check(args: argparse.Namespace) -> int:
    """Read the whole tree, and its cache where there is one, and list every bad entry; returns the exit status."""
    problems = check_data(args.data_path, **some(args, OF_DATA))
    for problem in problems:
        print(problem)
    n_errors, n_warnings = (sum(p.severity == kind for p in problems) for kind in ("error", "warning"))
    print(f"checked {', '.join(map(str, args.data_path))}: {n_errors} errors, {n_warnings} warnings")
    return 1 if n_errors else 0


def some(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def build_data(args: argparse.Namespace):
    return build_dataset(args.data_path, **some(args, ["input_size", "min_crop_ratio", "seed", *OF_DATA]))


def build_model(args: argparse.Namespace) -> models_cxrmim.CXRMIM:
    try:
        model = models_cxrmim.ENCODERS[args.model](img_size=args.input_size, **some(args, OF_MODEL))
        masked_count(model.num_patches, args.mask_ratio)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    return model


def initial_weights(args: argparse.Namespace) -> str | None:
    """The file of initial weights that --pretrained and --model ask for."""
    path = args.pretrained or (BASE_WEIGHTS if args.model == "cxrmim_vit_base_patch16" else "none")
    if path.lower() == "none":
        return None
    if not Path(path).exists():
        raise UserError(
            f"--pretrained {path}: no such file; make it with `python scripts/fetch_weights.py`, "
            "or start from random weights with --pretrained none"
        )
    return path


if __name__ == "__main__":
    run_cli(main)
