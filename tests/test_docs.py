"""README.md and docs/ can't rot: their commands parse, their links lead somewhere, their tables are the program's."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
from docs_checks import (
    ROOT,
    Command,
    Fault,
    anchors,
    check_command,
    check_link,
    check_named,
    commands,
    flag_tables,
    links,
    named_things,
    pages,
    parser_rows,
    program_parser,
)

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [str(page.relative_to(ROOT)) for page in pages()]
PICTURES = (".png", ".svg", ".jpg")
MAX_PICTURE = 500_000  # bytes
PROGRAMS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("run_*.py"), *(ROOT / "scripts").glob("*.py")]
    if "__main__" in path.read_text(encoding="utf-8")
)


def faults(found, check) -> list[str]:
    """ "line: fault" of each thing on a page that does not pass its check."""
    wrong = []
    for line, thing in found:
        try:
            check(thing)
        except Fault as fault:
            wrong.append(f"{line}: {fault}")
    return wrong


def page_faults(page: Path, root: Path = ROOT) -> list[str]:
    text = page.read_text(encoding="utf-8")
    shown = [(command.line, command) for command in commands(text)]
    return (
        faults(shown, lambda command: check_command(command, root))
        + faults(links(text), lambda target: check_link(page, target))
        + faults(named_things(text), lambda name: check_named(name, root))
    )


@pytest.mark.parametrize("page", PAGES)
def test_commands_links_and_names_of_a_page(page):
    assert page_faults(ROOT / page) == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_show_their_parser_and_take_no_abbreviated_flags(program):
    assert not program_parser(program).allow_abbrev


@pytest.mark.parametrize("page", PAGES)
def test_tables_of_flags_are_the_parsers(page):
    for program, rows in flag_tables((ROOT / page).read_text(encoding="utf-8")):
        assert rows == parser_rows(program_parser(program)), program


def test_the_published_flags_have_their_table():
    tables = dict(flag_tables((ROOT / "docs/pretraining.md").read_text(encoding="utf-8")))
    assert len(tables["run_pretrain.py"]) > 40


def test_readme_is_short_and_begins_with_what_was_checked():
    lines = README.splitlines()
    assert len(lines) <= 200
    beginning = "\n".join(lines[:40])
    for word in ("made-up", "GPU", "credentialed"):
        assert word in beginning


def test_pictures_are_shown_and_small():
    shown = {Path(target).name for _, target in links(README) if target.endswith(PICTURES)}
    assert len(shown) >= 3
    used = {Path(target).name for page in PAGES for _, target in links((ROOT / page).read_text(encoding="utf-8"))}
    for picture in (ROOT / "asset").iterdir():
        assert picture.name in used
        assert picture.stat().st_size < MAX_PICTURE, picture.name


def test_readme_shows_the_two_commands_and_ci_runs_them():
    two = {"bash scripts/demo.sh", "bash scripts/test.sh"}
    assert two <= {command.text.split("#")[0].strip() for command in commands(README)}
    workflow = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    steps = re.findall(r"run: (bash .+)", workflow)
    assert "bash .ci/run" in steps
    steps += (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert two <= set(steps)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_a_page_is_linked_from_another(page):
    others = [ROOT / other for other in PAGES if other != page]
    linked = {
        (other.parent / target.partition("#")[0]).resolve()
        for other in others
        for _, target in links(other.read_text(encoding="utf-8"))
    }
    assert (ROOT / page).resolve() in linked


# ---- the checks see what they are for ------------------------------------------------------------------

PLANTED_SH = 'python run_it.py --size 3 \\\n  "$@"\n'
PLANTED_PY = """
import argparse
def get_args_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--size", type=int, required=True, help="side, px")
    parser.add_argument("--kind", choices=("a", "b"), default="a", help="kind")
    return parser
