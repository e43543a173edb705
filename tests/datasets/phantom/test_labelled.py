"""Made-up RSNA and ChestX-ray14: read back by the data sets' own readers."""

from __future__ import annotations

import make_phantom
import pytest
from trees import contents

from datasets.phantom.labelled import Chests
from datasets.phantom.nih import make_nih
from datasets.phantom.rsna import make_rsna
from downstream.data import read_dataset
from downstream.data.images import Reading
from downstream.data.labelled import TEST, TRAIN, VALID

CHESTS = Chests(n_images=48, size=(64, 52))
MAKERS = {"rsna": make_rsna, "nih": make_nih}


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    return {name: make(root, CHESTS) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_the_reader_finds_every_image_and_the_same_seed_gives_the_same_bytes(name, studies, tmp_path):
    images = read_dataset(name, studies[name].raw)
    sizes = {Reading().read(file).shape for file in images.files}
    assert sizes == {(64, 52)}
    assert {TRAIN, VALID, TEST} == set(images.parts)
    again = MAKERS[name](tmp_path, CHESTS)
    assert contents(again.raw) == contents(studies[name].raw)
    assert "Made-up" in (again.raw / "MADE_UP.txt").read_text()


def test_command_line_writes_each_layout(tmp_path, capsys):
    for name in ("rsna", "nih"):
        options = ["--layout", name, "--n_images", "8", "--width", "40", "--height", "48"]
        assert make_phantom.main(["--out", str(tmp_path), *options]) == 0
        assert f"8 images in {tmp_path / name}" in capsys.readouterr().out
    assert make_phantom.main(["--out", str(tmp_path / "jpg"), *options[2:], "--layout", "rsna", "--format", "jpg"]) == 0
    assert len(list((tmp_path / "jpg/rsna").rglob("*.jpg"))) == 8
