"""From a raw gaze data set and MIMIC-CXR's images to the processed tree that pretraining reads.

The tree (`out`):
- reflacx.json: list of entries, see `_entry`; written last, so that a tree with it is complete;
- images/<study_id>/<dicom_id>.png, attention/ and foreground/<study_id>/<reflacx_id>.png, 8-bit gray,
  all three of the same size (PNG for the images too: JPG of quality 95 takes two fifths of the room, but
  moves the finest HOG target of a real film by 10% of its energy);
- prepare.json: options, versions, counts and every reading left out, with the reason.

The unit of work is one image with all its readings; it is decoded once and no two processes write
the same file. Nothing depends on the number of processes or on where an earlier run stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import platform
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL
import pydicom
import torch
from PIL import Image
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from datasets.raw.egd import find_egd_root, read_egd
from datasets.raw.findings import merge_findings, unify
from datasets.raw.image_index import find_images
from datasets.raw.readings import Exclusion, RawReadings, Reading, is_simulated
from datasets.raw.reflacx import find_root, read_reflacx
from datasets.transforms import Box, crop_resize_flip, grid_size
from util.errors import UserError
from util.files import TEMPORARY_PREFIX, atomic_write
from util.gaze import fixation_heatmap, heatmap_to_uint8, inside_image, merge_heatmaps
from util.images import write_gray
from util.masking import otsu_foreground, significant_patches
from util.radiograph import radiograph_size, read_radiograph

INDEX, RECORD = "reflacx.json", "prepare.json"
FORMAT = 1
Task, Result = TypeVar("Task"), TypeVar("Result")
PATCH_GRID = 14  # patches per side at 224 px
IMAGES_PER_WORKER = 32  # fewer are not worth starting a process for

# Data set -> (whether a directory holds it, its reader). A further data set is one more line here.
SOURCES: dict[str, tuple[Callable[[Path], Path | None], Callable[..., RawReadings]]] = {
    "reflacx": (find_root, read_reflacx),
    "egd": (find_egd_root, read_egd),
}


@dataclass(frozen=True)
class Options:
    """What decides the pixels and names in the tree; a tree is made with one set of them.

    `size`: short side of the stored images, px, 0 = native; never enlarged. `readings`: one (the
    first usable by id), each, or merge, see `_groups`. `sigma`: EGD-CXR's Gaussian, px of the
    original image (REFLACX brings its own).
    """

    source: str
    size: int = 512
    readings: str = "one"
    sigma: float | None = None


@dataclass
class ImageResult:
    """What came of one image: entries for the index, readings left out, patches, seconds by stage."""

    entries: list[dict] = field(default_factory=list)
    exclusions: list[Exclusion] = field(default_factory=list)
    significant: list[int] = field(default_factory=list)
    n_written: int = 0
    seconds: Counter = field(default_factory=Counter)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start


@dataclass
class PrepareReport:
    """Outcome of `prepare`: counts in the order of the table, and the readings left out."""

    counts: dict[str, int | float]
    exclusions: list[Exclusion]
    notes: list[str]
    seconds: Counter
    dry_run: bool

    @property
    def faults(self) -> list[Exclusion]:
        return [exclusion for exclusion in self.exclusions if exclusion.is_fault]

    def __str__(self) -> str:
        width = max(map(len, self.counts))
        lines = [f"{name:<{width}}  {value:>8,}" for name, value in self.counts.items()]
        lines += [f"note: {note}" for note in self.notes]
        listed = [exclusion for exclusion in self.exclusions if exclusion.detail]
        if listed:
            lines.append("left out:")
            lines += [f"  {exclusion.id}: {exclusion.reason}: {exclusion.detail}" for exclusion in listed]
        return "\n".join(lines)


def detect_source(raw: Path) -> str:
    """Name of the data set that `raw` holds."""
    if not raw.is_dir():
        raise UserError(f"{raw}: no such directory; --raw is the root of the gaze data set")
    for name, (find, _) in SOURCES.items():
        if find(raw) is not None:
            return name
    raise UserError(
        f"{raw}: neither REFLACX (main_data/metadata_phase_*.csv) nor EGD-CXR (master_sheet.csv) is here "
        "or one directory below"
    )


def prepare(
    raw: Path,
    images: Path,
    out: Path,
    *,
    source: str | None = None,
    size: int = 512,
    readings: str = "one",
    split: str = "all",
    sigma: float = 150.0,
    workers: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
) -> PrepareReport:
    """Build the processed tree in `out`, or finish or check the one that is there.

    Raises `UserError` where nothing sensible can be done; a single bad file or reading is reported.
    """
    raw, images = raw.absolute(), images.absolute()  # the record is the same from wherever it is run
    source = source or detect_source(raw)
    if size < 0:
        raise UserError(f"--size {size} is negative; 0 keeps the native size")
    reader_options = {"sigma": sigma} if source == "egd" else {}
    options = Options(source, size, readings, **reader_options)
    found = SOURCES[source][1](raw, **reader_options)
    chosen = [reading for reading in found.readings if split in ("all", reading.split)]
    if not chosen:
        raise UserError(f"{raw}: no usable reading of split {split!r} ({found.n_found} in all)")
    n_other_split = len(found.readings) - len(chosen)
    exclusions = list(found.exclusions)

    paths = find_images(images, {reading.image_id: reading.image_path for reading in chosen})
    by_image: dict[str, list[Reading]] = {}
    for reading in chosen:
        if reading.image_id in paths:
            by_image.setdefault(reading.image_id, []).append(reading)
        else:
            detail = f"no {reading.image_id}.jpg, .png or .dcm under {images}"
            exclusions.append(Exclusion(reading.id, "image missing", detail))
    if not by_image:
        raise UserError(f"{images}: holds none of the {len(chosen)} readings' images (<dicom_id>.jpg, .dcm)")
    tasks = [(paths[image_id], group) for image_id, group in by_image.items()]

    with output_tree(out, options, overwrite=overwrite, dry_run=dry_run):
        work = partial(process_image, out=out, options=options, dry_run=dry_run)
        results = list(run_tasks(work, tasks, workers))
        entries = sorted((e for r in results for e in r.entries), key=lambda entry: entry["reflacx_id"])
        if is_simulated(SOURCES[source][0](raw)):
            entries = [entry | {"simulated": True} for entry in entries]
        exclusions += (exclusion for result in results for exclusion in result.exclusions)
        exclusions.sort(key=lambda exclusion: (exclusion.id, exclusion.reason))
        significant = [n for result in results for n in result.significant]
        n_used = sum(len(entry["raw_ids"]) for entry in entries)
        reasons = Counter(exclusion.reason for exclusion in exclusions)
        counts: dict[str, int | float] = {"readings found": found.n_found}
        counts |= {f"- {reason}": n for reason, n in sorted(reasons.items())}
        counts |= {
            "- of another split": n_other_split,
            "- further readings of an image, not needed": found.n_found
            - sum(reasons.values()) - n_other_split - n_used,
            "readings used": n_used,
            "images": len({entry["image_path"] for entry in entries}),
            "entries": len(entries),
        }  # fmt: skip
        if significant:
            counts["mean significant patches of 196"] = round(float(np.mean(significant)), 2)
        seconds = sum((result.seconds for result in results), Counter())
        if not dry_run:
            record = {
                "options": options_record(options),
                "finished": True,
                "split": split,
                "raw": str(raw),
                "images": str(images),
                "versions": versions(),
                "counts": counts,
                "notes": found.notes,
                "left_out": [asdict(exclusion) for exclusion in exclusions],
            }
            write_json(out / RECORD, record)
            write_json(out / INDEX, entries)
            counts["map files written by this run"] = sum(result.n_written for result in results)
    return PrepareReport(counts, exclusions, found.notes, seconds, dry_run)


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, *, name: str = "prepare"
) -> Iterator[Result]:
    """`function` of each task, in order, with a progress bar called `name`."""
    workers = min(workers, len(tasks) // IMAGES_PER_WORKER)
    progress = partial(tqdm, total=len(tasks), desc=name, disable=None)
    if workers <= 1:
        yield from progress(map(function, tasks))
        return
    # A plain fork would copy torch's thread pool in an unusable state.
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield from progress(pool.map(function, tasks, chunksize=4))
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most likely for lack of memory; run again with fewer --workers, "
            "what is done stays"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Each worker is one of many: neither torch nor NumPy's BLAS may start threads of its own; and it
    ends with the program that started it, however that ends."""
    torch.set_num_threads(1)
    threadpool_limits(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Workers hold each other's queue open: without this they wait for ever once the parent was killed.
    multiprocessing.parent_process().join()
    os._exit(1)


def process_image(
    task: tuple[Path, list[Reading]], *, out: Path, options: Options, dry_run: bool
) -> ImageResult:
    """Work out one image and its readings, and write what is not there yet.

    The maps are computed even where their files exist: it is cheap, and so a second run, or a dry one,
    finds the same faults and counts as the first (a dry one reads no pixels of images).
    """
    path, readings = task
    result = ImageResult()
    try:
        file_size = radiograph_size(path)
    except UserError as error:
        return _leave_out(result, readings, "image unreadable", error)
    out_size = scaled_size(file_size, options.size)

    mapped: list[tuple[Reading, np.ndarray]] = []
    for reading in readings:
        with result.timed("heatmaps"):
            heatmap = reading_heatmap(reading, path, file_size, out_size)
        if isinstance(heatmap, Exclusion):
            result.exclusions.append(heatmap)
            continue
        mapped.append((reading, heatmap))
        if options.readings == "one":
            break
    if not mapped:
        return result
    if options.readings == "merge" and len({reading.split for reading, _ in mapped}) > 1:
        splits = ", ".join(f"{reading.id} {reading.split}" for reading, _ in mapped)
        error = UserError(f"{splits}: to be merged, but of different splits; choose one with --split")
        return _leave_out(result, [reading for reading, _ in mapped], "splits differ", error)

    image_path = f"images/{mapped[0][0].study_id}/{mapped[0][0].image_id}.png"
    if not dry_run and not (out / image_path).exists():
        try:
            with result.timed("decoding"):
                gray = read_radiograph(path)
        except UserError as error:
            return _leave_out(result, [reading for reading, _ in mapped], "image unreadable", error)
        with result.timed("resizing"):
            gray = resize_gray(gray, out_size)
        with result.timed("writing images"):
            write_image(out / image_path, gray)
    for group in [mapped] if options.readings == "merge" else [[pair] for pair in mapped]:
        entry = _entry([reading for reading, _ in group], image_path)
        with result.timed("foreground"):
            attention, foreground = attention_maps(merge_heatmaps([heatmap for _, heatmap in group]))
            result.significant.append(count_significant(foreground))
        result.entries.append(entry)
        name = f"{entry['study_id']}/{entry['reflacx_id']}.png"
        for kind, pixels in (("attention", attention), ("foreground", foreground)):
            if not dry_run and not (out / kind / name).exists():
                result.n_written += 1
                with result.timed("writing maps"):
                    write_image(out / kind / name, pixels)
    return result


def reading_heatmap(
    reading: Reading, path: Path, file_size: tuple[int, int], out_size: tuple[int, int]
) -> np.ndarray | Exclusion:
    """Gaze map of one reading, float64 [H, W] of `out_size` (height, width), or why there is none."""
    if reading.image_size and max(abs(a - b) for a, b in zip(reading.image_size, file_size)) > 1:
        expected = "{1} x {0}".format(*reading.image_size)
        detail = f"{path}: is {file_size[1]} x {file_size[0]} px, the readings were made on {expected}"
        return Exclusion(reading.id, "image size differs", detail, is_fault=True)
    try:
        fixations = replace(reading, image_size=file_size).load_fixations()
        lasting = fixations[fixations["duration"] > 0]
        if lasting.empty:
            detail = f"{reading.fixations_path}: none of positive duration"
            return Exclusion(reading.id, "no fixations", detail)
        if not inside_image(lasting, file_size).any():
            detail = f"{reading.fixations_path}: all {len(lasting)} lie outside the image"
            return Exclusion(reading.id, "all fixations outside", detail)
        return fixation_heatmap(lasting, file_size, out_size)
    except UserError as error:
        where = "" if str(reading.fixations_path) in str(error) else f"{reading.fixations_path}: "
        return Exclusion(reading.id, "unusable fixations", f"{where}{error}", is_fault=True)


def _leave_out(
    result: ImageResult, readings: Sequence[Reading], reason: str, error: UserError
) -> ImageResult:
    result.exclusions += [Exclusion(reading.id, reason, str(error), is_fault=True) for reading in readings]
    return result


def _entry(readings: Sequence[Reading], image_path: str) -> dict:
    """Entry of reflacx.json for one reading, or for several merged, in the order of their ids.

    `reflacx_id` is the reading's id; merged, the first one's id + how many more ("P101R000001+4").
    `raw_ids` lists them all. `labels` are the common findings of datasets/findings.py. Of merged
    readings `phase` is the first one's.
    """
    first = readings[0]
    labels = [unify(reading.labels) for reading in readings]
    return {
        "image_path": image_path,
        "study_id": first.study_id,
        "reflacx_id": first.id if len(readings) == 1 else f"{first.id}+{len(readings) - 1}",
        "raw_ids": [reading.id for reading in readings],
        "dicom_id": first.image_id,
        "subject_id": first.subject_id,
        "phase": first.phase,
        "split": first.split,
        "source": first.source,
        "labels": labels[0] if len(labels) == 1 else merge_findings(labels),
    }


def scaled_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width) with the short side `short_side`, aspect ratio kept; unchanged where that would
    enlarge, and for `short_side` 0."""
    return size if short_side == 0 else grid_size(*size, short_side)


def resize_gray(gray: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W] resized to (height, width) `size`, bicubic with antialiasing."""
    return crop_resize_flip([gray], Box(0, 0, *gray.shape), size)[0].numpy()


