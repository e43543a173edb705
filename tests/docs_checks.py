"""What tests/test_docs.py asks of README.md and docs/: commands, links and names in them, as data.

A command line is read as a shell would read it and handed to the named program's own parser, so a page
can't show a flag or a script that is not there.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SHELL = ("", "bash", "sh", "console")
# How a command begins in running text, or in a block that may be a program's output.
SHOWN = r"(?:\w+=(?:\"[^\"]*\"|'[^']*'|\S*) )*(?:python3?|bash|sbatch|torchrun) [^\s`]*"
PREFIXES = {"exec", "nohup", "time", "env", "do", "then", "else"}
# Variables that a library or Python reads, not a script of ours.
FOREIGN = {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}
PYTEST_FLAGS = {"-m", "-k", "-x", "-q", "-s", "-v", "-n"}


class Fault(Exception):
    """What is wrong with a page, in one line."""


@dataclass(frozen=True)
class Command:
    """One command line of a page: `line` is its number, `text` the line, `stdin` the heredoc behind it."""

    line: int
    text: str
    stdin: str = ""


def pages(root: Path = ROOT) -> list[Path]:
    """Every page that a user reads."""
    found = [root / "README.md", root / "CONTRIBUTING.md", root / "preTrain/README.md"]
    return [page for page in found if page.exists()] + sorted((root / "docs").glob("*.md"))


def without_code(text: str) -> str:
    """The page with blank lines in place of its code blocks, so that line numbers stay."""
    return FENCE.sub(lambda found: "\n" * found.group().count("\n"), text)


def commands(text: str) -> list[Command]:
    """The command lines of a page: those of its shell blocks, and `python ...`, `bash ...` in its text."""
    found = []
    for block in FENCE.finditer(text):
        first = text.count("\n", 0, block.start()) + 2
        if block.group(2) in SHELL:
            found += _block_commands(block.group(3).split("\n"), first, sure=block.group(2) != "")
    prose = without_code(text)
    for span in re.finditer(rf"`({SHOWN}[^`]*)`", prose):
        found.append(Command(prose.count("\n", 0, span.start()) + 1, " ".join(span.group(1).split())))
    return sorted(found, key=lambda command: command.line)


def _block_commands(lines: list[str], first: int, *, sure: bool) -> list[Command]:
    """`sure`: every line is a command; else those that look like one."""
    found, i = [], 0
    while i < len(lines):
        start, line = i, lines[i].strip()
        while line.endswith("\\") and i + 1 < len(lines):
            i += 1
            line = f"{line[:-1]} {lines[i].strip()}"
        if line and not line.startswith("#") and (sure or re.match(rf"(?:\$ )?{SHOWN}", line)):
            while _open_quotes(line) and i + 1 < len(lines):
                i += 1
                line = f"{line}\n{lines[i]}"
            stdin = []
            if heredoc := re.search(r"<<-?\s*['\"]?(\w+)['\"]?", line):
                while i + 1 < len(lines) and lines[i + 1].strip() != heredoc.group(1):
                    i += 1
                    stdin.append(lines[i])
                i += 1
                line = line.replace(heredoc.group(), "")
            found.append(Command(first + start, line.removeprefix("$ "), "\n".join(stdin)))
        i += 1
    return found


def _open_quotes(line: str) -> bool:
    try:
        _tokens(line)
    except ValueError:
        return True
    return False


def _tokens(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()")
    lexer.whitespace_split = True
    return list(lexer)


def check_command(command: Command, root: Path = ROOT) -> None:
    """Let the named programs parse a command line. Raises `Fault`."""
    text = re.sub(r" \d?>>? ?(?:&\d|[^\s|&;]+)", " ", command.text)  # redirections
    part: list[str] = []
    for token in [*_tokens(text), ";"]:
        if token and set(token) <= set("|&;()"):
            if part:
                _check_part(part, command.stdin, root)
            part = []
        else:
            part.append(token)


def _check_part(words: list[str], stdin: str, root: Path) -> None:
    variables = []
    while words and (re.match(r"\w+=", words[0]) or words[0] in PREFIXES):
        variables.append(words.pop(0).partition("=")[0])
    if not words:
        return
    program, words = words[0], words[1:]
    if Path(program).name in ("python", "python3"):
        _check_python(words, stdin, root)
    elif program == "torchrun":
        _check_launched("run", words, root)
    elif program in ("bash", "sbatch"):
        while words and words[0].startswith("-"):  # sbatch's own
            words = words[1:]
        if words:
            _check_script(words[0], words[1:], [v for v in variables if v not in PREFIXES | FOREIGN], root)


def _check_python(words: list[str], stdin: str, root: Path) -> None:
    while words and words[0] in ("-u", "-B"):
        words = words[1:]
    if not words:
        return
    if words[0] in ("-", "-c"):
        try:
            ast.parse(stdin if words[0] == "-" else words[1])
        except SyntaxError as error:
            raise Fault(f"Python code does not compile: {error}") from None
    elif words[0] == "-m":
        if words[1] in ("torch.distributed.launch", "torch.distributed.run"):
            _check_launched(words[1].rpartition(".")[2], words[2:], root)
    elif not words[0].startswith("-"):
        parse(words[0], words[1:], root)


def _check_launched(launcher: str, words: list[str], root: Path) -> None:
    """torchrun and its older name, by their own parser; then what they start."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    if launcher == "launch":
        parser.add_argument("--use-env", "--use_env", action="store_true")
    args = _parse(parser, words, "torchrun")
    parse(args.training_script, args.training_script_args, root)


