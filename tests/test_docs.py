"""README.md and docs/: their commands parse, their links lead somewhere, their table of flags is the program's."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "preTrain/README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
PROGRAMS = [
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("run_*.py"), *ROOT.glob("scripts/*.py")]
    if "get_args_parser" in path.read_text(encoding="utf-8")
]


def program_parser(program: str) -> argparse.ArgumentParser:
    """What the program's `get_args_parser` gives."""
    return importlib.import_module(program.removesuffix(".py").replace("/", ".")).get_args_parser()


def commands(text: str) -> list[str]:
    """The command lines of a page: each `python ...`, `torchrun ...`, `bash ...` of its blocks and its running text."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    shown = r"(?:\w+=(?:\"[^\"]*\"|\S*) )*(?:python3?|bash|sbatch|torchrun) [^`]+"
    lines += [" ".join(code.split()) for code in re.findall(rf"`({shown})`", text)]
    return [line for line in lines if re.match(shown, line)]


def check_command(line: str) -> None:
    """A Python program's own parser takes its words; a shell script exists and reads the variables given to it, and the
    program that it hands its words on to takes them."""
    words = list(takewhile(lambda word: word not in ("|", "&&", ">", "2>&1"), shlex.split(line, comments=True)))
    script = next((word for word in words if re.fullmatch(r"(scripts/|run_)\w+\.(py|sh)", word)), None)
    if script is None:
        return
    before, after = words[: words.index(script)], words[words.index(script) + 1 :]
    source = (ROOT / script).read_text(encoding="utf-8")
    if script.endswith(".sh"):
        for variable in re.findall(r"\b([A-Z]\w*)=", " ".join(before)):
            assert re.search(rf"\b{variable}\b", source + (ROOT / "scripts/venv.sh").read_text()), variable
        passed_on = re.search(r"(run_\w+\.py)\b[^$]*\"\$@\"", source.replace("\\\n", " "))
        if passed_on is None:
            return
        script, after = passed_on[1], [*after, "..."]
    parser = program_parser(script)
    for action in parser._actions:
        action.required = action.required and "..." not in after
    parser.parse_args([word for word in after if word != "..."])


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#{1,6} +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_commands_of_a_page(page, monkeypatch):
    def error(self, message):
        raise AssertionError(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", error)
    for line in commands(TEXT[page]):
        check_command(line)


@each_page
def test_links_and_names_of_a_page(page):
    for target in links(TEXT[page]):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target
    named = r"`((?:scripts|util|datasets|gaze|downstream|tests|docs|asset)/[\w./]*|(?:run|engine|models)_\w+\.py)`"
    for name in re.findall(named, TEXT[page]):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_take_no_abbreviated_flags(program):
    assert not program_parser(program).allow_abbrev


def test_the_table_of_flags_is_the_parsers():
    table = TEXT[ROOT / "docs/pretraining.md"].partition("<!-- flags of run_pretrain.py -->")[2]
    shown = re.findall(r"^\| \**`(--\w+)`\** \| (?:`(.*?)`)? ?\| (.+) \|$", table, re.MULTILINE)
    rows = []
    for action in program_parser("run_pretrain.py")._actions[1:]:  # all but --help
        default = action.default
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        default = "" if default is None or isinstance(default, bool) else str(default)
        rows.append((action.option_strings[0], default, action.help.removesuffix(" (default)")))
    assert shown == rows


def test_ci_runs_the_readmes_commands():
    steps = (ROOT / ".github/workflows/test.yml").read_text() + (ROOT / ".ci/run").read_text()
    for command in ("bash scripts/demo.sh", "bash scripts/test.sh"):
        assert any(command in line for line in commands(TEXT[ROOT / "README.md"])[:2]) and command in steps


def test_pictures_and_pages_are_linked_and_pictures_are_small():
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(TEXT[page])}
    assert {*PAGES[1:], *(ROOT / "asset").iterdir()} <= linked
    assert all(picture.stat().st_size < 500_000 for picture in (ROOT / "asset").iterdir())
