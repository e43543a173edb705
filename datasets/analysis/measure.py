"""Where radiologists look: the motivation analysis of the CXR-MIM paper, on a user's own raw data.

Three questions, for any gaze data set that `datasets.prepare.readings` reads: how large are the marked
abnormalities; how much denser is the gaze on them than elsewhere; how many patches of an image does
the gaze make significant at 224 px. The first two need abnormalities marked on the image (REFLACX has
ellipses, EGD-CXR has none).

The gaze density ratio of a reading is the mean of its heatmap over the abnormal ellipses divided by
the mean over the rest of the image: gaze mass per area over gaze mass per area. As a control it is
computed within the chest box alone, so that the empty borders, at which nobody looks, cannot make it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from datasets.analysis.figure import Example, analysis_figure
from datasets.analysis.gaze_density import ANY, N_PATCHES, SIZES, Box, box_mask, density_ratio, ellipse_mask, size_class
from datasets.prepare.pixels import attention_maps, count_significant, resize_gray, scaled_size
from datasets.prepare.readings import SOURCES, detect_source, egd_options, reading_gaze, without_image
from datasets.prepare.work import run_tasks
from datasets.raw.findings import COMMON_FINDING
from datasets.raw.mimic_cxr import find_images
from datasets.raw.readings import ELLIPSE_COLUMNS, Exclusion, RawReadings, Reading, is_simulated
from util.bootstrap import MIN_DRAWS, bootstrap_means, interval
from util.errors import UserError
from util.figures import save_figure
from util.files import atomic_write
from util.radiograph import MIMIC_CXR_JPG, radiograph_size, read_radiograph

NOT_ABNORMAL = ("Support devices", "Quality issue")  # labels that make an ellipse no abnormality
REGIONS = ("whole image", "chest box")  # within which a ratio is computed
EXAMPLE_SIZE = 512  # short side, px


class Abnormality(NamedTuple):
    """One marked ellipse by its bounding box, px of the original image."""

    box: Box
    certainty: int
    findings: tuple[str, ...]


class Rows(NamedTuple):
    """What one reading adds to the tables. `ratios`: a row per finding, with a column for each of `REGIONS`."""

    reading: dict[str, object]
    ellipses: list[dict[str, object]]
    ratios: list[dict[str, object]]


@dataclass
class Analysis:
    """The tables, by the names of their files, and what they were computed with."""

    options: Mapping[str, object]
    tables: dict[str, pd.DataFrame]
    exclusions: list[Exclusion]
    notes: list[str]
    examples: list[Example]

    @property
    def faults(self) -> list[Exclusion]:
        return [exclusion for exclusion in self.exclusions if exclusion.is_fault]

    def write(self, out: Path) -> list[Path]:
        """Write the tables and the figure into directory `out`, in place of another analysis's; returns their paths."""
        out.mkdir(parents=True, exist_ok=True)
        figure = out / "gaze_analysis.png"
        figure.unlink(missing_ok=True)
        written = []
        for name, table in self.tables.items():
            path = out / f"{name}.csv"
            path.unlink(missing_ok=True)
            if not table.empty:
                with atomic_write(path, "w") as file:
                    table.to_csv(file, index=False, float_format="%.6g")
                written.append(path)
        save_figure(analysis_figure(self.tables, self.examples, self.options), figure)
        return [*written, figure]

    def __str__(self) -> str:
        readings, sizes, ratios = (self.tables[name] for name in ("readings", "size_by_finding", "ratio_by_finding"))
        patches = readings["significant_patches"]
        lines = [f"{len(readings)} readings of {readings['image_id'].nunique()} images"]
        for title, table in (("shares of ellipses, by size", sizes), ("gaze density ratio", ratios)):
            if not table.empty:
                overall = table[table["finding"] == ANY].drop(columns="finding")
                lines.append(f"{title}:\n{overall.to_string(index=False, float_format='{:.3f}'.format)}")
        lines.append(
            f"significant patches of {N_PATCHES} at 224 px: mean {patches.mean():.1f}, median {patches.median():.0f}, "
            f"none in {(patches == 0).sum()}"
        )
        lines += [f"note: {note}" for note in self.notes]
        reasons = Counter(exclusion.reason for exclusion in self.exclusions)
        lines += [f"left out: {n} x {reason}" for reason, n in sorted(reasons.items())]
        lines += [f"  {e.id}: {e.reason}: {e.detail}" for e in self.exclusions if e.detail]
        return "\n".join(lines)


