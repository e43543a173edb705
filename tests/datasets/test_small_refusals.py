"""Single nonsensical options and files, each refused by its name before anything is lost or shown."""

import re

import numpy as np
import pandas as pd
import pytest

from datasets.single_image import check_rectangles, read_own_fixations
from util.errors import UserError


def test_infinite_rectangles_are_uncut_and_nan_is_named(tmp_path):
    path = tmp_path / "fixations.csv"
    path.write_text("x,y,duration,sigma_x,sigma_y,xmin,ymin,xmax,ymax\n5,6,1,2,2,-inf,-inf,inf,inf\n")
    assert np.isinf(read_own_fixations(path)["xmin"]).all()
    path.write_text(path.read_text().replace("-inf,-inf", "-inf,nan"))
    with pytest.raises(UserError, match=re.escape("line 2, column 'ymin': 'nan' is not a finite number")):
        read_own_fixations(path)


def test_gaze_of_an_image_of_another_size(capsys):
    def check(xmax, ymax, size=(120, 100)):
        check_rectangles(pd.DataFrame({"xmax": [xmax, 20.0], "ymax": [ymax, 20.0]}), size, "a.csv")
        return capsys.readouterr().err

    assert check(100, 120) == check(np.inf, np.inf) == ""
    with pytest.raises(UserError, match="a.csv: parts of an image of 200 x 240 px"):
        check(200, 240)
    assert "nothing beyond 50 x 60 px" in check(50, 60)
