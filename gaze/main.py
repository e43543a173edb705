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
from torch.utils.data import Subset

from datasets.sampler import train_loader
from gaze import metrics as saliency
from gaze.data import TRAIN, VALIDATE, GazeSamples, GazeStudy
from gaze.judge import write_judgement
from gaze.model import GazeNet, load_encoder, load_gaze_net
from util import distributed
from util.checkpoint import (
    announce_resume,
    find_checkpoint,
    is_due,
    load_checkpoint,
    restoring,
    save_and_prune,
    save_checkpoint,
)
from util.cli import Parser, add_launch_arguments, check_least, finite_float, seed_number
from util.download import local_file
from util.errors import UserError
from util.export import read_backbone
from util.foreign_weights import PLAIN_VIT, is_unknown
from util.loading import SampleLoader, ignore_stop_signals
from util.lr_sched import parameter_groups
from util.output import hold_output, writing_results
from util.precision import set_tf32
from util.pretrained import stored_weights
from util.stop import GO_ON, StopSignals, exit_status
from util.training import Training
from util.weights import read_state_dict

BEST = "best.pth"


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("run_gaze.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--data_path", nargs="+", required=True, help="processed tree, or several")
    add("--input_size", type=int, default=224, help="side of the input in pixels, divisible by 32")
    add("--num_workers", type=int, default=4, help="data loading processes per rank")
    add("--cache_dir", default=None, help="where decoded images are cached (None: inside the data tree)")
    add("--cache_size", type=int, default=512, help="short side of cached images in pixels")
    add("--no_cache", action="store_false", dest="use_cache", help="decode the files in every epoch")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", default="resnet50", help="timm's name of the encoder")
    add("--weights", default=None, metavar="PATH|none",
        help="weights of the encoder: of timm's --backbone, or a checkpoint or export of pretraining, which is then "
             "the encoder (None: those in preTrain/, if they are there)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", type=int, default=16, help="images per rank and step")
    add("--epochs", type=int, default=20, help="where training ends, unless it is stopped early")
    add("--patience", type=int, default=6, help="stop after so many epochs without a better validation KLD")
    add("--lr", type=finite_float, default=1e-3, help="learning rate")
    add("--min_lr", type=finite_float, default=1e-6, help="learning rate at the end")
    add("--warmup_epochs", type=int, default=1, help="linear warm-up from 0, then a half-cycle cosine")
    add("--weight_decay", type=finite_float, default=0.05, help="none on biases, norms and other 1-D parameters")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None,
        help="autocast type (None: float16 on CUDA, float32 on CPU)")
    add("--skip_nonfinite", type=int, default=0, metavar="N",
        help="leave out up to N updates with a non-finite loss or gradient before stopping")
    add("--seed", type=seed_number, default=0, help="of initial weights and sample order")

    add = parser.add_argument_group("output and resuming").add_argument
    add("--output_dir", default="./output_dir/gaze", help="best.pth, checkpoints, log.txt, metrics, pictures")
    add("--save_every", type=int, default=1, help="epochs between checkpoints")
    add("--keep", type=int, default=2, help="keep the last N checkpoints")
    add("--print_every", type=int, default=20, help="steps between progress lines")
    add("--resume", default="", metavar="PATH", help="checkpoint to go on from")
    add("--no_auto_resume", action="store_false", dest="auto_resume",
        help="start afresh, where the default goes on from the newest checkpoint in output_dir")
    add("--max_minutes", type=finite_float, default=None,
        help="stop after so long, with a checkpoint, exit status 75; a cache being built is finished first")
    add("--judge", default=None, metavar="PATH", help="don't train: judge this best.pth on the test images")
    # fmt: on

    add_launch_arguments(parser)
    parser.set_defaults(accum_iter=1, log_dir=None)  # util.resume compares effective batches
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    for name in ("weights", "resume", "judge"):
        setattr(args, name, local_file(getattr(args, name)))
    check_args(args)
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
    with hold_output(args.output_dir, None, ranks=ranks):
        request = GO_ON if args.judge else train(args, ranks, signals)
        if request == GO_ON:
            distributed.on_main(ranks, lambda: judge(args, ranks))
    distributed.stop()
    return exit_status(request)