def analyze(
    raw: Path,
    images: Path | None = None,
    *,
    source: str | None = None,
    split: str = "all",
    size: int = 256,
    size_thresholds: tuple[float, float] = (0.01, 0.05),
    min_certainty: int = 1,
    n_bootstrap: int = 2000,
    n_examples: int = 3,
    seed: int = 0,
    sigma: float | None = None,
    metadata: Path | None = None,
    dicom_contrast: str = MIMIC_CXR_JPG,
    workers: int = 1,
) -> Analysis:
    """Analyse all usable readings of a raw gaze data set.

    Args:
        raw: root of REFLACX or EGD-CXR, see `datasets.prepare.readings.detect_source`.
        images: root of the MIMIC-CXR images. Needed for the examples, and for everything where the data
            set does not say how large its images are (EGD-CXR).
        size: short side of the heatmaps, px.
        size_thresholds: area shares of the image at which medium and large begin.
        min_certainty: ellipses below this certainty (1-5) are not used.
        n_examples: images to show, evenly spread over the density ratios.
        sigma, metadata: of EGD-CXR, see `read_egd`; an error for other data sets.
        dicom_contrast: of the examples, one of `util.radiograph.CONTRASTS`.

    A damaged reading is left out and listed. Raises `UserError` where nothing can be analysed.
    """
    small, medium = size_thresholds
    if not 0 < small < medium < 1:
        raise UserError(f"--size_thresholds {small:g} {medium:g}: two rising shares of the image's area, in 0..1")
    if n_bootstrap < MIN_DRAWS or n_examples < 0 or size < 1:
        raise UserError(
            f"--bootstrap {n_bootstrap} --examples {n_examples} --size {size}: at least {MIN_DRAWS}, 0 and 1"
        )
    root = raw.resolve()
    source = source or detect_source(root)
    found = SOURCES[source][1](root, **egd_options(source, sigma, metadata, images))
    paths = _find_images(found, root, split, images)

    measure = partial(_measure, size=size, min_certainty=min_certainty, thresholds=size_thresholds)
    tasks = [(reading, paths.get(reading.image_id)) for reading in found.readings]
    results = list(run_tasks(measure, tasks, workers, name="analyze"))
    measured = [result for result in results if isinstance(result, Rows)]
    found.exclusions += [result for result in results if isinstance(result, Exclusion)]
    if not measured:
        reasons = Counter(exclusion.reason for exclusion in found.exclusions).most_common(3)
        text = ", ".join(f"{n} x {reason}" for reason, n in reasons)
        raise UserError(f"{root}: none of the {len(tasks)} readings can be analysed ({text})")

    readings = pd.DataFrame([rows.reading for rows in measured])
    ellipses = pd.DataFrame([row for rows in measured for row in rows.ellipses])
    ratios = pd.DataFrame([row for rows in measured for row in rows.ratios])
    examples = _examples(readings, found, paths, n_examples, min_certainty, dicom_contrast)
    if ellipses.empty:
        none = f"{'EGD-CXR' if source == 'egd' else 'this data set'} marks no abnormalities on its images"
        if source != "egd" and min_certainty > 1:
            none = f"no abnormality is marked with a certainty of --min_certainty {min_certainty} or more"
        found.notes.append(f"{none}: no ellipse sizes and no density ratios; patch counts and examples only")
        readings = readings.drop(columns=["ellipses", "ratio_image", "ratio_chest"])
    counts = np.bincount(readings["significant_patches"])  # of readings, by their number of significant patches
    tables = {
        "ellipses": ellipses,
        "size_by_finding": _size_table(ellipses),
        "readings": readings,
        "ratio_by_finding": _ratio_table(ratios, n_bootstrap, seed),
        "significant_patches": pd.DataFrame({"significant_patches": range(len(counts)), "readings": counts}),
    }
    simulated = is_simulated(SOURCES[source][0](root))
    options = dict(source=source, raw=str(raw), simulated=simulated, split=split, size_thresholds=size_thresholds)
    return Analysis(options, tables, found.exclusions, found.notes, examples)


