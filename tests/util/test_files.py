"""Whole files or none: also through links."""

from __future__ import annotations

import pytest

from util.errors import UserError
from util.export import check_file_place
from util.files import atomic_write, check_folder_place


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path, relative, there):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "file.txt", tmp_path / "link.txt"
    if there:
        target.write_text("old")
    link.symlink_to("disk/file.txt" if relative else target)
    with atomic_write(link, "w") as file:
        file.write("new")
    assert link.is_symlink() and target.read_text() == "new"
    with pytest.raises(ZeroDivisionError), atomic_write(link, "w") as file:
        file.write("half")
        raise ZeroDivisionError
    assert link.is_symlink() and target.read_text() == "new"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["file.txt"]


def test_where_nothing_can_be_written_is_told_before_and_nothing_is_made(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "a", "a.json", tmp_path / "file"):
        check_file_place(path, "--json")
    for path, why in ((tmp_path, "is a directory"), (tmp_path / "no" / "a", "no such directory")):
        with pytest.raises(UserError, match=f"^--json {path}: {why}"):
            check_file_place(path, "--json")
    for path in (tmp_path, tmp_path / "a" / "b"):
        check_folder_place(path, "--out")
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(UserError, match=f"^--out {path}: {tmp_path}/file is not a directory"):
            check_folder_place(path, "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
