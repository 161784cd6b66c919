#!/usr/bin/env bash
# Trains on this machine, or runs this machine's part of a run on several; the arguments are flags of `qa-deepspeed train`.
#
#   GPUS       ranks here (default: one on each GPU, or one on the CPU)
#   CONFIG     DeepSpeed config, a shipped name or a path (default: auto)
#   LAUNCHER   deepspeed (default) or torchrun
#   PORT       rank 0's port (default 29500)
#   NODES, NODE_RANK, MASTER_ADDR   with torchrun: machines of the run, this one's number, the first one's address
#   RENDEZVOUS                      with torchrun: HOST:PORT of the rendezvous, instead of NODE_RANK and MASTER_ADDR;
#                                   HOST is one of them. The same on all, PORT another for each run
#   NODES=LEAST:MOST, MAX_RESTARTS  with RENDEZVOUS: when a rank dies, all ranks are restarted at most this often (default 0)
#                                   on the remaining machines, if they are at least LEAST (HOST among them). Pass
#                                   --global_batch_size, so that the global batch stays the same with fewer ranks.
#   ECHO_ONLY=1   print the command and do nothing
set -euo pipefail
# shellcheck source=launch/launching.sh
source "$(dirname "${BASH_SOURCE[0]}")/launching.sh"
GPUS=${GPUS:-$(count_gpus)}
PORT=${PORT:-29500}
NODES=${NODES:-1}
MAX_RESTARTS=${MAX_RESTARTS:-0}
for name in GPUS PORT; do number_of "$name"; done
[[ $NODES =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "NODES must be a number of machines, or LEAST:MOST, not '$NODES'"
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS must be a whole number, not '$MAX_RESTARTS'"
[ -n "${RENDEZVOUS:-}" ] || [ "${NODES#*:}/$MAX_RESTARTS" = "$NODES/0" ] ||
    fail "NODES=LEAST:MOST and MAX_RESTARTS need RENDEZVOUS=HOST:PORT, or multinode.sh --max_restarts"
[ -z "${CONFIG:-}" ] || set -- --deepspeed_config "$CONFIG" "$@"
divide_cores "$GPUS"
case ${LAUNCHER:-deepspeed} in
    deepspeed)
        [ "$NODES" = 1 ] || fail "NODES=$NODES needs LAUNCHER=torchrun here, or multinode.sh"
        command=(deepspeed --quiet --num_accelerators "$GPUS" --master_port "$PORT" --module qa_deepspeed train "$@")
        ;;
    torchrun)
        if [ -n "${RENDEZVOUS:-}" ]; then
            meeting=(--rdzv_backend c10d --rdzv_endpoint "$RENDEZVOUS" --rdzv_id "qa_deepspeed-${RENDEZVOUS##*:}"
                --max_restarts "$MAX_RESTARTS")
        else
            meeting=(--node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$PORT")
        fi
        command=(python -m qa_deepspeed.torchrun --nnodes "$NODES" --nproc_per_node "$GPUS" "${meeting[@]}"
            -m qa_deepspeed train "$@")
        ;;
    *) fail "LAUNCHER must be deepspeed or torchrun, not '$LAUNCHER'" ;;
esac
show "${command[@]}"
exec "${command[@]}"
