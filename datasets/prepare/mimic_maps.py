"""One image of MIMIC-CXR with its heatmap, if it has one: from its files to the files of a tree."""

from __future__ import annotations

from pathlib import Path

from datasets.prepare.heatmaps import read_heatmap
from datasets.prepare.pixels import attention_maps, count_significant, resize_gray, scaled_size, write_image
from datasets.prepare.work import Made
from datasets.raw.readings import Exclusion
from util.errors import UserError
from util.radiograph import radiograph_size, read_radiograph


def make_image(task, *, out: Path | None, options) -> Made:
    """Write one image and its maps below `out`; with None, check all but the image's pixels.

    `task` is a `datasets.prepare.mimic.MimicTask`, `options` are `MimicOptions`. The note has the significant
    patches, if there is a heatmap.
    """
    made = Made()
    try:
        size = scaled_size(radiograph_size(task.image), options.size)
        if task.heatmap is not None:
            with made.timed("heatmaps"):
                maps = attention_maps(read_heatmap(task.heatmap, size))
        if out is not None:
            with made.timed("decoding"):
                gray = read_radiograph(task.image, options.dicom_contrast)
            with made.timed("resizing"):
                gray = resize_gray(gray, size)
            with made.timed("writing"):
                write_image(out / f"files/{task.key}.jpg", gray)
    except UserError as error:
        made.exclusions.append(Exclusion(task.dicom_id, "unreadable", str(error), is_fault=True))
        return made
    made.files.append(f"files/{task.key}.jpg")
    if task.heatmap is not None:
        made.note["significant"] = [count_significant(maps[1])]
        for kind, pixels in zip(("attention", "foreground"), maps):
            made.files.append(f"{kind}/{task.key}.png")
            if out is not None:
                with made.timed("writing"):
                    write_image(out / made.files[-1], pixels)
    return made
