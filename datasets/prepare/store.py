"""A tree made from sources, whole or not at all: stage everything, then commit.

A finished tree matches its sources and options exactly. It consists of units (an image with its maps): a run makes
those whose origin (a digest of their sources) differs from the one in the tree, and keeps the others.

    with TreeMaking(out, options, index="images.json").running() as making:    # lock, finish an old commit, check
        for unit in making.begin(Report(units, {})):                           # the units still to make
            ...                                                                # write files below making.staging
            making.place(unit, Made(["files/a.jpg"], note))
        report = making.finish(entries, {})                                    # check, then commit

A tree may have two layers, each with its own options, record and index: `prepare` (images, with heatmaps if given) and
`gaze` (heatmaps predicted from a tree's images). At the tree's root a layer has

    <layer>.origins     a line for each unit, sorted: [key, origin, {file: size}, note]; in names `*` stands for the key
    <layer>.json        the record: options, counts, what was left out
    tables, the index   the index comes last: a tree that has it is whole
    .making/<layer>-<digest of the options>/    during a run: `tree/` (the files made so far), `units` (a line for each
                        unit in it, written after the unit's files), and at the end `commit`: what to remove and move

Until `commit` exists the tree is unchanged. After that, an interrupted run is finished by the next one, whatever its
layer and options.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from datasets.prepare.units import Made, Report, Unit, origin_of, stamp
from datasets.raw.readings import digest_of, first_of
from util.errors import UserError
from util.files import atomic_write, file_lock

FORMAT = 3  # raised with every change of what the same sources become
LAYERS = ("prepare", "gaze")  # each is made from the one before it
STAGING, LOCK = ".making", ".prepare.lock"
NAMED = 5  # how many files a message names
PACKAGES = ("numpy", "pillow", "pydicom", "torch")


@dataclass
class TreeMaking:
    """One run that makes a layer of a tree; see the module's text.

    Attributes:
        out: the tree's root, resolved. A directory that is neither empty nor a tree of ours is refused.
        options: all that decides pixels or membership and is the same for every unit; a tree has one set.
        index: name of the index, which `finish` writes last.
        layer: one of `LAYERS`. A layer above needs the tree below it.
        overwrite: keep nothing of the old tree, which stays until the new one is whole. If killed, call it again.
        dry_run: take no lock and write nothing; `begin`, `place` and `finish` check as usual.

    Raises (each method):
        UserError: the tree is in use, has other options, or is not ours; a finished tree would lose a file;
            no unit can be made; or a file can't be read, written or removed.
    """

    out: Path
    options: Mapping[str, Any]
    _: KW_ONLY
    index: str
    layer: str = LAYERS[0]
    overwrite: bool = False
    dry_run: bool = False

    @contextlib.contextmanager
    def running(self) -> Iterator[TreeMaking]:
        """Lock the tree, finish an interrupted commit, check the options. Within: `begin`, `place` each unit, `finish`."""
        try:
            refuse_foreign(self.out)
            with contextlib.ExitStack() as stack:
                if not self.dry_run:
                    self.out.mkdir(parents=True, exist_ok=True)
                    message = {"what": str(self.out), "mend": "wait for it, or choose another --out"}
                    stack.enter_context(file_lock(self.out / LOCK, **message))
                for commit in self.out.glob(f"{STAGING}/*/commit"):
                    if self.dry_run:
                        raise UserError(f"{self.out}: a run was cut off at its end; finish it first, without --dry_run")
                    finish_commit(self.out, commit.parent)
                self._check()
                yield self
        except OSError as error:
            name = error.filename or self.out
            raise UserError(f"{name}: can't be read or written ({error.strerror or error})") from error

    def _check(self) -> None:
        self.options = json.loads(json.dumps({"format": FORMAT, **self.options}))
        record = read_record(self.out, self.layer)
        was = record.get("options", self.options)
        # An option that only another version has, and that is off, changes no file.
        keys = [key for key in {**was, **self.options} if (was.get(key) or None) != (self.options.get(key) or None)]
        if keys and not self.overwrite:
            changed = ", ".join(f"{key} {was.get(key)} there, {key} {self.options.get(key)} asked for" for key in keys)
            raise UserError(
                f"{self.out}: was prepared with other options: {changed}; choose another --out, or --overwrite to replace it"
            )
        self._layers = LAYERS[LAYERS.index(self.layer) :]
        # Lines of the layers that may be replaced, by layer and key; the versions that made the kept units.
        self._old = {layer: finished_lines(self.out, layer) for layer in self._layers[: None if self.overwrite else 1]}
        self._made_with = [] if self.overwrite else record.get("made_with", [])
        self._folder = self.out / STAGING / f"{self.layer}-{origin_of(self.options)}"
        self.staging = self._folder / "tree"  # where a unit's files are written, under their paths in the tree
        self._journal = self._folder / "units"
        self._now: dict[str, str] = {}  # lines of the new tree, by key
        self.n_made = 0

    def begin(self, report: Report) -> list[Unit]:
        """The units still to make, of `report.units`: all that the new tree is to have."""
        self.report = report
        self._units = {unit.key: unit for unit in report.units}
        if self._journal.exists():  # continue from what earlier runs staged
            for line in self._journal.read_text(encoding="utf-8", errors="replace").split("\n"):
                with contextlib.suppress(ValueError):  # cut off by a kill
                    if self._holds(line, self.staging):
                        self._now[json.loads(line)[0]] = line
            if not self.dry_run:  # drop the other lines, lest they match again later
                write_lines(self._journal, self._now.values())
        self._staged = set(self._now)  # keys of those whose files are staged
        for key, line in () if self.overwrite else self._old[self.layer].items():
            if key not in self._now and self._holds(line, self.out):
                self._now[key] = line
        return [unit for unit in report.units if unit.key not in self._now]

    def _holds(self, line: str, folder: Path) -> bool:
        """Whether a line is up to date: its unit has the same origin now, and its files are complete in `folder`."""
        key, origin, sizes, _ = read_line(line)
        if key not in self._units or self._units[key].origin != origin:
            return False
        return all(stamp(f"{folder}/{name}")[0] == size for name, size in sizes.items())

    def place(self, unit: Unit, made: Made) -> None:
        """Record that a unit has been made; call it for each unit of `begin`."""
        for source, was in zip(unit.sources, unit.stamps):
            # The status time may differ (a new link, other permissions): then the next run makes it again.
            if stamp(source)[:2] != was[:2]:
                raise UserError(f"{source}: changed while the tree was made from it; run again")
        self.report.exclusions += made.exclusions
        if not made.files:
            return
        self.n_made += 1
        sizes = {name: stamp(self.staging / name)[0] for name in made.files}
        # An empty origin matches none, so the next run tries what was left out again.
        line = write_line(unit.key, "" if made.exclusions else unit.origin, sizes, made.note)
        self._now[unit.key] = line
        self._staged.add(unit.key)
        if not self.dry_run:
            with open(self._journal, "a", encoding="utf-8") as journal:
                journal.write(line + "\n")

    def notes(self) -> Iterator[tuple[Unit, dict[str, Any]]]:
        """The units of the new tree, kept and made, with their notes, in the order of `begin`."""
        for key, unit in self._units.items():
            if key in self._now:
                yield unit, read_line(self._now[key])[3]

    def finish(
        self, entries: Iterable[Mapping[str, Any]], counted: Mapping[str, int], **tables: Iterable[str]
    ) -> Report:
        """Check that the tree loses nothing, then replace what differs in it.

        Args:
            entries: the entries of the index, in their order.
            counted: further counts for the report, listed after its own.
            tables: lines of further files at the root, by file name.
        """
        report = self.report
        report.count(counted, (n for _, note in self.notes() for n in note.get("significant", ())))
        origins, record = f"{self.layer}.origins", f"{self.layer}.json"
        root = [origins, *tables, record, self.index]
        if not self._now:
            raise UserError(
                f"{self.out}: not one entry is left for the tree, of {report.counts}{first_of(report.exclusions)}"
            )
        records = {layer: there for layer in self._layers if (there := read_record(self.out, layer))}
        old, now = {line for lines in self._old.values() for line in lines.values()}, {*self._now.values()}
        gone = set(files_of(old - now)).difference(files_of(now - old))
        for layer, there in records.items() if self.overwrite else ():
            gone |= {f"{layer}.origins", f"{layer}.json", *there["root_files"]}
        gone -= {*root}
        if gone and not self.overwrite:
            raise UserError(
                f"{self.out}: the finished tree would lose {len(gone)} of its files, as their sources are missing, can't "
                f"be used or give others now, such as {', '.join(sorted(gone)[:NAMED])}; mend that, choose another --out, "
                f"or --overwrite to make it afresh{first_of(report.exclusions)}"
            )
        report.counts["made by this run"] = self.n_made
        if self.dry_run:
            return report
        if self._staged and versions() not in self._made_with:
            self._made_with.append(versions())
        self.staging.mkdir(parents=True, exist_ok=True)
        write_lines(self.staging / origins, (self._now[key] for key in sorted(self._now)))
        digest = digest_of((self.staging / origins).read_bytes())
        content = {"options": self.options, "root_files": [self.index, *tables], "origins": digest}
        content |= report.record | {"made_with": self._made_with}
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        record_lines = [json.dumps(content, indent=1, ensure_ascii=False, default=os.fspath)]
        for name, each in {**tables, record: record_lines, self.index: ["[", lines, "]"]}.items():
            write_lines(self.staging / name, each)

        staged = files_of(map(self._now.get, self._staged))
        moves, remove = [name for name in (*staged, *root) if self._differs(name)], sorted(gone)
        if gone or {*moves} - {record}:  # no layer depends on the record alone
            remove = [*(there["root_files"][0] for there in records.values()), *remove]
            moves.append(self.index)
        if moves:
            write_lines(self._folder / "commit", map(json.dumps, [remove, *moves]))
            finish_commit(self.out, self._folder)
        for folder in self.out.glob(f"{STAGING}/{self.layer}-*"):
            shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # not empty: another run is unfinished
            (self.out / STAGING).rmdir()
        return report

    def _differs(self, name: str) -> bool:
        """Whether the tree lacks a file, or has it with other content than the staged one."""
        there = self.out / name
        return not (there.is_file() and filecmp.cmp(self.staging / name, there, shallow=False))


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide pixels."""
    return {"python": python_version()} | {package: version(package) for package in PACKAGES}


