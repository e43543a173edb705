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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from datasets.analysis.figure import analysis_figure
from datasets.analysis.gaze_density import ANY, N_PATCHES, SIZES, Box, density_ratio, ellipse_mask, size_class
from datasets.fixations import pixel_middles
from datasets.prepare.pixels import attention_maps, count_significant, resize_gray, scaled_size
from datasets.prepare.readings import SOURCES, detect_source, egd_options, reading_gaze, without_image
from datasets.prepare.work import run_tasks
from datasets.raw.findings import COMMON_FINDING
from datasets.raw.mimic_cxr import find_images
from datasets.raw.readings import ELLIPSE_COLUMNS, Exclusion, Reading, is_simulated
from util.bootstrap import MIN_DRAWS, bootstrap_means, interval
from util.errors import UserError
from util.figures import save_figure
from util.files import atomic_write
from util.radiograph import MIMIC_CXR_JPG, radiograph_size, read_radiograph

NOT_ABNORMAL = ("Support devices", "Quality issue")  # labels that make an ellipse no abnormality


class Abnormality(NamedTuple):
    """One marked ellipse by its bounding box, px of the original image."""

    box: Box
    certainty: int
    findings: tuple[str, ...]


class Rows(NamedTuple):
    """What one reading adds to the tables. `ratios`: a row per finding, `whole image` and `chest box`."""

    reading: dict[str, object]
    ellipses: list[dict[str, object]]
    ratios: list[dict[str, object]]


@dataclass(frozen=True)
class Example:
    """An image to show: its reading, pixels and heatmap (both [H, W]) and abnormal boxes (px of the original)."""

    reading: Reading
    gray: np.ndarray
    size: tuple[int, int]
    heatmap: np.ndarray
    boxes: list[Box]
    ratio: float


