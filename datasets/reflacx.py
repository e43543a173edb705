"""The processed REFLACX tree: radiographs with gaze heatmaps (DATA.md layout of the published program)."""

from __future__ import annotations

import os
from typing import Any

from datasets.tree import EntryFiles, GazeTree


class Reflacx(GazeTree):
    """`reflacx.json` and `attention/` and `foreground/<study_id>/<reflacx_id>.png`; see `GazeTree`."""

    index_file = "reflacx.json"
    required_keys = ("image_path", "study_id", "reflacx_id")

    def entry_files(self, entry: dict[str, Any]) -> EntryFiles:
        name = f"{entry['study_id']}/{entry['reflacx_id']}.png"
        image = entry["image_path"]
        return EntryFiles(
            # Indexes written against MIMIC-CXR-JPG may leave its top directory out.
            image=self.first_existing(image, f"files/{image}"),
            attention=os.path.join(self.root, "attention", name),
            foreground=os.path.join(self.root, "foreground", name),
        )
