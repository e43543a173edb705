"""Heatmaps that a gaze predictor makes: for the images of a prepared tree, in place, or for loose files.

`fill_tree` makes the layer `gaze` of a tree that `scripts/prepare_mimic.py` made without heatmaps: attention/,
foreground/ and the index that pretraining and the published loader read. `predict_files` writes a heatmap for each
radiograph below a directory. Both find units, which `_make` makes as a run of `datasets.prepare.store`: it goes on where
it was stopped, and keeps what is made from the same image by the same predictor.

An image's prediction does not depend on the images around it: batches are always full, the last one padded, so that
every image is computed by the same kernels, wherever a run was stopped.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.build import IMAGES_INDEX, detect_tree
from datasets.files_by_id import files_below
from datasets.mimic import Mimic
from datasets.prepare.heatmaps import LOOSE_INDEX
from datasets.prepare.pixels import attention_maps, count_significant, write_image
from datasets.prepare.store import TreeMaking, finished_lines
from datasets.prepare.units import Made, Report, Unit, origin_of, stamp
from datasets.raw.readings import Exclusion
from datasets.tree import read_index
from gaze.data import resize_whole
from gaze.metrics import density, resize_density
from util.errors import UserError
from util.images import read_gray, read_map
from util.output import Progress
from util.radiograph import MIMIC_CXR_JPG, read_radiograph

LAYER = "gaze"
RADIOGRAPHS = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
PREDICTED, REAL = "predicted", "real"


class Predictor(NamedTuple):
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
    """What is made of one image: the files, its heatmap and in a tree the foreground; and its entry in the index, to
    which the kind of gaze is added. The sources of its `Unit` are the image's file and the heatmaps of its real readings,
    if there are any."""

    files: tuple[str, ...]
    entry: Mapping[str, Any]


def fill_tree(
    root: Path, predictor: Predictor, *, real: Sequence[Path] = (), overwrite: bool = False, **how: int
) -> Report:
    """Make the heatmaps of a tree of images, or finish those that are there.

    Args:
        root: a tree that holds images alone.
        real: processed trees; an image that is in one of them (by dicom_id) keeps its readings' mean map.
        overwrite: replace what another predictor made.
        how: batch_size, images that are predicted at once; workers, threads that read and write.

    Returns:
        The report, with what was left out.

    Raises:
        UserError: not such a tree, or one that another predictor has filled.
    """
    root = root.resolve()
    if not (root / IMAGES_INDEX).is_file():
        raise UserError(
            f"{root}: no {IMAGES_INDEX} in it, so it is no tree of images alone; `python scripts/prepare_mimic.py "
            f"--images ... --out {root}` makes one"
        )
    options = {"source": LAYER, "predictor": predictor.digest}
    with TreeMaking(root, options, index=Mimic.index_file, layer=LAYER, overwrite=overwrite).running() as making:
        units = _tree_units(root, _real_readings(real))
        report = Report(units, {"images": len(units)}, record={"real": [path.resolve() for path in real]})
        return _make(making, report, predictor, read_gray, **how)


def predict_files(
    images: Path,
    out: Path,
    predictor: Predictor,
    *,
    dicom_contrast: str = MIMIC_CXR_JPG,
    overwrite: bool = False,
    **how: int,
) -> Report:
    """A heatmap of its size for each radiograph (PNG, JPG, DICOM) below `images`: 8-bit gray PNG under the same name
    below `out`; see `fill_tree`. `dicom_contrast`: one of `util.radiograph.CONTRASTS`."""
    images, out = images.resolve(), out.resolve()
    if not images.is_dir():
        raise UserError(f"--images {images}: no such directory")
    options = {"source": "predict_gaze", "predictor": predictor.digest, "dicom_contrast": dicom_contrast}
    with TreeMaking(out, options, index=LOOSE_INDEX, overwrite=overwrite).running() as making:
        units = _loose_units(images, out)
        report = Report(units, {"images": len(units)}, record={"images": images})
        return _make(making, report, predictor, partial(read_radiograph, contrast=dicom_contrast), **how)


def _tree_units(root: Path, real: Mapping[str, list[str]]) -> list[Unit]:
    below, units = finished_lines(root, "prepare"), []
    for entry in read_index(root / IMAGES_INDEX):
        key = os.path.splitext(entry["image_path"])[0]
        sources = (f"{root}/files/{entry['image_path']}", *real.get(Path(key).name, ()))
        own, *others = stamps = tuple(map(stamp, sources))
        task = Task((f"attention/{key}.png", f"foreground/{key}.png"), entry)
        # Without the time of the status: a copy of the tree keeps its heatmaps.
        units.append(Unit(key, origin_of(origin_of(below[key]), own[:2], others), task, sources, stamps))
    return units


def _real_readings(trees: Sequence[Path]) -> dict[str, list[str]]:
    """The heatmaps of each image that the trees have readings of, by its dicom_id."""
    found: dict[str, list[str]] = {}
    for tree_type, root in map(detect_tree, trees):
        tree = tree_type(root.resolve())
        for index, entry in enumerate(tree.entries):
            if entry.get("gaze") != PREDICTED:
                dicom_id = Path(entry["image_path"]).stem
                found.setdefault(dicom_id, []).append(str(tree.files(index).attention))
    return found


def _loose_units(images: Path, out: Path) -> list[Unit]:
    found: dict[str, Unit] = {}
    for image in files_below(images, [out]):
        key, suffix = os.path.splitext(image)
        if suffix.lower() not in RADIOGRAPHS:
            continue
        source, heatmap = f"{images}/{image}", f"{key}.png"
        if key in found:
            raise UserError(f"{source}: {found[key].sources[0]} would have the same heatmap, {heatmap}; rename one")
        own = stamp(source)
        task = Task((heatmap,), {"image": image, "heatmap": heatmap})
        found[key] = Unit(key, origin_of(image, own), task, (source,), (own,))
    if not found:
        raise UserError(f"--images {images}: no {', '.join(RADIOGRAPHS)} is in it or below")
    return [*found.values()]


def _make(
    making: TreeMaking,
    report: Report,
    predictor: Predictor,
    read: Callable[[str], np.ndarray],
    *,
    batch_size: int = 32,
    workers: int = 1,
) -> Report:
    """Make what is not there yet: threads read the images by `read` and write, this one predicts. Then write the index."""
    todo, side = making.begin(report), predictor.input_size
    progress = Progress("predicting", len(todo), "images")
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(todo), batch_size):
            units = todo[start : start + batch_size]
            samples = [*pool.map(partial(_read, read, side), units)]
            images = torch.zeros(batch_size, 1, side, side, dtype=torch.uint8)
            for image, sample in zip(images, samples):
                if not isinstance(sample, UserError):
                    image.copy_(sample[0])
            written = pool.map(partial(_write, making.staging), units, predictor.maps(images), samples)
            for unit, made in zip(units, written, strict=True):
                making.place(unit, made)
                progress.add(1)
    kinds = Counter(note["gaze"] for _, note in making.notes())
    return making.finish(
        ({**unit.task.entry, "gaze": note["gaze"]} for unit, note in making.notes()),
        {"entries": kinds.total(), "- predicted": kinds[PREDICTED], "- of real readings": kinds[REAL]},
    )


def _read(read: Callable[[str], np.ndarray], side: int, unit: Unit) -> tuple | UserError:
    """The whole image at the predictor's size, uint8 [1, S, S]; its own (height, width); its real readings' mean map at
    that size, None if it has none. Or what is wrong with it."""
    image, *readings = unit.sources
    try:
        gray, maps = read(image), []
        for path in readings:
            levels = torch.from_numpy(read_map(path))
            if not levels.any():
                raise UserError(f"{path}: the heatmap is zero everywhere; prepare it again")
            maps.append(resize_density(density(levels)[None], gray.shape))
    except UserError as error:
        return error
    return resize_whole(gray, side), gray.shape, torch.cat(maps).mean(0) if maps else None


def _write(out: Path, unit: Unit, predicted: Tensor, sample: tuple | UserError) -> Made:
    if isinstance(sample, UserError):
        return Made(exclusions=[Exclusion(unit.key, "unreadable", str(sample), is_fault=True)])
    _, size, heatmap = sample
    kind = PREDICTED if heatmap is None else REAL
    if heatmap is None:
        heatmap = resize_density(predicted[None], size)[0]
    planes = attention_maps(heatmap.numpy())
    files = unit.task.files
    for file, plane in zip(files, planes):
        write_image(out / file, plane)
    significant = {"significant": [count_significant(planes[1])]} if files[1:] else {}
    return Made([*files], {"gaze": kind} | significant)
