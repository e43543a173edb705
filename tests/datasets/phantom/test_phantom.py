"""The made-up studies: the same bytes each time, lesions where they are said to be."""

import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from trees import contents

from datasets.phantom.chest import LESION_KINDS, Frame, Lesion, draw_lesion, render_chest
from datasets.phantom.real import add_real_radiograph
from datasets.phantom.reflacx import make_study
from datasets.raw.reflacx import read_reflacx
from util.errors import UserError
from util.radiograph import read_radiograph

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))
import make_phantom

SMALL = (128, 105)


def test_same_arguments_same_bytes_and_images_do_not_depend_on_their_number(tmp_path):
    options = {"size": SMALL, "seed": 5, "shared_images": 1, "image_format": "mixed"}
    first = make_study(tmp_path / "a", 4, **options)
    again = make_study(tmp_path / "b", 4, **options)
    assert contents(first.root) == contents(again.root)
    more = make_study(tmp_path / "c", 6, **options)
    few, many = contents(first.root), contents(more.root)
    assert {name for name, data in few.items() if many.get(name) != data} == {"reflacx/main_data/metadata_phase_3.csv"}
    other = make_study(tmp_path / "d", 4, **{**options, "seed": 6})
    assert not {image.dicom_id for image in other.truth} & {image.dicom_id for image in first.truth}


@pytest.mark.parametrize("kind", LESION_KINDS)
def test_lesions_are_seen_where_they_are_said_to_be(kind):
    size = (384, 315)
    frame = Frame(size)
    for seed in range(3):
        lesion = draw_lesion(kind, np.random.default_rng(seed))
        normal = render_chest(size, np.random.default_rng(9)).astype(float)
        changes = []
        for contrast in (0.5, 1.0):
            drawn = Lesion(kind, lesion.ellipse, contrast)
            changes.append(np.abs(render_chest(size, np.random.default_rng(9), (drawn,)) - normal))
        xmin, ymin, xmax, ymax = frame.box(lesion.ellipse)
        y, x = np.mgrid[: size[0], : size[1]]
        inside = ((x - (xmin + xmax) / 2) / (xmax - xmin) * 2) ** 2 + (
            (y - (ymin + ymax) / 2) / (ymax - ymin) * 2
        ) ** 2 <= 1
        # Cardiomegaly shows at the heart's border, an effusion in a corner: a tenth of the ellipse at least.
        assert np.quantile(changes[1][inside], 0.9) > 12
        assert changes[1][inside].mean() > 8 * changes[1][~inside].mean()
        if kind != "cardiomegaly":  # its contrast is its size
            assert changes[0][inside].mean() < 0.75 * changes[1][inside].mean()


def test_real_radiograph(tmp_path):
    study = make_study(tmp_path, 2, size=SMALL, shared_images=0)
    before = {image.path: image.path.read_bytes() for image in study.truth}
    image = add_real_radiograph(study)
    first = contents(study.root)
    assert image is study.truth[-1]
    assert image.path.parent.is_relative_to(study.images / "files")
    assert image.path.read_bytes() == Path(pydicom.data.get_testdata_file("RG1_UNCR.dcm")).read_bytes()
    assert all(path.read_bytes() == data for path, data in before.items())
    (reading,) = (r for r in read_reflacx(study.raw).readings if r.image_id == image.dicom_id)
    assert reading.image_size == (1955, 1841) and "simulated" in reading.labels["Other"]
    text = (study.raw / "main_data" / reading.id / "transcription.txt").read_text()
    assert "Simulated reading" in text and "The film is real" in text
    # The spots it dwells on are opacities: brighter than the lung beside them, where the gaze is not.
    gray = read_radiograph(image.path, "window")
    assert gray.shape == (1955, 1841)
    inside = [gray[int(b[1]) : int(b[3]), int(b[0]) : int(b[2])].mean() for b in image.boxes]
    assert min(inside) > gray[430:600, 400:560].mean() + 10
    # Once more changes nothing, also from a study made again in the same place.
    add_real_radiograph(make_study(tmp_path, 2, size=SMALL, shared_images=0))
    assert contents(study.root) == first


def test_real_radiograph_without_its_package(tmp_path, monkeypatch):
    study = make_study(tmp_path, 1, size=SMALL)
    before = contents(study.root)
    monkeypatch.setattr(pydicom.data, "get_testdata_file", lambda name, download: None)
    with pytest.raises(UserError, match="pip install pydicom-data"):
        add_real_radiograph(study)
    assert contents(study.root) == before


def test_command_line(tmp_path, capsys):
    options = ["--n_images", "3", "--width", "105", "--height", "128"]
    assert make_phantom.main(["--out", str(tmp_path / "a"), *options, "--format", "dcm"]) == 0
    printed = capsys.readouterr().out
    assert "3 images in" in printed and "3 simulated readings" in printed
    with pytest.raises(UserError, match="cannot make this study"):
        make_phantom.main(["--out", str(tmp_path / "c"), "--n_images", "1", "--dwell_ratio", "1e6"])


@pytest.mark.parametrize(
    "options",
    [
        ["--layout", "rsna", "--shared_images", "2"],
        ["--layout", "nih", "--real_radiograph"],
        ["--layout", "rsna", "--dwell_ratio", "3"],
        ["--layout", "rsna", "--format", "mixed"],
    ],
)
def test_options_that_a_layout_lacks_are_refused(tmp_path, options):
    with pytest.raises(UserError, match=r"--(shared_images|real_radiograph|dwell_ratio|format|readers)|mixed"):
        make_phantom.main(["--out", str(tmp_path / "a"), "--n_images", "2", *options])