"""


@pytest.fixture
def house(tmp_path):
    """A small repository: one program, three scripts, one page."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "run_it.py").write_text(PLANTED_PY)
    (tmp_path / "scripts/passes_on.sh").write_text(PLANTED_SH)
    (tmp_path / "scripts/plain.sh").write_text(': "${SEEDS:=0}"\necho done\n')
    (tmp_path / "scripts/place.sh").write_text("OUT=${1:-here}\n")
    (tmp_path / "page.md").write_text("# A page\n## Its `part` (two)\n")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("python run_it.py --size 3 --kind b", None),
        ("python run_it.py --size 3 --colour red", "unrecognized arguments: --colour red"),
        ("python run_it.py --siz 3", "required: --size"),
        ("python run_it.py --size three", "invalid int value"),
        ("python run_it.py --size 3 --kind c", "invalid choice"),
        ("python run_it.py --kind b", "required: --size"),
        ("python run_it.py --kind b ...", None),
        ("python run_that.py --size 3", "no program run_that.py"),
        ("cd there && OMP_NUM_THREADS=1 python run_it.py --size 3 2>&1 | tee log", None),
        ("X=1; python run_it.py --sise 3", "required: --size"),
        ("for n in 1 2; do python run_it.py --size three; done", "invalid int value"),
        ("ls -l there", None),
        ("torchrun --standalone --nproc_per_node 2 run_it.py --size 3", None),
        ("torchrun --standalone --nproc_per_node 2 run_it.py --size 3 --kin a", "unrecognized arguments: --kin a"),
        ("torchrun --no_such 2 run_it.py --size 3", "torchrun: "),
        ("python -m torch.distributed.launch --nproc_per_node 1 run_it.py --size x", "invalid int value"),
        ("python -c 'import os; print(os.sep)'", None),
        ("python -c 'import os; print(os.sep'", "does not compile"),
        ("bash scripts/passes_on.sh --kind b", None),
        ("bash scripts/passes_on.sh --sort b", "unrecognized arguments: --sort b"),
        ("sbatch --array=0-2 scripts/passes_on.sh --kind d", "invalid choice"),
        ("bash scripts/missing.sh", "no script scripts/missing.sh"),
        ("SEEDS=1 bash scripts/plain.sh", None),
        ("SEED=1 bash scripts/plain.sh", "reads no variable SEED"),
        ('SEEDS="0 1" KIND=a bash scripts/plain.sh', "reads no variable KIND"),
        ("bash scripts/plain.sh out", "takes no arguments"),
        ("bash scripts/place.sh out", None),
        ("bash scripts/place.sh --out here", "has no --out"),
    ],
)
def test_a_command_is_checked(house, line, fault):
    if fault is None:
        check_command(Command(1, line), house)
    else:
        with pytest.raises(Fault, match=re.escape(fault)):
            check_command(Command(1, line), house)


def test_a_page_with_planted_faults(house):
    text = """# Title
See [here](page.md#its-part-two), [there](page.md#no-such-part), [gone](gone.md) and ![](gone.png).
```bash
python run_it.py \\
  --size 3 --bad_flag   # a comment
SEEDS="0 1" SEED=1 bash scripts/plain.sh
python - <<'END'
print(i
END
```
Or `bash scripts/nothing.sh`; the code is in `util/nothing.py` and `datasets.nothing`, see `test_nothing`.
"""
    (house / "planted.md").write_text(text)
    (house / "tests").mkdir()
    assert page_faults(house / "planted.md", house) == [
        "4: run_it.py: unrecognized arguments: --bad_flag",
        "6: scripts/plain.sh reads no variable SEED",
        "7: Python code does not compile: '(' was never closed (<unknown>, line 1)",
        "11: no script scripts/nothing.sh",
        "2: no heading for page.md#no-such-part",
        "2: dead link gone.md",
        "2: dead link gone.png",
        "11: no file util/nothing.py",
        "11: no module datasets.nothing",
        "11: no test test_nothing",
    ]


def test_a_stale_table_differs(house):
    good = "<!-- flags of run_it.py -->\n\n| flag | default | meaning |\n|---|---|---|\n| `--size` |  | side, px |\n"
    rows = parser_rows(program_parser("run_it.py", house))
    assert rows == [("--size", "", "side, px"), ("--kind", "a", "kind")]
    assert flag_tables(good + "| **`--kind`** | `a` | kind |\n") == [("run_it.py", rows)]
    assert flag_tables(good + "| `--kind` | `b` | kind |\n") != [("run_it.py", rows)]
    assert flag_tables(good) != [("run_it.py", rows)]


def test_anchors_are_githubs():
    text = (
        "# A Title: of `code`, twice\n## A Title: of `code`, twice\n```\n# no heading\n```\n### [Link](x.md) – done_\n"
    )
    assert anchors(text) == {"a-title-of-code-twice", "a-title-of-code-twice-1", "link--done_"}


def test_a_parser_with_abbreviations_is_seen(house):
    assert program_parser("run_it.py", house).allow_abbrev is False
    assert argparse.ArgumentParser().allow_abbrev  # what a script gets that does not say so
