"""Every number of the published model that tests/golden/ holds must come out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models_cxrmim import CXRMIM, cxrmim_vit_base_patch16
from util.masking import otsu_foreground, significant_patches

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "parity_small.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.fixture(scope="module")
def meta(golden):
    return json.loads(str(golden["meta"]))


@pytest.fixture(scope="module")
def batch(golden, meta):
    gray = torch.from_numpy(golden["gray"])[:, None]
    mean, std = (torch.tensor(meta[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return {
        "img": (gray.expand(-1, 3, -1, -1) - mean) / std,
        "attention": torch.from_numpy(golden["attention_u8"]).float() / 255,
    }


@pytest.fixture(scope="module")
def mask(golden):
    return torch.from_numpy(golden["mask"]).float()


@pytest.fixture
def make_model(golden, meta):
    def make(**options):
        keys = (
            "img_size patch_size embed_dim depth num_heads id_list scale_list decoder_embed_dim decoder_depth "
            "decoder_num_heads hog_nbins gaze_temperature"
        ).split()
        model = CXRMIM(**{key: meta[key] for key in keys}, **options)
        weights = {key[3:]: torch.from_numpy(value) for key, value in golden.items() if key.startswith("sd.")}
        model.load_state_dict(weights)
        return model

    return make


def test_foreground_and_significant_patches(golden, meta):
    attention = torch.from_numpy(golden["attention_u8"])
    assert torch.equal(otsu_foreground(attention), torch.from_numpy(golden["foreground"]) == 255)
    significant = significant_patches(torch.from_numpy(golden["foreground"]), meta["patch_size"])
    assert torch.equal(significant, torch.from_numpy(golden["significant"]))


def test_mask_has_the_published_counts(golden, meta, batch, make_model, mask):
    significant = torch.from_numpy(golden["significant"])
    ours = make_model().draw_mask(batch, meta["mask_ratio"], meta["clinical_ratio"])
    assert torch.equal(ours.sum(1), mask.sum(1))
    assert torch.equal((ours * significant).sum(1), (mask * significant).sum(1))


def test_latents_predictions_and_targets(golden, batch, mask, make_model):
    model = make_model().eval()
    latents = model.forward_encoder(batch["img"], mask)
    preds = model.forward_decoder(latents, mask)
    targets = model.hog_targets(batch["img"])
    gray_targets = model.hog_targets(batch["img"][:, :1])
    for k in range(4):
        torch.testing.assert_close(
            latents[k][:, 0], torch.from_numpy(golden[f"latent_cls_{k}"]), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(preds[k], torch.from_numpy(golden[f"pred_{k}"]), atol=1e-4, rtol=0)
        torch.testing.assert_close(targets[k], torch.from_numpy(golden[f"target_{k}"]), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            gray_targets[k], torch.from_numpy(golden[f"target_{k}"]), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("weighted", [False, True])
def test_loss(golden, batch, mask, make_model, weighted):
    loss = make_model(gaze_weighted=weighted)(batch, mask=mask)
    published = golden["loss_weighted" if weighted else "loss_unweighted"]
    assert loss.item() == pytest.approx(float(published), abs=1e-5)


def test_gradients(golden, batch, mask, make_model):
    model = make_model(gaze_weighted=True)
    model(batch, mask=mask).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(float(golden["grad_norm_weighted"]), rel=1e-4)
    torch.testing.assert_close(
        model.patch_embed.proj.bias.grad,
        torch.from_numpy(golden["grad_patch_embed_bias"]),
        atol=1e-5,
        rtol=1e-4,
    )


def test_state_dict_names_and_shapes_are_the_published_ones():
    published = json.loads((GOLDEN / "published_state_dict.json").read_text())
    model = cxrmim_vit_base_patch16()
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert ours == {key: shape for key, shape in published.items() if not key.startswith("hog_enc.")}
    model.load_state_dict({key: torch.zeros(shape) for key, shape in published.items()})
    with pytest.raises(RuntimeError, match="blocks.99"):
        model.load_state_dict(model.state_dict() | {"blocks.99.x": torch.zeros(1)})
