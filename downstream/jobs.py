"""Finished pieces of long work, each in a file named by all that it depends on, so that nothing is done twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from util.errors import UserError
from util.files import atomic_write


def digest(content: object) -> str:
    """A short name for plain content (numbers, texts, lists, dicts): equal content, equal name."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:20]


class Jobs:
    """Arrays of finished jobs in a folder, which is made at the first one."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"

    def load(self, key: str) -> dict[str, np.ndarray] | None:
        """What was saved under `key`; None if nothing was, or if it can't be read any more (which is said)."""
        path = self.path(key)
        try:
            with np.load(path, allow_pickle=False) as stored:
                return dict(stored)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, BadZipFile, EOFError, RuntimeError) as error:
            print(f"warning: {path}: can't be read ({error}); doing it again", flush=True)
            return None

    def save(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep `arrays`, whole or not at all. Raises `UserError` on a full disk."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path(key)) as file:
                np.savez(file, **arrays)
        except OSError as error:
            raise UserError(f"{self.path(key)}: can't be written: {error.strerror}; make room") from None
