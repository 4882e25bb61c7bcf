"""YAML files of random pieces: each is a mapping of settings or is refused in one line.

Lost is a text with which reading it, or making a config of it, ends in another error.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from pathlib import Path

from mclfast._base.files import read_yaml
from mclfast.config import TrainConfig
from sweeps import tally

#: Settings, and pieces that mean something to YAML.
_SETTINGS = {
    "lr": "0.1",
    "epochs": "3",
    "cohort": "[resnet8, resnet8]",
    "method": "mcl",
    "milestones": "[5, 9]",
    "amp": "off",
    "seed": "1",
    "weight_decay": "1e-3",
    "augment": "true",
    "image_size": "null",
}
_ODD = (
    ["&x ", "*x", "<<", "? ", "- ", "!!binary ", "!!python/name:os.system", "!!set ", "|", ">", "%"]
    + ["{", "}", "[", "]", ",", '"', "'", "#", "\t", "\0", "\x85", "\ufeff", "---", "...", "=", "~"]
    + ["2020-99-99", "1:60:99", ".inf", ".nan", "0x", "1_000", "1e999", "9" * 5000, "[" * 40, "é"]
)


def sweep(count: int, seed: int) -> dict[str, int]:
    """Reads random texts.

    Args:
        count: number of texts.
        seed: seed of the texts.

    Returns:
        Numbers of texts: tried, survived (read, and a config was made), refused, lost.
    """
    draw, found = random.Random(seed), Counter(tried=0, survived=0, refused=0, lost=0)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "r.yaml")
        for number in range(count):
            text = _text(draw)
            file.write_text(text, encoding="utf-8")
            outcome = _try(file)
            tally(found, outcome, f"text {number} (seed {seed}): {text[:500]!r}")
    return dict(found)


def _text(draw: random.Random) -> str:
    """Lines of settings, some of them with odd pieces somewhere."""
    names = draw.sample(list(_SETTINGS), draw.randrange(1, 6))
    if draw.random() < 0.1:
        names.append(draw.choice(names))
    lines = []
    for name in names:
        line = f"{name}: {_SETTINGS[name]}"
        while draw.random() < 0.15:
            place = draw.randrange(len(line) + 1)
            line = line[:place] + draw.choice(_ODD) + line[place:]
        lines.append("  " * (draw.random() < 0.05) + line)
    return "\n".join(lines) + "\n"


def _try(file: Path) -> str:
    try:
        TrainConfig.from_values(read_yaml(file, "recipe"))
    except ValueError as error:
        text = str(error)
        return text if "\n" in text or len(text) > 2000 else "refused"
    # A traceback for the user; the sweep has to go on.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "survived"
