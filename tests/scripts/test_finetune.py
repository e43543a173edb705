"""Fine-tuning: it learns, keeps the best epoch, respects subjects and unknown labels, names bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from datasets.downstream.labels import LabelledImages, read_csv_labels
from scripts.finetune import main
from util.errors import UserError
from util.export import build_backbone, read_backbone
from util.finetune import Options, TrainingImages, auc_table, known_bce, split_images

SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        bright = rng.random() < 0.5
        gray = rng.integers(0, 80, (SIDE, SIDE)) + 120 * bright
        Image.fromarray(gray.astype(np.uint8)).save(root / f"{i}.png")
        split = ("train", "train", "validate", "train", "test")[i // 2 % 5]
        found = ["Bright"] * bright + ["Rare"] * (i == 7)
        rows.append({"path": f"{i}.png", "labels": "|".join(found), "subject_id": i // 2, "split": split})
    pd.DataFrame(rows).to_csv(root / "labels.csv", index=False)
    return root


def command(backbone: Path, folder: Path, out: Path, *options: str, csv: str = "labels.csv") -> list[str]:
    data = ["--csv", str(folder / csv), "--images", str(folder)]
    short = [
        "--epochs",
        "4",
        "--batch_size",
        "8",
        "--lr",
        "2e-3",
        "--warmup_epochs",
        "1",
        "--num_workers",
        "0",
    ]
    return [str(backbone), *data, *short, "--bootstrap", "50", "--output_dir", str(out), *options]


def test_command_learns_and_keeps_the_best_epoch(backbone, folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(backbone, folder, out)) == 0
    log = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [0, 1, 2, 3]
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    table = pd.read_csv(out / "auc.csv")
    assert list(table["finding"]) == ["Bright"] and table["auc"][0] > 0.9 and table["images"][0] == 12
    assert "left out, too few images with or without it: Rare" in capsys.readouterr().out

    saved = torch.load(out / "best.pth", weights_only=True)["metadata"]
    best = max(log, key=lambda entry: entry["validation_auc"])
    assert int(saved["epoch"]) == best["epoch"] and json.loads(saved["findings"]) == ["Bright"]
    # timm loads it strictly with the stored arguments
    arguments = json.loads(saved["timm_args"])
    model = timm.create_model(saved["timm_model"], checkpoint_path=str(out / "best.pth"), **arguments)
    assert model.head.out_features == 1


def test_same_seed_same_result(backbone, folder, tmp_path):
    tables = []
    for name in "ab":
        main(command(backbone, folder, tmp_path / name, "--epochs", "1"))
        tables.append((tmp_path / name / "log.txt").read_text())
    assert tables[0] == tables[1]


def test_all_weights_train_and_early_layers_move_less(backbone):
    """Layer-wise decay: with one optimiser step of Adam, a weight moves by its own learning rate."""
    from timm.optim import create_optimizer_v2

    model = build_backbone(read_backbone(backbone), 2, global_pool="avg")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.0, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    assert scale[id(model.head.weight)] == 1
    assert scale[id(model.patch_embed.proj.weight)] < scale[id(model.blocks[0].attn.qkv.weight)]
    assert scale[id(model.blocks[0].attn.qkv.weight)] == scale[id(model.blocks[1].attn.qkv.weight)] / 2


def test_unknown_labels_have_no_say():
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.randint(0, 2, (4, 3)).float()
    labels[1, 2] = labels[3, 0] = torch.nan
    loss = known_bce(logits, labels)
    known = ~labels.isnan()
    assert loss.item() == pytest.approx(
        F.binary_cross_entropy_with_logits(logits[known], labels[known]).item()
    )
    loss.backward()
    assert (logits.grad[~known] == 0).all() and (logits.grad[known] != 0).all()


def test_splits_never_share_a_subject(folder):
    images = read_csv_labels(folder / "labels.csv", folder)
    named = split_images(images, seed=0)
    assert set(images.splits[named.test]) == {"test"} and set(images.splits[named.validate]) == {"validate"}
    unnamed = split_images(
        LabelledImages(images.paths, images.findings, images.labels, images.subjects, None), 0
    )
    assert len(unnamed.test) == 0 and 8 <= len(unnamed.validate) <= 16
    assert not set(images.subjects[unnamed.train]) & set(images.subjects[unnamed.validate])
    assert sorted([*unnamed.train, *unnamed.validate]) == list(range(60))


def test_training_images_depend_on_seed_epoch_and_index_only(folder):
    images = read_csv_labels(folder / "labels.csv", folder)
    data = TrainingImages(images, np.array([5, 3]), [0], SIDE, Options())
    image, label = data[(2, 1)]
    assert torch.equal(image, data[(2, 1)][0]) and not torch.equal(image, data[(3, 1)][0])
    assert label.tolist() == [images.labels[3, 0]] and image.shape == (1, SIDE, SIDE)


def test_auc_table_leaves_out_single_classes():
    labels = np.array([[0, 1, 0], [1, 1, np.nan], [0, 1, 1], [1, 1, 0]], float)
    logits = np.array([[0.1, 0, 0], [0.9, 0, 0], [0.3, 0, 1], [0.2, 0, 0]])
    table = auc_table(["a", "b", "c"], labels, logits, np.arange(4), 20, 0).set_index("finding")
    assert list(table.index) == ["a", "c", "mean"]
    assert table.loc["a", "auc"] == 0.75 and table.loc["c", "auc"] == 1 and table.loc["c", "images"] == 3
    assert table.loc["mean", "auc"] == pytest.approx(0.875)


def test_bad_input_is_named(backbone, folder, tmp_path):
    out = tmp_path / "run"
    good = pd.read_csv(folder / "labels.csv", keep_default_na=False)
    good.assign(labels="Bright").to_csv(folder / "one.csv", index=False)
    good.assign(split=["test", "train"] * 30).to_csv(folder / "mixed.csv", index=False)
    (tmp_path / "text.pth").write_text("no weights")
    for argv, reason in [
        (command(tmp_path / "text.pth", folder, out), "text.pth"),
        (command(backbone, folder, out, csv="one.csv"), "no finding has 10 training images"),
        (command(backbone, folder, out, csv="mixed.csv"), "inside and outside of test"),
        (command(backbone, folder, out, "--batch_size", "64"), "batch_size 64"),
        (command(backbone, folder, out, "--pool", "max"), "--pool max"),
        (command(backbone, folder, out, "--epochs", "0"), "--epochs"),
        (command(backbone, folder, out, "--img_size", "33"), "--img_size 33"),
    ]:
        with pytest.raises(UserError, match=reason):
            main(argv)
    assert not out.exists()
    out.mkdir()
    (out / "log.txt").write_text("")
    with pytest.raises(UserError, match="holds a run already"):
        main(command(backbone, folder, out))
