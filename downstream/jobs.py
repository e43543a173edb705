"""Names by content, so that nothing is done twice."""

from __future__ import annotations

import hashlib
import json


def digest(content: object) -> str:
    """A short name for plain content (numbers, texts, lists, dicts): equal content, equal name."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:20]
