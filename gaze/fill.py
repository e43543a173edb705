"""Heatmaps that a gaze predictor makes: for the images of a prepared tree, in place, or for loose files.

`fill_tree` makes the layer `gaze` of a tree that `scripts/prepare_mimic.py` made without heatmaps: attention/,
foreground/ and the index that pretraining and the published loader read. `predict_files` writes a heatmap for each
radiograph below a directory. Both are runs of `datasets.prepare.making`: they go on where they were stopped, keep what
is made from the same image by the same predictor, and can be shared among jobs.

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
from datasets.prepare.layout import Unit, finished_lines, origin_of, read_record, stamp
from datasets.prepare.making import TreeMaking
from datasets.prepare.pixels import attention_maps, count_significant, write_image
from datasets.prepare.work import Found, Made, PrepareReport, finish_tree, versions
from datasets.raw.readings import Exclusion
from datasets.tree import read_index
from gaze.data import resize_whole
from gaze.metrics import resize_density
from util.errors import UserError
from util.images import read_gray, read_map
from util.loading import SampleLoader, ignore_stop_signals
from util.output import Progress
from util.radiograph import MIMIC_CXR_JPG, read_radiograph

LAYER = "gaze"
RADIOGRAPHS = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
PREDICTED, REAL = "predicted", "real"

Read = Callable[[Path], np.ndarray]  # a file as uint8 [H, W]


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


def fill_tree(
    root: Path,
    predictor: Predictor,
    *,
    real: Sequence[Path] = (),
    part: tuple[int, int] | None = None,
    batch_size: int = 32,
    workers: int = 1,
    overwrite: bool = False,
) -> PrepareReport:
    """Make the heatmaps of a tree of images, or finish those that are there.

    Args:
        root: a tree that holds images alone.
        real: processed trees; an image that is in one of them (by dicom_id) keeps its readings' mean map.
        part: (i, n) makes a share, and no index; a run without it makes what is left and writes the index.
        workers: processes that decode and threads that write.

    Returns:
        The report, with what was left out; of a part with the number of images made alone.

    Raises:
        UserError: not such a tree, or one that another predictor has filled.
    """
    root = root.resolve()
    if not (root / IMAGES_INDEX).is_file():
        if read_record(root) and (root / Mimic.index_file).is_file():
            raise UserError(f"{root}: has heatmaps of its own; predictions go into a tree of images alone")
        raise UserError(
            f"{root}: no {IMAGES_INDEX} in it; `python scripts/prepare_mimic.py --images ... --out {root}` makes a "
            "tree of images"
        )
    if root in (path.resolve() for path in real):
        raise UserError(f"--real {root}: is the tree that is filled; name trees of real readings")
    options = {"source": LAYER, "predictor": predictor.digest}
    with TreeMaking(root, options, index=Mimic.index_file, layer=LAYER, part=part, overwrite=overwrite) as making:
        entries = {os.path.splitext(entry["image_path"])[0]: entry for entry in read_index(root / IMAGES_INDEX)}
        units = list(_tree_units(root, entries, _real_readings(real)))
        found = Found(units, {"images": len(units)}, record={"real": [str(path.resolve()) for path in real]})
        _make(making, found, predictor, root, read_gray, batch_size, workers)
        if part is not None:
            return _part_report(making, found)
        kinds = Counter(note["gaze"] for _, note in making.notes())
        return finish_tree(
            making,
            found,
            lambda: ({**entries[unit.key], "gaze": note["gaze"]} for unit, note in making.notes()),
            {"entries": kinds.total(), "- predicted": kinds[PREDICTED], "- of real readings": kinds[REAL]},
        )


def predict_files(
    images: Path,
    out: Path,
    predictor: Predictor,
    *,
    dicom_contrast: str = MIMIC_CXR_JPG,
    part: tuple[int, int] | None = None,
    batch_size: int = 32,
    workers: int = 1,
    overwrite: bool = False,
) -> PrepareReport:
    """A heatmap of its size for each radiograph (PNG, JPG, DICOM) below `images`: 8-bit gray PNG under the same name
    below `out`; see `fill_tree`. `dicom_contrast`: one of `util.radiograph.CONTRASTS`."""
    images, out = images.resolve(), out.resolve()
    if not images.is_dir():
        raise UserError(f"--images {images}: no such directory")
    options = {"source": "predict_gaze", "predictor": predictor.digest, "dicom_contrast": dicom_contrast}
    sources = FileIndex(images, [out])
    with TreeMaking(out, options, index=LOOSE_INDEX, part=part, overwrite=overwrite) as making:
        exclusions: list[Exclusion] = []
        units = list(_loose_units(images, sources, exclusions))
        if not units:
            raise UserError(f"--images {images}: no {', '.join(RADIOGRAPHS)} is in it or below")
        found = Found(units, {"images": len(units)}, exclusions, record={"images": str(images)})
        read = partial(read_radiograph, contrast=dicom_contrast)
        _make(making, found, predictor, images, read, batch_size, workers)
        if part is not None:
            return _part_report(making, found)
        return finish_tree(
            making,
            found,
            lambda: ({"image": unit.task.image, "heatmap": unit.task.attention} for unit, _ in making.notes()),
            {"heatmaps": sum(1 for _ in making.notes())},
        )


def _dicom_id(entry: Mapping[str, Any]) -> str:
    return str(entry.get("dicom_id") or Path(entry["image_path"]).stem)


def _tree_units(root: Path, entries: Mapping[str, Any], real: Mapping[str, tuple[str, ...]]) -> Iterator[Unit]:
    below = finished_lines(root, "prepare")
    for key, entry in entries.items():
        if key not in below:
            raise UserError(f"{root / IMAGES_INDEX}: {key} is not in prepare.origins; prepare the images again")
        readings = real.get(_dicom_id(entry).casefold(), ())
        task = Task(f"files/{entry['image_path']}", f"attention/{key}.png", f"foreground/{key}.png", readings)
        sources = (str(root / task.image), *readings)
        own, *others = stamps = tuple(map(stamp, sources))
        # Without the time of the status: a copy of the tree keeps its heatmaps.
        yield Unit(key, origin_of(origin_of(below[key]), own[:2], others), task, sources, stamps)


def _real_readings(trees: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    """The heatmaps of each image that the trees have readings of, by dicom_id, in small letters."""
    found: dict[str, list[str]] = {}
    for path in trees:
        tree_type, root = detect_tree(path)
        tree = tree_type(root.resolve())
        real = [i for i, entry in enumerate(tree.entries) if entry.get("gaze") != PREDICTED]
        if not real:
            raise UserError(f"--real {path}: all its heatmaps are predicted; name trees of real readings")
        for index in real:
            name = _dicom_id(tree.entries[index]).casefold()
            found.setdefault(name, []).append(str(tree.files(index).attention))
    return {name: tuple(paths) for name, paths in found.items()}


def _loose_units(images: Path, sources: FileIndex, exclusions: list[Exclusion]) -> Iterator[Unit]:
    taken: dict[str, str] = {}
    for image in sources.files():
        key, suffix = os.path.splitext(image)
        if suffix.lower() not in RADIOGRAPHS:
            continue
        if "*" in key:
            exclusions.append(Exclusion(image, "unusable name", "has * in it", is_fault=True))
        elif key in taken:
            detail = f"{taken[key]} would have the same heatmap"
            exclusions.append(Exclusion(image, "name taken", detail, is_fault=True))
        else:
            taken[key] = image
            source = f"{images}/{image}"
            own = stamp(source)
            yield Unit(key, origin_of(image, own), Task(image, f"{key}.png", None), (source,), (own,))


class _Images(Dataset):
    """Images to predict: the whole image at the predictor's size, or what is wrong with it."""

    def __init__(self, root: Path, tasks: Sequence[Task], read: Read, size: int):
        self.root, self.tasks, self.read, self.size = root, tasks, read, size

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> tuple[Tensor | None, tuple[int, int], str]:
        task = self.tasks[index]
        try:
            gray = self.read(self.root / task.image)
        except UserError as error:
            return None, (0, 0), str(error)
        return resize_whole(gray, self.size), gray.shape, ""


