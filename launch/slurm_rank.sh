#!/usr/bin/env bash
# One rank of slurm.sbatch: sets the launchers' variables from Slurm's.
set -euo pipefail
# shellcheck source=launch/launching.sh
source "$(dirname "${BASH_SOURCE[0]}")/launching.sh"
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*}
divide_cores "$LOCAL_WORLD_SIZE"
exec python -m qa_deepspeed "$@"
