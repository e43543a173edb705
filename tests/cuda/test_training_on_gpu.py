"""Pretraining on a GPU: nothing waits for it, nothing leaks, skips, compiles, resumes and joins as on the CPU.

Each test runs on the CPU as well, as far as the CPU has what it needs, so that it works on the first GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from host_waits import GivenBatches, no_host_waits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import run_pretrain
from engine_pretrain import batch_losses, name_means
from util import distributed
from util.lr_sched import parameter_groups
from util.masking import (
    MASKINGS,
    MaskRequest,
    draw_mask,
    mask_generator,
    masked_count,
    otsu_foreground,
    significant_patches,
)
from util.output import Progress, RunLog
from util.stop import StopSignals
from util.training import Sums, Training

ROOT = Path(run_pretrain.__file__).parent
GPU = pytest.param("cuda", marks=pytest.mark.cuda)
DEVICES = ["cpu", GPU]
FLAGS = (
    "--model cxrmim_vit_tiny_patch16 --input_size 64 --id_list 0 1 --scale_list 4.0 0.5 --pretrained none "
    "--batch_size 4 --warmup_epochs 0 --lr 1e-3 --gaze_weighted --print_every 1000000"
).split()


def batches(n, device, size=64, batch_size=4, seed=0):
    """Batches as the loader gives them, in pinned memory for a GPU."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        shape = (batch_size, size, size)
        batch = {
            "img": torch.randint(256, (batch_size, 1, size, size), dtype=torch.uint8, generator=generator),
            "attention": torch.randint(256, shape, dtype=torch.uint8, generator=generator),
            "foreground": torch.randint(2, shape, dtype=torch.uint8, generator=generator),
        }
        made.append({name: t.pin_memory() if device == "cuda" else t for name, t in batch.items()})
    return made


