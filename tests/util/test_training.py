"""Non-finite numbers: no update with them, found a little later, and reported with all that helps."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from datasets.sampler import TrainBatches
from util.distributed import Ranks
from util.errors import UserError
from util.precision import make_scaler, nan_gradient_unless_finite, update_scale, update_was_skipped
from util.training import OVERFLOWS_IN_A_ROW, Training

CPU = torch.device("cpu")
BATCHES = TrainBatches(200, 1)


def make_training(dtype: str = "float32") -> Training:
    core = torch.nn.Linear(1, 1)
    training = Training(
        core=core,
        optimizer=torch.optim.AdamW(core.parameters()),
        ranks=Ranks(0, 1, CPU, None),
        signals=SimpleNamespace(request=0),
        options={"dtype": dtype, "skip_nonfinite": 0},
        n_values=1,
        losses=None,
        sample_name=lambda index: f"sample{index}.png",
    )
    training.loader = SimpleNamespace(batch_sampler=BATCHES)
    return training


def sample(step: int) -> str:
    """Name of the sample that a step trains on."""
    return f"sample{BATCHES.batch(0, step)[0]}.png"


def note(training: Training, step: int, *, loss: float = 1.0, skipped: bool = False) -> None:
    numbers = torch.tensor([0.5, loss, float(skipped)])
    training.unread.append((f"epoch 2 step {step}, lr 0.001", range(step - 1, step + 1), numbers))


@pytest.mark.parametrize("loss", [1.25, math.inf, -math.inf, math.nan])
def test_a_finite_loss_and_its_gradient_stay_and_any_other_becomes_nan(loss):
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    total = nan_gradient_unless_finite(weight.sum() * 0.5 + (loss - 1.5))
    total.backward()
    if math.isfinite(loss):
        assert total.item() == loss and weight.grad.tolist() == [0.5, 0.5]
    else:
        assert weight.grad.isnan().all()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_no_update_is_made_with_a_nonfinite_gradient_and_outside_fp16_the_scale_stays_1(clip):
    """GradScaler and fused AdamW of the installed torch, as the training loop uses them."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    other = torch.nn.Parameter(torch.tensor(3.0))
    optimizer = torch.optim.AdamW([weight, other], lr=0.1, fused=True)
    scaler = make_scaler("float32", CPU)
    before, history = scaler.state_dict(), []
    for factor in (1.0, math.inf, 1.0, math.nan):
        loss = nan_gradient_unless_finite((weight * weight).sum() * factor + other)
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_([weight, other], clip)
        scaler.step(optimizer)
        assert update_was_skipped(scaler, optimizer).item() == (not math.isfinite(factor))
        update_scale(scaler, "float32")
        optimizer.zero_grad()
        state = optimizer.state[weight]
        history.append([*weight.tolist(), other.item(), state["step"].item(), *state["exp_avg"].tolist()])
    assert history[0] == history[1] != history[2] == history[3]
    assert all(math.isfinite(number) for number in history[3])
    assert scaler.get_scale() == 1.0 and scaler.state_dict() == before
    assert make_scaler("float16", CPU).get_scale() == 65536.0


def test_a_nonfinite_loss_is_reported_with_step_lr_losses_and_samples():
    training = make_training()
    note(training, 1)
    training.check_finite()
    note(training, 7, loss=math.nan, skipped=True)
    note(training, 9)
    with pytest.raises(UserError) as error:
        training.check_finite()
    for part in ("non-finite loss at epoch 2 step 7", "lr 0.001", "[0.5, nan]", f"samples {sample(6)}; {sample(7)}"):
        assert part in str(error.value)


def test_a_nonfinite_gradient_is_an_error_but_in_fp16():
    training = make_training()
    note(training, 3, skipped=True)
    with pytest.raises(UserError, match="non-finite gradient at epoch 2 step 3"):
        training.check_finite()
    training = make_training("float16")
    for step in range(2 * OVERFLOWS_IN_A_ROW - 1):  # an update half way, and the count starts again
        note(training, step, skipped=step != OVERFLOWS_IN_A_ROW - 1)
        if step % 7 == 0:
            training.check_finite()
    training.check_finite()
    assert training.watch == {"skipped": 0, "overflows": OVERFLOWS_IN_A_ROW - 1}
    note(training, 99, skipped=True)
    with pytest.raises(UserError, match="50 fp16 overflows in a row"):
        training.check_finite()
    training = make_training("float16")
    note(training, 3, loss=math.inf, skipped=True)
    with pytest.raises(UserError, match="non-finite loss"):
        training.check_finite()
