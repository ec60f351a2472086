#!/usr/bin/python3
"""What a Volume Daemon does with a volume, by dbus-python: attach, export, a job over NBD, prepare the detach, detach.

    volume.py EXPORT PROFILE:ID SOCKET ATTACH DETACH

ATTACH and DETACH are commands of the platform (virsh attach-disk ...). NBDTRACK_BUS is another bus than the system's.
"""
import os
import subprocess
import sys

import dbus

ERROR = "org.nbdtrack1.Error."
# More than the daemon takes for what it is asked here.
TIMEOUT_S = 60


def manager():
    address = os.environ.get("NBDTRACK_BUS")
    bus = dbus.bus.BusConnection(address) if address else dbus.SystemBus()
    return dbus.Interface(bus.get_object("org.nbdtrack1", "/org/nbdtrack1", introspect=False), "org.nbdtrack1.Manager")


def options(**given):
    return dbus.Dictionary(given, signature="sv")


def main(export, volume, socket, attach, detach):
    nbdtrack = manager()
    subprocess.run(attach, shell=True, check=True)
    for _attempt in range(2):
        try:
            # Answers when it serves; asked again, also after a lost answer, it answers the same.
            path, created = nbdtrack.AddExport(
                export, options(volume=volume, wait_ms=dbus.UInt32(30_000)), timeout=TIMEOUT_S
            )
            break
        except dbus.DBusException as error:
            # The definition is kept: the disk is late.
            if error.get_dbus_name() != ERROR + "NotReady":
                raise
    else:
        sys.exit(f"{export} does not serve; 'nbdtrack explain {export}' says why")
    print(path, "created" if created else "was there")

    subprocess.run(["nbdinfo", "--size", f"nbd+unix:///{export}?socket={socket}"], check=True)

    try:
        # Nothing of it is in flight or unflushed once this has answered.
        nbdtrack.PrepareDetach(volume, options(timeout_ms=dbus.UInt32(30_000)), timeout=TIMEOUT_S)
    except dbus.DBusException as error:
        sys.exit(f"not detached: {error.get_dbus_message()}")
    subprocess.run(detach, shell=True, check=True)
    nbdtrack.RemoveExport(export, options(), timeout=TIMEOUT_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
