"""A tree made from sources, whole or not at all: stage everything, then commit.

A finished tree is exactly its sources and options. It consists of units (an image with its maps): a run makes those
whose origin (a digest of their sources) is not the one in the tree, and keeps the others.

    with TreeMaking(out, options, index="images.json") as making:     # lock, finish a cut-off commit, check
        for unit in making.begin(units):                              # those to make
            ...                                                       # write files below making.staging
            making.place(unit, ["files/a.jpg"], note)
        making.finish(entries, record)                                # check, then commit

A tree may have two layers, each with its own options, record and index: `prepare` (images, with heatmaps if given) and
`gaze` (heatmaps predicted from a tree's images). At the tree's root a layer has

    <layer>.origins     a line for each unit, sorted: [key, origin, {file: size}, note]; in names `*` stands for the key
    <layer>.json        the record: options, counts, what was left out
    tables, the index   the index comes last: a tree that has it is whole
    .making/<layer>/    while a run is at work: `tree/` (what it has made), `units` (its options, then a line for each
                        unit in it, written after the unit's files), and `commit`, once everything is there

Until `commit` exists the tree is what it was. From then on the next run, whichever it is, first finishes moving.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.prepare.layout import (
    FORMAT,
    LAYERS,
    LOCK,
    STAGING,
    Unit,
    digest_of,
    files_of,
    finished_lines,
    key_of,
    read_line,
    read_record,
    stamp,
    write_line,
)
from util.errors import UserError
from util.files import atomic_write, file_lock

NAMED = 5  # how many files a message names


class TreeMaking:
    """One run that makes a layer of a tree; see the module's text. A context manager.

    Args:
        out: the tree's root. A directory that is neither empty nor a tree of ours is refused.
        options: all that decides pixels or membership and is the same for every unit; a tree has one set.
        index: name of the index, which `finish` writes last.
        layer: one of `LAYERS`. A layer above needs the tree below it.
        part: (i, n) makes a share of the units, beside runs with other i, as in arrays of jobs. It can't
            `finish`; a run without `part` does, and makes what is left.
        overwrite: keep nothing of the old tree, which stays until the new one is whole. Killed, the same call goes on.
        dry_run: take no lock, write nothing; `begin`, `place` and `finish` check all the same.

    Raises (each method):
        UserError: the tree is in use, has other options, or is not ours; a finished tree would lose a file;
            nothing is there to make; or a file can't be read, written or removed.
    """

    def __init__(
        self,
        out: str | os.PathLike,
        options: Mapping[str, Any],
        *,
        index: str,
        layer: str = LAYERS[0],
        part: tuple[int, int] | None = None,
        overwrite: bool = False,
        dry_run: bool = False,
    ):
        if overwrite and part is not None:
            raise UserError("--overwrite: one part of several can't start a tree afresh; run once without parts")
        self.out, self.layer, self.part, self.index = Path(out).resolve(), layer, part, index
        self.options = json.loads(json.dumps({"format": FORMAT, **options}))
        self.overwrite, self.dry_run = overwrite, dry_run
        self.n_made = self.n_anew = 0  # units made; of them those that the tree had otherwise
        self._folder = self.out / STAGING / layer
        self.staging = self._folder / "tree"  # where a unit's files are written, each by its path in the tree
        self._journal = self._folder / ("units" if part is None else "units-{}-of-{}".format(*part))
        self._above = LAYERS[LAYERS.index(layer) + 1 :]
        self._now: dict[str, str] = {}  # lines of the tree to be, by key
        self._staged: set[str] = set()  # keys of those whose files are staged
        self._locks = contextlib.ExitStack()

    # --- lock and check ----------------------------------------------------------------------------

    def __enter__(self) -> TreeMaking:
        try:
            refuse_foreign(self.out, self.layer)
            if self.dry_run:
                if any((self.out / STAGING / layer / "commit").exists() for layer in LAYERS):
                    raise UserError(f"{self.out}: a run was cut off at its end; finish it first, without --dry_run")
            else:
                self.out.mkdir(parents=True, exist_ok=True)
                whole = self._lock()
                for layer in LAYERS:
                    finish_commit(self.out, layer)
            record = read_record(self.out, self.layer)
            self._begun = next((json.loads(line) for line in self._journal_lines() if line.startswith("{")), None)
            was = record.get("options") or self._begun
            if self.part is not None and self._begun:  # other parts may be at work
                was = self._begun
            if was and was != self.options and not self.overwrite:
                raise UserError(
                    f"{self.out}: was prepared with other options: {differing_options(was, self.options)}; choose "
                    "another --out, or --overwrite to replace it"
                )
            # Lines of the finished tree, by key, and the versions of all programs that made what is there; with
            # `overwrite` all files that earlier runs made, in the layers above too.
            self._old, self._replaced = {}, set()
            if not self.overwrite:
                self._old = finished_lines(self.out, self.layer)
            for layer in (self.layer, *self._above) if self.overwrite else ():
                self._replaced |= {f"{layer}.origins", f"{layer}.json"}
                self._replaced.update(read_record(self.out, layer).get("root_files", []))
                for line in finished_lines(self.out, layer).values():
                    self._replaced.update(files_of(line))
            self._made_with = record.get("made_with", []) if self._old else []
            if self.part is not None:
                whole.close()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and not self.dry_run and self.part is None:
            with contextlib.suppress(OSError):  # there is something in it
                os.removedirs(self.staging)
        self._locks.close()
        if isinstance(error, OSError):
            name = error.filename2 or error.filename or self.out
            raise UserError(f"{name}: can't be read or written ({error.strerror or error})") from error

    def _lock(self) -> contextlib.ExitStack:
        """The lock of the tree, which a part holds only while it begins. It locks a file of its own then, so that who
        holds the tree's can tell by the parts' whether any is at work."""
        told = {"what": str(self.out), "mend": "wait for it, or choose another --out"}
        whole = self._locks.enter_context(contextlib.ExitStack())
        whole.enter_context(file_lock(self.out / LOCK, **told, wait=self.part is not None))
        for path in sorted(self.out.glob(f"{LOCK}-*")):
            if self.part is None or not path.name.endswith(f"-of-{self.part[1]}"):
                whole.enter_context(file_lock(path, **told))
        if self.part is not None:
            self._locks.enter_context(file_lock(self.out / "{}-{}-of-{}".format(LOCK, *self.part), **told))
        return whole

    def _journal_lines(self) -> Iterator[str]:
        """Of this run and those before it; a kill may have cut one off."""
        for path in sorted(self._folder.glob("units*")):
            with open(path, encoding="utf-8", errors="replace") as lines:
                yield from (line.rstrip("\n") for line in lines)

    # --- work --------------------------------------------------------------------------------------

    def begin(self, units: Sequence[Unit], versions: Any = None) -> list[Unit]:
        """Of all units that the tree shall hold, those to make (by this part).

        `versions` of the programs that make them, JSON, for the record."""
        if not units:
            raise UserError(f"{self.out}: nothing to make a tree of")
        self._units = {unit.key: unit for unit in units}
        self._versions = versions
        self._refuse_loss(sorted(self._old.keys() - self._units.keys()), "their sources are missing or left out now")
        if not self.dry_run:
            self._take_staged()
        for key, line in self._old.items():
            if key not in self._now and self._holds(line, self.out):
                self._now[key] = line
        i, n = self.part or (0, 1)
        mine = (unit for unit in units if zlib.crc32(unit.key.encode()) % n == i)
        return [unit for unit in mine if unit.key not in self._now]

    def _holds(self, line: str, folder: Path) -> bool:
        """Whether a line is of a unit that is made from what is there now, its files whole in `folder`."""
        key, origin, sizes, _ = read_line(line)
        if key not in self._units or self._units[key].origin != origin:
            return False
        return all(stamp(f"{folder}/{name}")[0] == size for name, size in sizes.items())

    def _take_staged(self) -> None:
        """Go on from what earlier runs staged, if it holds. Drop the other lines: they must not hold again, later."""
        if self._begun not in (None, self.options):
            remove_staging(self.out, self.layer)
        for line in self._journal_lines():
            with contextlib.suppress(ValueError):  # not a whole line of a unit
                if self._holds(line, self.staging):
                    self._now[key_of(line)] = line
        self._staged = set(self._now)
        self.staging.mkdir(parents=True, exist_ok=True)
        if self.part is None:
            journals = [path for path in self._folder.glob("units*") if path != self._journal or not self._now]
            if self._now:
                write_lines(self._journal, (json.dumps(self.options), *self._now.values()))
            for path in journals:
                path.unlink()

    def place(self, unit: Unit, files: Sequence[str], note: Any = None, *, settled: bool = True) -> None:
        """Take a unit that has been made; each unit of `begin` must come here.

        Args:
            files: paths in the tree, written below `staging`; none: the unit has no place in the tree.
            note: JSON: what its entries in the index need; `notes` gives it back, of kept units too.
            settled: False to have the next run make it again, whatever its origin: something of it was
                damaged or left out, and that may be mended by other means than its sources.
        """
        for source, was in zip(unit.sources, unit.stamps):
            # Its status may have changed (a link more, other rights): then the next run makes it anew.
            if stamp(source)[:2] != was[:2]:
                raise UserError(f"{source}: changed while the tree was made from it; run again")
        if not files:
            return
        self.n_made += 1
        self.n_anew += unit.key in self._old
        sizes = {name: 0 if self.dry_run else os.stat(self.staging / name).st_size for name in files}
        line = self._now[unit.key] = write_line(unit.key, unit.origin if settled else "", sizes, note)
        same = line == self._old.get(unit.key) and all(same_file(self.staging / n, self.out / n) for n in files)
        if self.dry_run or same:
            return
        if not self._journal.exists():
            write_lines(self._journal, [json.dumps(self.options)])
        with open(self._journal, "a", encoding="utf-8") as journal:
            journal.write(line + "\n")
        self._staged.add(unit.key)

    def notes(self) -> Iterator[tuple[Unit, Any]]:
        """The units that the tree holds, kept and made, with their notes, in the order of `begin`."""
        for key, unit in self._units.items():
            if key in self._now:
                yield unit, read_line(self._now[key])[3]

    # --- finish ------------------------------------------------------------------------------------

    def finish(
        self, entries: Iterable[Mapping[str, Any]], record: Mapping[str, Any], tables: Mapping[str, Iterable[str]]
    ) -> None:
        """Check that the tree loses nothing, then replace what differs in it.

        Args:
            entries: the entries of the index, in their order.
            record: what the record holds beside options and versions.
            tables: by name, the lines of further files at the root.
        """
        if not self._now:
            raise UserError(f"{self.out}: not one entry is left for the tree")
        root = [f"{self.layer}.origins", *tables, f"{self.layer}.json", self.index]
        gone = self._gone() - {*root}
        if not self.overwrite:
            self._refuse_loss(sorted(gone), "what they are made from can't be used now")
        if self.dry_run:
            return
        if self._versions not in self._made_with and (self.n_made or not self._made_with):
            self._made_with.append(self._versions)
        write_lines(self.staging / root[0], (self._now[key] for key in sorted(self._now)))
        for name, lines in tables.items():
            write_lines(self.staging / name, lines)
        origins = digest_of((self.staging / root[0]).read_bytes())
        own = {"options": self.options, "root_files": [self.index, *tables], "origins": origins}
        content = {**own, **record, "made_with": self._made_with}
        write_lines(self.staging / root[-2], [json.dumps(content, indent=1, ensure_ascii=False)])
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        write_lines(self.staging / self.index, ["[", lines, "]"])
        changed = [name for name in root if not same_file(self.staging / name, self.out / name)]
        indexes = []
        if (
            gone or self._staged or changed not in ([], [root[-2]])
        ):  # the record alone is nothing that others are made of
            indexes.append(self.index)
            for layer in (self.layer, *self._above):
                indexes += read_record(self.out, layer).get("root_files", [])[:1]
        for layer in self._above if self.overwrite else ():
            remove_staging(self.out, layer)
        todo = {"indexes": indexes, "remove": sorted(gone), "root": root}
        write_lines(self._folder / "commit", (json.dumps(todo), *(self._now[key] for key in self._staged)))
        finish_commit(self.out, self.layer)
        for path in self.out.glob(f"{LOCK}-*"):
            path.unlink()

    def _gone(self) -> set[str]:
        """Files of the tree that no unit has any more."""
        changed = (line for key, line in self._old.items() if self._now.get(key) != line)
        gone = self._replaced.union(name for line in changed for name in files_of(line))
        for line in self._now.values() if gone else ():
            gone.difference_update(files_of(line))
        return gone

    def _refuse_loss(self, names: Sequence[str], why: str) -> None:
        if names:
            told = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
            raise UserError(
                f"{self.out}: the finished tree would lose {len(names)} of what it holds, as {why}: {told}; "
                "mend that, choose another --out, or --overwrite to make it afresh without them"
            )


def refuse_foreign(root: Path, layer: str) -> None:
    """UserError unless a layer can be made here: in a tree of ours, or in nothing."""
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: is not a directory; choose another --out")
    record = read_record(root)
    if layer != LAYERS[0] and not (root / record.get("root_files", ["prepare.json"])[0]).exists():
        raise UserError(f"{root}: holds no finished tree of images")
    if record or not root.exists() or (root / STAGING / LAYERS[0] / "commit").exists():
        return
    if strangers := sorted(name for name in os.listdir(root) if not name.startswith((LOCK, STAGING))):
        raise UserError(
            f"{root}: not empty and not made by this script (no prepare.json, but {strangers[0]}); choose another --out"
        )


def finish_commit(root: Path, layer: str) -> None:
    """Move what is staged into the tree, if all of it is there. May be cut off and called again at any moment."""
    folder = root / STAGING / layer
    if not (folder / "commit").exists():
        return
    staged = folder / "tree"
    with open(folder / "commit", encoding="utf-8") as lines:
        todo = json.loads(next(lines))
        if (staged / todo["root"][-1]).exists():  # the last one to move
            for name in todo["indexes"]:
                (root / name).unlink(missing_ok=True)
        for line in lines:
            for name in files_of(line):
                settle(staged / name, root / name)
    for name in todo["remove"]:
        (root / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            os.removedirs((root / name).parent)
    for name in todo["root"]:
        settle(staged / name, root / name)
    (folder / "commit").unlink()
    remove_staging(root, layer)


def settle(staged: Path, target: Path) -> None:
    """Move a file to its place, unless it was, or the same is there."""
    if not staged.exists() or same_file(staged, target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(staged, target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # a folder of the tree is a link to another disk
            raise
        shutil.copyfile(staged, target)
        staged.unlink()


def remove_staging(root: Path, layer: str) -> None:
    if (root / STAGING / layer).exists():
        shutil.rmtree(root / STAGING / layer)
    with contextlib.suppress(OSError):  # the other layer is unfinished
        (root / STAGING).rmdir()


def same_file(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    with atomic_write(path) as file:
        file.writelines(f"{line}\n".encode() for line in lines)


def differing_options(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """ "size 512 there, size 64 asked for", of the options that are not the same."""
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    there, asked = (", ".join(f"{key} {options.get(key)}" for key in keys) for options in (was, now))
    return f"{there} there, {asked} asked for"
