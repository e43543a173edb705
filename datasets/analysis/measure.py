"""Where radiologists look: the motivation analysis of the CXR-MIM paper, on a user's own raw data.

Three questions, for any gaze data set that `datasets.raw.sources` reads: how large are the marked
abnormalities; how much denser is the gaze on them than elsewhere; how many patches of an image does
the gaze make significant at 224 px. The first two need abnormalities marked on the image (REFLACX has
ellipses, EGD-CXR has none).

The gaze density ratio of a reading is the mean of its heatmap over the abnormal ellipses divided by
the mean over the rest of the image: gaze mass per area over gaze mass per area. As a control it is
computed within the chest box alone, so that the empty borders, at which nobody looks, cannot make it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from skimage.segmentation import mark_boundaries

from datasets.analysis.figure import ANY, SIZES, analysis_figure
from datasets.analysis.gaze_density import box_mask, density_ratio, ellipse_mask
from datasets.fixations import RECTANGLE, fixation_heatmap
from datasets.prepare.pixels import attention_maps, count_significant, scaled_size
from datasets.prepare.readings import reading_gaze
from datasets.prepare.work import run_tasks
from datasets.raw.mimic_cxr import find_images
from datasets.raw.readings import Exclusion, Reading, first_of
from datasets.raw.sources import read_raw
from datasets.transforms import resize_gray
from util.bootstrap import bootstrap_means, interval
from util.errors import UserError
from util.figures import save_figure
from util.files import atomic_write
from util.pictures import gaze_overlay
from util.radiograph import MIMIC_CXR_JPG, radiograph_size, read_radiograph

NOT_ABNORMAL = {"Support devices", "Quality issue"}  # findings that make an ellipse no abnormality
BOX = list(RECTANGLE)
# Columns of the ratios, and within what they are computed.
REGIONS = {"ratio_image": "whole image", "ratio_chest": "chest box"}
TABLES = ("ellipses", "size_by_finding", "readings", "ratio_by_finding", "significant_patches")
DRAWS = 2000  # of subjects, for the intervals
EXAMPLE_SIZE = 512  # short side, px


@dataclass
class Analysis:
    """The tables, by the names of their files, examples (title, picture RGB [H, W, 3]), the figure's title, what was left
    out, and notes."""

    tables: dict[str, pd.DataFrame]
    examples: list[tuple[str, np.ndarray]]
    title: str
    exclusions: list[Exclusion]
    notes: list[str]

    def write(self, out: Path) -> None:
        """Write the tables and gaze_analysis.png into directory `out`, in place of another analysis's."""
        out.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            (out / f"{name}.csv").unlink(missing_ok=True)
            if name in self.tables:
                with atomic_write(out / f"{name}.csv", "w") as file:
                    self.tables[name].to_csv(file, index=False, float_format="%.6g")
        save_figure(analysis_figure(self.tables, self.examples, self.title), out / "gaze_analysis.png")

    def __str__(self) -> str:
        lines = [self.title]
        for name in ("size_by_finding", "ratio_by_finding"):
            if name in self.tables:
                lines.append(f"{name}:\n{self.tables[name].to_string(index=False, float_format='{:.3f}'.format)}")
        lines += [*map("note: {}".format, self.notes), *map("left out: {}".format, self.exclusions)]
        return "\n".join(lines)


