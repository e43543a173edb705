"""The processed REFLACX tree: radiographs with gaze heatmaps (DATA.md layout of the published program)."""

from __future__ import annotations

from typing import Any

from datasets.tree import EntryFiles, GazeTree


class Reflacx(GazeTree):
    """`reflacx.json` and `attention/` and `foreground/<study_id>/<reflacx_id>.png`; see `GazeTree`.

    Indexes written against MIMIC-CXR-JPG may leave its top directory out of `image_path`."""

    index_file = "reflacx.json"
    required_keys = ("image_path", "study_id", "reflacx_id")

    def entry_files(self, entry: dict[str, Any]) -> EntryFiles:
        name = f"{entry['study_id']}/{entry['reflacx_id']}.png"
        names = (f"{self.image_prefix}{entry['image_path']}", f"attention/{name}", f"foreground/{name}")
        return EntryFiles(*(f"{self.root}/{name}" for name in names))
