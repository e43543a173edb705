"""From MIMIC-CXR and heatmaps made elsewhere (a gaze predictor's) to the MIMIC tree of pretraining.

The tree (`out`), read by `datasets.mimic.Mimic`:
- mimic-cxr-jpg-cleanv4.json: list of entries; written last, so that a tree with it is complete;
- files/pNN/p<subject>/s<study>/<dicom_id>.jpg, and below attention/ and foreground/ the same path,
  files/ included, with .png; 8-bit gray, all three of one size;
- prepare.json: options, versions, counts and every heatmap left out, with the reason.

The images are JPG (quality 95): the source is JPG already, and at 512 px a PNG takes 2.4 times the
space (125 against 52 kB for a real film), which for 240,000 images matters. The machinery is that of
`datasets.prepare.readings`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from datasets.mimic import Mimic
from datasets.prepare.readings import (
    RECORD,
    ImageResult,
    PrepareReport,
    attention_maps,
    count_significant,
    options_record,
    output_tree,
    resize_gray,
    run_tasks,
    scaled_size,
    versions,
    write_image,
    write_json,
)
from datasets.raw.image_index import find_images
from datasets.raw.readings import Exclusion
from util.errors import UserError
from util.images import read_gray
from util.radiograph import radiograph_size, read_radiograph
from util.tables import check_id, read_table

INDEX = Mimic.index_file
FRONTAL = ("AP", "PA")
METADATA_NAMES = ("mimic-cxr-2.0.0-metadata.csv.gz", "mimic-cxr-2.0.0-metadata.csv")
HEATMAP_SUFFIXES = (".png", ".npy")
_METADATA_COLUMNS = ("dicom_id", "subject_id", "study_id", "ViewPosition")
_DICOM_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{8}){4}")


@dataclass(frozen=True)
class MimicOptions:
    """What decides the pixels and names in the tree. `size`: short side of the images, px, 0 = native;
    never enlarged."""

    source: str = "mimic"
    size: int = 512


@dataclass(frozen=True)
class MimicTask:
    """One image to store: where it and its heatmap are, and what the metadata says of it."""

    dicom_id: str
    subject_id: str
    study_id: str
    view: str
    image: Path
    heatmap: Path

    @property
    def image_path(self) -> str:
        return f"{_study_directory(self.subject_id, self.study_id)}/{self.dicom_id}.jpg"


def find_heatmaps(root: Path) -> tuple[dict[str, Path], list[Exclusion]]:
    """Heatmap files (.png, .npy) below `root` by dicom_id, which is in the file's name, wherever it is:
    `<dicom_id>.png`, `pred_<dicom_id>_gaze.npy`, ...; a name without one is taken whole. Of two files for
    one image neither is used; they are reported."""
    if not root.is_dir():
        raise UserError(f"{root}: no such directory; --heatmaps holds one PNG or NPY per image")
    found: dict[str, list[Path]] = {}
    for directory, _, names in os.walk(root, followlinks=True):
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in HEATMAP_SUFFIXES:
                match = _DICOM_ID.search(stem)
                found.setdefault(match.group() if match else stem, []).append(Path(directory, name))
    if not found:
        raise UserError(f"{root}: no .png or .npy file is in it or below")
    twice = [
        Exclusion(name, "several heatmaps", ", ".join(map(str, sorted(paths))), is_fault=True)
        for name, paths in sorted(found.items())
        if len(paths) > 1
    ]
    return {name: paths[0] for name, paths in sorted(found.items()) if len(paths) == 1}, twice


def read_heatmap(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A heatmap over the whole image, resized to (height, width) `size`: float32 [H, W] >= 0.

    PNG is 8-bit gray; NPY an array of numbers [H, W] (axes of length 1 are dropped) without negatives.
    Its own size may be any, also of another aspect ratio: predictors often work on squares. Raises
    `UserError` naming the file for anything else, also where all values are equal: such a map
    attends to nothing.
    """
    if path.suffix.lower() == ".png":
        values = read_gray(path).astype(np.float32)
    else:
        try:
            loaded = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: cannot be read as NPY ({error})") from None
        if not isinstance(loaded, np.ndarray) or loaded.dtype.kind not in "fiub":
            raise UserError(f"{path}: holds no array of numbers")
        values = loaded.astype(np.float32).squeeze()
    if values.ndim != 2:
        raise UserError(f"{path}: is of shape {list(values.shape)}, expected one map [height, width]")
    if not np.isfinite(values).all() or values.min() < 0:
        raise UserError(f"{path}: has negative or not finite values; a heatmap is a density, 0 or more")
    if values.min() == values.max():
        raise UserError(f"{path}: all values are equal, it attends to nothing")
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR)).clip(0)


