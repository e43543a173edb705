"""util/tables.py: what a table may look like, and how one that can't be read is named."""

import gzip

import numpy as np
import pandas as pd
import pytest

from util.errors import UserError
from util.tables import numeric_columns, read_table, to_numbers

PLAIN = "id,x,note\n007,1.5,left\n008,2,\n"


def read(tmp_path, content, required=("id", "x"), text=("id",)):
    path = tmp_path / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path, required, text=text)


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        "\ufeff" + PLAIN,  # a byte order mark
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        PLAIN.replace("\n", ",\n"),  # a comma at every line's end
        PLAIN.replace("left\n", "left,,\n"),  # at one
        PLAIN.replace("note\n", "note,\n"),  # in the header alone
        " id , x,note\n 007 ,1.5 , left\n008, 2,\n",
        PLAIN.replace("007", '"007"'),
        gzip.compress(PLAIN.encode(), mtime=0),
    ],
)
def test_the_same_table_however_it_is_written(tmp_path, content):
    table = read(tmp_path, content)
    assert table["id"].tolist() == ["007", "008"] and table["x"].tolist() == [1.5, 2]
    assert table["note"].tolist()[0] == "left" and table["note"].isna().tolist() == [False, True]
    assert table.index.tolist() == [2, 3]


def test_lines_are_those_of_the_file(tmp_path):
    table = read(tmp_path, '\n\nid,x\n\n1,10\n , \n"two\nlines",20\n,,\n3,far\n')
    assert table.index.tolist() == [5, 7, 10] and table["id"].tolist() == ["1", "two\nlines", "3"]
    with pytest.raises(UserError, match=r"table.csv: line 10, column 'x': 'far' is not a finite number"):
        numeric_columns(table, ["x"], tmp_path / "table.csv")
    np.testing.assert_array_equal(to_numbers(table, ["x"])["x"], [10, 20, np.nan])


def test_types_are_those_of_pandas_and_text_is_as_it_is_written(tmp_path):
    rows = {
        "id": ["007", "1e5", "NA", ""],
        "int": ["1", "2", "3", "004"],
        "float": ["1", "", "NaN", "1e-3"],
        "bool": ["True", "False", "True", "true"],
        "maybe": ["True", "", "False", "True"],
        "words": ["a", "1", "", "True"],
        "nothing": ["", "", "", ""],
    }
    content = ",".join(rows) + "\n" + "".join(",".join(cells) + "\n" for cells in zip(*rows.values()))
    table = read(tmp_path, content, required=("id",))
    expected = pd.read_csv(tmp_path / "table.csv", dtype={"id": str}, keep_default_na=True)
    assert table["id"].tolist() == rows["id"]
    for name in list(rows)[1:]:
        assert table[name].tolist() == pytest.approx(expected[name].tolist(), nan_ok=True), name
        assert table[name].dtype.kind == expected[name].dtype.kind, name
    assert read(tmp_path, "id,x\n").empty


@pytest.mark.parametrize(
    "content, words",
    [
        ("", r"cannot be read as CSV \(the file is empty\)"),
        ("\n\n", "the file is empty"),
        (PLAIN[:-3], r"line 3 has 2 cells, the header 3 columns; is the file cut off"),
        ("id,x\n1,2\n1,2,3\n", "line 3 has 3 cells, the header 2 columns"),
        ("id,x\n1,0,5\n", "line 2 has 3 cells"),  # a decimal comma
        ("id,x,not", "ends within its header; is the file cut off"),
        ("id,x,x\n1,2,3\n", "column 'x' appears twice"),
        ("id;y\n1;2\n", r"column 'x' is missing; the header, taken as separated by semicolons, is 'id;y'"),
        ("id y\n1 2\n", r"columns? 'id', 'x' is missing; .* is 'id y'"),
        ("id,x;id\tx\n1,2\n", None),  # commas and tabs both lack one
        ('id,x\n"1,2\n3,4\n', r"line 2: unexpected end of data"),
        (PLAIN.encode("utf-16"), "not UTF-8 text|zero bytes"),
        ("id,x\n1,2\né,3\n".encode("latin-1"), "line 3 is not UTF-8 text"),
        (b"id,x\n1\0,2\n", "zero bytes"),
        (gzip.compress(PLAIN.encode(), mtime=0)[:-9], "cannot be read"),
        (gzip.compress(PLAIN.encode(), mtime=0)[:20] + b"xxxxxxxxxxxxxxxxxx", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, words):
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path, content)
    assert str(error.value).startswith(str(tmp_path / "table.csv")) and "\n" not in str(error.value)


def test_two_possible_separators_are_no_guess(tmp_path):
    with pytest.raises(UserError, match="could be separated by commas or semicolons"):
        read(tmp_path, "a,b;c\n1,2;3\n", required=())
    table = read(tmp_path, "id;x;a,b\n1;2;3,4\n")  # only one gives what is needed
    assert table["a,b"].tolist() == ["3,4"]
