"""A tree being made: what it is made from, what of it is there, and the one way in which it changes.

A finished tree is exactly its sources and options. It consists of units (`datasets.prepare.origins`): a run makes
those whose origin is not the one in the tree, and keeps the others.

    with TreeMaking(out, options, index="images.json") as making:     # lock, check, clean
        for unit in making.begin(units):                              # those that are to be made
            ...                                                       # work: write below making.staging
            making.place(unit, ["files/a.jpg"], note)                 # into the tree
        making.finish(entries, record)                                # origins, record, index

A tree may have two *layers*, one above the other, each with its own options, record and index: `prepare` (images,
with heatmaps where they are given) and `gaze` (heatmaps predicted from a tree's images). At the tree's root,
beside its lock, a layer has

- `<layer>.json`, the record: options, versions, counts, what was left out;
- `<layer>.origins`: a line for each unit, sorted;
- `<layer>.journal`, while it is unfinished: the same lines as they come about, from which an interrupted run goes on;
- the index and the tables that `finish` is given. The index is written last: a tree that has it is whole.

Files are written below `.making/` and moved into the tree when they are whole. Those that a finished tree has already
are replaced at the very end, when it is known that the tree loses none: until then it stays what it was, and its
index is away while they are replaced. Whenever a run is killed, a file counts as made only if its unit's line
says so, and the line is written after the file has come to its place.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.prepare.layout import (
    LAYERS,
    LOCK,
    REMOVING,
    STAGING,
    begin_removing,
    differing_options,
    end_removing,
    finished_lines,
    has_content,
    has_size,
    index_lines,
    journal_files,
    move_file,
    origins_file,
    pretty_json,
    read_record,
    record_file,
    refuse_foreign,
    remove_files,
    remove_folder,
    remove_temporaries,
    root_files,
    same_files,
    write_parts,
)
from datasets.prepare.origins import Unit, append_to, digest_of, key_of, read_journal, read_line, read_lines, write_line
from util.errors import UserError
from util.files import fsync_directory
from util.locks import file_lock

FORMAT = 2  # raised with every change of what the same sources become
NAMED = 5  # how many files a message names


class TreeMaking:
    """One run that makes a layer of a tree; see the module's text. A context manager.

    Args:
        out: the tree's root. A directory that is neither empty nor a tree of ours is refused.
        options: all that decides pixels or membership and is the same for every unit; a tree has one set.
        index: name of the index, which `finish` writes last.
        tables: names of further files at the root that `finish` writes.
        layer: of `LAYERS`. A layer above needs the tree below it, and is made anew where that has changed.
        part: (i, n) makes a share of the units, beside runs with other i, as in arrays of jobs. It can't
            `finish`; a run without `part` does, and makes what is left.
        overwrite: start afresh: `begin` removes what earlier runs made here, of this layer and those above.
        dry_run: take no lock, write nothing; `begin`, `place` and `finish` check all the same.

    Raises (each method):
        UserError: the tree is in use, has other options, or is not ours; a finished tree would lose a file;
            nothing is there to make; or a file can't be written or removed.
    """

    def __init__(
        self,
        out: str | os.PathLike,
        options: Mapping[str, Any],
        *,
        index: str,
        tables: Sequence[str] = (),
        layer: str = LAYERS[0],
        part: tuple[int, int] | None = None,
        overwrite: bool = False,
        dry_run: bool = False,
    ):
        if overwrite and part is not None:
            raise UserError("--overwrite: one part of several can't start a tree afresh; run once without parts")
        self.out = Path(out).resolve()
        self.options = json.loads(json.dumps({"format": FORMAT, **options}))
        self.index, self.layer, self.part = index, layer, part
        self.overwrite, self.dry_run = overwrite, dry_run
        self.root_files = [index, *tables]
        self.name = layer if part is None else f"{layer}-{part[0]}-of-{part[1]}"
        self.n_made = self.n_anew = 0  # units made; of them those that the tree had otherwise
        self._locks = contextlib.ExitStack()
        self._lines: dict[str, str] = {}  # of the units that are in the tree, by key
        self._settled: set[str] = set()  # keys of the finished tree; empty if it never was
        self._stale: set[str] = set()  # files of lines that no longer hold
        self._waiting: dict[str, str] = {}  # lines of units to be replaced at the end
        self._units: Sequence[Unit] = ()
        self._todo: set[str] = set()
        self._versions: list[Any] = []  # of all programs that made what is there
        self._new_versions: Any = None
        self._journal = None
        self._was_there = self.out.exists()
        self._holds_lock = False

    # --- lock, check, clean ------------------------------------------------------------------------

    def __enter__(self) -> TreeMaking:
        try:
            refuse_foreign(self.out, self.layer)
            if self.dry_run:
                self._check_options()
            else:
                self.out.mkdir(parents=True, exist_ok=True)
                self._lock()
                self._clean()
            if not self.overwrite:
                self._load()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with self._locks:
            try:
                if self._journal is not None:
                    self._journal.close()
            except OSError as full:  # what could not be written before is tried again
                error = full if error is None else error
            if error is not None and not self.dry_run and self._holds_lock:
                with contextlib.suppress(OSError, UserError):
                    remove_folder(self.staging)  # the next run would not use it
                    with contextlib.suppress(OSError):  # other parts are at work
                        (self.out / STAGING).rmdir()
                    self._leave_no_empty_tree()
        if isinstance(error, OSError):
            name = error.filename or self.out
            raise UserError(f"{name}: can't be read or written ({error.strerror or error})") from error

    def _lock(self) -> None:
        """One file locks the tree. A part locks one of its own, taken while the tree's is held, so that who
        holds the tree's can tell by the parts' whether any is at work."""
        told = {"what": str(self.out), "mend": "wait for it, or choose another --out"}
        with contextlib.ExitStack() as stack:
            stack.enter_context(file_lock(self.out / LOCK, **told, wait=self.part is not None))
            for lock in sorted(self.out.glob(f"{LOCK}-*")):
                mine = lock.name.startswith(f"{LOCK}-{self.layer}-") and self.part is not None
                if not (mine and lock.name.endswith(f"-of-{self.part[1]}")):
                    stack.enter_context(file_lock(lock, **told))
            if not (self.out / LOCK).exists():  # the run before us found nothing to make and cleared up
                raise UserError(f"{self.out}: another run has just removed it; run again")
            refuse_foreign(self.out, self.layer)
            self._check_options()
            if self.part is None:
                self._locks.enter_context(stack.pop_all())
            else:
                self._locks.enter_context(file_lock(self.out / f"{LOCK}-{self.name}", **told))
                if not read_record(self.out, self.layer):
                    self._write_record()  # before another part may come with other options
            self._holds_lock = True

    def _check_options(self) -> None:
        was = read_record(self.out, self.layer).get("options")
        if was is not None and was != self.options and not self.overwrite:
            raise UserError(
                f"{self.out}: was prepared with other options: {differing_options(was, self.options)}; choose "
                "another --out, or --overwrite to replace it"
            )

    def _clean(self) -> None:
        """Remove what a killed run left and no run can use: only what is ours, and of no part at work."""
        if self.part is not None:
            remove_folder(self.staging)
            return
        remove_folder(self.out / STAGING)
        names = {REMOVING, *self.root_files}
        for layer in LAYERS:
            names |= {f"{layer}.json", f"{layer}.origins", *root_files(self.out, layer)}
        remove_temporaries(self.out, names)
        end_removing(self.out)

    def _load(self) -> None:
        """What the tree holds, by its origins and journals."""
        self._lines = finished_lines(self.out, self.layer)
        if self._lines:
            self._versions = list(read_record(self.out, self.layer).get("made_with", []))
            self._settled = set(self._lines)
        last_words: dict[str, set[str | None]] = {}
        for path in journal_files(self.out, self.layer):
            said, stale, versions = read_journal(path)
            self._stale |= stale
            for own in versions:
                self._add_versions(own)
            for key, line in said.items():
                last_words.setdefault(key, set()).add(line)
        for key, words in last_words.items():
            # Of parts that speak of one unit nobody knows which was the last: trust them where they agree.
            self._replace_line(key, words.pop() if len(words) == 1 else None)

    def _replace_line(self, key: str, line: str | None) -> None:
        if (old := self._lines.pop(key, None)) is not None:
            self._stale.update(read_line(old)[2])
        if line is not None:
            self._lines[key] = line

    def _add_versions(self, versions: Any) -> None:
        if versions not in self._versions:
            self._versions.append(versions)

    # --- work --------------------------------------------------------------------------------------

    @property
    def staging(self) -> Path:
        """Where a unit's files are written, each by its path in the tree, before `place`."""
        return self.out / STAGING / self.name

    def begin(self, units: Sequence[Unit], versions: Any = None) -> list[Unit]:
        """Of all units that the tree shall hold, those that are to be made (by this part).

        `versions` of the programs that make them, JSON, for the record."""
        if not units:
            raise UserError(f"{self.out}: nothing to make a tree of")
        keys = {unit.key for unit in units}
        if len(keys) < len(units):
            raise ValueError("two units of one key")
        self._units, self._new_versions = units, json.loads(json.dumps(versions))
        if self.overwrite:
            if not self.dry_run and read_record(self.out, self.layer):
                self._start_afresh()
            self._lines, self._settled, self._stale, self._versions = {}, set(), set(), []
        self._refuse_loss(sorted(self._settled - keys), "their sources are away or left out now")
        if not self.dry_run and not read_record(self.out, self.layer):
            self._write_record()
        for key in [key for key in self._lines if key not in keys]:
            self._replace_line(key, None)
        i, n = self.part or (0, 1)
        mine = (unit for unit in units if zlib.crc32(unit.key.encode()) % n == i)
        todo = [unit for unit in mine if not self._is_there(unit)]
        self._todo = {unit.key for unit in todo}
        return todo

    def _is_there(self, unit: Unit) -> bool:
        line = self._lines.get(unit.key)
        if line is None:
            return False
        _, origin, sizes, _ = read_line(line)
        return origin == unit.origin and all(has_size(f"{self.out}/{name}", n) for name, n in sizes.items())

    def place(self, unit: Unit, files: Sequence[str], note: Any = None, *, settled: bool = True) -> None:
        """Take a unit that has been made into the tree; each unit of `begin` must come here.

        Args:
            files: paths in the tree, written below `staging`; none: the unit has no place in the tree.
            note: JSON: what its entries in the index need; `notes` gives it back, of kept units too.
            settled: False to have the next run make it again, whatever its origin: something of it was
                damaged or left out, and that may be mended by other means than its sources.
        """
        if (source := unit.changed_source()) is not None:
            raise UserError(f"{source}: changed while the tree was made from it; run again")
        self._todo.discard(unit.key)
        self.n_made += bool(files)
        self.n_anew += bool(files) and unit.key in self._lines
        sizes = {name: 0 if self.dry_run else os.stat(self.staging / name).st_size for name in files}
        line = write_line(unit.key, unit.origin if settled else "", sizes, note)
        if not files or self.dry_run:
            self._replace_line(unit.key, line if files else None)
        elif unit.key in self._settled:
            if line != self._lines.get(unit.key) or not same_files(self.staging, self.out, files):
                self._waiting[unit.key] = line
        else:
            self._move(unit.key, line)

    def _move(self, key: str, line: str) -> None:
        """Staged files into the tree; the journal tells of it before, and when it is done."""
        if self._journal is None:
            self._journal = append_to(self.out / f"{self.name}.journal")
            self._journal.write(json.dumps({"versions": self._new_versions}) + "\n")
            self._add_versions(self._new_versions)
        names = read_line(line)[2]
        self._journal.write(write_line(key, None, names, None) + "\n")
        self._journal.flush()
        replaced = set()
        for name in names:
            staged, target = self.staging / name, self.out / name
            if target.exists():
                if filecmp.cmp(staged, target, shallow=False):
                    staged.unlink()
                    continue
                # A power cut must not leave the old file under the new line.
                os.fsync(self._journal.fileno())
                replaced.add(target.parent)
            move_file(staged, target)
        for directory in replaced:
            fsync_directory(directory)
        self._journal.write(line + "\n")
        self._journal.flush()
        self._replace_line(key, line)

    def notes(self) -> Iterator[tuple[Unit, Any]]:
        """The units that the tree holds, kept and made, with their notes, in the order of `begin`."""
        for unit in self._units:
            line = self._waiting.get(unit.key) or self._lines.get(unit.key)
            if line is not None:
                yield unit, read_line(line)[3]

    # --- finish ------------------------------------------------------------------------------------

    def finish(
        self,
        entries: Callable[[], Iterable[Mapping[str, Any]]],
        record: Mapping[str, Any],
        tables: Mapping[str, Callable[[], Iterable[str]]] | None = None,
    ) -> None:
        """Make the tree whole: files that waited, nothing stale, origins, tables, record and, last, the index;
        each is written only where it differs from what is there.

        Args:
            entries: gives the entries of the index in their order, anew with every call.
            record: what the record holds beside options and versions.
            tables: by name, what gives the lines (with their ends) of further files at the root.
        """
        if self.part is not None or self._todo:
            raise ValueError(f"not all is made: {len(self._todo)} units, part {self.part}")
        if next(iter(entries()), None) is None:
            raise UserError(f"{self.out}: not one entry is left for the tree")
        lines = dict(sorted((self._lines | self._waiting).items()))
        stale = self._find_stale(lines)
        if self.dry_run:
            return
        if self._waiting:
            self._write_record(read_record(self.out, self.layer))
            self._remove_indexes()
            for key, line in self._waiting.items():
                self._move(key, line)
        remove_files(self.out, sorted(stale))
        own = {"options": self.options, "finished": True, "root_files": self.root_files}
        own["origins"] = digest_of(lines.values())
        content = {**own, **record, "made_with": self._versions or [self._new_versions]}
        writes = {
            f"{self.layer}.origins": lambda: (f"{line}\n" for line in lines.values()),
            **(tables or {}),
            f"{self.layer}.json": lambda: [pretty_json(content)],
            self.index: lambda: index_lines(entries()),
        }
        differing = [name for name, make in writes.items() if not has_content(self.out / name, make())]
        if differing:
            remove_files(self.out, [self.index])
            if self.index in differing:  # the layers above hold less than this one then, or other entries
                self._remove_indexes()
            for name, make in writes.items():
                if name in differing or name == self.index:
                    write_parts(self.out / name, make())
        if self._journal is not None:
            self._journal.close()
        for path in (*journal_files(self.out, self.layer), *self.out.glob(f"{LOCK}-{self.layer}-*")):
            path.unlink()
        remove_folder(self.out / STAGING)

    def _remove_indexes(self) -> None:
        """Of this layer and those above, which are not whole while this one changes."""
        for layer in LAYERS[LAYERS.index(self.layer) :]:
            remove_files(self.out, root_files(self.out, layer)[:1])

    def _find_stale(self, lines: Mapping[str, str]) -> set[str]:
        """Files to be removed, as no unit has them any more; UserError if the finished tree has one of them."""
        for key in self._waiting.keys() & self._lines.keys():
            self._stale.update(read_line(self._lines[key])[2])
        lost: set[str] = set()
        origins = origins_file(self.out, self.layer)
        for line in read_lines(origins) if self._settled else ():
            if (now := lines.get(key := key_of(line))) != line:
                lost.update(read_line(line)[2].keys() - (read_line(now)[2].keys() if now else ()))
        for line in lines.values() if lost or self._stale else ():
            names = read_line(line)[2].keys()
            self._stale -= names
            lost -= names
        self._refuse_loss(sorted(lost), "what they are made from can't be used now")
        return set(self._stale)  # a copy: what waits adds to it as it is moved

    def _refuse_loss(self, names: Sequence[str], why: str) -> None:
        if names:
            told = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
            raise UserError(
                f"{self.out}: the finished tree would lose {len(names)} of what it holds, as {why}: {told}; "
                "mend that, choose another --out, or --overwrite to make it afresh without them"
            )

    def _write_record(self, was: Mapping[str, Any] | None = None) -> None:
        """The record of a tree that is not finished: what is known of it, `was`, and how it is to be made."""
        own = {"options": self.options, "finished": False, "root_files": self.root_files}
        write_parts(record_file(self.out, self.layer), [pretty_json({**(was or {}), **own})])

    def _start_afresh(self) -> None:
        """Remove what earlier runs made; killed on the way, any next run goes on removing."""
        begin_removing(self.out, self.layer)
        self._write_record()
        end_removing(self.out)

    def _leave_no_empty_tree(self) -> None:
        """After an error that came before anything was made: nothing of ours stays."""
        held = [origins_file(self.out, self.layer), *journal_files(self.out, self.layer), self.out / REMOVING]
        if self.part is not None or any(path.exists() for path in held):
            return
        if read_record(self.out, self.layer).get("finished"):  # its origins were lost
            return
        remove_folder(self.out / STAGING)
        record_file(self.out, self.layer).unlink(missing_ok=True)
        if self.layer == LAYERS[0]:
            (self.out / LOCK).unlink(missing_ok=True)
            if not self._was_there:
                self.out.rmdir()
