#!/usr/bin/env bash
# The tests of the C++ operators under ThreadSanitizer, once for each instruction set that this
# processor has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(command -v "${PYTHON:-python3}")

MCLFAST_BUILD_EXT=1 MCLFAST_SANITIZE=thread "$python" setup.py -q build \
    --build-base build/tsan --build-lib build/tsan/lib
sets=$("$python" - <<'PY'
from mclfast.ops import backends

simd = (backends.build_info() or {})["simd"]
print("default", *(name for name, part in (("avx2", "avx2"), ("avx512", "avx512f")) if part in simd))
PY
)
for set in $sets; do
    echo "ThreadSanitizer: $set"
    # The library of the sanitizer must come before Python's own; code of others is not instrumented.
    LD_PRELOAD="$(gcc -print-file-name=libtsan.so)" OMP_NUM_THREADS=2 MCLFAST_CPU_CAPABILITY=$set \
        TSAN_OPTIONS="ignore_noninstrumented_modules=1:exitcode=66" PYTHONPATH=build/tsan/lib \
        MCLFAST_SANITIZE=thread "$(dirname "$python")/pytest" -q -p no:cacheprovider \
        tests/ops/test_cpu_ops.py tests/ops/test_cpu_bank_ops.py
done
