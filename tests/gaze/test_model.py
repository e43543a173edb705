"""The gaze predictor's network: a density that starts from the prior, on any encoder, with its weights."""

from __future__ import annotations

import pytest
import timm
import torch

from gaze.main import build_model, get_args_parser
from gaze.model import PRIOR_FLOOR, GazeNet

SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 1}


@pytest.mark.parametrize(
    ("backbone", "args"), [("test_resnet", {}), ("test_convnext", {}), ("vit_base_patch16_224", SMALL)]
)
def test_starts_from_the_prior_and_learns(backbone, args):
    torch.manual_seed(0)
    prior = torch.rand(256, dtype=torch.float64).softmax(0).view(16, 16)
    model = GazeNet(backbone, 64, width=16, backbone_args=args)
    model.set_prior(prior)
    img = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    log_p = model(img)
    assert log_p.shape == (2, 16, 16) and log_p.dtype == torch.float32
    assert torch.allclose(log_p[0].double().exp(), (1 - PRIOR_FLOOR) * prior + PRIOR_FLOOR / 256, rtol=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        (-model(img)[:, 0, 0]).sum().backward()
        optimizer.step()
        assert all(p.grad is not None for p in model.parameters())  # DDP needs every one
    after = model(img)
    assert torch.allclose(after.exp().sum((1, 2)), torch.ones(2), atol=1e-5)
    assert (after[:, 0, 0] > log_p[:, 0, 0]).all()


def model_of(weights) -> GazeNet:
    flags = ["--data_path", "none", "--input_size", "64", "--weights", str(weights), "--backbone", "test_resnet"]
    return build_model(get_args_parser().parse_args(flags))[0].eval()


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_encoder_weights_are_timms(name, tmp_path):
    torch.manual_seed(3)
    plain = timm.create_model(name, num_classes=10).eval()
    torch.save(plain.state_dict(), tmp_path / "file.pth")
    x = torch.rand(1, 3, 64, 64)
    _, features = plain.forward_intermediates(x)
    assert torch.allclose(model_of(f"{tmp_path / 'file.pth'}@{name}").encoder(x)[-1], features[-1], atol=1e-6)


def test_own_backbone_is_the_encoder(backbone):
    loaded = model_of(backbone).encoder.state_dict()
    own = torch.load(backbone, weights_only=True)["state_dict"]  # trained at 32 px
    assert torch.equal(loaded["model.blocks.1.mlp.fc1.weight"], own["blocks.1.mlp.fc1.weight"])
    assert loaded["model.pos_embed"].shape == (1, 17, 64)
