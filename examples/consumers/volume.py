#!/usr/bin/python3
"""What a Volume Daemon does with a disk of a VM, by dbus-python: attach, have it exported, a job over NBD, prepare the detach, detach.

    volume.py VM_ID DISK PROFILE:ID SOCKET ATTACH DETACH

ATTACH and DETACH are commands of the platform (virsh attach-disk ...). NBDTRACK_BUS is another bus than the system's.
"""
import os
import subprocess
import sys

import dbus
import dbus.mainloop.glib
from gi.repository import GLib

ERROR = "org.nbdtrack1.Error."
JOB = "org.nbdtrack1.Job"
# More than the daemon takes for what it is asked here.
TIMEOUT_S = 60


def connect():
    # Signals come while the main loop runs.
    dbus.mainloop.glib.DBusGMainLoop(set_as_default=True)
    address = os.environ.get("NBDTRACK_BUS")
    return dbus.bus.BusConnection(address) if address else dbus.SystemBus()


def options(**given):
    return dbus.Dictionary(given, signature="sv")


def ensure(nbdtrack, vm, disk, volume):
    """The name of the disk's export, when it serves."""
    wanted = options(volume=volume, job="example", wait_ms=dbus.UInt32(30_000))
    for _attempt in range(2):
        try:
            # The export is the disk's from now on, also after its detach. Asked again, also after a lost answer, it is found.
            _path, name, created = nbdtrack.EnsureVmExport(vm, dbus.UInt32(disk), "", wanted, timeout=TIMEOUT_S)
            print(name, "created" if created else "was there", flush=True)
            return name
        except dbus.DBusException as error:
            # The definition is kept: the disk is late.
            if error.get_dbus_name() != ERROR + "NotReady":
                raise
    sys.exit(f"disk {disk} of {vm} is not served; 'nbdtrack exports' says why")


def prepare_detach(bus, nbdtrack, volume):
    """Returns when nothing of the volume is in flight or unflushed; meanwhile shows the call's Job."""
    loop = GLib.MainLoop()
    outcome = []
    jobs = {}

    def show(path):
        print("{Operation}: {Stage}, {Clients} clients".format(**jobs[path]), flush=True)

    def appeared(path, interfaces):
        job = interfaces.get(JOB)
        if job and job["Target"] == volume:
            jobs[path] = dict(job)
            show(path)

    def changed(interface, properties, _invalidated, path):
        if path in jobs:
            jobs[path].update(properties)
            show(path)

    def completed(success, _error, message, path):
        if path in jobs:
            print("done" if success else f"failed: {message}", flush=True)

    def answered(*errors):
        outcome.extend(errors)
        loop.quit()

    def listen(heard, signal, interface, **more):
        bus.add_signal_receiver(heard, signal, interface, "org.nbdtrack1", **more)

    listen(appeared, "InterfacesAdded", "org.freedesktop.DBus.ObjectManager")
    listen(changed, "PropertiesChanged", "org.freedesktop.DBus.Properties", arg0=JOB, path_keyword="path")
    listen(completed, "Completed", JOB, path_keyword="path")
    # The job's signals come before this answer.
    nbdtrack.PrepareDetach(
        volume, options(timeout_ms=dbus.UInt32(30_000)), timeout=TIMEOUT_S, reply_handler=answered, error_handler=answered
    )
    loop.run()
    if outcome:
        sys.exit(f"not detached: {outcome[0].get_dbus_message()}")


def main(vm, disk, volume, socket, attach, detach):
    bus = connect()
    root = bus.get_object("org.nbdtrack1", "/org/nbdtrack1", introspect=False)
    nbdtrack = dbus.Interface(root, "org.nbdtrack1.Manager")
    subprocess.run(attach, shell=True, check=True)
    export = ensure(nbdtrack, vm, int(disk), volume)
    subprocess.run(["nbdinfo", "--size", f"nbd+unix:///{export}?socket={socket}"], check=True)
    prepare_detach(bus, nbdtrack, volume)
    subprocess.run(detach, shell=True, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