def _check_script(name: str, words: list[str], variables: list[str], root: Path) -> None:
    if not (root / name).is_file():
        raise Fault(f"no script {name}")
    source = (root / name).read_text(encoding="utf-8")
    code = re.sub(r"^\s*#.*$", "", source, flags=re.MULTILINE).replace("\\\n", " ")
    sourced = "".join(
        (root / other).read_text(encoding="utf-8")
        for other in re.findall(r"scripts/\w+\.sh", source)
        if (root / other).is_file()
    )
    for variable in variables:
        if not re.search(rf"\b{variable}\b", source + sourced):
            raise Fault(f"{name} reads no variable {variable}")
    passed_on = [line for line in code.splitlines() if '"$@"' in line]
    programs = [found for line in passed_on for found in re.findall(r"[\w/]+\.py\b|\bpytest\b", line)]
    if "pytest" in programs:
        flags = [word for word in words if word.startswith("-") and word not in PYTEST_FLAGS]
        paths = [word for word in words if "/" in word]
        if flags or not all((root / path.partition("::")[0]).exists() for path in paths):
            raise Fault(f"{name}: pytest takes no {' '.join(flags + paths)} here")
    elif programs:
        parse(programs[-1], words, root, complete=False)
    elif not passed_on:
        for word in words:
            if word.startswith("-") and not re.search(rf"(?<![\w-]){re.escape(word)}\b", code):
                raise Fault(f"{name} has no {word}")
        places = [int(place) for place in re.findall(r"\$\{?(\d)", code)]
        if words and not places:
            raise Fault(f"{name} takes no arguments")


def parse(program: str, words: list[str], root: Path = ROOT, *, complete: bool = True) -> None:
    """Let a program's own parser take these words. `...` among them stands for further ones."""
    if "..." in words:
        words, complete = [word for word in words if word != "..."], False
    _parse(program_parser(program, root), words, program, complete)


def _parse(parser: argparse.ArgumentParser, words, program: str, complete: bool = True):
    def error(message: str):
        raise Fault(f"{program}: {message}")

    parser.error = error
    if not complete:
        for action in parser._actions:
            action.required = False
    try:
        return parser.parse_args(words)
    except SystemExit:  # --help, --version
        return None


