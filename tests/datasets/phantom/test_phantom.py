"""The made-up studies: the same bytes each time, lesions where they are said to be, labels that their readers read."""

import make_phantom
import numpy as np
import pytest
from read_labelled import read_dataset
from trees import contents

from datasets.phantom.chest import LESION_KINDS, Lesion, draw_lesion, pixel_box, render_chest
from datasets.phantom.gaze_study import make_study
from datasets.phantom.label_study import make_rsna
from downstream.data.images import Reading
from downstream.data.labelled import TEST, TRAIN, VALID
from util.errors import UserError

SMALL = (128, 105)


def test_images_do_not_depend_on_their_number(tmp_path):
    options = {"size": SMALL, "seed": 5, "shared_images": 1, "image_format": "mixed"}
    make_study(tmp_path / "a", 4, **options)
    make_study(tmp_path / "c", 6, **options)
    few, many = contents(tmp_path / "a"), contents(tmp_path / "c")
    assert {name for name, data in few.items() if many.get(name) != data} == {"reflacx/main_data/metadata_phase_3.csv"}


@pytest.mark.parametrize("kind", LESION_KINDS)
def test_lesions_are_seen_where_they_are_said_to_be(kind):
    size = (384, 315)
    normal = render_chest(size, np.random.default_rng(9)).astype(float)
    y, x = np.mgrid[: size[0], : size[1]]
    for seed in range(2):
        ellipse = draw_lesion(kind, np.random.default_rng(seed)).ellipse
        xmin, ymin, xmax, ymax = pixel_box(size, ellipse)
        inside = np.hypot((2 * x - xmin - xmax) / (xmax - xmin), (2 * y - ymin - ymax) / (ymax - ymin)) <= 1
        usual = np.abs(render_chest(size, np.random.default_rng(9), (Lesion(kind, ellipse, 1.0),)) - normal)
        # Cardiomegaly shows at the heart's border, an effusion in a corner: a tenth of the ellipse at least.
        assert np.quantile(usual[inside], 0.9) > 12
        assert usual[inside].mean() > 8 * usual[~inside].mean()


def test_the_reader_finds_every_image_and_the_same_seed_gives_the_same_bytes(tmp_path):
    studies = [make_rsna(tmp_path / place, 48, size=(32, 26)) for place in "ab"]
    images = read_dataset("rsna", studies[0].raw)
    assert {Reading().read(file).shape for file in images.files} == {(32, 26)}
    assert {TRAIN, VALID, TEST} == set(images.parts)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert "Made-up" in (studies[0].raw / "MADE_UP.txt").read_text()


@pytest.mark.parametrize(
    "options, printed, suffix",
    [("--format dcm", ["3 images in", "3 simulated readings"], ".dcm"), ("--layout rsna", ["3 images in"], ".dcm")],
)
def test_command_line_writes_each_layout(tmp_path, capsys, options, printed, suffix):
    words = f"--n_images 3 --width 40 --height 48 {options}".split()
    assert make_phantom.main(["--out", str(tmp_path), *words]) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in printed) and len(list(tmp_path.rglob(f"*{suffix}"))) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ("--layout rsna --shared_images 2", "--shared_images has no effect"),
        ("--n_images 1 --dwell_ratio 1e6", "cannot make this study: found no gaze"),
    ],
)
def test_options_that_give_no_study_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        make_phantom.main(["--out", str(tmp_path), *options.split()])
