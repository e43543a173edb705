"""Loss curves: what is drawn is what is logged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from scripts.plot_log import loss_figure, main, read_log
from util.errors import UserError


def write_run(folder: Path, epochs: int, factor: float = 1.0) -> str:
    folder.mkdir(parents=True)
    shares = {"train_loss": 1, "train_loss_scale_4.0": 0.75, "train_loss_scale_0.5": 0.25}
    lines = [{"epoch": e} | {key: share * factor / (e + 1) for key, share in shares.items()} for e in range(epochs)]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_figure_draws_the_logged_values(tmp_path, capsys):
    """Of an epoch with two entries, the later."""
    a, b = write_run(tmp_path / "a", 20), write_run(tmp_path / "b", 3, 2.0)
    figure = loss_figure({"a": read_log(a), "b": read_log(b)})
    assert [axes.get_title() for axes in figure.axes] == ["sum of the scales", "scale 4.0", "scale 0.5"]
    for axes, share in zip(figure.axes, (1, 0.75, 0.25), strict=True):
        for line, epochs, factor in zip(axes.lines, (20, 3), (1.0, 2.0), strict=True):
            assert list(line.get_xdata()) == list(range(epochs))
            assert list(line.get_ydata()) == pytest.approx([share * factor / (e + 1) for e in range(epochs)])
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b"]
    with open(tmp_path / "b/log.txt", "a") as file:
        file.write(json.dumps({"epoch": 2, "train_loss": 9.0}) + "\n")
    assert main([a, b, "--out", str(tmp_path / "loss.png")]) == 0
    assert Image.open(tmp_path / "loss.png").size[0] > 1000
    assert "b: epochs 0 to 2, loss 2.0000 to 9.0000" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", '{"epoch": 0, "train_loss": 1}\n{"epo', '{"epoch": 0, "train_loss": "low"}\n'])
def test_bad_logs_are_named(tmp_path, text):
    (tmp_path / "log.txt").write_text(text)
    with pytest.raises(UserError, match="log.txt: no log of losses by epoch"):
        main([str(tmp_path), "--out", str(tmp_path / "x.png")])
    assert not (tmp_path / "x.png").exists()
