"""Every step that runs on a GPU, on one that is not there: nothing is on the wrong device, and nothing waits."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from fake_gpu import CUDA, fake_gpu, needs_fake_gpu
from host_waits import NO_SIGNALS, begin, training_of
from torch import nn

import engine_pretrain
import gaze.main
import run_pretrain
from downstream.data.images import normalisation
from downstream.data.labelled import MULTICLASS, MULTILABEL
from downstream.driver import RECIPES
from downstream.finetune import make_training
from downstream.forward import outputs, read_back
from gaze.model import GazeNet
from util.stop import GO_ON
from util.training import Training

pytestmark = needs_fake_gpu
SIDE, BATCH = 64, 2


@pytest.fixture(autouse=True)
def unread(monkeypatch):
    """The losses of both updates stay on the GPU until the epoch is over."""

    def check_finite(training: Training) -> None:
        assert len(training.unread) == 2 and all(numbers.device == CUDA for *_, numbers in training.unread)

    monkeypatch.setattr(Training, "check_finite", check_finite)


def pixels(*shape):
    return torch.zeros(*shape, dtype=torch.uint8)


def train(training: Training, batch, steps: int = 2) -> None:
    begin(training, [batch] * steps, steps)
    assert training.train_epoch() == GO_ON and training.step == steps


@pytest.mark.parametrize(
    ("masking", "flags"),
    [
        ("attention", "--dtype float16 --gaze_weighted --clip_grad 1 --accum_iter 2"),
        ("random", "--dtype bfloat16"),
        ("block", "--dtype float32"),
    ],
)
def test_pretraining(masking, flags, monkeypatch):
    args = run_pretrain.get_args_parser().parse_args(
        f"--model cxrmim_vit_tiny_patch16 --input_size {SIDE} --id_list 0 0 1 1 --masking {masking} --lr 1e-3 "
        f"{flags}".split()
    )
    model = run_pretrain.build_model(args)
    asked = []
    # A generator of a GPU's numbers can't be made without one.
    monkeypatch.setattr(engine_pretrain, "mask_generator", lambda *place: asked.append(place))
    with fake_gpu(model, monkeypatch) as ranks:
        batch = {"img": pixels(BATCH, 1, SIDE, SIDE)}
        batch |= {name: pixels(BATCH, SIDE, SIDE) for name in ("attention", "foreground")}
        losses = partial(engine_pretrain.batch_losses, args=args)
        train(training_of(model, args, ranks, 5, losses), batch, 2 * args.accum_iter)
    assert {place[-1] for place in asked} == {CUDA}


def test_gaze_training(monkeypatch):
    args = gaze.main.get_args_parser().parse_args(["--data_path", "none", "--dtype", "float16"])
    model = GazeNet("test_resnet", input_size=SIDE, width=16)
    with fake_gpu(model, monkeypatch) as ranks:
        batch = {"img": pixels(BATCH, 1, SIDE, SIDE), "target": torch.zeros(BATCH, SIDE // 4, SIDE // 4)}
        train(training_of(model, args, ranks, 2, gaze.main.batch_losses), batch)


@pytest.mark.parametrize(("recipe", "task"), [("published", MULTILABEL), ("layer_decay", MULTICLASS)])
def test_fine_tuning(recipe, task, monkeypatch):
    options = {"drop_path_rate": RECIPES[recipe].drop_path, "global_pool": RECIPES[recipe].pool}
    model = small_vit(num_classes=3, **options)
    with fake_gpu(model, monkeypatch) as ranks:
        how = dict(task=task, seed=0, steps=9, dtype=torch.bfloat16, ranks=ranks, signals=NO_SIGNALS)
        training = make_training(model, RECIPES[recipe], normalisation("imagenet"), **how)
        train(training, (pixels(BATCH, 1, 80, 80), torch.zeros(BATCH, 3)))


def small_vit(**options) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=SIDE, embed_dim=48, depth=2, num_heads=3, **options)


def test_frozen_encoder(monkeypatch):
    model = small_vit(num_classes=0)
    with fake_gpu(model, monkeypatch):
        gray = pixels(BATCH, 1, 80, 80).to(CUDA, non_blocking=True)
        features = outputs(model, gray, normalisation("imagenet"), torch.bfloat16)
    assert features.device == CUDA and features.shape == (BATCH, 96)


def test_features_are_waited_for_when_the_next_are_under_way(monkeypatch):
    told = []

    class Event:
        def record(self, stream: None) -> None:
            told.append("asked for")

        def synchronize(self) -> None:
            told.append("waited for")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    with fake_gpu(nn.Linear(1, 1), monkeypatch):
        found = list(read_back(torch.zeros(2, 3, device=CUDA) for _ in range(3)))
    assert told == ["asked for", *2 * ["asked for", "waited for"], "waited for"]
    assert [tensor.device.type for tensor in found] == 3 * ["cpu"]