def _find_images(found: RawReadings, root: Path, split: str, images: Path | None) -> dict[str, Path]:
    """Leave readings of the split in `found`, without those that need an image and have none; the files by image id."""
    readings = [reading for reading in found.readings if split in ("all", reading.split)]
    if not readings:
        raise UserError(f"{root}: {found.none_of(split)}")
    paths = {}
    if images is not None:
        place = find_images(images.resolve(), {reading.image_id: reading.image_path for reading in readings})
        paths = place.paths
        needed = [r for r in readings if r.image_size is None or r.image_id in place.ambiguous]
        lost = {exclusion.id: exclusion for exclusion in without_image(needed, place, images)}
        found.exclusions += lost.values()
        readings = [reading for reading in readings if reading.id not in lost]
    if not paths and all(reading.image_size is None for reading in readings):
        raise UserError(
            f"{root}: this data set does not say how large its images are: --metadata, MIMIC-CXR's table, or --images, "
            "with them, is needed"
        )
    found.readings = readings
    return paths


def _measure(
    task: tuple[Reading, Path | None], *, size: int, min_certainty: int, thresholds: tuple[float, float]
) -> Rows | Exclusion:
    """What one reading tells; its image's path is needed only where the data set gives no size."""
    reading, path = task
    try:
        image_size = reading.image_size or reading.original_size(radiograph_size(path))
        gaze = reading_gaze(reading, reading.fixations_path, image_size, scaled_size(image_size, size))
        if isinstance(gaze, Exclusion):
            return gaze
        _, heatmap = gaze
        abnormalities = _abnormalities(reading, min_certainty)
        ratios = _ratios(heatmap, abnormalities, reading.load_chest_box(), image_size)
    except UserError as error:
        return Exclusion(reading.id, "unusable reading", str(error), is_fault=True)
    who = {"id": reading.id, "subject_id": reading.subject_id}
    ellipses = []
    for (xmin, ymin, xmax, ymax), certainty, findings in abnormalities:
        share = np.pi / 4 * (xmax - xmin) * (ymax - ymin) / (image_size[0] * image_size[1])
        row = {"findings": "|".join(findings), "certainty": certainty, "area_share": share}
        ellipses.append(who | row | {"size": size_class(share, thresholds)})
    overall = ratios.get(ANY, (np.nan, np.nan))
    row = {
        **who,
        "image_id": reading.image_id,
        "split": reading.split,
        "ellipses": len(abnormalities),
        "significant_patches": count_significant(attention_maps(heatmap)[1]),
        "ratio_image": overall[0],
        "ratio_chest": overall[1],
    }
    return Rows(row, ellipses, [who | {"finding": name} | dict(zip(REGIONS, own)) for name, own in ratios.items()])


def _abnormalities(reading: Reading, min_certainty: int) -> list[Abnormality]:
    """The ellipses of a reading that mark abnormalities."""
    found = []
    for row in reading.load_ellipses().to_dict("records"):
        *box, certainty = (float(row.pop(column)) for column in ELLIPSE_COLUMNS)
        own = [label for label, is_marked in row.items() if is_marked]
        abnormal = [label for label in own if label not in NOT_ABNORMAL]
        if certainty >= min_certainty and (abnormal or not own):
            findings = dict.fromkeys(COMMON_FINDING[label] for label in abnormal)
            found.append(Abnormality(tuple(box), int(certainty), tuple(findings)))
    return found


