"""Training the gaze predictor on a GPU: nothing waits for it, and the losses are the CPU's.

Each test runs on the CPU as well, as far as the CPU has what it needs, so that it works on the first GPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from host_waits import GivenBatches, no_host_waits

import gaze.main
from gaze.main import batch_losses
from gaze.model import GazeNet
from util import distributed
from util.output import Progress, RunLog
from util.precision import set_tf32
from util.stop import GO_ON, StopSignals
from util.training import Training

GPU = pytest.param("cuda", marks=pytest.mark.cuda)
DEVICES = ["cpu", GPU]
FLAGS = ["--data_path", "none", "--epochs", "2", "--warmup_epochs", "0", "--lr", "1e-3", "--print_every", "1000000"]
SIZE, BATCH = 64, 4


def batches(n, device):
    """Batches as the loader gives them, in pinned memory for a GPU."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(n):
        target = torch.rand(BATCH, SIZE // 4, SIZE // 4, generator=generator) ** 4
        batch = {
            "img": torch.randint(256, (BATCH, 1, SIZE, SIZE), dtype=torch.uint8, generator=generator),
            "target": target / target.sum((1, 2), keepdim=True),
        }
        made.append({name: t.pin_memory() if device == "cuda" else t for name, t in batch.items()})
    return made


def losses_of(given, n, device, tmp_path, *flags):
    """Mean KLD and CC of an epoch of n given batches, after run_gaze.py's own options."""
    args = gaze.main.get_args_parser().parse_args([*FLAGS, "--device", device, *flags])
    ranks = distributed.start(device)
    torch.manual_seed(0)
    core = GazeNet("test_resnet", input_size=SIZE, width=16)
    with torch.no_grad():
        core.out.weight.normal_(std=0.1)  # zero at first: the loss would be the prior's, whatever else
    core = core.to(ranks.device)
    optimizer = torch.optim.AdamW(core.parameters(), lr=0.0, fused=True)
    with StopSignals() as signals:
        training = Training(
            core=core,
            optimizer=optimizer,
            ranks=ranks,
            signals=signals,
            options=vars(args),
            n_values=2,
            losses=batch_losses,
            name_means=lambda means: {"kld": means[0]},
        )
        training.start(
            GivenBatches(given, n),
            log=RunLog(tmp_path, None, 0.0, enabled=False),
            progress=Progress("training", n, "steps", enabled=False),
        )
        assert training.train_epoch() == GO_ON and training.step == n
    return training.sums.means()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", DEVICES)
def test_no_step_waits_for_the_device(device, dtype, tmp_path):
    with no_host_waits(batches(8, device), device) as given:
        means = losses_of(given, 8, device, tmp_path, "--dtype", dtype)
    assert all(math.isfinite(value) for value in means)


# The first step's loss is of the same weights; from then on differences grow, since AdamW's first updates are
# nearly the gradient's sign. bfloat16 has 8 bits of mantissa.
@pytest.mark.parametrize(
    ("dtype", "n", "tolerance"), [("float32", 1, 1e-4), ("float32", 3, 1e-2), ("bfloat16", 1, 3e-2)]
)
@pytest.mark.parametrize("device", DEVICES)
def test_losses_are_those_of_the_cpu_in_float32(device, dtype, n, tolerance, tmp_path):
    set_tf32(False)
    expected = losses_of(batches(n, "cpu"), n, "cpu", tmp_path, "--dtype", "float32")
    found = losses_of(batches(n, device), n, device, tmp_path, "--dtype", dtype)
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
