"""scripts/list_images.py: an address for each image that a usable reading names, once."""

from __future__ import annotations

import pytest

from datasets.phantom.gaze_study import make_study
from scripts.list_images import SITES, main
from util.errors import UserError


@pytest.mark.parametrize("kind", ["jpg", "dcm"])
def test_each_image_once_at_its_place(tmp_path, kind):
    study = make_study(tmp_path, n_images=4, size=(64, 64), shared_images=2)
    out = tmp_path / "images.txt"
    assert main(["--raw", str(study.raw), "--format", kind, "--out", str(out)]) == 0
    places = {image.path.relative_to(study.images).with_suffix(f".{kind}") for image in study.truth}
    assert out.read_text().splitlines() == sorted(f"{SITES[kind]}/{place}" for place in places)


def test_what_is_no_reflacx_is_refused(tmp_path):
    with pytest.raises(UserError, match="main_data"):
        main(["--raw", str(tmp_path), "--out", str(tmp_path / "images.txt")])
