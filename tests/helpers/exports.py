"""Exported backbones changed on purpose: without the digests that tell a change from damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DIGESTS = ("blake2b", "weights_blake2b")


def edit(folder: Path, **changes: Any) -> None:
    """Changes fields of the description of an export; the value ``...`` removes a field.

    Args:
        folder: folder of the export.
        changes: new values by name.
    """
    file = folder / "backbone.json"
    about = json.loads(file.read_text()) | dict.fromkeys(DIGESTS, ...) | changes
    file.write_text(json.dumps({k: v for k, v in about.items() if v is not ...}))
