"""README.md and docs/: their commands parse, their links lead somewhere, their table of flags is the program's."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "preTrain/README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
PICTURES = (".png", ".svg", ".jpg")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
PROGRAMS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("run_*.py"), *ROOT.glob("scripts/*.py")]
    if "get_args_parser" in path.read_text(encoding="utf-8")
)


@cache
def program_parser(program: str) -> argparse.ArgumentParser:
    """What the program's `get_args_parser` gives."""
    name = f"shown_{Path(program).stem}"
    spec = importlib.util.spec_from_file_location(name, ROOT / program)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module.get_args_parser()


def commands(text: str) -> list[str]:
    """The command lines of a page: each `python ...`, `torchrun ...`, `bash ...` of its blocks and its running text."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    shown = r"(?:\w+=(?:\"[^\"]*\"|\S*) )*(?:python3?|bash|sbatch|torchrun) [^`]+"
    lines += [" ".join(code.split()) for code in re.findall(rf"`({shown})`", text)]
    return [line for line in lines if re.match(shown, line)]


def check_command(line: str) -> None:
    """A Python program's own parser takes its words; a shell script exists and reads the variables given to it."""
    words = shlex.split(line, comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in ("|", "&&", ">", "2>&1")), len(words))]
    script = next((word for word in words if re.search(r"\.(py|sh)$", word) and not word.startswith("-")), None)
    if script is None or not re.match(r"(scripts|run_)", script):
        return
    assert (ROOT / script).is_file(), script
    before, after = words[: words.index(script)], words[words.index(script) + 1 :]
    source = (ROOT / script).read_text(encoding="utf-8")
    if script.endswith(".sh"):
        for variable in (word.partition("=")[0] for word in before if re.match(r"[A-Z]\w*=", word)):
            assert re.search(rf"\b{variable}\b", source + (ROOT / "scripts/venv.sh").read_text()), variable
        passed_on = re.findall(r"([\w/]+\.py)\b.*\\?\n?.*\"\$@\"", source)
        if not passed_on or not (ROOT / passed_on[-1]).is_file():
            return
        script, after = passed_on[-1], [*after, "..."]
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


def test_the_readme_says_early_what_was_not_checked_and_ci_runs_its_commands():
    beginning = "\n".join(TEXT[ROOT / "README.md"].splitlines()[:40])
    for word in ("made-up", "GPU", "credentialed"):
        assert word in beginning
    steps = (ROOT / ".github/workflows/test.yml").read_text() + (ROOT / ".ci/run").read_text()
    for command in ("bash scripts/demo.sh", "bash scripts/test.sh"):
        assert command in commands(TEXT[ROOT / "README.md"])[0] + commands(TEXT[ROOT / "README.md"])[1]
        assert command in steps


def test_pictures_and_pages_are_linked_and_pictures_are_small():
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(TEXT[page])}
    assert {*PAGES[1:], *(ROOT / "asset").iterdir()} <= linked
    assert all(picture.stat().st_size < 500_000 for picture in (ROOT / "asset").iterdir())
