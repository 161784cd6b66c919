#!/usr/bin/env bash
# Sets up the same environment as quickstart.sh, with the tools of the tests, then checks style and types and runs the
# tests. Arguments go to pytest; without any, all tests run but the slow ones and those for GPUs, two files at a time: while
# a test of several ranks starts up, one core would idle.
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
