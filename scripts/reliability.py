"""Puts the figures of the long sweeps into docs/reliability.md.

PYTHONPATH=tests python -m sweeps --json FILE     # makes the figures, see make nightly
python scripts/reliability.py FILE                # writes them into the table
python scripts/reliability.py FILE --check        # 1 if the table does not hold them
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"
COLUMNS = ("tried", "survived", "refused", "lost")


def table(found: dict[str, Any]) -> str:
    """The figures of each sweep as a table."""
    lines = [
        f"| sweep | {' | '.join(COLUMNS)} | more | seed | seconds |",
        f"|{'---|' * (len(COLUMNS) + 4)}",
    ]
    for name, result in found.items():
        counts = result["counts"]
        others = ", ".join(f"{k} {v:,}" for k, v in counts.items() if k not in COLUMNS)
        cells = [f"{counts[column]:,}" if column in counts else "" for column in COLUMNS]
        cells += [others, str(result["seed"]), f"{result['seconds']:.0f}"]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    places = {(r["torch"], r["python"], r["processor"]) for r in found.values()}
    where = "; ".join(f"torch {t}, Python {p}, {c}" for t, p, c in sorted(places))
    return "\n".join([*lines, "", f"With {where}.", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("figures", type=Path, help="file that `python -m sweeps --json` wrote")
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    given = parser.parse_args()
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    wanted = f"{before}{BEGIN}{table(json.loads(given.figures.read_text()))}{END}{after}"
    if given.check:
        return int(text != wanted)
    DOCUMENT.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
