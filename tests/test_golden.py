"""Every number of the published model that tests/golden/ holds must come out, on the CPU and on a GPU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models_cxrmim import CXRMIM, cxrmim_vit_base_patch16
from util.masking import otsu_foreground, significant_patches
from util.precision import set_tf32

GOLDEN = Path(__file__).parent / "golden"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
# Largest deviation of targets and losses, and of predictions and latents. A GPU sums in another order.
TOLERANCE = {"cpu": (1e-5, 1e-4), "cuda": (1e-4, 1e-4)}


@pytest.fixture(params=DEVICES)
def device(request):
    set_tf32(False)  # torch's own default has TF32 in convolutions
    return request.param


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "parity_small.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.fixture(scope="module")
def meta(golden):
    return json.loads(str(golden["meta"]))


@pytest.fixture
def batch(golden, meta, device):
    gray = torch.from_numpy(golden["gray"])[:, None]
    mean, std = (torch.tensor(meta[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return {
        "img": ((gray.expand(-1, 3, -1, -1) - mean) / std).to(device),
        "attention": (torch.from_numpy(golden["attention_u8"]).float() / 255).to(device),
    }


@pytest.fixture
def mask(golden, device):
    return torch.from_numpy(golden["mask"]).float().to(device)


@pytest.fixture
def make_model(golden, meta, device):
    def make(**options):
        keys = (
            "img_size patch_size embed_dim depth num_heads id_list scale_list decoder_embed_dim decoder_depth "
            "decoder_num_heads hog_nbins gaze_temperature"
        ).split()
        model = CXRMIM(**{key: meta[key] for key in keys}, **options)
        weights = {key[3:]: torch.from_numpy(value) for key, value in golden.items() if key.startswith("sd.")}
        model.load_state_dict(weights)
        return model.to(device)

    return make


def close(ours, published, tolerance):
    torch.testing.assert_close(ours.cpu().float(), torch.from_numpy(published), atol=tolerance, rtol=0)


def test_foreground_and_significant_patches(golden, meta, device):
    attention = torch.from_numpy(golden["attention_u8"]).to(device)
    assert torch.equal(otsu_foreground(attention).cpu(), torch.from_numpy(golden["foreground"]) == 255)
    significant = significant_patches(torch.from_numpy(golden["foreground"]).to(device), meta["patch_size"])
    assert torch.equal(significant.cpu(), torch.from_numpy(golden["significant"]))


def test_mask_has_the_published_counts(golden, meta, batch, make_model, mask):
    significant = torch.from_numpy(golden["significant"]).to(mask.device)
    ours = make_model().draw_mask(batch, meta["mask_ratio"], meta["clinical_ratio"])
    assert torch.equal(ours.sum(1), mask.sum(1))
    assert torch.equal((ours * significant).sum(1), (mask * significant).sum(1))


@torch.no_grad()
def test_latents_predictions_and_targets(golden, batch, mask, make_model, device):
    model = make_model().eval()
    latents = model.forward_encoder(batch["img"], mask)
    preds = model.forward_decoder(latents, mask)
    targets = model.hog_targets(batch["img"])
    gray_targets = model.hog_targets(batch["img"][:, :1])
    exact, deep = TOLERANCE[device]
    for k in range(4):
        close(latents[k][:, 0], golden[f"latent_cls_{k}"], deep)
        close(preds[k], golden[f"pred_{k}"], deep)
        close(targets[k], golden[f"target_{k}"], exact)
        close(gray_targets[k], golden[f"target_{k}"], exact)


@pytest.mark.parametrize("weighted", [False, True])
def test_loss(golden, batch, mask, make_model, device, weighted):
    loss = make_model(gaze_weighted=weighted)(batch, mask=mask)
    published = golden["loss_weighted" if weighted else "loss_unweighted"]
    assert loss.item() == pytest.approx(float(published), abs=TOLERANCE[device][0])


def test_gradients(golden, batch, mask, make_model, device):
    model = make_model(gaze_weighted=True)
    model(batch, mask=mask).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(float(golden["grad_norm_weighted"]), rel=1e-4)
    close(model.patch_embed.proj.bias.grad, golden["grad_patch_embed_bias"], TOLERANCE[device][0])


# Published is float32. The other number formats may differ from it by so much in the loss (1.25) and, as a
# share, in the norm of all gradients.
@pytest.mark.parametrize(
    "device, how, of_loss, of_gradient",
    [
        pytest.param("cuda", "tf32", 1e-3, 2e-3, marks=pytest.mark.cuda),
        pytest.param("cuda", "float16", 1e-3, 2e-3, marks=pytest.mark.cuda),
        pytest.param("cuda", "bfloat16", 5e-3, 1e-2, marks=pytest.mark.cuda),
        ("cpu", "bfloat16", 5e-3, 1e-2),
    ],
    indirect=["device"],
)
def test_other_number_formats(golden, batch, mask, make_model, device, how, of_loss, of_gradient):
    model = make_model(gaze_weighted=True)
    set_tf32(how == "tf32")
    try:
        with torch.autocast(device, getattr(torch, how, None), enabled=how != "tf32"):
            loss = model(batch, mask=mask)
        scale = 2.0**10 if how == "float16" else 1.0  # small gradients would underflow
        (scale * loss).backward()
    finally:
        set_tf32(False)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm() / scale
    assert loss.item() == pytest.approx(float(golden["loss_weighted"]), abs=of_loss)
    assert norm.item() == pytest.approx(float(golden["grad_norm_weighted"]), rel=of_gradient)
    if how != "tf32":  # it was really in use
        assert loss.item() != pytest.approx(float(golden["loss_weighted"]), abs=1e-7)


def test_state_dict_names_and_shapes_are_the_published_ones():
    published = json.loads((GOLDEN / "published_state_dict.json").read_text())
    model = cxrmim_vit_base_patch16()
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert ours == {key: shape for key, shape in published.items() if not key.startswith("hog_enc.")}
    model.load_state_dict({key: torch.zeros(shape) for key, shape in published.items()})
    with pytest.raises(RuntimeError, match="blocks.99"):
        model.load_state_dict(model.state_dict() | {"blocks.99.x": torch.zeros(1)})