def read_record(root: Path, layer: str = LAYERS[0]) -> dict[str, Any]:
    """The record of a layer; empty if it was never finished."""
    path = root / f"{layer}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def finished_lines(root: Path, layer: str) -> dict[str, str]:
    """The lines of a layer's origins by key, in their order; none if it was never finished. UserError if the list does
    not match the record."""
    path, record = root / f"{layer}.origins", read_record(root, layer)
    if not record:
        return {}
    content = path.read_bytes() if path.is_file() else b""
    if digest_of(content) != record["origins"]:
        raise UserError(
            f"{path}: is missing, damaged or changed, so it is not known what the tree holds; "
            "restore it, or remove the tree and run again"
        )
    return {json.loads(line)[0]: line for line in content.decode().split("\n")[:-1]}


def write_line(key: str, origin: str, sizes: Mapping[str, int], note: Any) -> str:
    """A line of origins, without a line break. Lines stay text in memory: parsed, 377,000 would take gigabytes."""
    files = {name.replace(key, "*"): size for name, size in sizes.items()}
    return json.dumps([key, origin, files, note], ensure_ascii=False, separators=(",", ":"))


def read_line(line: str) -> tuple[str, str, dict[str, int], Any]:
    """(key, origin, size by file, note)."""
    key, origin, files, note = json.loads(line)
    return key, origin, {name.replace("*", key): size for name, size in files.items()}, note


def files_of(lines: Iterable[str]) -> Iterator[str]:
    return (name for line in lines for name in read_line(line)[2])


def refuse_foreign(root: Path) -> None:
    """UserError unless `root` is one of our trees, empty, or missing."""
    if read_record(root) or not root.exists() or any(root.glob(f"{STAGING}/*/commit")):
        return
    if strangers := sorted(name for name in os.listdir(root) if not name.startswith((LOCK, STAGING))):
        raise UserError(
            f"{root}: not empty and not made by this script (no prepare.json, but {strangers[0]}); choose another --out"
        )


def finish_commit(root: Path, folder: Path) -> None:
    """Move the files staged in `folder` into the tree. It may be killed at any moment and called again."""
    staged = folder / "tree"
    with open(folder / "commit", encoding="utf-8") as lines:
        remove, *moves = map(json.loads, lines)
    if (staged / moves[-1]).exists():  # the new index is not in place yet, so the old one goes first
        for name in remove:
            (root / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                os.removedirs((root / name).parent)
    for name in moves:
        if (staged / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(staged / name, root / name)
    (folder / "commit").unlink()
    shutil.rmtree(folder)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    with atomic_write(path) as file:
        file.writelines(f"{line}\n".encode() for line in lines)
