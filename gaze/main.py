"""Train a gaze predictor: from images and the gaze of their readers to a heatmap for any image. See docs/gaze.md."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.sampler import train_loader
from gaze import metrics as saliency
from gaze.data import TRAIN, VALIDATE, GazeSamples, GazeStudy
from gaze.judge import write_judgement
from gaze.model import GazeNet, load_encoder, load_gaze_net, restore_gaze_net
from util import distributed
from util.checkpoint import announce_resume, find_checkpoint, load_checkpoint, save_and_prune, save_checkpoint
from util.cli import Parser, add_launch_arguments, check_least, finite_float, seed_number
from util.download import local_file
from util.errors import UserError
from util.export import load_timm, read_encoder, split_model, stored_weights
from util.loading import SampleLoader, ignore_stop_signals
from util.lr_sched import parameter_groups
from util.output import hold_output, writing_results
from util.precision import set_tf32
from util.stop import GO_ON, StopSignals
from util.training import Training
from util.weights import is_plain_vit, read_state_dict

BEST = "best.pth"
CACHE_SIZE = 512  # short side, px, as in pretraining, which can share the cache


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("run_gaze.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--data_path", nargs="+", required=True, help="processed tree, or several")
    add("--input_size", type=int, default=224, help="side of the input in pixels, divisible by 32")
    add("--num_workers", type=int, default=4, help="data loading processes per rank")
    add("--cache_dir", default=None, help="where decoded images are cached (None: inside the data tree)")
    add("--no_cache", action="store_false", dest="use_cache", help="decode the files in every epoch")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", default="resnet50", help="timm's name of the encoder")
    add("--weights", default=None, metavar="PATH|none",
        help="weights of the encoder: of timm's --backbone, or FILE@TIMM_MODEL, or a plain ViT such as a checkpoint or "
             "export of pretraining, which is then the encoder (None: those in preTrain/, if they are there)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", type=int, default=16, help="images per rank and step")
    add("--epochs", type=int, default=20, help="where training ends, unless it is stopped early")
    add("--patience", type=int, default=6, help="stop after so many epochs without a better validation KLD")
    add("--lr", type=finite_float, default=1e-3, help="learning rate")
    add("--warmup_epochs", type=int, default=1, help="linear warm-up from 0, then a half-cycle cosine")
    add("--weight_decay", type=finite_float, default=0.05, help="none on biases, norms and other 1-D parameters")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None,
        help="autocast type (None: float16 on CUDA, float32 on CPU)")
    add("--skip_nonfinite", type=int, default=0, metavar="N",
        help="leave out up to N updates with a non-finite loss or gradient before stopping")
    add("--seed", type=seed_number, default=0, help="of initial weights and sample order")

    add = parser.add_argument_group("output and resuming").add_argument
    add("--output_dir", default="./output_dir/gaze", help="best.pth, checkpoints, log.txt, metrics, pictures")
    add("--resume", default="", metavar="PATH",
        help="checkpoint to go on from (default: the newest in output_dir)")
    add("--max_minutes", type=finite_float, default=None,
        help="stop after so long, with a checkpoint, exit status 75; a cache being built is finished first")
    add("--judge", default=None, metavar="PATH", help="don't train: judge this best.pth on the test images")
    # fmt: on

    add_launch_arguments(parser)
    parser.set_defaults(accum_iter=1, log_dir=None, min_lr=1e-6, print_every=20)  # what `Training` needs beside
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    for name in ("weights", "resume", "judge"):
        file, model = split_model(getattr(args, name) or "")
        setattr(args, name, f"{local_file(file)}@{model}" if model else local_file(getattr(args, name)))
    check_least(args, 1, "batch_size", "epochs", "patience")
    check_least(args, 0, *"num_workers warmup_epochs weight_decay lr skip_nonfinite max_minutes".split())
    for flag in ("resume", "judge"):
        if (path := getattr(args, flag)) and not Path(path).is_file():
            raise UserError(f"--{flag} {path}: no such file")
    with StopSignals(args.max_minutes) as signals:
        return run(args, signals)


def run(args: argparse.Namespace, signals: StopSignals) -> int:
    """Train as `args` say, to the end or to a request to stop, and judge; returns the exit status (util/stop.py)."""
    with signals.default_handlers():
        ranks = distributed.start(
            args.device, local_rank=args.local_rank, world_size=args.world_size, dist_url=args.dist_url
        )
    args.dtype = args.dtype or ("float16" if ranks.device.type == "cuda" else "float32")
    set_tf32(False)
    torch.manual_seed(args.seed)
    with hold_output(args.output_dir, ranks=ranks):
        request = GO_ON if args.judge else train(args, ranks, signals)
        if request == GO_ON:
            distributed.on_main(ranks, lambda: judge(args, ranks))
    distributed.stop()
    return request


def train(args: argparse.Namespace, ranks: distributed.Ranks, signals: StopSignals) -> int:
    """Train to the end, early or not (0), or to a request to stop, which is returned."""
    resumed = distributed.on_main(ranks, lambda: find_checkpoint(args.output_dir, resume=args.resume))
    if resumed is None:
        core, about = build_model(args)
    else:
        core, about = restore_gaze_net(state := load_checkpoint(resumed), resumed), f"weights of {resumed}"
    study = open_study(args, core.input_size)
    samples = {part: GazeSamples(study.part(part), core.input_size, core.map_size) for part in (TRAIN, VALIDATE)}
    core.to(ranks.device)
    best: dict[str, Any] | None = None  # what best.pth holds; in every checkpoint too, so that any can be gone on with

    def save_best() -> None:
        distributed.on_main(ranks, lambda: save_checkpoint(best, Path(args.output_dir) / BEST))

    def finish_epoch(training: Training, means: list[float], seconds: float) -> dict[str, Any]:
        """Validate, and keep the model if it is the best so far; returns the epoch's record."""
        nonlocal best
        # On rank 0 alone: its buffers (of batch norm) are those that are saved.
        scores = distributed.on_main(ranks, lambda: validate(core, samples[VALIDATE], args, ranks.device))
        is_better = scores["val_kld"] < (math.inf if best is None else best["val_kld"])
        ranks.say(
            f"epoch {training.epoch + 1}/{args.epochs}  validation KLD {scores['val_kld']:.4f}  CC {scores['val_cc']:.4f}"
            f"{'  best so far' if is_better else ''}"
        )
        training.log.scalars(scores, training.epoch + 1)
        if is_better:  # the weights alone: an optimiser's state is twice as large
            weights = {name: tensor.cpu().clone() for name, tensor in core.state_dict().items()}
            alone = {"model": weights, "epoch": training.epoch, "step": 0, "optimizer": {}, "scaler": {}, "best": None}
            best = training.state() | alone | scores
            save_best()
        losses = {"train_loss": means[0], "train_cc": means[1]}
        return {**losses, **scores, "train_lr": training.optimizer.param_groups[0]["lr"], "time_s": round(seconds, 2)}

    training = Training(
        core=core,
        optimizer=torch.optim.AdamW(parameter_groups(core, args.weight_decay), lr=0.0, fused=True),
        ranks=ranks,
        signals=signals,
        options=vars(args),
        n_values=2,
        losses=batch_losses,
        finish_epoch=finish_epoch,
        name_means=name_means,
        is_over=lambda: training.epoch - (0 if best is None else best["epoch"] + 1) >= args.patience,
        save_due=lambda: True,
        write=partial(save_and_prune, output_dir=args.output_dir, keep=2),
        more_state=lambda: {"config": core.config, "seen": core.seen, "encoder_seen": core.encoder_seen, "best": best},
        sample_name=samples[TRAIN].sample_name,
        # Of the validation too: the best epoch so far was chosen by it.
        samples=f"{samples[TRAIN].identity()} {samples[VALIDATE].identity()}",
        dataset_size=len(samples[TRAIN]),
    )
    if resumed is None:
        core.set_prior(distributed.on_main(ranks, lambda: centre_prior(samples[TRAIN], args.num_workers)))
    else:
        check_same_run(state, args, training, resumed)
        best = state["best"]
        training.restore(state, resumed)
        announce_resume(resumed, state, args.output_dir, ranks, named=bool(args.resume))
        if best is not None:
            save_best()
    core.seen = sorted({*core.seen, *study.seen()})
    loader = train_loader(
        samples[TRAIN],
        args.batch_size,
        ranks,
        seed=args.seed,
        epochs=args.epochs,
        epoch=training.epoch,
        step=training.step,
        num_workers=args.num_workers,
    )
    n_parameters = sum(p.numel() for p in core.parameters())
    ranks.say(
        f"model            {core.config['backbone']}, {n_parameters / 1e6:.1f} M parameters, {args.dtype} on {ranks.device}"
        f"\n                 {about}"
        f"\ninput and map    {core.input_size} x {core.input_size} px, {core.map_size} x {core.map_size}"
        f"\neffective batch  {args.batch_size * ranks.world_size}, {loader.batch_sampler.steps_per_epoch} steps per epoch, "
        f"learning rate {args.lr:.2e}\n{study.describe()}"
    )
    training.start(loader, sync_buffers=True)
    request = training.run()
    training.close()
    if request != GO_ON:
        ranks.say(f"stopped at epoch {training.epoch + 1}, step {training.step}; the same command goes on from here")
        return request
    if training.epoch < args.epochs:
        ranks.say(f"stopped early: {args.patience} epochs without a better validation KLD")
    if best is None:
        raise UserError(f"{args.output_dir}: no epoch had a finite validation KLD; lower --lr or use --dtype float32")
    ranks.say(f"best: epoch {best['epoch'] + 1}, validation KLD {best['val_kld']:.4f}, CC {best['val_cc']:.4f}")
    return GO_ON


