#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call of under ten minutes: build, tests, memory and
# race checks of the CUDA kernels, benchmark.
#
#   scripts/gpu_check.sh [OUT]      results go to OUT (default: bench/results/gpu)
#
# Needs a Python with torch for CUDA, triton, numpy and pytest; installs and downloads nothing.
# Exits with the first failure, and leaves what it had measured by then.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-bench/results/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv | tee "$out/gpu.csv"
MCLFAST_BUILD_EXT=1 "$python" setup.py -q build_ext --inplace > "$out/build.log" 2>&1
"$python" -m mclfast env | tee "$out/environment.txt"
timeout 200 "$python" -m pytest -q -p no:cacheprovider tests/ops/test_gpu.py tests/ops/test_gpu_bank.py \
    tests/execution/test_gpu_memory_modes.py tests/execution/test_gpu_layout.py tests/plan/test_gpu_plan.py \
    | tee "$out/tests.txt"
# The kernels of csrc/cuda under the checkers of the CUDA toolkit, at small shapes.
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        timeout 45 compute-sanitizer --tool "$tool" --error-exitcode 99 \
            "$python" -m pytest -q -p no:cacheprovider tests/ops/test_gpu_bank.py -k "small or update" \
            | tee "$out/$tool.txt"
    done
else
    echo "compute-sanitizer is not installed: memcheck and racecheck skipped" | tee "$out/memcheck.txt"
fi
timeout 150 "$python" -m mclfast bench --preset gpu --budget 3 --plot --out "$out" \
    | tee "$out/bench.txt"
# Whole training steps against the plain loop, and against the number of networks.
timeout 60 "$python" bench/bench_train_step.py --device cuda --rounds 20 --bilevel-rounds 2 \
    --variants published ours channels_last stack --out "$out/train-step" \
    | tee "$out/train-step.txt"
timeout 60 "$python" bench/bench_cohort_size.py --device cuda --network resnet32 --batch 128 \
    --out "$out/train-step" | tee "$out/cohort-size.txt"
