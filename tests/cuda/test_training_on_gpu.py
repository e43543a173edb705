"""Pretraining on a GPU: nothing waits for it, nothing leaks, skips, compiles, resumes and joins as on the CPU.

Each test runs on the CPU as well, as far as the CPU has what it needs, so that it works on the first GPU.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from host_waits import DEVICES, means_of_epoch, no_host_waits, pinned, training_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import run_pretrain
from engine_pretrain import batch_losses
from util import distributed
from util.masking import MASKINGS, MaskRequest, draw_mask, mask_generator, otsu_foreground, significant_patches
from util.precision import set_tf32
from util.training import Training

ROOT = Path(run_pretrain.__file__).parent
FLAGS = (
    "--model cxrmim_vit_tiny_patch16 --input_size 64 --id_list 0 1 --scale_list 4.0 0.5 --pretrained none "
    "--batch_size 4 --warmup_epochs 0 --lr 1e-3 --gaze_weighted"
)


def batches(n, device, size=64, batch_size=4):
    generator = torch.Generator().manual_seed(0)

    def plane(levels, *shape):
        return torch.randint(levels, (batch_size, *shape, size, size), dtype=torch.uint8, generator=generator)

    return [pinned({"img": plane(256, 1), "attention": plane(256), "foreground": plane(2)}, device) for _ in range(n)]


def training_on(device, flags="") -> Training:
    """As run_pretrain.py makes it, without data and files."""
    args = run_pretrain.get_args_parser().parse_args(f"{FLAGS} --device {device} {flags}".split())
    ranks = distributed.start(device)
    set_tf32(False)
    torch.manual_seed(0)
    core = run_pretrain.build_model(args).to(ranks.device)
    losses = partial(batch_losses, args=args)
    return training_of(core, args, ranks, len(core.scale_list) + 1, losses)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("masking", list(MASKINGS))
@pytest.mark.parametrize("device", DEVICES)
def test_no_step_waits_for_the_device(device, masking, dtype):
    if device == "cpu" and dtype == "float16" and masking != "attention":
        pytest.skip("slow on the CPU and the same code")
    with no_host_waits(batches(8, device), device) as given:
        training = training_on(device, f"--masking {masking} --dtype {dtype}")
        assert all(map(math.isfinite, means_of_epoch(training, given, 8)))


@pytest.mark.parametrize("device", DEVICES)
def test_an_overflow_skips_the_update_and_lowers_the_scale(device):
    training = training_on(device, "--dtype float16")
    parameters = [p for group in training.optimizer.param_groups for p in group["params"] if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    for group in training.optimizer.param_groups:
        group["lr"] = 1e-3
    scale = training.scaler.get_scale()
    for factor, skipped in ((math.inf, True), (1.0, False)):
        training.scaler.scale(sum((p.float() * factor).sum() for p in parameters)).backward()
        assert float(training.update()) == skipped
        assert training.scaler.get_scale() == scale / 2
        assert {torch.equal(p, old) for p, old in zip(parameters, before, strict=True)} == {skipped}


@pytest.mark.parametrize("device", DEVICES)
def test_masks_and_foregrounds_are_those_of_the_cpu(device):
    attention = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    attention = nn.functional.interpolate(attention, size=(224, 224), mode="bicubic")[:, 0] * 255
    attention = attention.clamp(0, 255).to(torch.uint8)
    attention[0] = 7  # an all-equal map has no foreground
    foreground = otsu_foreground(attention)
    assert torch.equal(otsu_foreground(attention.to(device)).cpu(), foreground)
    significant = significant_patches(foreground, 16)
    assert torch.equal(significant_patches(foreground.to(device), 16).cpu(), significant) and significant.any()
    batch = {"attention": attention.to(device), "foreground": foreground.to(device)}
    for name in MASKINGS:
        first, second = (
            draw_mask(name, MaskRequest(batch, 16, 0.75, 0.5, 1, 2, mask_generator(0, 1, 2, 0, device))).cpu()
            for _ in range(2)
        )
        # The numbers drawn differ between devices; the counts must not, nor the same draw twice.
        assert torch.equal(first, second) and torch.equal(first.sum(1), torch.full((6,), 147.0))


@pytest.mark.cuda
def test_memory_does_not_grow():
    given, seen = batches(4, "cuda"), []

    def watched():
        for batch in itertools.islice(itertools.cycle(given), 200):
            seen.append(torch.cuda.memory_allocated())
            yield batch

    means_of_epoch(training_on("cuda", "--dtype bfloat16"), watched(), 200)
    assert max(seen[20:]) <= max(seen[5:20]), seen


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
def test_compiled_losses_are_the_same(device, how):
    given = batches(6, device)
    given[3]["img"].fill_(100)  # a flat picture: another batch's loss in its place would show
    results = []
    torch.compiler.reset()
    for compiled in (False, True):
        training, steps = training_on(device, "--dtype float32"), []
        if compiled:
            training.core.compile(fullgraph=True, **how)

        def watched(training, batch, losses=training.losses, steps=steps):
            found = losses(training, batch)
            steps.append(found[1][:2].float().clone())
            return found

        training.losses = watched
        means_of_epoch(training, given, 6)
        results.append(torch.stack(steps).cpu())
    eager, found = results
    torch.testing.assert_close(found[0], eager[0], rtol=1e-5, atol=0)
    # AdamW's first updates are nearly the gradient's sign, so that the last bit of a gradient near 0 is amplified.
    torch.testing.assert_close(found, eager, rtol=5e-3, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_one_rank_of_a_process_group(device, tmp_path):
    """NCCL, or gloo on the CPU, with a single rank: the gradients of the bare model."""
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    gradients = []
    try:
        for wrap in (lambda core: core, DistributedDataParallel):
            core = training_on(device, "--dtype float32").core
            batch = core.prepare_batch(batches(1, device)[0])
            mask = core.draw_mask(batch, generator=mask_generator(0, 0, 0, 0, device))
            wrap(core)(batch, mask=mask, n_visible=4).backward()
            gradients.append([p.grad.clone() for p in core.parameters() if p.grad is not None])
    finally:
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

    def run(output):
        flags = f"{FLAGS} --device cuda --dtype {dtype} --epochs 3 --num_workers 1 --save_every 1 --keep 3".split()
        command = [sys.executable, "-c", DETERMINISTIC, *flags, "--data_path", str(tree), "--output_dir", str(output)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        losses = [json.loads(line)["train_loss"] for line in (output / "log.txt").read_text().splitlines()]
        return torch.load(output / "checkpoint-2.pth", weights_only=True)["model"], losses

    (whole, losses), _ = run(tmp_path / "whole"), run(tmp_path / "parts")
    for path in (tmp_path / "parts").glob("checkpoint-[12]*.pth"):
        path.unlink()
    resumed, resumed_losses = run(tmp_path / "parts")
    assert all(t.device.type == "cpu" for t in whole.values())
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert losses == resumed_losses
