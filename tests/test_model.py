import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models_cxrmim import CXRMIM, sincos_pos_embed
from util.masking import otsu_foreground

TINY = dict(
    img_size=64, embed_dim=32, depth=4, num_heads=4, decoder_embed_dim=32, decoder_num_heads=4, id_list=(0, 1, 2, 3)
)


def make_batch(size=64, batch_size=3, seed=0):
    """A batch as the data sets give it."""
    generator = torch.Generator().manual_seed(seed)

    def smooth():
        coarse = torch.rand(batch_size, 1, size // 16, size // 16, generator=generator)
        return (F.interpolate(coarse, size=(size, size), mode="bilinear") * 255).to(torch.uint8)

    attention = smooth()[:, 0]
    return {"img": smooth(), "attention": attention, "foreground": (attention > 128).to(torch.uint8)}


@pytest.mark.parametrize("size", [224, 448])
def test_shapes_at_each_scale(size):
    model = CXRMIM(**TINY | {"img_size": size}).eval()
    batch = model.prepare_batch(make_batch(size, 2))
    mask = model.draw_mask(batch)
    grid = size // 16
    latents = model.forward_encoder(batch["img"], mask)
    preds = model.forward_decoder(latents, mask)
    targets = model.hog_targets(batch["img"])
    n_visible = grid**2 - int(grid**2 * 0.75)
    assert [tuple(latent.shape) for latent in latents] == [(2, 1 + n_visible, 32)] * 4
    cells = [(2, (4 * grid) ** 2, 27), (2, (2 * grid) ** 2, 27), (2, grid**2, 27), (2, (grid // 2) ** 2, 27)]
    assert [tuple(pred.shape) for pred in preds] == cells
    assert [tuple(target.shape) for target in targets] == cells


def test_pos_embed_is_the_formula():
    dim, height, width = 16, 3, 4
    embed = sincos_pos_embed(dim, (height, width))
    assert not embed.requires_grad
    assert embed.shape == (1, 1 + height * width, dim)
    assert (embed[0, 0] == 0).all()
    for row in range(height):
        for column in range(width):
            waves = [10000 ** (-i / (dim / 4)) for i in range(dim // 4)]
            expected = [
                function(position * wave)
                for position in (column, row)
                for function in (math.sin, math.cos)
                for wave in waves
            ]
            np.testing.assert_allclose(embed[0, 1 + row * width + column].numpy(), expected, atol=1e-6)


def test_masked_pixels_do_not_reach_the_encoder():
    model = CXRMIM(**TINY).eval()
    batch = model.prepare_batch(make_batch())
    mask = model.draw_mask(batch)
    pixels = mask.view(-1, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    disturbed = batch["img"] + pixels * torch.randn(batch["img"].shape)
    for a, b in zip(model.forward_encoder(batch["img"], mask), model.forward_encoder(disturbed, mask), strict=True):
        assert torch.equal(a, b)


def slow_loss(model, preds, targets, mask, attention, weighted):
    """The loss, cell by cell in NumPy."""
    total = 0.0
    grid = model.grid_size[0]
    for scale, pred, target in zip(model.scale_list, preds, targets, strict=True):
        side, cell = int(grid * scale), int(16 / scale)
        error_sum = weight_sum = 0.0
        for b in range(len(mask)):
            m = np.zeros(side * side)
            a = np.zeros(side * side)
            for y in range(side):
                for x in range(side):
                    rows = range(int(y / scale), max(int(y / scale) + 1, int((y + 1) / scale)))
                    columns = range(int(x / scale), max(int(x / scale) + 1, int((x + 1) / scale)))
                    m[y * side + x] = np.mean([mask[b, r * grid + c].item() for r in rows for c in columns])
                    window = attention[b, y * cell : (y + 1) * cell, x * cell : (x + 1) * cell]
                    a[y * side + x] = window.mean().item() * m[y * side + x]
            weight = np.exp(a / 0.1) / np.exp(a / 0.1).sum() + m if weighted else m
            error = ((pred[b] - target[b]) ** 2).mean(1).detach().numpy()
            error_sum += (error * weight).sum()
            weight_sum += weight.sum()
        total += error_sum / weight_sum
    return total


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_equals_the_slow_version(weighted):
    model = CXRMIM(**TINY, gaze_weighted=weighted)
    batch = model.prepare_batch(make_batch())
    mask = model.draw_mask(batch, generator=torch.Generator().manual_seed(0))
    preds = model.forward_decoder(model.forward_encoder(batch["img"], mask), mask)
    targets = model.hog_targets(batch["img"])
    slow = slow_loss(model, preds, targets, mask, batch["attention"], weighted)
    loss = model.scale_losses(preds, targets, mask, batch["attention"] if weighted else None).sum()
    assert loss.item() == pytest.approx(slow, rel=1e-5)
    whole = model(batch, mask=mask)
    assert whole.item() == pytest.approx(slow, rel=1e-4)  # its targets come from one gray channel
    assert model(batch, mask=mask, per_scale=True).sum().item() == pytest.approx(whole.item())


def test_gray_bytes_and_normalised_floats_give_the_same_loss():
    model = CXRMIM(**TINY, gaze_weighted=True)
    raw = make_batch()
    img = raw["img"].float().expand(-1, 3, -1, -1) / 255
    mean, std = (torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
    floats = {"img": (img - mean) / std, "attention": raw["attention"].float() / 255, "foreground": raw["foreground"]}
    mask = model.draw_mask(model.prepare_batch(raw))
    assert model(raw, mask=mask).item() == pytest.approx(model(floats, mask=mask).item(), rel=1e-4)
    prepared = model.prepare_batch(raw)
    assert all(value is model.prepare_batch(prepared)[key] for key, value in prepared.items())


def test_without_foreground_the_mask_is_that_of_the_otsu_foreground():
    model = CXRMIM(**TINY)
    batch = model.prepare_batch(make_batch())
    del batch["foreground"]

    def draw(b):
        return model.draw_mask(b, generator=torch.Generator().manual_seed(0))

    assert torch.equal(draw(batch), draw(batch | {"foreground": otsu_foreground(batch["attention"])}))
    assert model(batch).isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id_list": (0, 4)}, "id_list has 2 blocks and scale_list 4"),
        ({"id_list": (0, 1, 2, 4)}, "id_list .* outside"),
        ({"id_list": (0, 1, 2, -1)}, "id_list .* outside"),
        ({"scale_list": (4, 2, 1, 3)}, "scale_list .* not among"),
        ({"id_list": (), "scale_list": ()}, "id_list"),
        ({"img_size": 48}, "input_size 48"),
        ({"masking": "gaze"}, "masking"),
        ({"gaze_temperature": 0.0}, "gaze_temperature"),
    ],
)
def test_what_does_not_fit_together_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        CXRMIM(**TINY | options)


def test_any_number_of_taps_trains_every_parameter_that_is_used():
    model = CXRMIM(**TINY | {"id_list": (2, 0, 2), "scale_list": (0.5, 4, 4)})
    model(make_batch()).backward()
    for name, parameter in model.named_parameters():
        used = not name.startswith("blocks.3")
        assert (parameter.grad is not None) == parameter.requires_grad == (used and "pos_embed" not in name), name


def test_wrong_input_is_refused():
    model = CXRMIM(**TINY)
    with pytest.raises(ValueError, match="32 x 32"):
        model(make_batch(32))
    mask = torch.zeros(3, 16)
    mask[0, 0] = 1
    with pytest.raises(ValueError, match="unequal"):
        model(make_batch(), mask=mask)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_model_gives_the_same_loss_and_gradients(backend):
    """aot_eager captures the whole graph, forward and backward, without a minute of C++ compilation."""
    flags = TINY | dict(depth=2, id_list=(0, 1), scale_list=(4.0, 0.5), gaze_weighted=True)
    model, compiled = CXRMIM(**flags), CXRMIM(**flags)
    compiled.load_state_dict(model.state_dict())
    compiled.compile(backend=backend, fullgraph=True)
    batch = model.prepare_batch(make_batch())
    mask = model.draw_mask(batch)
    losses = [m(batch, mask=mask, n_visible=4) for m in (model, compiled)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3)
    assert list(compiled.state_dict()) == list(model.state_dict())
