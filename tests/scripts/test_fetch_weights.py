"""Initial weights through timm's own loading, from a local file; clear words without a connection."""

from __future__ import annotations

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import safetensors.torch
import timm
import torch

from models_cxrmim import CXRMIM, cxrmim_vit_tiny_patch16
from scripts.fetch_weights import TAG, main, tagged_name
from util.errors import UserError
from util.export import stored_weights
from util.weights import load_initial_weights, read_state_dict


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    """Random weights in the file that timm's page offers for ViT-Ti."""
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224")
    path = tmp_path_factory.mktemp("download") / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return path, model.state_dict()


def test_local_file_becomes_weights_with_checksum_and_heads(downloaded, tmp_path, capsys):
    path, expected = downloaded
    out = tmp_path / "preTrain" / "vit_tiny_p16_224_timm.pth"
    assert main(["--model", "cxrmim_vit_tiny_patch16", "--file", str(path), "--out", str(out)]) == 0
    state, info = read_state_dict(out)
    assert state.keys() == expected.keys() and info.metadata["num_heads"] == "3"
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert (out.parent / f"{out.name}.sha256").read_text() == f"{digest}  {out.name}\n"
    printed = capsys.readouterr().out
    assert digest in printed and TAG in printed
    report = load_initial_weights(cxrmim_vit_tiny_patch16(), out)
    assert "matched  148" in report


def test_every_tag_exists_in_the_installed_timm():
    assert all(f"vit_{size}_patch16_224.{TAG}" in timm.list_pretrained() for size in ("tiny", "small", "base", "large"))


def test_file_of_another_model_is_refused(tmp_path):
    other, out = tmp_path / "other.pth", tmp_path / "w.pth"
    model = CXRMIM(img_size=64, embed_dim=64, depth=2, num_heads=1, id_list=(0, 1), scale_list=(1.0, 0.5))
    torch.save(model.state_dict(), other)
    with pytest.raises(UserError, match="other.pth: not the weights of timm's vit_tiny") as caught:
        main(["--model", "tiny", "--file", str(other), "--out", str(out)])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="none.pth: no such"):
        main(["--model", "tiny", "--file", str(tmp_path / "none.pth"), "--out", str(out)])
    with pytest.raises(UserError, match="--model resnet51: timm has no"):
        main(["--model", "resnet51", "--out", str(out)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.pth"]


def test_weights_are_downloaded_from_the_hub(downloaded, tmp_path, monkeypatch):
    """As far as a mirror of it on 127.0.0.1 stands for it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    page = tmp_path / f"timm/vit_tiny_patch16_224.{TAG}/resolve/main"
    page.mkdir(parents=True)
    (page / "model.safetensors").write_bytes(downloaded[0].read_bytes())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    main(["--model", "tiny", "--out", str(tmp_path / "w.pth")])
    server.shutdown()
    server.server_close()
    state, _ = read_state_dict(tmp_path / "w.pth")
    assert all(torch.equal(state[name], tensor) for name, tensor in downloaded[1].items())


def test_without_a_connection_the_manual_steps_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"can't be downloaded.*127.0.0.1:9/timm/vit_large.*--file") as caught:
        main(["--model", "large", "--out", str(tmp_path / "w.pth")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "w.pth").exists()


def test_any_of_timms_models_where_the_gaze_predictor_looks_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("util.export.FOLDER", tmp_path)
    model = timm.create_model("test_resnet")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert main(["--model", "test_resnet", "--file", str(tmp_path / "model.safetensors")]) == 0
    assert "test_resnet.r160_in1k" in capsys.readouterr().out
    state, _ = read_state_dict(stored_weights("test_resnet"))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert tagged_name("base") == tagged_name("cxrmim_vit_base_patch16") == f"vit_base_patch16_224.{TAG}"
    assert tagged_name("resnet50").startswith("resnet50.")
    assert stored_weights("vit_base_patch16_224").name == "vit_base_p16_224_timm.pth"