def _make(
    making: TreeMaking, found: Found, predictor: Predictor, root: Path, read: Read, batch_size: int, workers: int
) -> None:
    """Make what is not there yet: processes decode, this one predicts, threads write."""
    units = making.begin(found.units, versions())
    todo, real = ([unit for unit in units if bool(unit.task.real) == is_real] for is_real in (False, True))
    loader = SampleLoader(
        _Images(root, [unit.task for unit in todo], read, predictor.input_size),
        batch_size=batch_size,
        num_workers=workers if len(todo) > batch_size else 0,
        collate_fn=list,
        worker_init_fn=ignore_stop_signals,
    )

    def made_in_order(pool: ThreadPoolExecutor) -> Iterator[Made]:
        """One batch is written while the next one is predicted, and no more than that wait in memory."""
        waiting: Iterator[Made] = iter(())
        for start, batch in zip(range(0, len(todo), batch_size), loader):
            maps = _predict(batch, predictor, batch_size)
            written = pool.map(partial(_write, making.staging), todo[start : start + batch_size], maps, batch)
            yield from waiting
            waiting = written
        yield from waiting
        for start in range(0, len(real), batch_size):
            yield from pool.map(partial(_keep_real, making.staging, root), real[start : start + batch_size])

    with (
        Progress("predicting", len(units), "images", enabled=bool(units)) as steps,
        ThreadPoolExecutor(workers) as pool,
    ):
        for unit, made in zip([*todo, *real], made_in_order(pool), strict=True):
            found.exclusions += made.exclusions
            making.place(unit, made.files, made.note, settled=not made.exclusions)
            steps.add(1)