def attention_maps(heatmap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stored attention and foreground (0/255) of a heatmap [H, W] >= 0: uint8 [H, W] each."""
    attention = heatmap_to_uint8(heatmap)
    foreground = otsu_foreground(torch.from_numpy(attention)[None])[0].numpy()
    return attention, foreground * np.uint8(255)


def count_significant(foreground: np.ndarray) -> int:
    """Significant patches of 196 when the whole map, uint8 [H, W] 0/255, is seen at 224 x 224 px."""
    side = 16 * PATCH_GRID
    seen = Image.fromarray(foreground).resize((side, side), Image.Resampling.BOX)
    return int(significant_patches(torch.from_numpy(np.array(seen))[None] >= 128, 16).sum())


@contextlib.contextmanager
def output_tree(
    out: Path,
    options: Options,
    *,
    overwrite: bool,
    dry_run: bool,
    index: str = INDEX,
    folders: Sequence[str] = ("images", "attention", "foreground"),
) -> Iterator[None]:
    """Hold `out` for one run: refuse a tree of other options or of another program, start afresh with
    `overwrite`, clear what a killed run left half-written. `options` may be any dataclass; the tree
    is the file `index` and the `folders`."""
    record_path = out / RECORD
    earlier = None
    if record_path.exists():
        try:
            earlier = json.loads(record_path.read_text())
            earlier["options"].items()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{record_path}: not the record this script writes ({error}); choose another --out"
            ) from error
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    if earlier is None and not all(name.startswith(TEMPORARY_PREFIX) for name in names):
        raise UserError(f"{out}: not empty and not made by this script (no {RECORD}); choose another --out")
    if earlier is not None and not overwrite and earlier["options"] != options_record(options):
        was = ", ".join(f"{key} {value}" for key, value in earlier["options"].items() if value is not None)
        raise UserError(
            f"{out}: was prepared with other options ({was}); choose another --out, "
            "or --overwrite to replace it"
        )
    if dry_run:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another run is preparing it; wait or choose another --out") from None
        try:
            if overwrite and earlier is not None:
                (out / index).unlink(missing_ok=True)
                for kind in folders:
                    shutil.rmtree(out / kind, ignore_errors=True)
            if overwrite or earlier is None:
                write_json(record_path, {"options": options_record(options), "finished": False})
            for half_written in out.rglob(f"{TEMPORARY_PREFIX}*"):
                half_written.unlink()
            yield
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror})") from error


def options_record(options: Options) -> dict:
    return {"format": FORMAT, **asdict(options)}


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "pydicom": pydicom.__version__,
        "torch": torch.__version__,
    }


def write_image(path: Path, gray: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gray(path, gray)


def write_json(path: Path, content: object) -> None:
    """Write unless the file has this very content already."""
    data = (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
    if not path.exists() or path.read_bytes() != data:
        with atomic_write(path) as file:
            file.write(data)
