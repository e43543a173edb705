"""Initial weights through timm's own loading, from a local file; clear words without a connection."""

from __future__ import annotations

import pytest
import safetensors.torch
import timm
import torch

from models_cxrmim import cxrmim_vit_tiny_patch16
from scripts.fetch_weights import TAG, VITS, main
from util.errors import UserError
from util.export import stored_weights
from util.weights import load_initial_weights, read_state_dict


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    """Random weights in the files that timm's pages offer, by the model's name."""
    found = {}
    for name in ("vit_tiny_patch16_224", "test_resnet"):
        path = tmp_path_factory.mktemp(name) / "model.safetensors"
        safetensors.torch.save_file(timm.create_model(name).state_dict(), path)
        found[name] = path
    return found


@pytest.mark.parametrize(
    ("model", "name", "told"),
    [("tiny", "vit_tiny_patch16_224", TAG), ("test_resnet", "test_resnet", "test_resnet.r160_in1k")],
)
def test_local_file_lands_where_programs_look_for_it(downloaded, tmp_path, monkeypatch, capsys, model, name, told):
    monkeypatch.setattr("util.export.FOLDER", tmp_path / "preTrain")
    assert main(["--model", model, "--file", str(downloaded[name])]) == 0
    state, info = read_state_dict(stored_weights(name))
    expected = safetensors.torch.load_file(downloaded[name])
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
    assert told in capsys.readouterr().out
    if name != "test_resnet":
        assert info.metadata["num_heads"] == "3"
        assert "matched  148" in load_initial_weights(cxrmim_vit_tiny_patch16(), stored_weights(name))


def test_every_tag_exists_in_the_installed_timm():
    assert {f"{name}.{TAG}" for name in VITS.values()} <= set(timm.list_pretrained()) and "base" in VITS
    assert stored_weights("vit_base_patch16_224").name == "vit_base_p16_224_timm.pth"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "tiny", "--file", "{other}"], "not the weights of timm's vit_tiny"),
        (["--model", "tiny", "--file", "none.pth"], "none.pth: no such"),
        (["--model", "resnet51"], "--model resnet51: timm has no"),
        (["--model", "large"], "127.0.0.1:9/timm/vit_large.*can't be downloaded"),
    ],
)
def test_what_can_not_work_is_one_line_and_writes_nothing(downloaded, tmp_path, monkeypatch, words, told):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    words = [word.format(other=downloaded["test_resnet"]) for word in words]
    with pytest.raises(UserError, match=told) as caught:
        main([*words, "--out", str(tmp_path / "w.pth")])
    assert "\n" not in str(caught.value) and not (tmp_path / "w.pth").exists()