def _predict(batch: Sequence[tuple], predictor: Predictor, batch_size: int) -> list[Tensor]:
    """The map [G, G] of each image of a batch, padded to a full one; an unreadable image has that of a black one."""
    size = predictor.input_size
    images = torch.zeros(batch_size, 1, size, size, dtype=torch.uint8)
    for place, (image, _, _) in enumerate(batch):
        if image is not None:
            images[place] = image
    return list(predictor.maps(images)[: len(batch)])


def _write(out: Path, unit: Unit, density: Tensor, sample: tuple) -> Made:
    _, size, fault = sample
    if fault:
        return Made(exclusions=[Exclusion(unit.task.image, "unreadable", fault, is_fault=True)])
    return _write_maps(unit.task, resize_density(density[None], size)[0].numpy(), PREDICTED, out)


def _keep_real(out: Path, root: Path, unit: Unit) -> Made:
    """The mean map of an image's real readings, at the image's size."""
    task, readings = unit.task, []
    try:
        size = read_gray(root / task.image).shape
        for path in task.real:
            levels = read_map(path)
            if not levels.any():
                raise UserError(f"{path}: the heatmap is zero everywhere; prepare it again")
            readings.append(torch.from_numpy(levels))
    except UserError as error:
        return Made(exclusions=[Exclusion(task.image, "unreadable", str(error), is_fault=True)])
    if len(readings) == 1 and readings[0].shape == size:
        return _write_maps(task, readings[0].numpy(), REAL, out)
    maps = [resize_density(levels[None].double() / levels.double().sum(), size) for levels in readings]
    return _write_maps(task, torch.cat(maps).mean(0).numpy(), REAL, out)


def _write_maps(task: Task, heatmap: np.ndarray, kind: str, out: Path) -> Made:
    made = Made(note={"gaze": kind})
    attention, foreground = attention_maps(heatmap)
    write_image(out / task.attention, attention)
    made.files.append(task.attention)
    if task.foreground is not None:
        made.note["significant"] = [count_significant(foreground)]
        write_image(out / task.foreground, foreground)
        made.files.append(task.foreground)
    return made


def _part_report(making: TreeMaking, found: Found) -> PrepareReport:
    return PrepareReport({"made by this run": making.n_made}, found.exclusions, [])
