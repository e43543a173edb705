"""Training the gaze predictor on a GPU: nothing waits for it, and the losses are the CPU's.

Each test runs on the CPU as well, as far as the CPU has what it needs, so that it works on the first GPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from host_waits import DEVICES, means_of_epoch, no_host_waits, pinned, training_of

import gaze.main
from gaze.model import GazeNet
from util import distributed
from util.precision import set_tf32

SIZE, BATCH = 64, 4


def batches(n, device):
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(n):
        target = torch.rand(BATCH, SIZE // 4, SIZE // 4, generator=generator) ** 4
        img = torch.randint(256, (BATCH, 1, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        made.append(pinned({"img": img, "target": target / target.sum((1, 2), keepdim=True)}, device))
    return made


def losses_of(given, n, device, dtype):
    """Mean KLD and CC of an epoch of n given batches, after run_gaze.py's own options."""
    args = gaze.main.get_args_parser().parse_args(["--data_path", "none", "--epochs", "2", "--dtype", dtype])
    ranks = distributed.start(device)
    torch.manual_seed(0)
    core = GazeNet("test_resnet", input_size=SIZE, width=16)
    torch.nn.init.normal_(core.out.weight, std=0.1)  # zero at first: the loss would be the prior's, whatever else
    training = training_of(core.to(ranks.device), args, ranks, 2, gaze.main.batch_losses, warmup_epochs=0)
    return means_of_epoch(training, given, n)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", DEVICES)
def test_no_step_waits_for_the_device(device, dtype):
    with no_host_waits(batches(8, device), device) as given:
        assert all(map(math.isfinite, losses_of(given, 8, device, dtype)))


# The first step's loss is of the same weights; from then on differences grow, since AdamW's first updates are
# nearly the gradient's sign. bfloat16 has 8 bits of mantissa.
@pytest.mark.parametrize(
    ("dtype", "n", "tolerance"), [("float32", 1, 1e-4), ("float32", 3, 1e-2), ("bfloat16", 1, 3e-2)]
)
@pytest.mark.parametrize("device", DEVICES)
def test_losses_are_those_of_the_cpu_in_float32(device, dtype, n, tolerance):
    set_tf32(False)
    expected = losses_of(batches(n, "cpu"), n, "cpu", "float32")
    found = losses_of(batches(n, device), n, device, dtype)
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
