"""Fine-tuning: the published step, exact resume, several processes, best.pth judged on other data."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from reliability_runs import run, run_ranks, signal_at_call
from test_run_downstream import check_aucs, command, encoder, rsna  # noqa: F401  (fixtures)

from downstream.driver import RECIPES, Recipe
from downstream.encoders import read_candidates
from downstream.finetune import build, build_optimizer
from downstream.main import main
from util.errors import UserError
from util.export import build_encoder, read_encoder


def tune(root: Path, out: Path, weights: object, *options: object) -> list[str]:
    fixed = ["--weights", f"ours={weights}", "--method", "finetune", "--seeds", "43", "--lr", "1e-3"]
    return command(root, out, *fixed, "--epochs", "3", *options)


def log(out: Path) -> list[dict]:
    (path,) = out.glob("runs/*/log.txt")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def tuned(rsna, encoder, tmp_path_factory) -> Path:  # noqa: F811
    """The output of an undisturbed run."""
    out = tmp_path_factory.mktemp("tuned")
    assert main(tune(rsna, out, encoder)) == 0
    return out


def test_best_pth_is_the_epoch_with_the_lowest_validation_loss(tuned):
    entries = log(tuned)
    assert [entry["epoch"] for entry in entries] == [0, 1, 2]
    check_aucs(tuned)
    (path,) = tuned.glob("runs/ours-1-43-*/best.pth")
    assert not list(tuned.glob("runs/*/checkpoint*"))
    facts = torch.load(path, weights_only=True)["metadata"]
    assert int(facts["epoch"]) == np.argmin([entry["valid_loss"] for entry in entries])
    # timm loads it strictly with the stored arguments
    arguments = json.loads(facts["timm_args"])
    model = timm.create_model(facts["timm_model"], checkpoint_path=str(path), **arguments)
    assert model.head.out_features == 1 and json.loads(facts["labels"]) == ["Pneumonia"]
    again, img = build_encoder(read_encoder(path)).eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(again.forward_features(img), model.eval().forward_features(img))


def test_a_killed_run_goes_on_exactly(rsna, encoder, tuned, tmp_path):  # noqa: F811
    """Stopped by SIGTERM inside an epoch, it ends with the same numbers, to the last digit."""
    argv = tune(rsna, tmp_path, encoder)
    stop = partial(signal_at_call, "downstream.finetune", "global_loss", 8, signal.SIGTERM)
    status, output = run(argv, tmp_path / "log", main=main, fault=stop)
    assert status == 128 + signal.SIGTERM, output
    assert len(log(tmp_path)) == 1 and len(list(tmp_path.glob("runs/*/checkpoint.pth"))) == 1
    assert main(argv) == 0
    assert log(tmp_path) == log(tuned)
    for name in ("results.csv", "predictions.csv"):
        assert (tmp_path / name).read_text() == (tuned / name).read_text()


def test_two_processes_do_what_one_does(rsna, encoder, tuned, tmp_path):  # noqa: F811
    statuses, outputs = run_ranks(tune(rsna, tmp_path, encoder), tmp_path / "log", main=main)
    assert statuses == [0, 0], "\n".join(outputs)
    scores = [pd.read_csv(out / "predictions.csv")["score"] for out in (tuned, tmp_path)]
    np.testing.assert_allclose(*scores, atol=1e-4)
    assert ["wrote results.csv" in text for text in outputs] == [True, False]


def test_evaluate_judges_best_pth_on_another_folder(rsna, encoder, tuned, tmp_path):  # noqa: F811
    (best,) = tuned.glob("runs/*/best.pth")
    options = ["--method", "evaluate", "--weights", f"ours={best}"]
    assert main(command(rsna, tmp_path / "same", *options)) == 0
    same = pd.read_csv(tmp_path / "same" / "predictions.csv")
    whole = pd.read_csv(tuned / "predictions.csv")
    np.testing.assert_allclose(same["score"], whole["score"], atol=1e-6)
    assert main(command(rsna, tmp_path / "all", *options, "--split", "test")) == 0
    assert (check_aucs(tmp_path / "all")["n"] == 120).all()
    # 84 patients trained it and 18 validated it: their scores are no test.
    assert "arning: 102 of 120 test subjects" in (tmp_path / "all" / "table.md").read_text()
    assert "test subjects were" not in (tmp_path / "same" / "table.md").read_text()
    with pytest.raises(UserError, match=r"not a best\.pth"):
        main(command(rsna, tmp_path / "x", "--method", "evaluate", "--weights", encoder))


def best_pth(path: Path, labels: list[str], task: str = "multilabel") -> str:
    """A small best.pth, as an argument of --weights."""
    arguments = {"embed_dim": 32, "depth": 1, "num_heads": 1, "img_size": 32, "num_classes": len(labels)}
    state = timm.create_model("vit_base_patch16_224", **arguments).state_dict()
    told = {
        "timm_model": "vit_base_patch16_224",
        "timm_args": arguments,
        "labels": labels,
        "task": task,
        "mean": [0.5] * 3,
    }
    told |= {"std": [0.5] * 3, "reading": {}, "fraction": 1.0, "seed": 3, "num_heads": 1}
    metadata = {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in told.items()}
    torch.save({"state_dict": state, "metadata": metadata}, path)
    return f"{path.stem}={path}"


def test_models_are_judged_by_the_labels_that_all_share(tmp_path, capsys):
    """One table and one mean hold them all."""
    table = pd.DataFrame({"path": [f"{i}.png" for i in range(20)], "subject_id": range(20), "split": "test"})
    for i, label in enumerate(("Cardiomegaly", "Edema", "Effusion")):
        table[label] = np.arange(20) >> i & 1
    table.to_csv(tmp_path / "labels.csv", index=False)
    models = [best_pth(tmp_path / f"{labels[0]}.pth", labels) for labels in (["Cardiomegaly", "Edema"], ["Edema", "x"])]
    options = (
        f"--dataset csv --data_path {tmp_path} --label_columns Cardiomegaly Edema Effusion --method evaluate --dry_run"
    )
    argv = [*options.split(), "--output_dir", str(tmp_path / "out"), "--weights"]
    assert main([*argv, *models]) == 0
    assert capsys.readouterr().out.count("judged by Edema\n") == 2
    with pytest.raises(UserError, match="Edema .*: all weights and the images need a label in common"):
        main([*argv, models[0], best_pth(tmp_path / "x.pth", ["x"])])


def test_classes_that_the_model_lacks_are_refused(tmp_path):
    """Their images would count as the first class."""
    for part, classes in (("train", "abab"), ("test", "abc")):
        lines = [f"{part}{i} {part}{i}.png {name} source" for i, name in enumerate(classes)]
        (tmp_path / f"{part}.txt").write_text("\n".join(lines))
    argv = f"--dataset covidx --data_path {tmp_path} --method evaluate --dry_run --output_dir {tmp_path / 'out'}"
    argv = [*argv.split(), "--weights", best_pth(tmp_path / "two.pth", ["b", "a"], "multiclass")]
    with pytest.raises(UserError, match=r"two predicts b, a .* covidx has a, b, c .*: the classes must be the same"):
        main(argv)
    assert main([*argv, "--where", "class=a", "class=b"]) == 0


def test_evaluate_reads_files_as_training_did(encoder, tmp_path):  # noqa: F811
    """16-bit images scaled by one maximum for all: the same images give the same scores, in whatever order the labels
    stand, and no other way is taken."""
    rng, place = np.random.default_rng(0), np.arange(40)
    for i in place:
        deep = rng.integers(0, 900, (64, 64)) + 1500 * (i % 2)
        Image.fromarray(deep.astype(np.uint16)).save(tmp_path / f"{i}.png")
    table = {
        "path": [f"{i}.png" for i in place],
        "subject_id": place,
        "Bright": place % 2,
        "Third": (place % 3 == 0) * 1,
    }
    pd.DataFrame(table).to_csv(tmp_path / "labels.csv", index=False)
    argv = f"--dataset csv --data_path {tmp_path} --device cpu --bootstrap 200 --num_workers 0 --output_dir {tmp_path}/"
    trained = (
        "out --method finetune --seeds 43 --epochs 1 --batch_size 8 --intensity_max 4095 --label_columns Bright Third"
    )
    assert main([*f"{argv}{trained} --weights".split(), f"ours={encoder}"]) == 0
    (best,) = tmp_path.glob("out/runs/*/best.pth")
    judged = f"{argv}same --method evaluate --label_columns Third Bright --weights ours={best}".split()
    # DICOM's contrast played no part: whoever has DICOM files may choose one.
    assert main([*judged, "--dicom_contrast", "window"]) == 0
    found = [pd.read_csv(tmp_path / out / "predictions.csv").sort_values(["id", "label"]) for out in ("out", "same")]
    np.testing.assert_allclose(*(scores["score"] for scores in found), atol=1e-6)
    with pytest.raises(UserError, match="--intensity_max 999.0: ours was trained with 4095.0"):
        main([*judged, "--intensity_max", "999", "--dry_run"])


def test_published_recipe_is_adam_with_one_rate(encoder):  # noqa: F811
    """One step of the published optimiser, written out."""
    (candidate,) = read_candidates([str(encoder)], imagenet="")
    model, plain = (build(candidate, Recipe(), 2, seed=5) for _ in range(2))
    torch.manual_seed(5)
    head = torch.nn.Linear(64, 2)
    assert torch.equal(model.head.weight, head.weight) and torch.equal(model.head.bias, head.bias)
    images, labels = torch.randn(4, 3, 224, 224), torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]])
    torch.testing.assert_close(plain(images), plain.head(plain.forward_features(images)[:, 0]))
    reference = torch.optim.Adam(plain.parameters(), lr=2e-3, weight_decay=1e-5)
    for net, step in ((model, build_optimizer(model, Recipe())), (plain, reference)):
        F.binary_cross_entropy_with_logits(net(images), labels).backward()
        step.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


def test_layer_decay_moves_early_layers_less(backbone):
    model = build(read_candidates([str(backbone)], imagenet="")[0], recipe := RECIPES["layer_decay"], 2, seed=0)
    scale = {id(p): group["lr_scale"] for group in build_optimizer(model, recipe).param_groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    first, second = (scale[id(block.attn.qkv.weight)] for block in model.blocks)
    assert scale[id(model.patch_embed.proj.weight)] < first == pytest.approx(0.75 * second)
    assert scale[id(model.head.weight)] == 1
