"""util/precision.py: the casts of all parameters at once give the same bits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import models_cxrmim
from models_cxrmim import CXRMIM


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "img": torch.randint(256, (3, 1, 64, 64), dtype=torch.uint8, generator=generator),
        "attention": torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=generator),
    }


def make_model():
    torch.manual_seed(1)
    return CXRMIM(
        img_size=64,
        embed_dim=64,
        depth=3,
        num_heads=2,
        decoder_embed_dim=32,
        id_list=(0, 1, 2),
        scale_list=(4, 1, 0.5),
        gaze_weighted=True,
    )


def step(model, batch, dtype):
    """Losses and gradients of one step."""
    core = getattr(model, "module", model)
    prepared = core.prepare_batch(batch)
    mask = core.draw_mask(prepared, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        losses = model(prepared, mask=mask, n_visible=4, per_scale=True)
    losses.sum().backward()
    gradients = {name: p.grad.clone() for name, p in core.named_parameters() if p.grad is not None}
    return losses.detach(), gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_has_the_same_bits_as_with_a_cast_for_each_parameter(batch, dtype, monkeypatch):
    losses, gradients = step(make_model(), batch, dtype)
    monkeypatch.setattr(models_cxrmim, "run_cast_once", lambda module, *args: module(*args))
    plain_losses, plain_gradients = step(make_model(), batch, dtype)
    assert torch.equal(losses, plain_losses) and gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32 and torch.equal(gradient, plain_gradients[name]), name


def test_several_ranks_see_each_gradient(batch, tmp_path):
    """DistributedDataParallel's hooks stand on the parameters, behind the cast."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(make_model())
        losses, gradients = step(model, batch, torch.bfloat16)
    finally:
        torch.distributed.destroy_process_group()
    alone_losses, alone_gradients = step(make_model(), batch, torch.bfloat16)
    assert torch.equal(losses, alone_losses)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in alone_gradients.items())
