"""Train a gaze predictor: from images and the gaze of their readers to a heatmap for any image. See docs/gaze.md."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets.cache import open_planes
from datasets.sampler import train_loader
from gaze import metrics as saliency
from gaze.data import TRAIN, VALIDATE, GazeSamples, GazeStudy
from gaze.judge import write_judgement
from gaze.model import GazeNet, gaze_net_of, load_gaze_net
from util import distributed
from util.checkpoint import FORMAT, announce_resume, find_checkpoint, load_checkpoint, save_and_prune, save_checkpoint
from util.cli import Parser, add_launch_arguments, check_least, finite_float, seed_number
from util.download import local_file
from util.errors import UserError
from util.export import read_encoder, split_model, stored_weights
from util.loading import SampleLoader
from util.lr_sched import parameter_groups
from util.output import hold_output
from util.precision import set_tf32
from util.stop import GO_ON, StopSignals
from util.training import Training

BEST = "best.pth"
CACHE_SIZE = 512  # short side, px, as in pretraining, which can share the cache


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("run_gaze.py", description=__doc__)
    # fmt: off
    add = parser.add_argument
    add("--data_path", nargs="+", required=True, help="processed tree, or several")
    add("--input_size", type=int, default=224, help="side of the input in pixels, divisible by 32")
    add("--num_workers", type=int, default=4, help="data loading processes per rank")
    add("--cache_dir", default=None, help="where decoded images are cached (default: inside the data tree)")
    add("--no_cache", action="store_false", dest="use_cache", help="decode the files in every epoch")
    add("--backbone", default="resnet50", help="timm's name of the encoder")
    add("--weights", default=None, metavar="FILE|none",
        help="the encoder: a plain ViT, such as a checkpoint or export of pretraining, or FILE@TIMM_MODEL of any other "
             "(default: --backbone with its weights in preTrain/, if they are there)")
    add("--batch_size", type=int, default=16, help="images per rank and step")
    add("--epochs", type=int, default=20, help="where training ends, unless it is stopped early")
    add("--patience", type=int, default=6, help="stop after so many epochs without a better validation KLD")
    add("--lr", type=finite_float, default=1e-3, help="learning rate, after a warm-up of an epoch and before a half-cycle cosine")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None,
        help="autocast type (default: float16 on CUDA, float32 on CPU)")
    add("--seed", type=seed_number, default=0, help="seed of initial weights and sample order")
    add("--output_dir", default="./output_dir/gaze", help="best.pth, checkpoints, log.txt, metrics, pictures")
    add("--resume", default="", metavar="PATH",
        help="checkpoint to continue from (default: the newest in output_dir)")
    add("--max_minutes", type=finite_float, default=None,
        help="stop after this many minutes, with a checkpoint and exit status 75; a cache being built is finished first")
    add("--judge", default=None, metavar="PATH", help="don't train: judge this best.pth on the test images")
    # fmt: on

    add_launch_arguments(parser)
    # What `Training` needs beside.
    parser.set_defaults(warmup_epochs=1, min_lr=1e-6, weight_decay=0.05, accum_iter=1, log_dir=None, print_every=20)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    check_least(args, 1, "batch_size", "epochs", "patience")
    check_least(args, 0, "num_workers", "lr", "max_minutes")
    with StopSignals(args.max_minutes) as signals:
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
    state = load_checkpoint(resumed) if resumed else {}
    core, about = (gaze_net_of(state, resumed), f"weights of {resumed}") if resumed else build_model(args)
    study = open_study(args, core.input_size)
    samples, held_out = (GazeSamples(study.parts[part], core.input_size, core.map_size) for part in (TRAIN, VALIDATE))
    core.to(ranks.device)
    in_order = partial(SampleLoader, num_workers=args.num_workers)
    # What best.pth holds; in every checkpoint too, so that any can be gone on with.
    best: dict[str, Any] = {"epoch": -1, "val_kld": math.inf}

    def about_model() -> dict[str, Any]:
        return {"config": core.config, "seen": core.seen, "encoder_seen": core.encoder_seen}

    def save_best() -> None:
        distributed.on_main(ranks, lambda: save_checkpoint(best, Path(args.output_dir) / BEST))

    def finish_epoch(training: Training, means: list[float], seconds: float) -> dict[str, Any]:
        """Validate, and keep the model if it is the best so far; returns the epoch's record."""
        nonlocal best
        # On rank 0 alone: its buffers (of batch norm) are those that are saved.
        scores = distributed.on_main(ranks, lambda: validate(training, in_order(held_out, args.batch_size)))
        is_better = scores["val_kld"] < best["val_kld"]
        ranks.say(
            f"epoch {training.epoch + 1}/{args.epochs}  validation KLD {scores['val_kld']:.4f}  CC {scores['val_cc']:.4f}"
            f"{'  best so far' if is_better else ''}"
        )
        training.log.scalars(scores, training.epoch + 1)
        if is_better:
            weights = {name: tensor.cpu().clone() for name, tensor in core.state_dict().items()}
            best = {"model": weights, **about_model(), "epoch": training.epoch, **scores, "format": FORMAT}
            save_best()
        lr = training.optimizer.param_groups[0]["lr"]
        losses = {"train_loss": means[0], "train_cc": means[1]}
        return {**losses, **scores, "train_lr": lr, "time_s": round(seconds, 2)}

    training = Training(
        core=core,
        optimizer=torch.optim.AdamW(parameter_groups(core, args.weight_decay), lr=0.0, fused=True),
        ranks=ranks,
        signals=signals,
        options=vars(args),
        n_values=2,
        losses=batch_losses,
        finish_epoch=finish_epoch,
        name_means=lambda means: {"train_kld": means[0], "train_cc": means[1]},
        is_over=lambda: training.epoch - best["epoch"] > args.patience,
        save_due=lambda: True,
        write=partial(save_and_prune, output_dir=args.output_dir, keep=2),
        more_state=lambda: about_model() | {"best": best},
        sample_name=lambda index: samples.images[index].name,
        # Of the validation too: the best epoch so far was chosen by it.
        samples=f"{samples.identity()} {held_out.identity()}",
    )
    if resumed is None:
        core.set_prior(distributed.on_main(ranks, lambda: centre_prior(in_order(samples, 32))))
    else:
        check_same_run(state, training, resumed)
        best = state["best"] or best
        training.restore(state, resumed)
        announce_resume(resumed, state, args.output_dir, ranks, named=bool(args.resume))
        if best["epoch"] >= 0:
            save_best()
    core.seen = sorted({*core.seen, *study.seen()})
    loader = train_loader(samples, vars(args), ranks, epoch=training.epoch, step=training.step)
    ranks.say(f"{core.config['backbone']}, {args.dtype} on {ranks.device}; {about}\n{study.describe()}")
    training.start(loader, sync_buffers=True)
    request = training.run()
    training.log.close()
    if request != GO_ON:
        ranks.say(f"stopped at epoch {training.epoch + 1}, step {training.step}; the same command continues from here")
        return request
    if best["epoch"] < 0:
        raise UserError(f"{args.output_dir}: no epoch had a finite validation KLD; lower --lr or use --dtype float32")
    ranks.say(f"stopped after epoch {training.epoch}; best: epoch {best['epoch'] + 1}, KLD {best['val_kld']:.4f}")
    return GO_ON


