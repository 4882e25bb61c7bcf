#!/usr/bin/env bash
# mypy on the package as it is installed: with bench/ in it as mclfast.bench.
# mypy looks for modules by folder and knows nothing of setup.py, which says where they lie.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tree=build/typecheck
rm -rf "$tree"
mkdir -p "$tree/mclfast"
for entry in mclfast/*; do
    [ "$entry" = mclfast/bench.py ] || ln -s "$PWD/$entry" "$tree/mclfast/"
done
ln -s "$PWD/bench" "$tree/mclfast/bench"
mypy=${MYPY:-$PWD/.venv/bin/mypy}
cd "$tree"
exec "$mypy" --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache
