#!/bin/sh
# What a Volume Daemon does with a disk of a VM, by busctl: attach, have it exported, a job over NBD, prepare the detach, detach.
#
#   volume.sh VM_ID DISK PROFILE:ID SOCKET ATTACH DETACH
#
# ATTACH and DETACH are commands of the platform (virsh attach-disk …). NBDTRACK_BUS is another bus than the system's.
# volume.py and volume.go show the progress of the detach, too.
set -eu
vm=$1 disk=$2 volume=$3 socket=$4 attach=$5 detach=$6

manager() {
    method=$1
    shift
    busctl ${NBDTRACK_BUS:+--address="$NBDTRACK_BUS"} --timeout=60 --json=short call \
        org.nbdtrack1 /org/nbdtrack1 org.nbdtrack1.Manager "$method" "$@"
}

sh -c "$attach"
# The export is the disk's from now on, also after its detach; asked again it is found. Answers when it serves.
answer=$(manager EnsureVmExport 'susa{sv}' "$vm" "$disk" '' 3 volume s "$volume" job s example wait_ms u 30000)
echo "$answer"
# {"type":"osb","data":["/org/nbdtrack1/exports/…","NAME",true]}
export_name=$(echo "$answer" | cut -d'"' -f10)

nbdinfo --size "nbd+unix:///$export_name?socket=$socket"

# Nothing of it is in flight or unflushed once this has answered; a failure says what holds it, and nothing may be detached.
manager PrepareDetach 'sa{sv}' "$volume" 1 timeout_ms u 30000
sh -c "$detach"