def program_parser(program: str, root: Path = ROOT) -> argparse.ArgumentParser:
    """What the program's `get_args_parser` gives."""
    if not (root / program).is_file():
        raise Fault(f"no program {program}")
    module = _module(root / program)
    if not hasattr(module, "get_args_parser"):
        raise Fault(f"{program} has no get_args_parser()")
    return module.get_args_parser()


@cache
def _module(path: Path):
    name = f"shown_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def links(text: str) -> list[tuple[int, str]]:
    """(line, target) of every link and picture of a page, Markdown's and HTML's, outside code blocks."""
    prose = re.sub(r"`[^`\n]*`", lambda code: " " * len(code.group()), without_code(text))
    pattern = re.compile(r"\]\(<?([^)\s>]+)>?[^)]*\)|(?:src|srcset|href)=\"([^\"]+)\"|^\[[^\]]+\]: (\S+)", re.MULTILINE)
    return [
        (prose.count("\n", 0, found.start()) + 1, next(filter(None, found.groups())))
        for found in pattern.finditer(prose)
    ]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", without_code(text), flags=re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        name, n = slug, 0
        while name in found:
            n += 1
            name = f"{slug}-{n}"
        found.add(name)
    return found | set(re.findall(r"<a (?:name|id)=\"([^\"]+)\"", text))


def check_link(page: Path, target: str) -> None:
    """A relative link or picture must be there, and its anchor too. Raises `Fault`."""
    if re.match(r"[a-z]+:", target):
        return
    path, _, anchor = target.partition("#")
    file = (page.parent / path) if path else page
    if not file.exists():
        raise Fault(f"dead link {target}")
    if anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
        raise Fault(f"no heading for {target}")


def flag_tables(text: str) -> list[tuple[str, list[tuple[str, ...]]]]:
    """(program, [(flag, default, meaning), ...]) of each table below `<!-- flags of PROGRAM -->`."""
    tables = []
    for marker in re.finditer(r"<!-- flags of (\S+) -->\n+((?:\|.*\n)+)", text):
        rows = re.findall(r"^\| \**`(--\w+)`\** \| (?:`(.*?)`)? ?\| (.+) \|$", marker.group(2), re.MULTILINE)
        tables.append((marker.group(1), rows))
    return tables


def parser_rows(parser: argparse.ArgumentParser) -> list[tuple[str, str, str]]:
    """(flag, default, meaning) of each option, as a table of flags must show them."""
    rows = []
    for action in parser._actions:
        if action.dest == "help" or not action.option_strings:
            continue
        default = action.default
        if default is None or isinstance(default, bool):
            default = ""
        elif isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        rows.append((action.option_strings[0], str(default), action.help.removesuffix(" (default)")))
    return rows


def named_things(text: str) -> list[tuple[int, str]]:
    """(line, name) of files, modules and tests of this repository that a page names in `code`."""
    pattern = r"`((?:scripts|util|datasets|tests|docs|asset|\.ci)/[\w./]*|(?:run|engine|models)_\w+\.py|(?:datasets|util)(?:\.\w+)+|test_\w+)`"
    return [(text.count("\n", 0, found.start()) + 1, found.group(1)) for found in re.finditer(pattern, text)]


def check_named(name: str, root: Path = ROOT) -> None:
    """A file must be there, a dotted name must be a module or in one, a test must be defined. Raises `Fault`."""
    if name.startswith("test_"):
        if not any(f"def {name}(" in path.read_text(encoding="utf-8") for path in (root / "tests").rglob("*.py")):
            raise Fault(f"no test {name}")
    elif "/" in name or name.endswith(".py"):
        if not (root / name).exists():
            raise Fault(f"no file {name}")
    else:
        parts = name.split(".")
        for n in range(len(parts), 0, -1):
            path = root.joinpath(*parts[:n])
            file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
            if file.exists():
                if n < len(parts) and not re.search(rf"\b{parts[n]}\b", file.read_text(encoding="utf-8")):
                    raise Fault(f"no {parts[n]} in {file.relative_to(root)}")
                return
        raise Fault(f"no module {name}")