@dataclass
class Analysis:
    """The tables, one row per what `TABLES` says, and what they were computed with."""

    options: dict[str, object]
    ellipses: pd.DataFrame
    size_by_finding: pd.DataFrame
    readings: pd.DataFrame
    ratio_by_finding: pd.DataFrame
    significant_patches: pd.DataFrame
    exclusions: list[Exclusion]
    notes: list[str]
    examples: list[Example] = field(default_factory=list)

    TABLES = ("ellipses", "size_by_finding", "readings", "ratio_by_finding", "significant_patches")

    @property
    def faults(self) -> list[Exclusion]:
        return [exclusion for exclusion in self.exclusions if exclusion.is_fault]

    def write(self, out: Path) -> list[Path]:
        """Write the tables and the figure into directory `out`, in place of another analysis's; returns their paths."""
        out.mkdir(parents=True, exist_ok=True)
        figure = out / "gaze_analysis.png"
        for path in (figure, *(out / f"{name}.csv" for name in self.TABLES)):
            path.unlink(missing_ok=True)
        written = []
        for name in self.TABLES:
            table = getattr(self, name)
            if table.empty:
                continue
            written.append(out / f"{name}.csv")
            with atomic_write(written[-1], "w") as file:
                table.to_csv(file, index=False, float_format="%.6g")
        save_figure(analysis_figure(self), figure)
        return [*written, figure]

    def __str__(self) -> str:
        patches = self.readings["significant_patches"]
        lines = [f"{len(self.readings)} readings of {self.readings['image_id'].nunique()} images"]
        if not self.ellipses.empty:
            small, medium = self.options["size_thresholds"]
            total = self.size_by_finding.iloc[0]  # of ANY
            lines.append(
                f"{total['ellipses']:,} abnormal ellipses: {total['small']:.1%} small "
                f"(under {small:.2%} of the image), "
                f"{total['medium']:.1%} medium, {total['large']:.1%} large (from {medium:.2%})"
            )
        for row in self.ratio_by_finding[self.ratio_by_finding["finding"] == ANY].itertuples():
            lines.append(
                f"gaze density ratio, {row.within}: mean {row.mean:.2f} [{row.low:.2f}, {row.high:.2f}], "
                f"median {row.median:.2f}, {row.readings} readings"
            )
        lines.append(
            f"significant patches of {N_PATCHES} at 224 px: mean {patches.mean():.1f}, "
            f"median {patches.median():.0f}, "
            f"5%-95% {patches.quantile(0.05):.0f}-{patches.quantile(0.95):.0f}, "
            f"none in {(patches == 0).sum()}"
        )
        lines += [f"note: {note}" for note in self.notes]
        listed = [exclusion for exclusion in self.exclusions if exclusion.detail]
        reasons = Counter(exclusion.reason for exclusion in self.exclusions)
        lines += [f"left out: {n} x {reason}" for reason, n in sorted(reasons.items())]
        lines += [f"  {exclusion.id}: {exclusion.reason}: {exclusion.detail}" for exclusion in listed]
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
    if n_bootstrap < MIN_DRAWS or n_examples < 0:
        raise UserError(f"--bootstrap {n_bootstrap} --examples {n_examples}: at least {MIN_DRAWS} and 0")
    if size < 1:
        raise UserError(f"--size {size} is not positive")
    given, raw = raw, raw.resolve()
    source = source or detect_source(raw)
    found = SOURCES[source][1](raw, **egd_options(source, sigma, metadata, images))
    readings = [reading for reading in found.readings if split in ("all", reading.split)]
    if not readings:
        raise UserError(f"{raw}: {found.none_of(split)}")
    paths: dict[str, str] = {}
    if images is not None:
        place = find_images(images.resolve(), {reading.image_id: reading.image_path for reading in readings})
        paths = place.paths
        needed = [r for r in readings if r.image_size is None or r.image_id in place.ambiguous]
        lost = list(without_image(needed, place, images))
        found.exclusions.extend(lost)
        readings = [r for r in readings if r.id not in {exclusion.id for exclusion in lost}]
    if not paths and all(reading.image_size is None for reading in readings):
        raise UserError(
            f"{raw}: this data set does not say how large its images are: --metadata, MIMIC-CXR's table, or --images, "
            "with them, is needed"
        )

    measure = partial(_measure, size=size, min_certainty=min_certainty, thresholds=size_thresholds)
    tasks = [(reading, paths.get(reading.image_id)) for reading in readings]
    results = list(run_tasks(measure, tasks, workers, name="analyze"))
    measured = [result for result in results if isinstance(result, Rows)]
    exclusions = [*found.exclusions, *(result for result in results if isinstance(result, Exclusion))]
    if not measured:
        reasons = Counter(exclusion.reason for exclusion in exclusions).most_common(3)
        told = ", ".join(f"{n} x {reason}" for reason, n in reasons)
        raise UserError(f"{raw}: none of the {len(readings)} readings can be analysed ({told})")

    table = pd.DataFrame([rows.reading for rows in measured])
    ellipses, ratios = (
        pd.DataFrame([row for rows in measured for row in getattr(rows, name)]) for name in ("ellipses", "ratios")
    )
    notes = list(found.notes)
    if ellipses.empty:
        none = f"{'EGD-CXR' if source == 'egd' else 'this data set'} marks no abnormalities on its images"
        if source != "egd" and min_certainty > 1:
            none = f"no abnormality is marked with a certainty of --min_certainty {min_certainty} or more"
        notes.append(f"{none}: no ellipse sizes and no density ratios; patch counts and examples only")
        table = table.drop(columns=["ellipses", "ratio_image", "ratio_chest"])
    counts = np.bincount(table["significant_patches"])  # of readings, by their number of significant patches
    examples, not_shown = _examples(table, readings, paths, n_examples, min_certainty, dicom_contrast)
    return Analysis(
        {
            "source": source,
            "raw": str(given),
            "simulated": is_simulated(SOURCES[source][0](raw)),
            "split": split,
            "size_thresholds": size_thresholds,
        },
        ellipses,
        _size_table(ellipses),
        table,
        _ratio_table(ratios, n_bootstrap, seed),
        pd.DataFrame({"significant_patches": range(len(counts)), "readings": counts}),
        [*exclusions, *not_shown],
        notes,
        examples,
    )


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
        heatmap = gaze[1]
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
    ratio_rows = [
        who | {"finding": finding, "whole image": whole, "chest box": in_chest}
        for finding, (whole, in_chest) in ratios.items()
    ]
    return Rows(row, ellipses, ratio_rows)


def _abnormalities(reading: Reading, min_certainty: int) -> list[Abnormality]:
    """The ellipses of a reading that mark abnormalities."""
    ellipses = reading.load_ellipses()
    labels = [column for column in ellipses.columns if column not in ELLIPSE_COLUMNS]
    flags = ellipses[labels].to_numpy(dtype=bool)
    found = []
    for row, own_flags in zip(ellipses[list(ELLIPSE_COLUMNS)].to_numpy(dtype=float).tolist(), flags):
        xmin, ymin, xmax, ymax, certainty = row
        own = [label for label, flag in zip(labels, own_flags) if flag]
        abnormal = [label for label in own if label not in NOT_ABNORMAL]
        if certainty < min_certainty or (own and not abnormal):
            continue
        findings = tuple(dict.fromkeys(COMMON_FINDING[label] for label in abnormal))
        found.append(Abnormality((xmin, ymin, xmax, ymax), int(certainty), findings))
    return found


