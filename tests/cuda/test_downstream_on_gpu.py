"""Frozen encoders, linear heads and fine-tuning on a GPU: features, weights and losses are the CPU's.

Each test runs on the CPU as well, so that it works on the first GPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from host_waits import GivenBatches, no_host_waits

from downstream.data.images import normalisation
from downstream.data.labelled import MULTICLASS, MULTILABEL
from downstream.finetune import RECIPES, Tuning, make_training
from downstream.heads import Encoder, FeatureFile, HeadOptions, encode, train_heads
from util import distributed
from util.output import Progress, RunLog
from util.precision import set_tf32
from util.stop import GO_ON, StopSignals

GPU = pytest.param("cuda", marks=pytest.mark.cuda)
DEVICES = ["cpu", GPU]


def features_on(device, dtype, folder, n=10, side=32):
    """Cls tokens of made-up images, written and read back as run_downstream.py does: float32 [n, D]."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=side, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    images = torch.randint(256, (n, 1, side, side), dtype=torch.uint8)

    class Views(torch.utils.data.Dataset):
        def __getitem__(self, key):
            return images[key[0]]

    folder.mkdir()
    file, rows = FeatureFile(folder / "centre", n, model.embed_dim), np.arange(n)
    encoder = Encoder(model.eval().to(device), *normalisation("half"), torch.device(device), dtype)
    with StopSignals() as signals:
        done = encode(
            encoder,
            Views(),
            [(-1, rows, file)],
            device=torch.device(device),
            batch_size=4,
            num_workers=0,
            signals=signals,
            what="test",
        )
    assert done == n
    return torch.from_numpy(np.array(file.read(rows)))


# LayerNorm makes the features of size 1; bfloat16 keeps 8 bits of each product's result.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)], ids=str
)
@pytest.mark.parametrize("device", DEVICES)
def test_features_are_those_of_the_cpu_in_float32(device, dtype, tolerance, tmp_path):
    set_tf32(False)
    expected = features_on("cpu", torch.float32, tmp_path / "cpu")
    found = features_on(device, dtype, tmp_path / "device")
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("task", [MULTILABEL, MULTICLASS])
@pytest.mark.parametrize("device", DEVICES)
def test_stacked_heads_have_the_weights_of_heads_trained_alone_on_the_cpu(device, task):
    generator = torch.Generator().manual_seed(0)
    n, width, n_labels = 48, 16, 3
    features = torch.randn(2, n, width, generator=generator)
    scores = features[0] @ torch.randn(width, n_labels, generator=generator)
    if task == MULTICLASS:
        labels = torch.nn.functional.one_hot(scores.argmax(1), n_labels).float()
    else:
        labels = (scores > 0).float()
        labels[::7, 1] = torch.nan  # unknown

    def heads_on(where, seeds):
        views = [lambda view=view: view.to(where) for view in features]
        with StopSignals() as signals:
            return train_heads(
                views,
                labels.to(where),
                features[0, :20].to(where),
                labels[:20].to(where),
                task=task,
                seeds=seeds,
                options=HeadOptions(epochs=6, batch_size=16),
                signals=signals,
                what="test",
            )

    together = heads_on(device, [43, 44, 45])
    for seed, head in zip([43, 44, 45], together, strict=True):
        (alone,) = heads_on("cpu", [seed])
        assert head.weight.device.type == device and head.epoch == alone.epoch
        torch.testing.assert_close(head.weight.cpu(), alone.weight, rtol=0, atol=1e-4)
        torch.testing.assert_close(head.bias.cpu(), alone.bias, rtol=0, atol=1e-4)
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
        given.append(tuple(t.pin_memory() if device == "cuda" else t for t in (gray, labels)))
    ranks = distributed.start(device)
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=side, embed_dim=48, depth=2, num_heads=3, num_classes=3
    ).to(ranks.device)
    recipe = RECIPES[recipe]
    with (
        StopSignals() as signals,
        no_host_waits(given, device) as batches,
        Progress("test", n, "steps", enabled=False) as progress,
    ):
        tuning = Tuning(
            SimpleNamespace(task=MULTILABEL),
            None,
            recipe,
            *normalisation("half"),
            dtype,
            test_batch=size,
            num_workers=0,
            ranks=ranks,
            signals=signals,
        )
        training = make_training(tuning, model, 0, n)
        silent = RunLog("none", None, 0.0, enabled=False)
        training.start(GivenBatches(batches, n), log=silent, progress=progress)
        assert training.train_epoch() == GO_ON
    assert training.sums.totals[0, 1].item() == n
    return training.sums.means()[0]


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
