import math

import pytest
import torch

from models_cxrmim import cxrmim_vit_tiny_patch16
from util.lr_sched import learning_rate, parameter_groups

RECIPE = dict(lr=1e-3, min_lr=1e-6, warmup_epochs=40, epochs=400)


def test_schedule_at_fixed_points():
    assert learning_rate(0, **RECIPE) == 0
    assert learning_rate(10, **RECIPE) == pytest.approx(2.5e-4)
    assert learning_rate(40, **RECIPE) == pytest.approx(1e-3)
    assert learning_rate(220, **RECIPE) == pytest.approx((1e-3 + 1e-6) / 2)
    assert learning_rate(400, **RECIPE) == pytest.approx(1e-6)
    assert learning_rate(100, **RECIPE) == pytest.approx(1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi / 6)))


def test_no_warmup_and_nothing_but_warmup():
    assert learning_rate(0, lr=1.0, min_lr=0.0, warmup_epochs=0, epochs=10) == 1.0
    assert learning_rate(5, lr=1.0, min_lr=0.0, warmup_epochs=40, epochs=10) == pytest.approx(5 / 40)


def test_weight_decay_spares_biases_norms_and_vectors():
    with torch.device("meta"):
        model = cxrmim_vit_tiny_patch16(img_size=32)
    names = {id(p): name for name, p in model.named_parameters()}
    plain, decayed = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, weight_decay=0.05))
    assert [group["weight_decay"] for group in parameter_groups(model, 0.05)] == [0.0, 0.05]
    assert all("norm" in name or name.endswith("bias") or ".pred.1." in name for name in plain)
    assert {"cls_token", "decoder.0.mask_token", "patch_embed.proj.weight", "blocks.3.mlp.fc1.weight"} <= decayed
    assert not any("norm" in name or name.endswith("bias") for name in decayed)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", *(f"decoder.{k}.pos_embed" for k in range(4))}
    assert plain | decayed | frozen == set(names.values())
