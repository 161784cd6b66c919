#!/usr/bin/env bash
# Sets up the environment of quickstart.sh with the test tools, then checks lint, format and types and runs the tests.
# Arguments go to pytest; without any, all tests run but the slow ones and those for GPUs, two files at a time, since one
# core would idle while a test of several ranks starts.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
set_up_environment "[test]"
cd "$REPOSITORY"
[ $# -gt 0 ] || set -- -m "not slow and not gpu" --numprocesses 2 --dist loadfile
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
