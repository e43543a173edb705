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


def test_numbers_are_taken_and_words_are_not(capsys):
    args = run_pretrain.get_args_parser().parse_args(["--lr", "1e-3", "--scale_list", "4", "0.5"])
    assert args.lr == 1e-3 and args.scale_list == [4.0, 0.5]
    with pytest.raises(SystemExit):
        run_pretrain.get_args_parser().parse_args(["--lr", "fast"])
    assert "'fast' is not a number" in capsys.readouterr().err


def test_a_name_that_no_index_can_hold_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_pretrain.get_args_parser().parse_args(["--data_path", "a", "donn\udce9es"])
    assert stopped.value.code == 2 and "error: 'donn\\udce9es' is not UTF-8" in capsys.readouterr().err


def test_no_checkpoint_is_said_by_an_empty_word_as_published():
    assert run_pretrain.get_args_parser().parse_args(["--resume", ""]).resume == ""


def test_every_program_has_the_parser_without_abbreviations():
    files = [*ROOT.glob("run_*.py"), *ROOT.glob("*/main.py"), *ROOT.glob("scripts/*.py")]
    texts = [path.read_text(encoding="utf-8") for path in files]
    assert sum("= Parser(" in text for text in texts) >= 15
    assert not any("argparse.ArgumentParser(" in text for text in texts)


def test_no_program_takes_a_float_that_may_be_nan():
    files = [
        *ROOT.glob("*.py"),
        *(
            path
            for room in ("datasets", "downstream", "gaze", "scripts", "util")
            for path in (ROOT / room).rglob("*.py")
        ),
    ]
    found = [path.name for path in files if re.search(r"\btype=float\b", path.read_text(encoding="utf-8"))]
    assert found == [] and len(NUMBERS) >= 10


@pytest.mark.parametrize("text", ["-1", "4294967296", "1.5", "nan"])
def test_a_seed_is_what_every_generator_takes(text, capsys):
    with pytest.raises(SystemExit):
        run_pretrain.get_args_parser().parse_args(["--seed", text])
    assert f"argument --seed: {text!r}" in (told := capsys.readouterr().err) or f"--seed: {text} is not" in told
    assert seed_number("4294967295") == 2**32 - 1


def test_no_program_takes_another_seed():
    files = [*ROOT.glob("run_*.py"), *ROOT.glob("*/main.py"), *ROOT.glob("scripts/*.py")]
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    seeds = [line for line in lines if re.search(r'"--seeds?"', line)]
    assert seeds and all("type=seed_number" in line for line in seeds)
