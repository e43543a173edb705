"""Whole files or none: also through links."""

from __future__ import annotations

import pytest

from util.files import atomic_write


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
