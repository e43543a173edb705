"""util/tables.py: what a table may look like, and how one that can't be read is named."""

import gzip

import numpy as np
import pytest

from util.errors import UserError
from util.tables import check_truth, numeric_columns, read_table, to_numbers

PLAIN = "id,x,note\n007,1.5,left\n008,2,\n"


def read(tmp_path, content, required=("id", "x")):
    path = tmp_path / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path, required)


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        "\ufeff" + PLAIN,  # a byte order mark
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace(",", ";").replace("note", "a,b"),  # only one gives what is needed
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        PLAIN.replace("\n", ",\n"),  # a comma at every line's end
        " id , x,note\n 007 ,1.5 , left\n008, 2,\n",
        PLAIN.replace("007", '"007"'),
        gzip.compress(PLAIN.encode(), mtime=0),
    ],
)
def test_the_same_table_however_it_is_written(tmp_path, content):
    table = read(tmp_path, content)
    assert table.to_numpy().tolist() == [["007", "1.5", "left"], ["008", "2", ""]]
    assert list(table)[:2] == ["id", "x"] and table.index.tolist() == [2, 3]


def test_lines_are_those_of_the_file(tmp_path):
    table = read(tmp_path, '\n\nid,x\n\n1,10\n , \n"two\nlines",20\n,,\n3,far\n')
    assert table.index.tolist() == [5, 7, 10] and table["id"].tolist() == ["1", "two\nlines", "3"]
    with pytest.raises(UserError, match=r"table.csv: line 10, column 'x': 'far' is not a finite number"):
        numeric_columns(table, ["x"], tmp_path / "table.csv")
    np.testing.assert_array_equal(to_numbers(table, ["x"])["x"], [10, 20, np.nan])


def test_text_is_as_it_is_written_and_numbers_are_asked_for(tmp_path):
    table = read(tmp_path, "id,x\nNA,-inf\n1e5,004\n,1e-3\n007,1\n")
    assert table["id"].tolist() == ["NA", "1e5", "", "007"]
    assert numeric_columns(table, ["x"], "a", infinite=["x"])["x"].tolist() == [-np.inf, 4, 1e-3, 1]
    with pytest.raises(UserError, match="a: line 2, column 'x': '-inf' is not a finite number"):
        numeric_columns(table, ["x"], "a")
    with pytest.raises(UserError, match="a: line 2, column 'id': 'NA'"):
        numeric_columns(table, ["x", "id"], "a", infinite=["x", "id"])
    assert read(tmp_path, "id,x\n").empty
    assert [check_truth(cell, "") for cell in ("True", "yes", "1", "1.0", "FALSE", "no", "0")] == [True] * 4 + [
        False
    ] * 3


@pytest.mark.parametrize(
    "content, words",
    [
        ("", r"cannot be read as CSV \(the file is empty\)"),
        (PLAIN[:-3], r"line 3 has 2 cells, the header 3 columns; is the file cut off"),
        ("id,x\n1,2\n1,2,3\n", "line 3 has 3 cells, the header 2 columns"),
        ("id,x\n1,0,5\n", "line 2 has 3 cells"),  # a decimal comma
        ("id,x,x\n1,2,3\n", "column 'x' appears twice"),
        ("id;y\n1;2\n", r"column 'x' is missing; the header, taken as separated by semicolons, is 'id;y'"),
        ("id y\n1 2\n", r"columns? 'id', 'x' is missing; .* is 'id y'"),
        ('id,x\n"1,2\n3,4\n', r"line 2: unexpected end of data"),
        (PLAIN.encode("utf-16"), "not UTF-8 text|zero bytes"),
        ("id,x\n1,2\né,3\n".encode("latin-1"), "line 3 is not UTF-8 text"),
        (b"id,x\n1\0,2\n", "zero bytes"),
        (gzip.compress(PLAIN.encode(), mtime=0)[:-9], "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, words):
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path, content)
    assert str(error.value).startswith(str(tmp_path / "table.csv")) and "\n" not in str(error.value)
