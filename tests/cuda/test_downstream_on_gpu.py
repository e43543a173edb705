"""Frozen encoders, linear heads and fine-tuning on a GPU: features, weights and losses are the CPU's.

Each test runs on the CPU as well, so that it works on the first GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from host_waits import DEVICES, NO_SIGNALS, means_of_epoch, no_host_waits, pinned

from downstream.data.images import normalisation
from downstream.data.labelled import MULTICLASS, MULTILABEL
from downstream.data.partition import Rows
from downstream.driver import RECIPES, Recipe
from downstream.finetune import make_training
from downstream.forward import all_outputs
from downstream.frozen import train_heads
from util import distributed
from util.precision import set_tf32

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def features_on(device, dtype, n=10, side=32):
    """Cls tokens and means of made-up images, as run_downstream.py makes them: float32 [n, 2 D]."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=side, num_classes=0, **SMALL).eval().to(device)
    images = torch.randint(256, (n, 1, side, side), dtype=torch.uint8)

    class Views(torch.utils.data.Dataset):
        def __getitem__(self, key):
            return images[key[0]]

    how = dict(dtype=dtype, device=torch.device(device), batch_size=4, num_workers=0, signals=NO_SIGNALS)
    return torch.cat(list(all_outputs(model, Views(), np.arange(n), 0, normalisation("half"), **how)))


# LayerNorm makes the features of size 1; bfloat16 keeps 8 bits of each product's result.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)], ids=str
)
@pytest.mark.parametrize("device", DEVICES)
def test_features_are_those_of_the_cpu_in_float32(device, dtype, tolerance):
    set_tf32(False)
    expected = features_on("cpu", torch.float32)
    found = features_on(device, dtype)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("task", [MULTILABEL, MULTICLASS])
@pytest.mark.parametrize("device", DEVICES)
def test_stacked_heads_have_the_weights_of_heads_trained_alone_on_the_cpu(device, task):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 48, 16, generator=generator)
    scores = features[0] @ torch.randn(16, 3, generator=generator)
    labels = (scores > 0).float()
    labels[::7, 1] = torch.nan  # unknown
    if task == MULTICLASS:
        labels = torch.nn.functional.one_hot(scores.argmax(1), 3).float()

    def heads_on(where, seeds):
        def read(view, images):
            return features[max(view, 0)][images].to(where)

        rows, recipe = Rows(np.arange(48), np.arange(20), None), Recipe(epochs=6, batch_size=16)
        how = dict(task=task, seeds=seeds, recipe=recipe, signals=NO_SIGNALS, what="test")
        return train_heads(read, range(2), labels.to(where), rows, **how)

    together = heads_on(device, [43, 44])
    for seed, head in zip([43, 44], together, strict=True):
        (alone,) = heads_on("cpu", [seed])
        assert head.weight.device.type == device and head.epoch == alone.epoch
        for name in ("weight", "bias"):
            torch.testing.assert_close(getattr(head, name).cpu(), getattr(alone, name), rtol=0, atol=1e-4)
        assert head.valid_losses == pytest.approx(alone.valid_losses, abs=1e-4)
    assert not torch.allclose(together[0].weight, together[1].weight, atol=1e-2)


def fine_tuned_on(device, dtype, n, *, recipe="published", size=4, side=32):
    """Mean loss of n steps of fine-tuning as run_downstream.py does them, from the same weights."""
    generator = torch.Generator().manual_seed(0)
    given = []
    for _ in range(n):
        gray = torch.randint(256, (size, 1, side, side), dtype=torch.uint8, generator=generator)
        labels = torch.randint(2, (size, 3), generator=generator).float()
        labels[0, 0] = torch.nan  # unknown
        given.append(pinned((gray, labels), device))
    ranks = distributed.start(device)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=side, num_classes=3, **SMALL).to(ranks.device)
    how = dict(task=MULTILABEL, seed=0, steps=n, dtype=dtype, ranks=ranks, signals=NO_SIGNALS)
    training = make_training(model, RECIPES[recipe], normalisation("half"), **how)
    with no_host_waits(given, device) as batches:
        return means_of_epoch(training, batches, n)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_fine_tuning_waits_for_nothing(device, dtype):
    assert 0.3 < fine_tuned_on(device, dtype, 8, recipe="layer_decay") < 3


@pytest.mark.parametrize(
    ("dtype", "n", "tolerance"), [(torch.float32, 1, 1e-4), (torch.float32, 4, 1e-2), (torch.bfloat16, 1, 3e-2)]
)
@pytest.mark.parametrize("device", DEVICES)
def test_fine_tuning_has_the_losses_of_the_cpu_in_float32(device, dtype, n, tolerance):
    set_tf32(False)
    expected = fine_tuned_on("cpu", torch.float32, n)
    assert fine_tuned_on(device, dtype, n) == pytest.approx(expected, rel=tolerance)
