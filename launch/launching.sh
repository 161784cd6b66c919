# shellcheck shell=bash
# Sourced by local.sh, multinode.sh, slurm.sbatch and slurm_rank.sh: their common functions.

REPOSITORY=${REPOSITORY:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
VENV=${VENV:-$REPOSITORY/.venv}
[ ! -x "$VENV/bin/python" ] || export PATH="$VENV/bin:$PATH"
# The package is found from any folder; DeepSpeed's launcher sends variables that begin with PYTHON to the other hosts.
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"

REQUEUE_STATUS=75 # exit status of a preempted run that can be resumed

fail() {
    printf '%s: error: %s\n' "$(basename "$0")" "$1" >&2
    exit 2
}

# number_of NAME: fails unless the setting NAME is a whole number of at least 1.
number_of() {
    [[ ${!1} =~ ^[1-9][0-9]*$ ]] || fail "$1 must be a whole number of at least 1, not '${!1}'"
}

# count_gpus: the GPUs of this machine, or 1 rank on its CPU where there are none.
count_gpus() {
    local gpus=0
    if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi -L | wc -l); fi
    echo $((gpus > 0 ? gpus : 1))
}

# divide_cores RANKS: divides this machine's cores among the ranks where it has no GPU, as torchrun and deepspeed do not.
divide_cores() {
    if [ -z "${OMP_NUM_THREADS:-}" ] && ! command -v nvidia-smi >/dev/null; then
        export OMP_NUM_THREADS=$(($(nproc) > $1 ? $(nproc) / $1 : 1))
    fi
}

# show COMMAND...: prints the exact command, ready to be pasted. With ECHO_ONLY=1 the script ends here.
show() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    [ -z "${ECHO_ONLY:-}" ] || exit 0
}

# output_folder FLAGS...: the value of --output_dir among the run's flags.
output_folder() {
    while [ $# -gt 0 ]; do
        case $1 in
            --output_dir) printf '%s' "${2:-}" && return ;;
            --output_dir=*) printf '%s' "${1#*=}" && return ;;
        esac
        shift
    done
}

# wants_requeue STATUS FLAGS...: whether a run that ended with STATUS asks to be resumed by the same command. Some
# launchers change exit statuses, so that the run leaves a file as well.
wants_requeue() {
    local status=$1 folder
    shift
    folder=$(output_folder "$@")
    [ "$status" -eq "$REQUEUE_STATUS" ] || { [ "$status" -ne 0 ] && [ -n "$folder" ] && [ -e "$folder/requeue" ]; }
}
