"""Non-finite numbers: no update with them, found a little later, told with all that helps."""

from __future__ import annotations

import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist

from util.finite import (
    OVERFLOWS_IN_A_ROW,
    FiniteWatch,
    NonFiniteError,
    UnitScaler,
    make_scaler,
    nan_gradient_unless_finite,
    update_was_skipped,
)
from util.stop import GO_ON, PAUSE, TERMINATE

CPU = torch.device("cpu")


class Request:
    """Stands for the signals, whose real ones are tested in test_stop.py."""

    request = GO_ON


def make_watch(**kwargs) -> FiniteWatch:
    kwargs = {"signals": Request(), "sample_names": lambda epoch, step: [f"e{epoch}s{step}.png"], **kwargs}
    return FiniteWatch(CPU, kwargs.pop("signals"), **kwargs)


def note(watch: FiniteWatch, step: int, *, loss: float = 1.0, skipped: bool = False) -> int:
    return watch.step(
        2, range(step, step + 1), lr=1e-3, losses=torch.tensor([0.5, loss]), skipped=torch.tensor(float(skipped))
    )


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
def test_no_update_is_made_with_a_nonfinite_gradient(clip):
    """GradScaler and fused AdamW of the installed torch, as the training loop uses them."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    other = torch.nn.Parameter(torch.tensor(3.0))
    optimizer = torch.optim.AdamW([weight, other], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=2**31 - 1)
    history = []
    for factor in (1.0, math.inf, 1.0, math.nan):
        loss = nan_gradient_unless_finite((weight * weight).sum() * factor + other)
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_([weight, other], clip)
        scaler.step(optimizer)
        assert update_was_skipped(scaler, optimizer).item() == (not math.isfinite(factor))
        scaler.update()
        optimizer.zero_grad()
        state = optimizer.state[weight]
        history.append([*weight.tolist(), other.item(), state["step"].item(), *state["exp_avg"].tolist()])
    assert history[0] == history[1] != history[2] == history[3]
    assert all(math.isfinite(number) for number in history[3])


def test_a_nonfinite_loss_is_told_with_step_lr_losses_and_samples():
    watch = make_watch()
    assert note(watch, 0) == GO_ON
    with pytest.raises(NonFiniteError) as error:
        watch.step(2, range(6, 8), lr=1e-3, losses=torch.tensor([0.5, math.nan]), skipped=torch.tensor(1.0))
    for part in ("non-finite loss at epoch 2 step 7", "lr 0.001", "[0.5, nan]", "e2s6.png; e2s7.png"):
        assert part in str(error.value)


def test_a_nonfinite_gradient_is_an_error_but_in_fp16():
    with pytest.raises(NonFiniteError, match="non-finite gradient at epoch 2 step 3"):
        note(make_watch(), 3, skipped=True)
    watch = make_watch(half=True)
    for step in range(OVERFLOWS_IN_A_ROW - 1):
        note(watch, step, skipped=True)
    note(watch, 60)  # an update in between, and the count starts again
    for step in range(OVERFLOWS_IN_A_ROW - 1):
        note(watch, step, skipped=True)
    with pytest.raises(NonFiniteError, match="50 fp16 overflows in a row"):
        note(watch, 99, skipped=True)
    with pytest.raises(NonFiniteError, match="non-finite loss"):
        note(make_watch(half=True), 3, loss=math.inf, skipped=True)


def test_skip_nonfinite_tolerates_as_many_as_it_says(capsys):
    watch = make_watch(skip_nonfinite=2)
    for step in range(4):
        note(watch, step, loss=math.inf if step % 2 else 1.0, skipped=bool(step % 2))
    assert watch.skipped == 2
    out = capsys.readouterr().out
    assert out.count("warning: left out") == 2 and "2 of at most 2 steps" in out and "e2s3.png" in out
    with pytest.raises(NonFiniteError):
        note(watch, 5, loss=math.inf, skipped=True)


def test_a_late_reading_is_caught_before_a_save():
    """As on a GPU, where numbers are read two steps late."""
    watch = make_watch()
    watch._lag = 2
    note(watch, 0)
    note(watch, 1, loss=math.nan, skipped=True)
    note(watch, 2)
    with pytest.raises(NonFiniteError, match="step 1"):
        watch.settle()
    watch = make_watch()
    watch._lag = 2
    for step in range(2):
        note(watch, step, loss=1.0 if step else math.nan)
    with pytest.raises(NonFiniteError, match="step 0"):
        note(watch, 2)


def test_requests_pass_through():
    signals = Request()
    watch = make_watch(signals=signals)
    assert note(watch, 0) == GO_ON == watch.settle()
    signals.request = TERMINATE
    assert note(watch, 1) == TERMINATE == watch.settle()


def watching_rank(rank: int, store: str, queue) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    signals = Request()
    watch = make_watch(
        signals=signals,
        group=dist.group.WORLD,
        skip_nonfinite=1,
        sample_names=lambda epoch, step: [f"rank{rank}step{step}.png"],
    )
    seen = [note(watch, 0)]
    signals.request = PAUSE if rank == 1 else GO_ON
    seen += [note(watch, 1), note(watch, 2)]
    signals.request = GO_ON
    # Rank 1 alone has a bad loss; the gradient that comes of it is bad on both.
    seen += [note(watch, 3, loss=math.nan if rank == 1 else 1.0, skipped=True), watch.settle()]
    assert watch.skipped == 1
    note(watch, 4, loss=math.nan if rank == 1 else 1.0, skipped=True)
    try:
        note(watch, 5)
    except BaseException as error:
        queue.put((rank, seen, type(error).__name__, str(error)))
    dist.destroy_process_group()


def test_ranks_stop_together_and_name_the_bad_one(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    store = str(tmp_path / "store")
    ranks = [context.Process(target=watching_rank, args=(rank, store, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    told = sorted(queue.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(10)
    assert [one[1] for one in told] == [[GO_ON, GO_ON, PAUSE, PAUSE, GO_ON]] * 2
    assert [one[2] for one in told] == ["NonFiniteError", "SystemExit"]
    assert "rank 1: losses per scale [0.5, nan], samples rank1step4.png" in told[0][3]
    assert "rank0step4.png" not in told[0][3]


def test_outside_fp16_there_is_no_scale():
    """300 updates left out, and a checkpoint of an older program that had halved its scale: it stays 1."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    scaler = make_scaler("float32", CPU)
    before = scaler.state_dict()
    for factor in [math.nan] * 300 + [1.0]:
        scaler.scale(nan_gradient_unless_finite((weight * weight).sum() * factor)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 1.0 and scaler.state_dict() == before
    plain = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    other = torch.optim.AdamW([plain], lr=0.1, fused=True)
    (plain * plain).sum().backward()
    other.step()
    assert torch.equal(weight, plain)
    scaler.load_state_dict({**before, "scale": 2.0**-130})
    assert scaler.get_scale() == 1.0 == make_scaler("bfloat16", CPU).get_scale()
    half = make_scaler("float16", CPU)
    assert half.get_scale() == 65536.0 and not isinstance(half, UnitScaler)
