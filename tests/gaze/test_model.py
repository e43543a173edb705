"""The gaze predictor's network: a density that starts from the prior, rebuilt exactly, on any encoder."""

from __future__ import annotations

import pytest
import timm
import torch

from gaze.model import PRIOR_FLOOR, GazeNet, load_encoder
from util.errors import UserError
from util.export import read_encoder

SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 1}


def prior(size: int) -> torch.Tensor:
    values = torch.rand(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return values / values.sum()


@pytest.mark.parametrize(
    ("backbone", "args"), [("test_resnet", {}), ("test_convnext", {}), ("vit_base_patch16_224", SMALL)]
)
def test_starts_from_the_prior_and_learns(backbone, args):
    torch.manual_seed(0)
    model = GazeNet(backbone, 64, width=16, backbone_args=args)
    model.set_prior(prior(16))
    img = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    log_p = model(img)
    assert log_p.shape == (2, 16, 16) and log_p.dtype == torch.float32
    floored = (1 - PRIOR_FLOOR) * prior(16) + PRIOR_FLOOR / 256
    assert torch.allclose(log_p[0].double().exp(), floored, rtol=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        (-model(img)[:, 0, 0]).sum().backward()
        optimizer.step()
        assert all(p.grad is not None for p in model.parameters())  # DDP needs every one
    after = model(img)
    assert torch.allclose(after.exp().sum((1, 2)), torch.ones(2), atol=1e-5)
    assert (after[:, 0, 0] > log_p[:, 0, 0]).all()


def test_encoder_weights_are_timms():
    torch.manual_seed(3)
    plain = timm.create_model("test_resnet", num_classes=10).eval()
    model = GazeNet("test_resnet", input_size=64).eval()
    told = load_encoder(model.encoder, plain.state_dict(), "file.pth")
    assert "not used: fc" in told
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.encoder(x)[-1], plain.forward_features(x))
    flattened = GazeNet("test_convnext", input_size=64).eval()
    other = timm.create_model("test_convnext", num_classes=0).eval()
    load_encoder(flattened.encoder, other.state_dict(), "file.pth")
    _, features = other.forward_intermediates(x)
    assert torch.allclose(flattened.encoder(x)[-1], features[-1], atol=1e-6)


def test_own_backbone_is_the_encoder(backbone):
    own = read_encoder(backbone, img_size=64)  # trained at 32 px
    args = {name: value for name, value in own.timm_args.items() if name != "img_size"}
    model = GazeNet(own.timm_name, input_size=64, backbone_args=args)
    load_encoder(model.encoder, own.state, backbone)
    loaded = model.encoder.state_dict()
    assert torch.equal(loaded["model.blocks.1.mlp.fc1.weight"], own.state["blocks.1.mlp.fc1.weight"])
    assert loaded["model.pos_embed"].shape == (1, 17, 64)
    fresh = GazeNet(own.timm_name, input_size=64, backbone_args=args)
    load_encoder(fresh.encoder, read_encoder(backbone).state, backbone)  # resampled on the way
    assert torch.allclose(fresh.encoder.state_dict()["model.pos_embed"], loaded["model.pos_embed"], atol=1e-6)


@pytest.mark.parametrize(
    ("backbone", "change", "message"),
    [
        ("test_resnet", {"layer1.0.se.fc1.weight": torch.zeros(1)}, "which has no layer1.0.se.fc1.weight"),
        ("test_vit", {"blocks.0.ls1.gamma": torch.zeros(1)}, "which has no blocks.0.ls1.gamma"),
        ("test_vit", {"reg_token": torch.zeros(1)}, "which has no reg_token"),
        ("test_resnet", {"conv1.0.weight": None}, "Missing key"),
        ("test_resnet", {"layer4.0.conv1.weight": torch.zeros(3)}, "size mismatch"),
    ],
)
def test_weights_of_another_model_are_refused(backbone, change, message):
    model = GazeNet(backbone, input_size=160)
    state = timm.create_model(backbone).state_dict() | change
    with pytest.raises(UserError, match=f"file.pth: .*{message}") as caught:
        load_encoder(model.encoder, {name: value for name, value in state.items() if value is not None}, "file.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "nothing"}, "--backbone nothing"),
        ({"input_size": 100}, "--input_size 100"),
        ({"input_size": 32}, "at least 64"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        GazeNet(**{"backbone": "test_resnet", **options})