@contextlib.contextmanager
def training_of(given, device, tmp_path, *flags, n_steps=None):
    """A `Training` on given batches, without files or workers."""
    args = run_pretrain.get_args_parser().parse_args([*FLAGS, "--device", device, *flags])
    ranks = distributed.start(device)
    run_pretrain.settle_options(args, ranks)
    core = run_pretrain.build_model(args).to(ranks.device)
    if args.compile:
        core.compile()
    optimizer = torch.optim.AdamW(parameter_groups(core, args.weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True)
    with StopSignals() as signals:
        steps = n_steps or len(given)
        training = Training(
            core=core,
            optimizer=optimizer,
            ranks=ranks,
            signals=signals,
            options=vars(args),
            n_values=len(core.scale_list) + 1,
            losses=partial(batch_losses, args=args),
            name_means=partial(name_means, core),
            sample_name=lambda i: f"sample {i}",
            dataset_size=4 * steps,
        )
        silent = RunLog(tmp_path, tmp_path, 0.0, enabled=False)
        training.start(
            GivenBatches(given, steps), log=silent, progress=Progress("training", steps, "steps", enabled=False)
        )
        yield training


def losses_of(training):
    """Means of an epoch."""
    assert training.train_epoch() == 0 and training.step == training.steps_per_epoch
    return training.sums.means()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("masking", list(MASKINGS))
@pytest.mark.parametrize("device", DEVICES)
def test_no_step_waits_for_the_device(device, masking, dtype, tmp_path):
    if device == "cpu" and dtype == "float16" and masking != "attention":
        pytest.skip("slow on the CPU and the same code")
    with (
        no_host_waits(batches(8, device), device) as given,
        training_of(given, device, tmp_path, "--masking", masking, "--dtype", dtype, n_steps=8) as training,
    ):
        assert all(math.isfinite(loss) for loss in losses_of(training))


@pytest.mark.parametrize("device", DEVICES)
def test_an_overflow_skips_the_update_and_lowers_the_scale(device, tmp_path):
    with training_of(batches(1, device), device, tmp_path, "--dtype", "float16") as training:
        parameters = [p for group in training.optimizer.param_groups for p in group["params"] if p.requires_grad]
        before = [p.detach().clone() for p in parameters]
        for group in training.optimizer.param_groups:
            group["lr"] = 1e-3
        scale = training.scaler.get_scale()

        def backward(factor):
            loss = sum((p.float() * factor).sum() for p in parameters)
            training.scaler.scale(loss).backward()

        backward(math.inf)
        assert float(training.update()) == 1
        assert training.scaler.get_scale() == scale / 2
        assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
        backward(1.0)
        assert float(training.update()) == 0
        assert not any(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_masks_and_foregrounds_are_those_of_the_cpu(device):
    generator = torch.Generator().manual_seed(3)
    attention = torch.rand(6, 1, 8, 8, generator=generator)
    attention = (nn.functional.interpolate(attention, size=(224, 224), mode="bicubic")[:, 0] * 255).clamp(0, 255)
    attention = attention.to(torch.uint8)
    attention[0] = 7  # an all-equal map has no foreground
    foreground = otsu_foreground(attention)
    assert torch.equal(otsu_foreground(attention.to(device)).cpu(), foreground)
    significant = significant_patches(foreground, 16)
    assert torch.equal(significant_patches(foreground.to(device), 16).cpu(), significant)
    assert significant.any()
    for name in MASKINGS:
        batch = {"attention": attention.to(device), "foreground": foreground.to(device)}
        masks = []
        for _ in range(2):
            drawn = mask_generator(0, 1, 2, 0, device)
            masks.append(draw_mask(name, MaskRequest(batch, 16, 0.75, 0.5, 1, 2, drawn)).cpu())
        # The numbers drawn differ between devices; the counts must not, nor the same draw twice.
        assert torch.equal(*masks) and torch.equal(masks[0].sum(1), torch.full((6,), 147.0))
        if name == "attention":
            n_significant = significant.sum(1)
            expected = torch.maximum((n_significant * 0.5).floor(), masked_count(196, 0.75) - (196 - n_significant))
            assert torch.equal((masks[0] * significant).sum(1), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_does_not_grow(device, tmp_path):
    n = 200 if device == "cuda" else 4
    given = batches(4, device)
    seen = []

    def watched():
        for batch in itertools.islice(itertools.cycle(given), n):
            if device == "cuda":
                seen.append(torch.cuda.memory_allocated())
            yield batch

    with training_of(watched(), device, tmp_path, "--dtype", "bfloat16", n_steps=n) as training:
        losses_of(training)
    if device == "cuda":
        assert max(seen[20:]) <= max(seen[5:20]), seen


class ValuesOfSteps(Sums):
    """Keeps the values of every step."""

    def add(self, values):
        self.__dict__.setdefault("steps", []).append(values.clone())
        super().add(values)


# With CUDA graphs the first step runs as it is, the second is recorded, and the later ones are replayed.
@pytest.mark.parametrize(
    ("device", "how"),
    [
        ("cpu", {"backend": "eager"}),
        pytest.param("cuda", {"mode": "default"}, marks=pytest.mark.cuda),
        pytest.param("cuda", {"mode": "reduce-overhead"}, marks=pytest.mark.cuda),
    ],
    ids=["cpu", "compiled", "CUDA graphs"],
)
def test_compiled_losses_are_the_same(device, how, tmp_path):
    given = batches(6, device)
    given[3]["img"].fill_(100)  # a flat picture: another batch's loss in its place would show
    results = []
    torch.compiler.reset()
    for compiled in (False, True):
        with training_of(given, device, tmp_path, "--dtype", "float32") as training:
            if compiled:
                training.core.compile(fullgraph=True, **how)
            training.sums = ValuesOfSteps(3, training.ranks.device)
            training.train_epoch()
            results.append(torch.stack(training.sums.steps)[:, :2].float().cpu())
    eager, found = results
    torch.testing.assert_close(found[0], eager[0], rtol=1e-5, atol=0)
    # AdamW's first updates are nearly the gradient's sign, so that the last bit of a gradient near 0 is amplified.
    torch.testing.assert_close(found, eager, rtol=5e-3, atol=0)
    changes = (eager[1:] - eager[:-1]).abs() / eager[1:]
    assert changes.amax(1).min() > 0.05, "weights or batches that stayed the same would not be noticed"


@pytest.mark.parametrize("device", DEVICES)
def test_one_rank_of_a_process_group(device, tmp_path):
    """NCCL, or gloo on the CPU, with a single rank: the gradients of the bare model."""
    given = batches(1, device)
    gradients = []
    for wrapped in (False, True):
        with training_of(given, device, tmp_path, "--dtype", "float32") as training:
            core = training.core
            if wrapped:
                torch.distributed.init_process_group(
                    "nccl" if device == "cuda" else "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
                )
            try:
                model = DistributedDataParallel(core) if wrapped else core
                batch = core.prepare_batch(given[0])
                mask = core.draw_mask(batch, generator=mask_generator(0, 0, 0, 0, device))
                model(batch, mask=mask, n_visible=4).backward()
                gradients.append([p.grad.clone() for p in core.parameters() if p.grad is not None])
            finally:
                if wrapped:
                    torch.distributed.destroy_process_group()
    for alone, joined in zip(*gradients, strict=True):
        torch.testing.assert_close(joined, alone, rtol=1e-4, atol=1e-6)  # attention sums in any order


DETERMINISTIC = """
import os, sys
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
import torch
torch.use_deterministic_algorithms(True, warn_only=True)
# The fused kernels of attention sum their gradients in any order unless warnings are errors.
for fused in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp,
              torch.backends.cuda.enable_cudnn_sdp):
    fused(False)
torch.set_num_threads(1)
import run_pretrain
sys.exit(run_pretrain.main(sys.argv[1:]))
"""


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_resume_is_bit_equal_on_one_gpu(dtype, tree, tmp_path):
    """With torch's deterministic algorithms alone."""

    def run(output, *more, status=0):
        flags = [
            *FLAGS,
            "--device",
            "cuda",
            "--dtype",
            dtype,
            "--data_path",
            str(tree),
            "--epochs",
            "3",
            "--num_workers",
            "1",
            "--save_every",
            "1",
            "--keep",
            "3",
            "--output_dir",
            str(output),
            *more,
        ]
        done = subprocess.run([sys.executable, "-c", DETERMINISTIC, *flags], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr

    run(tmp_path / "whole")
    run(tmp_path / "parts")
    for path in (tmp_path / "parts").glob("checkpoint-[12]*.pth"):
        path.unlink()
    run(tmp_path / "parts")
    states = [torch.load(tmp_path / name / "checkpoint-2.pth", weights_only=True) for name in ("whole", "parts")]
    assert all(t.device.type == "cpu" for t in states[0]["model"].values())
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name
    losses = [
        [json.loads(line)["train_loss"] for line in (tmp_path / name / "log.txt").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