def analyze(
    raw: Path,
    images: Path | None = None,
    *,
    split: str = "all",
    size: int = 256,
    size_thresholds: tuple[float, float] = (0.01, 0.05),
    min_certainty: int = 1,
    examples: int = 3,
    sigma: float | None = None,
    metadata: Path | None = None,
    workers: int = 1,
) -> Analysis:
    """Analyse all usable readings of a raw gaze data set.

    Args:
        raw: root of REFLACX or EGD-CXR, see `datasets.raw.sources.find_raw`.
        images: root of the MIMIC-CXR images, for the examples.
        size: short side of the heatmaps, px.
        size_thresholds: area shares of the image at which medium and large begin.
        min_certainty: ellipses below this certainty (1-5) are not used.
        examples: how many images to show, evenly spread over the density ratios.
        sigma, metadata: of EGD-CXR, see `read_egd`; an error for other data sets.

    A damaged reading is left out and listed. Raises `UserError` where nothing can be analysed.
    """
    small, medium = size_thresholds
    if not 0 < small < medium < 1:
        raise UserError(f"--size_thresholds {small:g} {medium:g}: two rising shares of the image's area, in 0..1")
    root = raw.resolve()
    found = read_raw(root, images, sigma=sigma, metadata=metadata)
    chosen = found.of_split(split)
    measure = partial(_measure, size=size, min_certainty=min_certainty)
    measured = []
    for result in run_tasks(measure, [*chosen.values()], workers, name="analyze"):
        (found.exclusions if isinstance(result, Exclusion) else measured).append(result)
    if not measured:
        raise UserError(f"{root}: none of the {len(chosen)} readings can be analysed{first_of(found.exclusions)}")

    rows, parts, ratios = zip(*measured)
    readings, ellipses = pd.DataFrame(rows), pd.concat(parts)
    counts = np.bincount(readings["significant_patches"])  # of readings, by their number of significant patches
    tables = {
        "readings": readings,
        "significant_patches": pd.DataFrame({"significant_patches": range(len(counts)), "readings": counts}),
    }
    if ellipses.empty:
        tables["readings"] = readings.drop(columns="ellipses")
        found.notes.append(
            f"no abnormality is marked with a certainty of {min_certainty} or more (EGD-CXR marks none): no ellipse sizes "
            "and no density ratios"
        )
    elif readings.reindex(columns=[*REGIONS]).isna().all(axis=None):
        raise UserError(
            f"{root}: at --size {size} no ellipse covers a part of its image only; choose a larger one, or look where "
            "the ellipses are"
        )
    else:
        edges = (-np.inf, small, medium, np.inf)
        ellipses["size"] = pd.cut(ellipses["area_share"], edges, right=False, labels=SIZES)
        tables["ellipses"] = ellipses.assign(findings=ellipses["findings"].str[1:].str.join("|"))
        tables["size_by_finding"] = _size_table(ellipses)
        tables["ratio_by_finding"] = _ratio_table(pd.DataFrame(chain(*ratios)))

    pictures = []
    paths = find_images(images, {own.image_id: own.image_path for own in chosen.values()}).paths if images else {}
    shown = readings[readings["image_id"].isin([*paths])].drop_duplicates("image_id")
    if not ellipses.empty:
        shown = shown.dropna(subset="ratio_image").sort_values("ratio_image")
    # Evenly spread over the ranks of the ratios.
    for row in np.linspace(0, len(shown) - 1, min(examples, len(shown))).astype(int):
        reading = chosen[shown["id"].iloc[row]]
        try:
            picture = _picture(reading, paths[reading.image_id], min_certainty)
            pictures.append((reading.id, picture))
        except UserError as error:
            found.exclusions.append(Exclusion(reading.id, "no example", str(error), is_fault=True))
    made_up = "; SIMULATED GAZE, no radiologist looked at these images" if found.simulated else ""
    title = (
        f"{raw} ({found.source}), split {split}: {len(readings):,} readings of {readings['image_id'].nunique():,} images; "
        f"medium abnormalities from {small:.3g} of the image's area, large ones from {medium:.3g}{made_up}"
    )
    return Analysis(tables, pictures, title, found.exclusions, found.notes)