def prepare_mimic(
    images: Path,
    heatmaps: Path,
    out: Path,
    *,
    metadata: Path | None = None,
    views: tuple[str, ...] = FRONTAL,
    size: int = 512,
    workers: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
) -> PrepareReport:
    """Build the MIMIC tree in `out`, or finish or check the one that is there: one entry per heatmap whose
    image is of one of the `views` (ViewPosition; "all" takes any).

    `metadata` is mimic-cxr-2.0.0-metadata.csv, .gz or not; by default the one in `images`. Raises
    `UserError` where nothing sensible can be done; a single bad file is reported.
    """
    if size < 0:
        raise UserError(f"--size {size} is negative; 0 keeps the native size")
    options = MimicOptions(size=size)
    found, exclusions = find_heatmaps(heatmaps)
    n_found = len(found) + len(exclusions)
    rows = _read_metadata(images, metadata)
    chosen: dict[str, dict[str, str]] = {}
    for name in found:
        if name not in rows.index:
            exclusions.append(Exclusion(name, "not in the metadata", str(found[name])))
        elif "all" not in views and rows.at[name, "ViewPosition"] not in views:
            exclusions.append(Exclusion(name, "other view"))
        else:
            try:
                row = rows.loc[name].to_dict()
                for column in ("subject_id", "study_id"):
                    check_id(row[column], f"metadata of {name}, column {column!r}:")
                check_id(name, f"heatmap {found[name]}: dicom_id")
                chosen[name] = row
            except UserError as error:
                exclusions.append(Exclusion(name, "unusable metadata row", str(error), is_fault=True))
    if not chosen:
        raise UserError(
            f"{heatmaps}: none of its {n_found} heatmaps is of an image of view {' or '.join(views)}"
        )

    hints = {name: f"{_study_directory(**_ids(row))}/{name}.jpg" for name, row in chosen.items()}
    paths = find_images(images, hints)
    exclusions += [
        Exclusion(name, "image missing", f"no {name}.jpg, .png or .dcm under {images}")
        for name in chosen
        if name not in paths
    ]
    tasks = [
        MimicTask(name, row["subject_id"], row["study_id"], row["ViewPosition"], paths[name], found[name])
        for name, row in chosen.items()
        if name in paths
    ]
    if not tasks:
        raise UserError(
            f"{images}: holds none of the {len(chosen)} heatmaps' images (<dicom_id>.jpg or .dcm)"
        )
    tasks.sort(key=lambda task: task.image_path)

    folders = ("files", "attention", "foreground")
    with output_tree(out, options, overwrite=overwrite, dry_run=dry_run, index=INDEX, folders=folders):
        results = list(
            run_tasks(partial(process_image, out=out, options=options, dry_run=dry_run), tasks, workers)
        )
        entries = [entry for result in results for entry in result.entries]
        exclusions += (exclusion for result in results for exclusion in result.exclusions)
        exclusions.sort(key=lambda exclusion: (exclusion.id, exclusion.reason))
        significant = [n for result in results for n in result.significant]
        reasons = Counter(exclusion.reason for exclusion in exclusions)
        counts: dict[str, int | float] = {"images with heatmaps": n_found}
        counts |= {f"- {reason}": n for reason, n in sorted(reasons.items())}
        counts["entries"] = len(entries)
        if significant:
            counts["mean significant patches of 196"] = round(float(np.mean(significant)), 2)
        if not dry_run:
            record = {
                "options": options_record(options),
                "finished": True,
                "views": list(views),
                "images": str(images),
                "heatmaps": str(heatmaps),
                "versions": versions(),
                "counts": counts,
                "left_out": [asdict(exclusion) for exclusion in exclusions],
            }
            write_json(out / RECORD, record)
            write_json(out / INDEX, entries)
            counts["files written by this run"] = sum(result.n_written for result in results)
    seconds = sum((result.seconds for result in results), Counter())
    return PrepareReport(counts, exclusions, [], seconds, dry_run)


def process_image(task: MimicTask, *, out: Path, options: MimicOptions, dry_run: bool) -> ImageResult:
    """Store one image with its maps, unless they are there. The heatmap is read in any case, so that a
    second run, or a dry one, finds the same faults and counts as the first."""
    result = ImageResult()
    try:
        size = scaled_size(radiograph_size(task.image), options.size)
        with result.timed("heatmaps"):
            attention, foreground = attention_maps(read_heatmap(task.heatmap, size))
        image_file = out / task.image_path
        if not dry_run and not image_file.exists():
            with result.timed("decoding"):
                gray = read_radiograph(task.image)
            with result.timed("resizing"):
                gray = resize_gray(gray, size)
            with result.timed("writing"):
                write_image(image_file, gray)
            result.n_written += 1
    except UserError as error:
        result.exclusions.append(Exclusion(task.dicom_id, "unreadable", str(error), is_fault=True))
        return result
    for kind, pixels in (("attention", attention), ("foreground", foreground)):
        path = (out / kind / task.image_path).with_suffix(".png")
        if not dry_run and not path.exists():
            with result.timed("writing"):
                write_image(path, pixels)
            result.n_written += 1
    result.significant.append(count_significant(foreground))
    result.entries.append({
        "image_path": task.image_path, "study_id": task.study_id, "reflacx_id": task.dicom_id,
        "subject_id": task.subject_id, "dicom_id": task.dicom_id, "view": task.view, "source": "mimic",
    })  # fmt: skip
    return result


def _read_metadata(images: Path, metadata: Path | None) -> pd.DataFrame:
    """The metadata by dicom_id, all text."""
    if metadata is None:
        here = [images / name for name in METADATA_NAMES if (images / name).is_file()]
        if not here:
            raise UserError(
                f"{images}: no {METADATA_NAMES[0]} in it, which tells frontal from lateral views; "
                "give its path with --metadata"
            )
        metadata = here[0]
    table = read_table(metadata, _METADATA_COLUMNS, text=_METADATA_COLUMNS)
    twice = table["dicom_id"][table["dicom_id"].duplicated()]
    if not twice.empty:
        raise UserError(
            f"{metadata}: line {twice.index[0]}, column 'dicom_id': {twice.iloc[0]} appears twice"
        )
    return table.set_index("dicom_id")[list(_METADATA_COLUMNS[1:])]


def _ids(row: dict[str, str]) -> dict[str, str]:
    return {"subject_id": row["subject_id"], "study_id": row["study_id"]}


def _study_directory(subject_id: str, study_id: str) -> str:
    """Where MIMIC-CXR keeps a study."""
    return f"files/p{subject_id[:2]}/p{subject_id}/s{study_id}"
