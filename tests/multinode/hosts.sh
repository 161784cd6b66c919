#!/usr/bin/env bash
# Hosts on one machine: network namespaces on one bridge, an ssh server in each that the others reach by its name (node1,
# node2 ...) without a password. Needs root, iproute2 and openssh-server.
#
#   hosts.sh install                  what the tests need beside Python, by apt-get where it is missing
#   hosts.sh up FOLDER COUNT [DISK]   keys and configuration go to FOLDER; DISK is a folder that every host but the first
#                                     has for itself
#   hosts.sh down COUNT               end every process in them, and take them away
#   ip netns exec node1 COMMAND       runs a command on a host
#
#   PREFIX   what the namespaces' names begin with, before the number (default node); others can be up beside them
set -euo pipefail
PREFIX=${PREFIX:-node}
NETWORK=10.77.0

install() {
    local missing='' name
    for name in ip ssh sshd pdsh; do PATH=$PATH:/usr/sbin command -v "$name" >/dev/null || missing+=" $name"; done
    [ -n "$missing" ] || return 0
    printf 'Installing what the test of two hosts lacks:%s\n' "$missing"
    # At this run level Debian starts no server that it installs.
    export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive
    timeout 120 apt-get update -qq
    timeout 300 apt-get install -qq --yes --no-install-recommends iproute2 openssh-client openssh-server pdsh
}

up() {
    local folder=$1 count=$2 disk=${3:-} number name start
    mkdir -p "$folder" /run/sshd
    ssh-keygen -q -t ed25519 -N '' -f "$folder/key"
    printf '127.0.0.1 localhost\n' >"$folder/hosts"
    for number in $(seq "$count"); do printf '%s.%s node%s\n' "$NETWORK" "$number" "$number" >>"$folder/hosts"; done
    cat >"$folder/ssh_config" <<END
IdentityFile $folder/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
END
    cat >"$folder/sshd_config" <<END
HostKey $folder/key
AuthorizedKeysFile $folder/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
MaxStartups 100
PidFile none
END
    ip netns add "${PREFIX}hub"
    ip -n "${PREFIX}hub" link add hub type bridge
    ip -n "${PREFIX}hub" link set hub up
    for number in $(seq "$count"); do
        name=$PREFIX$number
        # `ip netns exec` puts these over /etc/hosts and /etc/ssh of the host.
        mkdir -p "/etc/netns/$name/ssh"
        cp "$folder/hosts" "/etc/netns/$name/hosts"
        cp "$folder/ssh_config" "/etc/netns/$name/ssh/ssh_config"
        ip netns add "$name"
        ip link add eth0 netns "$name" type veth peer name "to$number" netns "${PREFIX}hub"
        ip -n "${PREFIX}hub" link set "to$number" master hub up
        ip -n "$name" address add "$NETWORK.$number/24" dev eth0
        ip -n "$name" link set eth0 up
        ip -n "$name" link set lo up
        start="/usr/sbin/sshd -f $folder/sshd_config -E $folder/node$number.log"
        # `ip netns exec` has mounts of its own, and logins have those of the server.
        if [ -n "$disk" ] && [ "$number" -gt 1 ]; then start="mount -t tmpfs node$number $disk && $start"; fi
        ip netns exec "$name" bash -c "$start"
    done
}

down() {
    local number name
    for number in hub $(seq "$1"); do
        name=$PREFIX$number
        ip netns pids "$name" 2>/dev/null | xargs -r kill -9 || true
        ip netns delete "$name" 2>/dev/null || true
        rm -rf "/etc/netns/$name"
    done
}

"$@"
