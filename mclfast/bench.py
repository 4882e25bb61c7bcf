"""Stand-in that makes ``mclfast.bench`` the folder ``bench/`` of an uninstalled checkout.

A wheel holds the folder as ``mclfast/bench/``, which Python prefers to this file.
"""

from pathlib import Path

_init = Path(__file__).resolve().parent.parent / "bench" / "__init__.py"

# Relative imports inside the folder resolve by the spec, so ``__path__`` alone is not enough.
__path__ = [str(_init.parent)]
__package__ = __name__
if __spec__ is not None:
    __spec__.submodule_search_locations = __path__

exec(compile(_init.read_text(encoding="utf-8"), str(_init), "exec"))
