#!/bin/sh
# What a Volume Daemon does with a volume, by busctl: attach, export, a job over NBD, prepare the detach, detach.
#
#   volume.sh EXPORT PROFILE:ID SOCKET ATTACH DETACH
#
# ATTACH and DETACH are commands of the platform (virsh attach-disk …). NBDTRACK_BUS is another bus than the system's.
set -eu
export_name=$1 volume=$2 socket=$3 attach=$4 detach=$5

manager() {
    method=$1
    shift
    busctl ${NBDTRACK_BUS:+--address="$NBDTRACK_BUS"} --timeout=60 --json=short call \
        org.nbdtrack1 /org/nbdtrack1 org.nbdtrack1.Manager "$method" "$@"
}

sh -c "$attach"
# Answers when it serves; asked again, it answers the same.
manager AddExport 'sa{sv}' "$export_name" 2 volume s "$volume" wait_ms u 30000

nbdinfo --size "nbd+unix:///$export_name?socket=$socket"

# Nothing of it is in flight or unflushed once this has answered; a failure says what holds it, and nothing may be detached.
manager PrepareDetach 'sa{sv}' "$volume" 1 timeout_ms u 30000
sh -c "$detach"
manager RemoveExport 'sa{sv}' "$export_name" 0
