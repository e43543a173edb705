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

    def entry_files(self, entry: dict[str, Any]) -> EntryFiles:
        image = os.path.normpath(entry["image_path"])
        inner = image.removeprefix("files/")
        png = f"{os.path.splitext(inner)[0]}.png"
        with_prefix_first = image != inner

        def mirror(kind: str) -> tuple[str, str]:
            places = (f"{kind}/files/{png}", f"{kind}/{png}")
            return places if with_prefix_first else places[::-1]

        return EntryFiles(
            image=self.first_existing(f"files/{inner}", image),
            attention=self.first_existing(*mirror("attention")),
            foreground=self.first_existing(*mirror("foreground")),
        )
