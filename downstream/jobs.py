"""Finished pieces of long work: names by content, and arrays in files of such names, so that nothing is done twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from util.errors import UserError
from util.files import atomic_write


def digest(content: object) -> str:
    """A short name for plain content (numbers, texts, lists, dicts): equal content, equal name."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:20]


def load_array(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array of `save_array`; None if there is none of this shape, or a damaged one, which prints a warning."""
    try:
        found = np.load(path)
        if found.shape != shape:
            raise ValueError(f"shape {found.shape}")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        print(f"warning: {path}: can't be used ({error}); doing this again", flush=True)
        return None


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array, whole or not at all; makes the folder. Raises `UserError` on a full disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.save(file, array)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}; make room") from None