def check_same_run(state: Mapping[str, Any], training: Training, path: Path) -> None:
    """UserError unless the run of a checkpoint can go on: the same model, images and heatmaps. Prints other changes."""
    if not state.get("optimizer"):
        raise UserError(f"--resume {path}: holds weights alone; continue from a checkpoint-*.pth")
    wrong = [
        name for name in training.warn_of_changes(state, path) if name in ("--backbone", "--weights", "--input_size")
    ]
    if state["samples"] != training.samples:
        wrong.append("images or heatmaps, in training or validation (in another order, or cached otherwise)")
    if wrong:
        raise UserError(
            f"{path}: of a run with other {', '.join(wrong)}; bring those back, or start anew in another --output_dir"
        )


def errors(model: nn.Module, training: Training, batch: Mapping[str, Tensor]) -> Tensor:
    """KLD, and CC without a gradient, of each image of a batch against its mean target: float64 [B, 2]."""
    img, target = (batch[key].to(training.ranks.device, non_blocking=True) for key in ("img", "target"))
    with training.autocast():
        log_p = model(img)  # [B, G, G]
    log_p, target = log_p.double(), target.double()
    return torch.stack([saliency.log_kld(log_p, target), saliency.cc(log_p.exp(), target).detach()], 1)


def batch_losses(training: Training, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss [1] of this rank's next batch; and its KLD and CC, [2]."""
    means = errors(training.model, training, batch).mean(0)
    return means[:1], means.detach()


@torch.no_grad()
def validate(training: Training, batches: SampleLoader) -> dict[str, float]:
    """Mean KLD and CC over images, on the map's own grid."""
    training.core.eval()
    kld, cc = torch.cat([errors(training.core, training, batch) for batch in batches]).mean(0).tolist()
    return {"val_kld": kld, "val_cc": cc}


def centre_prior(batches: SampleLoader) -> Tensor:
    """Mean of the training images' targets: float64 [G, G], of sum 1. Reads every heatmap once."""
    total = sum(batch["target"].double().sum(0) for batch in batches)
    return total / total.sum()


def build_model(args: argparse.Namespace) -> tuple[GazeNet, str]:
    """The model with its initial weights, and a line about these."""
    stored = stored_weights(args.backbone)
    weights = args.weights or (f"{stored}@{args.backbone}" if stored.exists() else "none")
    if weights.lower() == "none":
        why = "--weights none" if args.weights else f"{stored} is missing; scripts/fetch_weights.py makes it"
        return GazeNet(args.backbone, args.input_size), f"encoder weights random ({why})"
    path, name = split_model(weights)
    found = read_encoder(local_file(path), name, img_size=args.input_size)
    sizes = {} if name else {key: value for key, value in found.timm_args.items() if key != "img_size"}
    model = GazeNet(found.timm_name, args.input_size, backbone_args=sizes)
    encoder = model.encoder.model  # timm's, without norm and head
    encoder.load_state_dict({key: found.state[key] for key in encoder.state_dict()})
    model.encoder_seen = sorted(found.source.seen)
    return model, f"encoder weights of {path}"


def open_study(args: argparse.Namespace, input_size: int) -> GazeStudy:
    """The images of --data_path, cached at a size that enlarges none of them."""
    study = GazeStudy(args.data_path, cache_size=max(CACHE_SIZE, input_size))
    for tree in study.trees if args.use_cache else ():
        tree.cache = open_planes(tree, args.cache_dir)
    return study


def judge(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    """Judge the best model on the test images; for rank 0."""
    model = load_gaze_net(local_file(args.judge) or Path(args.output_dir) / BEST).to(ranks.device)
    print(write_judgement(model, open_study(args, model.input_size), Path(args.output_dir), ranks.device))
