"""The MIMIC-CXR tree, for pretraining on more images with heatmaps that were predicted elsewhere."""

from __future__ import annotations

import os
from typing import Any

from datasets.tree import EntryFiles, GazeTree


class Mimic(GazeTree):
    """`mimic-cxr-jpg-cleanv4.json`, images under `files/`, and `attention/` and `foreground/` that mirror
    `image_path` with .png; see `GazeTree`. `image_path` may begin with `files/` or leave it out, and so may
    the mirrors."""

    index_file = "mimic-cxr-jpg-cleanv4.json"
    required_keys = ("image_path",)
    prefixes = ("files/", "")

    def entry_files(self, entry: dict[str, Any]) -> EntryFiles:
        image = os.path.normpath(entry["image_path"]).removeprefix("files/")
        png = f"{self.map_prefix}{os.path.splitext(image)[0]}.png"
        names = (f"{self.image_prefix}{image}", f"attention/{png}", f"foreground/{png}")
        return EntryFiles(*(f"{self.root}/{name}" for name in names))
