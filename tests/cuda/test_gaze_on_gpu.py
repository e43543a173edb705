"""Training the gaze predictor on a GPU: nothing waits for it, and the losses are the CPU's.

Each test runs on the CPU as well, as far as the CPU has what it needs, so that it works on the first GPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from host_waits import GivenBatches, no_host_waits

import gaze.main
from gaze.model import GazeNet
from util import distributed
from util.output import Progress
from util.precision import set_tf32
from util.stop import GO_ON, StopSignals
from util.training import Training

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SIZE, BATCH = 64, 4


def batches(n, device):
    """Batches as the loader gives them, in pinned memory for a GPU."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(n):
        target = torch.rand(BATCH, SIZE // 4, SIZE // 4, generator=generator) ** 4
        img = torch.randint(256, (BATCH, 1, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        batch = {"img": img, "target": target / target.sum((1, 2), keepdim=True)}
        made.append({name: t.pin_memory() if device == "cuda" else t for name, t in batch.items()})
    return made


def losses_of(given, n, device, dtype):
    """Mean KLD and CC of an epoch of n given batches, after run_gaze.py's own options."""
    args = gaze.main.get_args_parser().parse_args(["--data_path", "none", "--epochs", "2", "--dtype", dtype])
    ranks = distributed.start(device)
    torch.manual_seed(0)
    core = GazeNet("test_resnet", input_size=SIZE, width=16)
    torch.nn.init.normal_(core.out.weight, std=0.1)  # zero at first: the loss would be the prior's, whatever else
    core = core.to(ranks.device)
    with StopSignals() as signals:
        training = Training(
            core=core,
            optimizer=torch.optim.AdamW(core.parameters(), lr=0.0, fused=True),
            ranks=ranks,
            signals=signals,
            options=vars(args) | {"warmup_epochs": 0, "print_every": None},
            n_values=2,
            losses=gaze.main.batch_losses,
        )
        training.start(GivenBatches(given, n), log=object(), progress=Progress("training", n, "steps", enabled=False))
        assert training.train_epoch() == GO_ON and training.step == n
    return training.sums.means()


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