def _ratios(
    heatmap: np.ndarray, abnormalities: list[Abnormality], chest: Box | None, image_size: tuple[int, int]
) -> dict[str, tuple[float, float]]:
    """Density ratio in the whole image and within the chest box, for all abnormalities together (`ANY`)
    and for each finding. Outside always means outside of every abnormality. Ellipses that no pixel
    centre of the map falls into give no ratio."""
    abnormal = ellipse_mask([own.box for own in abnormalities], image_size, heatmap.shape)
    if not abnormal.any():
        return {}
    masks = {ANY: abnormal}
    for finding in sorted({finding for own in abnormalities for finding in own.findings}):
        boxes = [own.box for own in abnormalities if finding in own.findings]
        masks[finding] = ellipse_mask(boxes, image_size, heatmap.shape)
    in_chest = np.zeros_like(abnormal)
    if chest is not None:
        x = pixel_middles(image_size[1], heatmap.shape[1]) - 0.5
        y = pixel_middles(image_size[0], heatmap.shape[0]) - 0.5
        in_chest = ((y >= chest[1]) & (y <= chest[3]))[:, None] & ((x >= chest[0]) & (x <= chest[2]))[None, :]
    return {
        finding: (
            density_ratio(heatmap, mask, ~abnormal),
            density_ratio(heatmap, mask & in_chest, ~abnormal & in_chest),
        )
        for finding, mask in masks.items()
        if mask.any()
    }


def _size_table(ellipses: pd.DataFrame) -> pd.DataFrame:
    """Per finding: ellipses, the share of each size class, median area share; `ANY` first, then by number."""
    if ellipses.empty:
        return pd.DataFrame()
    by_finding = ellipses.assign(finding=ellipses["findings"].str.split("|")).explode("finding")
    by_finding = by_finding[by_finding["finding"] != ""]
    rows = []
    for finding, own in ((ANY, ellipses), *by_finding.groupby("finding")):
        shares = own["size"].value_counts(normalize=True)
        row = {"finding": finding, "ellipses": len(own)} | {size: shares.get(size, 0.0) for size in SIZES}
        rows.append(row | {"median_area_share": own["area_share"].median()})
    table = pd.DataFrame(rows)
    order = np.lexsort((table["finding"], -table["ellipses"], table["finding"] != ANY))
    return table.iloc[order].reset_index(drop=True)


def _ratio_table(ratios: pd.DataFrame, n_bootstrap: int, seed: int) -> pd.DataFrame:
    """Per finding and region (`within`): readings, subjects, mean with its 95% interval, median."""
    columns = ["finding", "within", "readings", "subjects", "mean", "low", "high", "median"]
    rows = []
    order = {} if ratios.empty else ratios["finding"].value_counts()
    for finding in sorted(order.keys(), key=lambda name: (name != ANY, -order[name], name)):
        for within in ("whole image", "chest box"):
            own = ratios[(ratios["finding"] == finding) & ratios[within].notna()]
            if own.empty:
                continue
            values, subjects = own[within].to_numpy(), own["subject_id"].to_numpy(str)
            means = bootstrap_means(values[:, None], subjects, draws=n_bootstrap, seed=seed)[:, 0]
            counts = len(own), own["subject_id"].nunique()
            rows.append([finding, within, *counts, *interval(means), np.median(values)])
    return pd.DataFrame(rows, columns=columns)


def _examples(
    table: pd.DataFrame,
    readings: list[Reading],
    paths: dict[str, Path],
    n: int,
    min_certainty: int,
    dicom_contrast: str,
) -> tuple[list[Example], list[Exclusion]]:
    """`n` images to show, evenly spread over the ranks of the ratios, and those that can't be shown, in whose place
    others are."""
    by_id = {reading.id: reading for reading in readings}
    table = table[table["image_id"].isin(list(paths))].drop_duplicates("image_id")
    if "ratio_image" in table:
        table = table[table["ratio_image"].notna()].sort_values(["ratio_image", "id"])
    else:
        table = table.assign(ratio_image=np.nan)
    n = min(n, len(table))
    spread = [int((i + 0.5) / n * len(table)) for i in range(n)]
    made, faults = {}, []
    for place in dict.fromkeys([*spread, *range(len(table))]):
        if len(made) == n:
            break
        name, ratio = table.iloc[place][["id", "ratio_image"]]
        example = _example(by_id[name], paths, ratio, min_certainty, dicom_contrast)
        if isinstance(example, Exclusion):
            faults.append(example)
        else:
            made[place] = example
    return [made[place] for place in sorted(made)], faults


def _example(
    reading: Reading, paths: dict[str, Path], ratio: float, min_certainty: int, dicom_contrast: str
) -> Example | Exclusion:
    path = paths[reading.image_id]
    try:
        file_size = radiograph_size(path)
        out_size = scaled_size(file_size, 512)
        gaze = reading_gaze(reading, path, file_size, out_size)
        if isinstance(gaze, Exclusion):
            return gaze
        size = reading.original_size(file_size)
        boxes = [abnormality.box for abnormality in _abnormalities(reading, min_certainty)]
        gray = resize_gray(read_radiograph(path, dicom_contrast), out_size)
    except UserError as error:
        return Exclusion(reading.id, "image unreadable", str(error), is_fault=True)
    return Example(reading, gray, size, gaze[1], boxes, ratio)