def train(args: argparse.Namespace, ranks: distributed.Ranks, signals: StopSignals) -> int:
    """Train to the end, early or not (0), or to a request to stop, which is returned."""
    resumed = distributed.on_main(
        ranks, lambda: find_checkpoint(args.output_dir, resume=args.resume, auto_resume=args.auto_resume)
    )
    core, told = build_model(args, fresh=resumed is None)
    study = GazeStudy(args.data_path, cache_size=args.cache_size)
    if args.use_cache:
        study.add_cache(args.cache_dir, args.output_dir)
    samples = {part: GazeSamples(study, study.part(part), core.input_size, core.map_size) for part in (TRAIN, VALIDATE)}
    core.to(ranks.device)
    best: dict[str, Any] | None = None  # what best.pth holds; in every checkpoint, too, so that any can be gone on with

    def finish_epoch(training: Training, means: list[float], seconds: float) -> dict[str, Any]:
        """Validate, and keep the model if it is the best so far; returns the epoch's record."""
        nonlocal best
        distributed.broadcast_buffers(core, ranks)
        scores = validate(
            core, samples[VALIDATE], ranks, batch_size=args.batch_size, dtype=args.dtype, workers=args.num_workers
        )
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
            distributed.on_main(ranks, lambda: save_checkpoint(best, Path(args.output_dir) / BEST))
        losses = {"train_loss": means[0], "train_cc": means[1]}
        lr = training.optimizer.param_groups[0]["lr"]
        return {**losses, **scores, "train_lr": lr, "time_s": round(seconds, 2)}

    def is_stale() -> bool:
        return training.epoch - 1 - (-1 if best is None else best["epoch"]) >= args.patience

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
        is_over=is_stale,
        save_due=lambda: is_stale() or is_due(training.epoch - 1, save_every=args.save_every, epochs=args.epochs),
        write=partial(save_and_prune, output_dir=args.output_dir, save_every=args.save_every, keep=args.keep),
        more_state=lambda: {"config": core.config, "seen": core.seen, "encoder_seen": core.encoder_seen, "best": best},
        sample_name=samples[TRAIN].sample_name,
        # Of the validation too: the best epoch so far was chosen by it.
        samples=f"{samples[TRAIN].identity()} {samples[VALIDATE].identity()}",
        dataset_size=len(samples[TRAIN]),
    )
    if resumed is not None:
        state = load_checkpoint(resumed)
        if "config" not in state or "best" not in state:
            raise UserError(f"{resumed}: a checkpoint of another program; pass one of run_gaze.py")
        if not state["optimizer"]:
            raise UserError(f"--resume {resumed}: holds weights alone; go on from a checkpoint-*.pth")
        if state["config"] != core.config:
            differs = "; ".join(
                f"{k} {v}, now {core.config.get(k)}" for k, v in state["config"].items() if v != core.config.get(k)
            )
            raise UserError(f"{resumed}: of another model ({differs}); go on with the flags and --weights of its run")
        training.warn_of_changes(state, resumed)
        if (state["dataset_size"], state["samples"]) != (training.dataset_size, training.samples):
            raise UserError(
                f"{resumed}: was trained and validated on other images or heatmaps than --data_path has now (in another "
                "order, or cached otherwise); bring those back, or start anew in another --output_dir"
            )
        with restoring(resumed):
            core.seen, core.encoder_seen = list(state["seen"]), list(state["encoder_seen"])
            best = state["best"]
        training.restore(state, resumed)
        announce_resume(resumed, state, args.output_dir, ranks, named=bool(args.resume))
        if best is not None:
            distributed.on_main(ranks, lambda: save_checkpoint(best, Path(args.output_dir) / BEST))
    else:
        core.set_prior(centre_prior(samples[TRAIN], args.num_workers))
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
    ranks.say(describe_run(args, core, study, loader.batch_sampler.steps_per_epoch, told, ranks))
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
def validate(
    model: GazeNet, samples: GazeSamples, ranks: distributed.Ranks, *, batch_size: int, dtype: str, workers: int
) -> dict:
    """Mean KLD and CC over images, of the map against their mean target, on the map's own grid.

    The ranks share the images; the result is the same for any number of them, but for the batches' rounding.
    """
    model.eval()
    mine = range(ranks.rank, len(samples), ranks.world_size)
    loader = SampleLoader(
        Subset(samples, mine), batch_size=batch_size, num_workers=workers, worker_init_fn=ignore_stop_signals
    )
    kind = getattr(torch, dtype)
    values = []
    for batch in loader:
        with torch.autocast(ranks.device.type, kind, enabled=kind != torch.float32):
            log_p = model(batch["img"].to(ranks.device))
        log_p, target = log_p.double().cpu(), batch["target"].double()
        values.append(torch.stack([saliency.log_kld(log_p, target), saliency.cc(log_p.exp(), target)], 1))
    own = torch.cat(values).tolist() if values else []
    gathered = sorted(row for rows in ranks.gather(list(zip(mine, own, strict=True))) for row in rows)
    means = np.mean([row for _, row in gathered], axis=0)
    return {"val_kld": float(means[0]), "val_cc": float(means[1])}