def _ratios(
    heatmap: np.ndarray, abnormalities: list[Abnormality], chest: Box | None, image_size: tuple[int, int]
) -> dict[str, tuple[float, float]]:
    """Density ratio in the whole image and within the chest box, for all abnormalities together (`ANY`)
    and for each finding. Outside always means outside of every abnormality. Ellipses that no pixel
    centre of the map falls into give no ratio."""
    boxes = {ANY: [own.box for own in abnormalities]}
    for finding in sorted({finding for own in abnormalities for finding in own.findings}):
        boxes[finding] = [own.box for own in abnormalities if finding in own.findings]
    masks = {finding: ellipse_mask(own, image_size, heatmap.shape) for finding, own in boxes.items()}
    elsewhere = ~masks[ANY]
    in_chest = elsewhere & False if chest is None else box_mask(chest, image_size, heatmap.shape)
    return {
        finding: (
            density_ratio(heatmap, mask, elsewhere),
            density_ratio(heatmap, mask & in_chest, elsewhere & in_chest),
        )
        for finding, mask in masks.items()
        if mask.any()
    }


def _by_number(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each finding; `ANY` first, then by number."""
    groups = [] if rows.empty else rows.groupby("finding")
    return sorted(groups, key=lambda group: (group[0] != ANY, -len(group[1]), group[0]))


def _size_table(ellipses: pd.DataFrame) -> pd.DataFrame:
    """Per finding: ellipses, the share of each size class, median area share."""
    if ellipses.empty:
        return pd.DataFrame()
    each = ellipses.assign(finding=ellipses["findings"].str.split("|")).explode("finding")
    rows = []
    for finding, own in _by_number(pd.concat([ellipses.assign(finding=ANY), each[each["finding"] != ""]])):
        shares = own["size"].value_counts(normalize=True)
        row = {"finding": finding, "ellipses": len(own)} | {size: shares.get(size, 0.0) for size in SIZES}
        rows.append(row | {"median_area_share": own["area_share"].median()})
    return pd.DataFrame(rows)


def _ratio_table(ratios: pd.DataFrame, n_bootstrap: int, seed: int) -> pd.DataFrame:
    """Per finding and region (`within`): readings, subjects, mean with its 95% interval, median."""
    rows = []
    for finding, rows_of_finding in _by_number(ratios):
        for within in REGIONS:
            own = rows_of_finding.dropna(subset=within)
            if own.empty:
                continue
            values, subjects = own[within].to_numpy(), own["subject_id"].to_numpy(str)
            means = bootstrap_means(values[:, None], subjects, draws=n_bootstrap, seed=seed)[:, 0]
            counts = len(own), own["subject_id"].nunique()
            rows.append([finding, within, *counts, *interval(means), np.median(values)])
    columns = ["finding", "within", "readings", "subjects", "mean", "low", "high", "median"]
    return pd.DataFrame(rows, columns=columns)


def _examples(
    table: pd.DataFrame, found: RawReadings, paths: dict[str, Path], n: int, min_certainty: int, dicom_contrast: str
) -> list[Example]:
    """`n` images to show, evenly spread over the ranks of the ratios; those that can't be shown are entered in
    `found`."""
    by_id = {reading.id: reading for reading in found.readings}
    table = table[table["image_id"].isin(list(paths))].drop_duplicates("image_id")
    if table["ratio_image"].notna().any():
        table = table.dropna(subset="ratio_image").sort_values(["ratio_image", "id"])
    n = min(n, len(table))
    examples = []
    for name, ratio in table.iloc[[int((i + 0.5) / n * len(table)) for i in range(n)]][["id", "ratio_image"]].values:
        reading = by_id[name]
        path = paths[reading.image_id]
        try:
            file_size = radiograph_size(path)
            out_size = scaled_size(file_size, EXAMPLE_SIZE)
            gaze = reading_gaze(reading, path, file_size, out_size)
            gray = resize_gray(read_radiograph(path, dicom_contrast), out_size)
        except UserError as error:
            gaze = Exclusion(name, "image unreadable", str(error), is_fault=True)
        if isinstance(gaze, Exclusion):
            found.exclusions.append(gaze)
            continue
        boxes = [abnormality.box for abnormality in _abnormalities(reading, min_certainty)]
        examples.append(Example(name, gray, reading.original_size(file_size), gaze[1], boxes, ratio))
    return examples
