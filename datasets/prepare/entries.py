"""The entries of reflacx.json and the names of their files."""

from __future__ import annotations

from collections.abc import Sequence

from datasets.raw.findings import merge_findings, unify
from datasets.raw.readings import Reading


def stored_image(reading: Reading) -> str:
    """Where a tree has the image of a reading."""
    return f"images/{reading.study_id}/{reading.image_id}.png"


def entry_id(readings: Sequence[Reading]) -> str:
    """`reflacx_id` of an entry: its reading's id; of several the first one's + how many more ("P101R000001+4")."""
    return readings[0].id if len(readings) == 1 else f"{readings[0].id}+{len(readings) - 1}"


def entry(readings: Sequence[Reading]) -> dict:
    """Entry of reflacx.json for one reading, or for several merged, in the order of their ids.

    `raw_ids` lists the readings. `labels` are the common findings of datasets/raw/findings.py. Of merged
    readings `phase` is the first one's.
    """
    first = readings[0]
    labels = [unify(reading.labels) for reading in readings]
    return {
        "image_path": stored_image(first),
        "study_id": first.study_id,
        "reflacx_id": entry_id(readings),
        "raw_ids": [reading.id for reading in readings],
        "dicom_id": first.image_id,
        "subject_id": first.subject_id,
        "phase": first.phase,
        "split": first.split,
        "source": first.source,
        "labels": labels[0] if len(labels) == 1 else merge_findings(labels),
    }
