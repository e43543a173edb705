"""Single nonsensical options and files, each refused by its name before anything is lost or shown."""

import re

import numpy as np
import pytest

import run_pretrain
from datasets.fixations import check_rectangles
from datasets.single_image import read_fixations
from util.errors import UserError


def test_cache_size_below_input_size():
    args = run_pretrain.get_args_parser().parse_args(["--cache_size", "8"])
    with pytest.raises(UserError, match="--cache_size 8: below --input_size 224.* from 501 on"):
        run_pretrain.check_args(args)
    args.cache_size = 224
    run_pretrain.check_args(args)


def test_infinite_rectangles_are_uncut_and_nan_is_named(tmp_path):
    path = tmp_path / "fixations.csv"
    path.write_text("x,y,duration,sigma_x,sigma_y,xmin,ymin,xmax,ymax\n5,6,1,2,2,-inf,-inf,inf,inf\n")
    assert np.isinf(read_fixations(path)["xmin"]).all()
    path.write_text(path.read_text().replace("-inf,-inf", "-inf,nan"))
    with pytest.raises(UserError, match=re.escape("line 2, column 'ymin': 'nan' is not a number")):
        read_fixations(path)


def rectangles(xmax, ymax):
    return {name: [1.0, 1.0] for name in ("x", "y", "duration", "sigma_x", "sigma_y")} | {
        "xmin": [0, 10],
        "ymin": [0, 10],
        "xmax": [xmax, 20],
        "ymax": [ymax, 20],
    }


def test_gaze_of_an_image_of_another_size():
    assert check_rectangles(rectangles(100, 120), (120, 100), "a.csv") is None
    with pytest.raises(UserError, match="a.csv: parts of an image of 200 x 240 px"):
        check_rectangles(rectangles(200, 240), (120, 100), "a.csv")
    assert "nothing beyond 50 x 60 px was ever in view" in check_rectangles(rectangles(50, 60), (120, 100), "a.csv")
    assert "can't be checked" in check_rectangles(rectangles(np.inf, np.nan) | {"xmax": [np.inf] * 2}, (9, 9), "a")
