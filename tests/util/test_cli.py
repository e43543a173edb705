"""Options that several programs share."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import run_pretrain
from util.cli import finite_float, seed_number

ROOT = Path(__file__).parents[2]
NUMBERS = [action for action in run_pretrain.get_args_parser()._actions if action.type is finite_float]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "NaN", "infinity", "1e999"])
@pytest.mark.parametrize("action", NUMBERS, ids=lambda action: action.dest)
def test_no_number_of_pretraining_may_be_nan_or_infinite(action, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_pretrain.get_args_parser().parse_args([f"{action.option_strings[0]}={text}"])
    assert stopped.value.code == 2
    assert f"error: argument {action.option_strings[0]}: {text} is not a finite number" in capsys.readouterr().err


def test_a_name_that_no_index_can_hold_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_pretrain.get_args_parser().parse_args(["--data_path", "a", "donn\udce9es"])
    assert stopped.value.code == 2 and "error: 'donn\\udce9es' is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1", "4294967296", "1.5", "nan"])
def test_a_seed_is_what_every_generator_takes(text, capsys):
    with pytest.raises(SystemExit):
        run_pretrain.get_args_parser().parse_args(["--seed", text])
    assert re.search(f"argument --seed: .*{text}", capsys.readouterr().err)
    assert seed_number("4294967295") == 2**32 - 1


@pytest.mark.parametrize(
    "refused", [r"\btype=float\b", r"argparse\.ArgumentParser\(", r'\("--seeds?"(?!.*type=seed_number)']
)
def test_every_program_takes_the_shared_types_and_parser(refused):
    """No number may be NaN, no option abbreviated, and a seed is one that every generator takes."""
    rooms = ("datasets", "downstream", "gaze", "scripts", "util")
    files = [*ROOT.glob("*.py"), *(path for room in rooms for path in (ROOT / room).rglob("*.py"))]
    assert len(files) >= 80
    assert [path.name for path in files if re.search(refused, path.read_text(encoding="utf-8"))] == []
