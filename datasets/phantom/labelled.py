"""What made-up labelled data sets share: chests with lesions of known kinds, whose labels are true."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.phantom.chest import LESION_KINDS
from datasets.phantom.study import PhantomImage, PhantomStudy, check_options, draw_chests

MARK = "MADE_UP.txt"


@dataclass(frozen=True)
class Chests:
    """Which chests to draw.

    Attributes:
        size: (height, width) in px.
        lesion_kinds: what to draw from; 1 or 2 of them in an image that has any.
        normal_fraction: share of images without a lesion.
        lesion_size, lesion_contrast: multiply the usual extent and contrast.
    """

    n_images: int = 24
    seed: int = 0
    size: tuple[int, int] = (512, 420)
    lesion_kinds: Sequence[str] = LESION_KINDS
    normal_fraction: float = 0.2
    lesion_size: float = 1.0
    lesion_contrast: float = 1.0

    def study(self, root: Path, name: str) -> PhantomStudy:
        """An empty study in `root`/`name`, which says that it is made up. Raises ValueError for bad options."""
        check_options(self.n_images, "jpg", self.lesion_kinds)
        folder = Path(root, name)
        folder.mkdir(parents=True, exist_ok=True)
        text = "Made-up chests, drawn by scripts/make_phantom.py: no result on them says anything of medicine.\n"
        (folder / MARK).write_text(text, encoding="utf-8")
        return PhantomStudy(Path(root), folder, folder, [], self.seed)

    def draw(self, study: PhantomStudy, suffix: str) -> Iterator[tuple[PhantomImage, np.ndarray]]:
        """Each image with its pixels, uint8 [H, W]; its path is still to be set. Image i is the same however
        many there are."""
        options = {
            name: getattr(self, name) for name in ("lesion_kinds", "normal_fraction", "lesion_size", "lesion_contrast")
        }
        chests = draw_chests(study, self.n_images, self.size, ((11,), (12,)), image_format=suffix[1:], **options)
        return ((image, gray) for image, gray, _ in chests)


def kinds_of(image: PhantomImage) -> set[str]:
    """Kinds of the image's lesions."""
    return {lesion.kind for lesion in image.lesions}