def centre_prior(samples: GazeSamples, workers: int) -> Tensor:
    """Mean of the training images' targets: float64 [G, G], of sum 1. Reads every heatmap once."""
    loader = SampleLoader(samples, batch_size=32, num_workers=workers, worker_init_fn=ignore_stop_signals)
    total = sum(batch["target"].double().sum(0) for batch in loader)
    return total / total.sum()


def describe_run(args, core: GazeNet, study: GazeStudy, steps: int, told: str, ranks: distributed.Ranks) -> str:
    """What a user checks before leaving a run alone."""
    n_parameters = sum(p.numel() for p in core.parameters() if p.requires_grad)
    lines = [
        f"model            {core.config['backbone']}, {n_parameters / 1e6:.1f} M trained parameters, {args.dtype} on "
        f"{ranks.device}",
        f"                 {told}",
        f"input and map    {core.input_size} x {core.input_size} px, {core.map_size} x {core.map_size}",
        f"effective batch  {args.batch_size * ranks.world_size}, {steps} steps per epoch, learning rate {args.lr:.2e}",
        study.describe(),
    ]
    if study.n_drawn:
        lines.append(f"note: {study.n_drawn} subjects have no split in their tree; their parts were drawn by subject")
    if study.merged:
        more = f", and {len(study.merged) - 1} more such" if len(study.merged) > 1 else ""
        lines.append(f"warning: subjects {study.merged[0]}{more} are taken for one")
    return "\n".join(lines)


def build_model(args: argparse.Namespace, *, fresh: bool) -> tuple[GazeNet, str]:
    """The model, with initial weights where it is `fresh`, and a line about these."""
    weights, backbone, backbone_args, seen = args.weights, args.backbone, {}, []
    if weights is None:
        stored = stored_weights(backbone)
        weights = stored if stored.exists() else None
        told = f"encoder weights random: {stored} is not there (scripts/fetch_weights.py makes it)"
    elif weights.lower() == "none":
        weights, told = None, "encoder weights random (--weights none)"
    if weights is not None:
        state, _ = read_state_dict(weights)
        if PLAIN_VIT in state and not any(map(is_unknown, state)):
            own = read_backbone(weights, img_size=args.input_size)
            state, backbone, seen = own.state, own.timm_name, sorted(own.source.seen)
            backbone_args = {name: value for name, value in own.timm_args.items() if name != "img_size"}
    model = GazeNet(backbone, args.input_size, backbone_args=backbone_args)
    model.encoder_seen = seen
    if weights is not None:
        told = load_encoder(model.encoder, state, weights) if fresh else f"encoder of {weights}"
    return model, told


def judge(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    """Judge the best model on the test images; for rank 0."""
    path = Path(args.judge or Path(args.output_dir) / BEST)
    model = load_gaze_net(path).to(ranks.device)
    check_cache_size(args, model.input_size)
    study = GazeStudy(args.data_path, cache_size=args.cache_size)
    if told := study.leave_out(frozenset(model.seen)):
        print(told)
    if args.use_cache:
        study.add_cache(args.cache_dir, args.output_dir)
    for tree, lacking in study.readings_without_fixations().items():
        print(f"note: {tree}: {lacking} have no fixations in fixations.csv, so no NSS and no AUC (prepare it again)")
    with writing_results(args.output_dir):
        print(write_judgement(model, study, Path(args.output_dir), ranks.device))


def check_cache_size(args: argparse.Namespace, input_size: int) -> None:
    if args.use_cache and args.cache_size < input_size:
        raise UserError(
            f"--cache_size {args.cache_size}: below the input's {input_size} px, so that images would be enlarged; "
            "pass more, or --no_cache"
        )


def check_args(args: argparse.Namespace) -> None:
    """Refuse values that can't work, by the flag's name, before anything is loaded."""
    check_least(args, 1, *"batch_size epochs patience input_size save_every keep print_every cache_size".split())
    check_least(args, 0, *"num_workers warmup_epochs weight_decay lr min_lr skip_nonfinite max_minutes".split())
    if not args.judge:
        check_cache_size(args, args.input_size)
    if args.input_size % 32 or args.input_size < 64:
        raise UserError(f"--input_size {args.input_size}: must be divisible by 32, and at least 64")
    for flag in ("resume", "judge"):
        if (path := getattr(args, flag)) and not Path(path).is_file():
            raise UserError(f"--{flag} {path}: no such file")
