# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: a virtual environment of the repository's own with the tested versions in it.
#
#   VENV             folder of the environment (default: .venv in the repository)
#   PYTHON           the Python >= 3.10 to make it with (default: python3)
#   TORCH_INDEX_URL  PyTorch's package index for this machine, for its CPU or CUDA wheels (default: pip's own index)

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$REPOSITORY/.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
NEEDED_MIB=3000

fail() {
    printf '%s: error: %s\n' "$(basename "$0")" "$1" >&2
    exit 1
}

# Keep the user's own Python packages out, and install nothing outside the environment.
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_ROOT
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_REQUIRE_VIRTUALENV=1 PIP_DISABLE_PIP_VERSION_CHECK=1

make_environment() {
    local python=${PYTHON:-python3} free place
    command -v "$python" >/dev/null || fail "no $python here: install Python >= 3.10, or name one: PYTHON=/path/to/python3"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$python" --version 2>&1) is too old, 3.10 or newer is needed: name one, PYTHON=/path/to/python3"
    if [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
        fail "$VENV is not a virtual environment: remove it, or name another folder with VENV"
    fi
    mkdir -p "$VENV" 2>/dev/null || fail "cannot write $VENV: name another folder with VENV"
    for place in "$VENV" "${TMPDIR:-/tmp}"; do
        free=$(df -Pm "$place" | awk 'NR == 2 { print $4 }')
        [ "$free" -ge "$NEEDED_MIB" ] ||
            fail "$free MiB free at $place, $NEEDED_MIB are needed (10000 with CUDA wheels): make room, or set VENV and TMPDIR"
    done
    "$python" -m venv "$VENV" >/dev/null 2>&1 ||
        fail "$python -m venv $VENV failed: install the venv module (Debian, Ubuntu: apt install python3-venv)"
}

install_packages() {
    "$VENV/bin/python" -m pip install --quiet --constraint "$REPOSITORY/launch/constraints.txt" "$@" ||
        fail "pip could not install the packages, see above; run this again to continue"
}

# set_up_environment EXTRAS: the environment with the package and these extras ("" or "[test]"), ready to use and first on
# PATH. An environment with the same pins is reused.
set_up_environment() {
    local extras=$1 stamp want index=()
    stamp=$VENV/installed$extras
    want=$(cat "$REPOSITORY/launch/constraints.txt" "$REPOSITORY/setup.cfg" && printf '%s\n' "$VENV" "${TORCH_INDEX_URL:-}")
    want=$(printf '%s' "$want" | cksum)
    if [ ! -x "$VENV/bin/python" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        make_environment
        [ -z "${TORCH_INDEX_URL:-}" ] || index=(--extra-index-url "$TORCH_INDEX_URL")
        printf 'Installing PyTorch into %s (some minutes where it must be downloaded) ...\n' "$VENV"
        # PyTorch first, since DeepSpeed's set-up looks for it; setuptools and wheel build both without build isolation.
        install_packages ${index[@]+"${index[@]}"} torch setuptools wheel
        printf 'Installing qa_deepspeed%s and what it needs ...\n' "$extras"
        install_packages --no-build-isolation --editable "$REPOSITORY$extras"
        printf '%s\n' "$want" >"$stamp"
    fi
    export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
}
