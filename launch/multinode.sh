#!/usr/bin/env bash
# Trains on the hosts of a hostfile; the arguments are flags of `qa-deepspeed train`.
#
#   HOSTFILE       lines `NAME slots=RANKS`, as hostfile.example; this machine should be the first
#   CONFIG         DeepSpeed config, a shipped name or a path (default: auto)
#   LAUNCHER       pdsh (default) or openmpi, by DeepSpeed's launcher; ssh: a torchrun on each host, started by plain ssh
#   PORT           rank 0's port (default 29500)
#   MASTER_ADDR    address of the first host as the others see it (default: its name in the hostfile)
#   SSH_PORT       port of the hosts' ssh servers (default 22)
#   MAX_RESTARTS   when a rank dies, start again at most this often, on the hosts that still answer (default 0);
#                  --max_restarts K as the first argument does the same. Pass --global_batch_size, so that the global
#                  batch stays the same with fewer ranks.
#   ECHO_ONLY=1    print the command and do nothing
set -euo pipefail
# shellcheck source=launch/launching.sh
source "$(dirname "${BASH_SOURCE[0]}")/launching.sh"
if [ "${1:-}" = --max_restarts ]; then
    MAX_RESTARTS=${2:?"--max_restarts needs a number"}
    shift 2
fi
MAX_RESTARTS=${MAX_RESTARTS:-0}
PORT=${PORT:-29500}
SSH_PORT=${SSH_PORT:-22}
for name in PORT SSH_PORT; do number_of "$name"; done
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS must be a whole number, not '$MAX_RESTARTS'"
[ -r "${HOSTFILE:-}" ] || fail "HOSTFILE='${HOSTFILE:-}' cannot be read: name a file with lines like 'node1 slots=8'"
case ${LAUNCHER:=pdsh} in pdsh | openmpi | ssh) ;; *) fail "LAUNCHER must be pdsh, openmpi or ssh, not '$LAUNCHER'" ;; esac
[ -z "${CONFIG:-}" ] || set -- --deepspeed_config "$CONFIG" "$@"
# ssh detects a cut link within 20 seconds; without this it would wait for ever, and the launcher with it.
alive=(-o ServerAliveInterval=5 -o ServerAliveCountMax=3)
export PDSH_SSH_ARGS_APPEND="${alive[*]} ${PDSH_SSH_ARGS_APPEND:-}"
ssh_options=(-o BatchMode=yes -o ConnectTimeout=5 "${alive[@]}" -p "$SSH_PORT")
live=$(mktemp "${TMPDIR:-/tmp}/hostfile.XXXXXX")
trap 'rm -f "$live"' EXIT

# keep_hosts_that_answer: writes the hosts of HOSTFILE that ssh reaches to the file `live` and names the others.
keep_hosts_that_answer() {
    local line name
    : >"$live"
    while read -r line || [ -n "$line" ]; do
        case $line in '' | '#'*) continue ;; esac
        name=${line%%[[:space:]]*}
        # the launchers pass names to ssh and pdsh, where one that begins with "-" would be an option
        case $name in -* | *[!A-Za-z0-9._:@%-]*) fail "HOSTFILE $HOSTFILE: '$name' is not the name of a host" ;; esac
        if ssh -n "${ssh_options[@]}" -- "$name" true 2>/dev/null; then
            printf '%s\n' "$line" >>"$live"
        else
            printf 'multinode.sh: %s does not answer and is left out\n' "$name" >&2
        fi
    done <"$HOSTFILE"
    [ -s "$live" ] || fail "no host of $HOSTFILE answers to ssh"
}

# start FLAGS...: one launch on the hosts of `live`; returns its status.
start() {
    if [ "$LAUNCHER" = ssh ]; then
        start_by_ssh "$@"
        return
    fi
    local command=(deepspeed --quiet --hostfile "$live" --launcher "$LAUNCHER" --master_port "$PORT") first
    [ -z "${MASTER_ADDR:-}" ] || command+=(--master_addr "$MASTER_ADDR")
    [ "$SSH_PORT" -eq 22 ] || command+=(--ssh_port "$SSH_PORT")
    if [ "$LAUNCHER" = openmpi ]; then
        # DeepSpeed's launcher does not pass rank 0's address to mpirun; without it, mpi4py would be needed.
        read -r first _ <"$live"
        command+=("--launcher_args=-x MASTER_ADDR=${MASTER_ADDR:-$first} -x MASTER_PORT=$PORT \
--mca plm_rsh_args '${ssh_options[*]}'")
    fi
    # A run with one host left is still started over ssh, not as a local run.
    command+=(--force_multi --module qa_deepspeed train "$@")
    show "${command[@]}"
    "${command[@]}"
}

# variables_to_send: fills `sent` with PATH, PYTHONPATH and the lines of .deepspeed_env, which DeepSpeed's launchers send.
variables_to_send() {
    local file line
    sent=("PATH=$PATH" "PYTHONPATH=$PYTHONPATH")
    for file in "$HOME/${DS_ENV_FILE:-.deepspeed_env}" "${DS_ENV_FILE:-.deepspeed_env}"; do
        [ -r "$file" ] || continue
        while read -r line || [ -n "$line" ]; do
            if [[ $line == *=* ]]; then sent+=("$line"); fi
        done <"$file"
    done
}

# start_by_ssh FLAGS...: a torchrun on every host of `live`; when one fails the others are stopped.
start_by_ssh() {
    local host slots number=0 first nodes status=0 part sent pids=()
    variables_to_send
    nodes=$(wc -l <"$live")
    read -r first _ <"$live"
    while read -r host slots _; do
        part=(python -m qa_deepspeed.torchrun --nnodes "$nodes" --nproc_per_node "${slots#slots=}" --node_rank "$number"
            --master_addr "${MASTER_ADDR:-$first}" --master_port "$PORT" -m qa_deepspeed train "$@")
        number=$((number + 1))
        part=(env "${sent[@]}" "${part[@]}")
        ECHO_ONLY='' show ssh "${ssh_options[@]}" -- "$host" "cd $(printf '%q' "$PWD") &&" "${part[@]}"
        [ -z "${ECHO_ONLY:-}" ] || continue
        # -tt allocates a terminal: the remote processes end with the connection.
        ssh -tt "${ssh_options[@]}" -- "$host" "cd $(printf '%q' "$PWD") && $(printf '%q ' "${part[@]}")" </dev/null &
        pids+=($!)
    done <"$live"
    for _ in ${pids[@]+"${pids[@]}"}; do
        if wait -n; then continue; else status=$?; fi
        kill "${pids[@]}" 2>/dev/null || true
        wait || true
        break
    done
    return "$status"
}

attempt=0
while :; do
    if [ -n "${ECHO_ONLY:-}" ]; then grep -vE '^[[:space:]]*(#|$)' "$HOSTFILE" >"$live"; else keep_hosts_that_answer; fi
    status=0
    start "$@" || status=$?
    # 2 is a user's mistake: a restart would repeat it. 75 asks the caller for a requeue.
    if [ "$status" -eq 0 ] || [ "$status" -eq 2 ]; then exit "$status"; fi
    if wants_requeue "$status" "$@"; then exit "$REQUEUE_STATUS"; fi
    if [ "$attempt" -ge "$MAX_RESTARTS" ]; then exit "$status"; fi
    attempt=$((attempt + 1))
    printf 'multinode.sh: the run ended with status %s; restart %s of %s\n' "$status" "$attempt" "$MAX_RESTARTS" >&2
done