def check_same_run(state: Mapping[str, Any], args: argparse.Namespace, training: Training, path: Path) -> None:
    """UserError unless the run of a checkpoint can go on: the same model, images and heatmaps. Prints other changes."""
    if not state["optimizer"]:
        raise UserError(f"--resume {path}: holds weights alone; go on from a checkpoint-*.pth")
    for flag in ("backbone", "weights", "input_size"):
        if (was := state["args"][flag]) != (now := getattr(args, flag)):
            raise UserError(f"{path}: of another model (--{flag} {was}, now {now}); go on with the flags of its run")
    training.warn_of_changes(state, path)
    if (state["dataset_size"], state["samples"]) != (training.dataset_size, training.samples):
        raise UserError(
            f"{path}: was trained and validated on other images or heatmaps than --data_path has now (in another "
            "order, or cached otherwise); bring those back, or start anew in another --output_dir"
        )


def batch_losses(training: Training, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss [1] of this rank's next batch; and its KLD and CC, [2]."""
    img, target = (batch[key].to(training.ranks.device, non_blocking=True) for key in ("img", "target"))
    with training.autocast():
        log_p = training.model(img)  # [B, G, G]
    kld = saliency.log_kld(log_p, target).mean()
    cc = saliency.cc(log_p.exp(), target).mean().float()
    return kld[None], torch.stack([kld.detach().double(), cc.detach().double()])


def name_means(means: list[float]) -> dict[str, float]:
    """Names, in TensorBoard, of the means [2] of what `batch_losses` gives."""
    return {"train_kld": means[0], "train_cc": means[1]}


@torch.no_grad()
def validate(model: GazeNet, samples: GazeSamples, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Mean KLD and CC over images, of the map against their mean target, on the map's own grid."""
    model.eval()
    kind = getattr(torch, args.dtype)
    rows = []
    for batch in plain_loader(samples, args.batch_size, args.num_workers):
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            log_p = model(batch["img"].to(device))
        log_p, target = log_p.double().cpu(), batch["target"].double()
        rows += torch.stack([saliency.log_kld(log_p, target), saliency.cc(log_p.exp(), target)], 1).tolist()
    kld, cc = np.mean(rows, axis=0).tolist()
    return {"val_kld": kld, "val_cc": cc}


def centre_prior(samples: GazeSamples, workers: int) -> Tensor:
    """Mean of the training images' targets: float64 [G, G], of sum 1. Reads every heatmap once."""
    total = sum(batch["target"].double().sum(0) for batch in plain_loader(samples, 32, workers))
    return total / total.sum()


def plain_loader(samples: Dataset, batch_size: int, workers: int) -> SampleLoader:
    """All samples, once and in order."""
    return SampleLoader(samples, batch_size=batch_size, num_workers=workers, worker_init_fn=ignore_stop_signals)


def build_model(args: argparse.Namespace) -> tuple[GazeNet, str]:
    """The model with its initial weights, and a line about these."""
    stored = stored_weights(args.backbone)
    path = args.weights or (stored if stored.exists() else "none")
    if str(path).lower() == "none":
        why = "--weights none" if args.weights else f"{stored} is missing; scripts/fetch_weights.py makes it"
        return GazeNet(args.backbone, args.input_size), f"encoder weights random ({why})"
    path, named = split_model(str(path))
    state, info = read_state_dict(path)
    backbone, backbone_args = args.backbone, {}
    if named:
        plain, _, _ = load_timm(named, state, path, img_size=args.input_size, num_classes=0)
        backbone, state = named, plain.state_dict()
    elif is_plain_vit(state):
        own = read_encoder(path, img_size=args.input_size)
        backbone, state = own.timm_name, own.state
        backbone_args = {name: value for name, value in own.timm_args.items() if name != "img_size"}
    model = GazeNet(backbone, args.input_size, backbone_args=backbone_args)
    model.encoder_seen = sorted(info.seen)
    return model, load_encoder(model.encoder, state, path)


def open_study(args: argparse.Namespace, input_size: int) -> GazeStudy:
    """The images of --data_path, cached at a size that enlarges none of them."""
    study = GazeStudy(args.data_path, cache_size=max(CACHE_SIZE, input_size))
    if args.use_cache:
        study.add_cache(args.cache_dir, args.output_dir)
    return study


def judge(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    """Judge the best model on the test images; for rank 0."""
    model = load_gaze_net(args.judge or Path(args.output_dir) / BEST).to(ranks.device)
    study = open_study(args, model.input_size)
    if note := study.leave_out(frozenset(model.seen)):
        print(note)
    with writing_results(args.output_dir):
        print(write_judgement(model, study, Path(args.output_dir), ranks.device))