def _measure(
    reading: Reading, *, size: int, min_certainty: int
) -> tuple[dict[str, Any], pd.DataFrame, list[dict[str, Any]]] | Exclusion:
    """What one reading adds to the tables: its row, its ellipses, and a row of density ratios for all abnormalities
    together (`ANY`) and for each finding, with a column for each of `REGIONS`.

    Outside always means outside of every abnormality. Ellipses that no pixel centre of the map falls into give no ratio.
    """
    image_size = reading.image_size
    try:
        gaze = reading_gaze(reading, reading.fixations_path, image_size, scaled_size(image_size, size))
        if isinstance(gaze, Exclusion):
            return gaze
        ellipses = _abnormalities(reading, min_certainty)
        chest = reading.load_chest_box()
    except UserError as error:
        return Exclusion(reading.id, "unusable reading", str(error), is_fault=True)
    _, heatmap = gaze
    who = {"id": reading.id, "subject_id": reading.subject_id}
    masks = {
        name: ellipse_mask(own[BOX].to_numpy(float), image_size, heatmap.shape)
        for name, own in ellipses.explode("findings").groupby("findings")
    }
    in_chest = np.bool_(False) if chest is None else box_mask(chest, image_size, heatmap.shape)
    ratios = {
        name: {
            region: density_ratio(heatmap, mask & within, ~masks[ANY] & within)
            for region, within in zip(REGIONS, (np.bool_(True), in_chest))
        }
        for name, mask in masks.items()
        if mask.any()
    }
    area = np.pi / 4 * ellipses.eval("(xmax - xmin) * (ymax - ymin)")
    ellipses = ellipses.assign(**who, area_share=area / (image_size[0] * image_size[1]))
    row = {
        **who,
        "image_id": reading.image_id,
        "split": reading.split,
        "ellipses": len(ellipses),
        "significant_patches": count_significant(attention_maps(heatmap)[1]),
        **ratios.get(ANY, {}),
    }
    own = ellipses[["id", "subject_id", "findings", "certainty", "area_share"]]
    return row, own, [{**who, "finding": name, **both} for name, both in ratios.items()]


def _abnormalities(reading: Reading, min_certainty: int) -> pd.DataFrame:
    """The ellipses of a reading that mark abnormalities; the `findings` of each are `ANY` and its own ones."""
    ellipses = reading.load_ellipses()
    other = [bool(own) and NOT_ABNORMAL.issuperset(own) for own in ellipses["findings"]]
    findings = [[ANY, *(name for name in own if name not in NOT_ABNORMAL)] for own in ellipses["findings"]]
    return ellipses.assign(findings=findings)[(ellipses["certainty"] >= min_certainty) & ~np.array(other, bool)]


def _by_number(rows: pd.DataFrame, column: str) -> Iterable[tuple[str, pd.DataFrame]]:
    """The rows of each finding in a column; `ANY` first, then by number, then by name."""
    return sorted(rows.groupby(column), key=lambda group: (group[0] != ANY, -len(group[1])))


def _size_table(ellipses: pd.DataFrame) -> pd.DataFrame:
    """Per finding: ellipses, the share of each size class, median area share."""
    rows = [
        [finding, len(own), *((own["size"] == size).mean() for size in SIZES), own["area_share"].median()]
        for finding, own in _by_number(ellipses.explode("findings"), "findings")
    ]
    return pd.DataFrame(rows, columns=["finding", "ellipses", *SIZES, "median_area_share"])


def _ratio_table(ratios: pd.DataFrame) -> pd.DataFrame:
    """Per finding and region (`within`): readings, subjects, mean with its 95% interval, median."""
    rows = []
    for finding, own in _by_number(ratios, "finding"):
        for column, within in REGIONS.items():
            known = own.dropna(subset=column)
            if len(known):
                means = bootstrap_means(known[[column]].to_numpy(), known["subject_id"], draws=DRAWS, seed=0)
                counts = len(known), known["subject_id"].nunique()
                rows.append([finding, within, *counts, *interval(means[:, 0]), known[column].median()])
    return pd.DataFrame(rows, columns=["finding", "within", "readings", "subjects", "mean", "low", "high", "median"])


def _picture(reading: Reading, path: str, min_certainty: int) -> np.ndarray:
    """The radiograph and beside it the same below its gaze, both with the abnormalities' outlines: RGB [H, 2W, 3]."""
    file_size = radiograph_size(path)
    reading.check_copy(file_size)
    image_size, size = reading.image_size, scaled_size(file_size, EXAMPLE_SIZE)
    gray = resize_gray(read_radiograph(path, MIMIC_CXR_JPG), size) / 255
    heatmap = fixation_heatmap(reading.load_fixations().table, image_size, size)
    mask = ellipse_mask(_abnormalities(reading, min_certainty)[BOX].to_numpy(float), image_size, size)
    picture = np.hstack([np.dstack([gray] * 3), gaze_overlay(gray, heatmap / heatmap.max())])
    return mark_boundaries(picture, np.hstack([mask, mask]), color=(0.3, 0.7, 0.9), mode="thick")
