"""Data sets of radiographs with gaze: `build_dataset` makes one from any processed tree (`datasets.build`).

What it needs, torch above all, is imported on first use, so that the programs and workers that prepare trees do not
carry it.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Mimic", "Problem", "Reflacx", "SampleError", "add_cache", "build_dataset", "check_data", "detect_tree"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import datasets.build

    return getattr(datasets.build, name)
