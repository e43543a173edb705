"""Heatmaps that a gaze predictor makes: for the images of a prepared tree, in place, or for loose files.

`fill_tree` makes the layer `gaze` of a tree that `scripts/prepare_mimic.py` made without heatmaps: attention/,
foreground/ and the index that pretraining and the published loader read. `predict_files` writes a heatmap for each
radiograph below a directory. Both find units, which `_make` makes as a run of `datasets.prepare.making`: it goes on where
it was stopped, keeps what is made from the same image by the same predictor, and can be shared among jobs.

An image's prediction does not depend on the images around it: batches are always full, the last one padded, so that
every image is computed by the same kernels, whatever the shares.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.build import IMAGES_INDEX, detect_tree
from datasets.files_by_id import FileIndex
from datasets.mimic import Mimic
from datasets.prepare.heatmaps import LOOSE_INDEX
from datasets.prepare.layout import Unit, finished_lines, origin_of, stamp
from datasets.prepare.making import TreeMaking
from datasets.prepare.pixels import attention_maps, count_significant, write_image
from datasets.prepare.work import Found, Made, PrepareReport, finish_tree, versions
from datasets.raw.readings import Exclusion
from datasets.tree import read_index
from gaze.data import resize_whole
from gaze.metrics import density, resize_density
from util.errors import UserError
from util.images import read_gray, read_map
from util.loading import SampleLoader, ignore_stop_signals
from util.output import Progress
from util.radiograph import MIMIC_CXR_JPG, read_radiograph

LAYER = "gaze"
RADIOGRAPHS = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
PREDICTED, REAL = "predicted", "real"


@dataclass(frozen=True)
class Predictor:
    """A gaze predictor, whatever it is inside.

    Attributes:
        maps: densities, float32 [B, G, G] on the CPU, of images, uint8 [B, 1, S, S].
        input_size: S.
        digest: of all that decides its maps.
    """

    maps: Callable[[Tensor], Tensor]
    input_size: int
    digest: str


class Task(NamedTuple):
    """One image: its file, the files that are made, and the heatmaps of its real readings, if there are any."""

    image: str
    attention: str
    foreground: str | None
    real: tuple[str, ...] = ()


@dataclass(frozen=True)
class How:
    """How units are made.

    Attributes:
        part: (i, n) makes a share, and no index; a run without it makes what is left and writes the index.
        batch_size: images that are predicted at once.
        workers: processes that decode, and threads that write.
        overwrite: replace what another predictor made.
    """

    part: tuple[int, int] | None = None
    batch_size: int = 32
    workers: int = 1
    overwrite: bool = False


def fill_tree(root: Path, predictor: Predictor, *, real: Sequence[Path] = (), **how: Any) -> PrepareReport:
    """Make the heatmaps of a tree of images, or finish those that are there.

    Args:
        root: a tree that holds images alone.
        real: processed trees; an image that is in one of them (by dicom_id) keeps its readings' mean map.
        how: see `How`.

    Returns:
        The report, with what was left out; of a part, the number of images made alone.

    Raises:
        UserError: not such a tree, or one that another predictor has filled.
    """
    root, how = root.resolve(), How(**how)
    if not (root / IMAGES_INDEX).is_file():
        raise UserError(
            f"{root}: no {IMAGES_INDEX} in it, so it is no tree of images alone; `python scripts/prepare_mimic.py "
            f"--images ... --out {root}` makes one"
        )
    if root in (path.resolve() for path in real):
        raise UserError(f"--real {root}: is the tree that is filled; name trees of real readings")
    options = {"source": LAYER, "predictor": predictor.digest}
    with TreeMaking(
        root, options, index=Mimic.index_file, layer=LAYER, part=how.part, overwrite=how.overwrite
    ) as making:
        entries = {os.path.splitext(entry["image_path"])[0]: entry for entry in read_index(root / IMAGES_INDEX)}
        units = list(_tree_units(root, entries, _real_readings(real)))
        found = Found(units, {"images": len(units)}, record={"real": [str(path.resolve()) for path in real]})
        return _make(
            making, found, predictor, how, root, read_gray, lambda unit, kind: {**entries[unit.key], "gaze": kind}
        )


def predict_files(
    images: Path, out: Path, predictor: Predictor, *, dicom_contrast: str = MIMIC_CXR_JPG, **how: Any
) -> PrepareReport:
    """A heatmap of its size for each radiograph (PNG, JPG, DICOM) below `images`: 8-bit gray PNG under the same name
    below `out`; see `fill_tree`. `dicom_contrast`: one of `util.radiograph.CONTRASTS`."""
    images, out, how = images.resolve(), out.resolve(), How(**how)
    if not images.is_dir():
        raise UserError(f"--images {images}: no such directory")
    options = {"source": "predict_gaze", "predictor": predictor.digest, "dicom_contrast": dicom_contrast}
    with TreeMaking(out, options, index=LOOSE_INDEX, part=how.part, overwrite=how.overwrite) as making:
        return _make(
            making,
            _loose_units(images, out),
            predictor,
            how,
            images,
            partial(read_radiograph, contrast=dicom_contrast),
            lambda unit, kind: {"image": unit.task.image, "heatmap": unit.task.attention},
        )


def _dicom_id(entry: Mapping[str, Any]) -> str:
    return str(entry.get("dicom_id") or Path(entry["image_path"]).stem).casefold()


def _tree_units(root: Path, entries: Mapping[str, Any], real: Mapping[str, list[str]]) -> Iterator[Unit]:
    below = finished_lines(root, "prepare")
    for key, entry in entries.items():
        if key not in below:
            raise UserError(f"{root / IMAGES_INDEX}: {key} is not in prepare.origins; prepare the images again")
        readings = tuple(real.get(_dicom_id(entry), ()))
        task = Task(f"files/{entry['image_path']}", f"attention/{key}.png", f"foreground/{key}.png", readings)
        sources = (str(root / task.image), *readings)
        own, *others = stamps = tuple(map(stamp, sources))
        # Without the time of the status: a copy of the tree keeps its heatmaps.
        yield Unit(key, origin_of(origin_of(below[key]), own[:2], others), task, sources, stamps)


def _real_readings(trees: Sequence[Path]) -> dict[str, list[str]]:
    """The heatmaps of each image that the trees have readings of, by `_dicom_id`."""
    found: dict[str, list[str]] = {}
    for path in trees:
        tree_type, root = detect_tree(path)
        tree = tree_type(root.resolve())
        real = [i for i, entry in enumerate(tree.entries) if entry.get("gaze") != PREDICTED]
        if not real:
            raise UserError(f"--real {path}: all its heatmaps are predicted; name trees of real readings")
        for index in real:
            found.setdefault(_dicom_id(tree.entries[index]), []).append(str(tree.files(index).attention))
    return found


def _loose_units(images: Path, out: Path) -> Found:
    units: dict[str, Unit] = {}
    exclusions = []
    for image in FileIndex(images, [out]).files():
        key, suffix = os.path.splitext(image)
        if suffix.lower() not in RADIOGRAPHS:
            continue
        if "*" in key:
            exclusions.append(Exclusion(image, "unusable name", "has * in it", is_fault=True))
        elif key in units:
            detail = f"{units[key].task.image} would have the same heatmap"
            exclusions.append(Exclusion(image, "name taken", detail, is_fault=True))
        else:
            source = f"{images}/{image}"
            own = stamp(source)
            units[key] = Unit(key, origin_of(image, own), Task(image, f"{key}.png", None), (source,), (own,))
    if not units:
        raise UserError(f"--images {images}: no {', '.join(RADIOGRAPHS)} is in it or below")
    return Found([*units.values()], {"images": len(units)}, exclusions, record={"images": str(images)})


class _Sample(NamedTuple):
    """An image as it is read.

    Attributes:
        image: the whole of it at the predictor's size, uint8 [1, S, S]; black if it is unreadable.
        size: its own (height, width).
        real: its real readings' mean map at that size, if it has any.
        fault: what is wrong with it.
    """

    image: Tensor
    size: tuple[int, int] = (0, 0)
    real: Tensor | None = None
    fault: str = ""


class _Images(Dataset):
    def __init__(self, tasks: Sequence[Task], root: Path, read: Callable[[Path], np.ndarray], size: int):
        self.tasks, self.root, self.read, self.size = tasks, root, read, size

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> _Sample:
        task, maps = self.tasks[index], []
        try:
            gray = self.read(self.root / task.image)
            for path in task.real:
                levels = torch.from_numpy(read_map(path))
                if not levels.any():
                    raise UserError(f"{path}: the heatmap is zero everywhere; prepare it again")
                maps.append(resize_density(density(levels)[None], gray.shape))
        except UserError as error:
            return _Sample(torch.zeros(1, self.size, self.size, dtype=torch.uint8), fault=str(error))
        return _Sample(resize_whole(gray, self.size), gray.shape, torch.cat(maps).mean(0) if maps else None)


def _make(
    making: TreeMaking,
    found: Found,
    predictor: Predictor,
    how: How,
    root: Path,
    read: Callable[[Path], np.ndarray],
    entry: Callable[[Unit, str], Mapping[str, Any]],
) -> PrepareReport:
    """Make what is not there yet of images below `root`: processes decode, this one predicts, threads write. Then, unless
    this is a part, write the index; `entry` gives its entries, from a unit and its kind of gaze."""
    todo, batch_size, size = making.begin(found.units, versions()), how.batch_size, predictor.input_size
    loader = SampleLoader(
        _Images([unit.task for unit in todo], root, read, size),
        batch_size=batch_size,
        num_workers=how.workers if len(todo) > batch_size else 0,
        collate_fn=list,
        worker_init_fn=ignore_stop_signals,
    )

    def made_in_order(pool: ThreadPoolExecutor) -> Iterator[Made]:
        """One batch is written while the next one is predicted, and no more than that wait in memory."""
        waiting: Iterator[Made] = iter(())
        for start, batch in zip(range(0, len(todo), batch_size), loader):
            images = torch.zeros(batch_size, 1, size, size, dtype=torch.uint8)
            images[: len(batch)] = torch.stack([sample.image for sample in batch])
            tasks = [unit.task for unit in todo[start : start + batch_size]]
            written = pool.map(partial(_write, making.staging), tasks, predictor.maps(images), batch)
            yield from waiting
            waiting = written
        yield from waiting

    with (
        Progress("predicting", len(todo), "images", enabled=bool(todo)) as steps,
        ThreadPoolExecutor(how.workers) as pool,
    ):
        for unit, made in zip(todo, made_in_order(pool), strict=True):
            found.exclusions += made.exclusions
            making.place(unit, made.files, made.note, settled=not made.exclusions)
            steps.add(1)
    if how.part is not None:
        return PrepareReport({"made by this run": making.n_made}, found.exclusions, [])
    kinds = Counter(note["gaze"] for _, note in making.notes())
    return finish_tree(
        making,
        found,
        lambda: (entry(unit, note["gaze"]) for unit, note in making.notes()),
        {"entries": kinds.total(), "- predicted": kinds[PREDICTED], "- of real readings": kinds[REAL]},
    )


def _write(out: Path, task: Task, predicted: Tensor, sample: _Sample) -> Made:
    if sample.fault:
        return Made(exclusions=[Exclusion(task.image, "unreadable", sample.fault, is_fault=True)])
    is_real = sample.real is not None
    heatmap = sample.real if is_real else resize_density(predicted[None], sample.size)[0]
    attention, foreground = attention_maps(heatmap.numpy())
    made = Made([task.attention], {"gaze": REAL if is_real else PREDICTED})
    write_image(out / task.attention, attention)
    if task.foreground is not None:
        made.note["significant"] = [count_significant(foreground)]
        made.files.append(task.foreground)
        write_image(out / task.foreground, foreground)
    return made
