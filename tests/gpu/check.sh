#!/usr/bin/env bash
# Checks and measures on a machine with one GPU, in nine minutes: the GPU tests that matter most, then the table of steps.
#
#   tests/gpu/check.sh OUT [--tiny]
#
#   WHEELS    folder with wheels of what the machine lacks (deepspeed and its requirements), installed without an index
#   SECONDS_OF_TESTS, SECONDS_OF_STEPS   time for each part (default 200 and 300)
#
# Results go to OUT as they come: machine.txt, tests.txt, steps.jsonl, steps.md. --tiny runs the same on a CPU with a small
# model and no GPU tests: the test that this script works.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ $# -ge 1 ] || { echo "usage: tests/gpu/check.sh OUT [--tiny]" >&2; exit 2; }
OUT=$1
TINY=${2:-}
PYTHON=${PYTHON:-python3}
[ -z "${QA_DEEPSPEED_SHARED:-}" ] && [ -d shared ] && export QA_DEEPSPEED_SHARED=$PWD/shared
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
mkdir -p "$OUT"
if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || exit 1
fi
{
    git log -1 --format='commit %h' 2>/dev/null
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU"
    "$PYTHON" -m pip list 2>/dev/null | grep -iE "^(torch|transformers|deepspeed|triton|datasets|numpy) "
} >"$OUT/machine.txt"
cat "$OUT/machine.txt"
failed=0
if [ "$TINY" != --tiny ]; then
    timeout "${SECONDS_OF_TESTS:-200}" "$PYTHON" -m pytest tests/gpu/test_graphs.py tests/gpu/test_packing.py \
        tests/gpu/test_kernels.py tests/gpu/test_gpu.py -m gpu -v -rs -p no:cacheprovider >"$OUT/tests.txt" 2>&1 || failed=1
    grep -E "FAILED|ERROR|SKIPPED|passed|failed" "$OUT/tests.txt"
fi
"$PYTHON" tests/gpu/bench_steps.py "$OUT" --seconds "${SECONDS_OF_STEPS:-300}" ${TINY:+"$TINY"} || failed=1
exit $failed
