"""Loss curves: what is drawn is what is logged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from scripts.plot_log import loss_figure, main, read_log, run_names
from util.errors import UserError


def write_run(folder: Path, epochs: int, factor: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {
            "epoch": e,
            "train_loss": factor / (e + 1),
            "train_loss_scale_4.0": 0.75 * factor / (e + 1),
            "train_loss_scale_0.5": 0.25 * factor / (e + 1),
            "train_lr": 1e-3,
            "significant_patches": 40.0,
        }
        for e in range(epochs)
    ]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_figure_draws_the_logged_values(tmp_path):
    a, b = write_run(tmp_path / "a", 20), write_run(tmp_path / "b", 3, 2.0)
    figure = loss_figure({"a": read_log(a), "b": read_log(b / "log.txt")})
    panels = [axes for axes in figure.axes if axes.lines]
    assert [axes.get_title() for axes in panels] == [
        "loss, sum of the scales",
        "loss at scale 4.0",
        "loss at scale 0.5",
    ]
    for axes, share in zip(panels, (1, 0.75, 0.25), strict=True):
        for line, epochs, factor in zip(axes.lines, (20, 3), (1.0, 2.0), strict=True):
            assert list(line.get_xdata()) == list(range(epochs))
            assert list(line.get_ydata()) == pytest.approx([share * factor / (e + 1) for e in range(epochs)])
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b"]


def test_an_epoch_without_a_finite_loss_is_a_gap(tmp_path):
    """The scales share the limits of what is finite, where there is anything."""
    log = read_log(write_run(tmp_path / "a", 3))
    log[0] |= dict.fromkeys(("train_loss", "train_loss_scale_4.0", "train_loss_scale_0.5"), math.nan)
    margin = 0.05 * (0.375 - 0.25 / 3)
    for axes in loss_figure({"a": log}).axes[1:]:
        assert axes.get_ylim() == pytest.approx((0.25 / 3 - margin, 0.375 + margin))
    assert loss_figure({"a": log[:1]}).axes[1].lines


def test_epoch_logged_again_after_a_resume_counts_once(tmp_path):
    run = write_run(tmp_path / "a", 3)
    with open(run / "log.txt", "a") as file:
        file.write(json.dumps({"epoch": 1, "train_loss": 9.0}) + "\n")
    log = read_log(run)
    assert [entry["epoch"] for entry in log] == [0, 1, 2]
    assert log[1]["train_loss"] == 9.0


def test_command_writes_the_picture(tmp_path, capsys):
    runs = [write_run(tmp_path / name / "out", 4) for name in ("a", "b")]
    out = tmp_path / "loss.png"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    assert Image.open(out).size[0] > 1000
    assert "a/out: epochs 0 to 3, loss 1.0000 to 0.2500" in capsys.readouterr().out


def test_run_names(tmp_path):
    assert run_names(["x/a", "x/b/log.txt"]) == ["a", "b"]
    assert run_names(["x/out", "y/out"]) == ["x/out", "y/out"]
    with pytest.raises(UserError, match="twice"):
        run_names(["x", "x/log.txt"])


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no epoch logged"),
        ('{"epoch": 0, "train_loss": 1}\n{"epo', "line 2"),
        ("[1]\n", "line 1"),
        ('{"epoch": 0, "train_loss": "low"}\n', "line 1"),
        ('{"train_loss": 1}\n', "line 1"),
    ],
)
def test_bad_logs_are_named(tmp_path, text, reason):
    (tmp_path / "log.txt").write_text(text)
    with pytest.raises(UserError, match=f"log.txt.*{reason}"):
        main([str(tmp_path), "--out", str(tmp_path / "x.png")])
    assert not (tmp_path / "x.png").exists()


def test_bad_arguments(tmp_path):
    run = write_run(tmp_path / "a", 2)
    for argv, reason in [
        ([str(tmp_path / "none")], "no such log"),
        ([str(run), "--out", str(tmp_path / "x.txt")], r"x.txt.*\.png"),
        ([str(run), "--out", str(tmp_path / "no" / "x.png")], "no such folder"),
        ([str(run), "--names", "a", "b"], "--names"),
    ]:
        with pytest.raises(UserError, match=reason):
            main(argv)
