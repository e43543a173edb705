"""What the README says of flags and files is what the program has."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import run_pretrain

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def flag_rows():
    """flag -> the default in the table, "" for none."""
    rows = re.findall(r"^\| \**`(--\w+)`\** \| (?:`(.*?)`)? ?\| .+ \|$", README, flags=re.MULTILINE)
    return dict(rows)


def test_the_table_lists_every_flag_with_its_default():
    table = flag_rows()
    expected = {}
    for action in run_pretrain.get_args_parser()._actions:
        if action.dest == "help":
            continue
        default = action.default
        if default is None or isinstance(default, bool):
            default = ""
        elif isinstance(default, list):
            default = " ".join(map(str, default))
        expected[action.option_strings[0]] = str(default)
    assert table == expected


def commands():
    """Command lines in the README's code blocks, continuation lines joined."""
    blocks = re.findall(
        r"^ *```(?:bash|sh|python|bibtex)?\n(.*?)^ *```", README, flags=re.MULTILINE | re.DOTALL
    )
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match(r" *(python|bash|sbatch|torchrun) (?!-c)", line)]


@pytest.mark.parametrize("command", commands())
def test_commands_name_programs_and_flags_that_exist(command, capsys, monkeypatch):
    program = re.search(r"[\w/]+\.(?:py|sh)\b", command).group()
    flags = set(re.findall(r" (--\w+)", command.split(program)[1]))
    assert (REPOSITORY / program).is_file()
    if program.endswith(".sh"):
        return  # their flags are pytest's and run_pretrain.py's
    spec = importlib.util.spec_from_file_location("program", REPOSITORY / program)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "program", module)  # where dataclasses look for their module
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert flags <= set(re.findall(r"--\w+", capsys.readouterr().out))


def test_named_files_exist():
    for path in set(re.findall(r"`((?:scripts|util|datasets|tests|preTrain)/[\w./]+)`", README)):
        assert (REPOSITORY / path.rstrip("/")).exists(), path
