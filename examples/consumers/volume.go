// What a Volume Daemon does with a disk of a VM, by godbus: attach, have it exported, a job over NBD, prepare the detach, detach.
//
//	volume VM_ID DISK PROFILE:ID SOCKET ATTACH DETACH
//
// ATTACH and DETACH are commands of the platform (virsh attach-disk ...). NBDTRACK_BUS is another bus than the system's.
// On Debian: apt install golang-go golang-github-godbus-dbus-dev; GO111MODULE=off GOPATH=/usr/share/gocode go build volume.go
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"strconv"
	"time"

	"github.com/godbus/dbus"
)

const (
	manager  = "org.nbdtrack1.Manager."
	job      = "org.nbdtrack1.Job"
	notReady = "org.nbdtrack1.Error.NotReady"
	// More than the daemon takes for what it is asked here.
	timeout = 60 * time.Second
)

type options map[string]dbus.Variant

func connect() (*dbus.Conn, error) {
	address := os.Getenv("NBDTRACK_BUS")
	if address == "" {
		return dbus.SystemBus()
	}
	bus, err := dbus.Dial(address)
	if err != nil {
		return nil, err
	}
	if err := bus.Auth(nil); err != nil {
		return nil, err
	}
	return bus, bus.Hello()
}

// call answers into the results, or gives the daemon's own words.
func call(root dbus.BusObject, member string, results []interface{}, arguments ...interface{}) error {
	within, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return root.CallWithContext(within, manager+member, 0, arguments...).Store(results...)
}

func shell(command string) error {
	return run(exec.Command("sh", "-c", command))
}

func run(command *exec.Cmd) error {
	command.Stdout, command.Stderr = os.Stdout, os.Stderr
	return command.Run()
}

// ensure gives the name of the disk's export, when it serves.
func ensure(root dbus.BusObject, vm string, disk uint32, volume string) (string, error) {
	var path dbus.ObjectPath
	var name string
	var created bool
	wanted := options{
		"volume":  dbus.MakeVariant(volume),
		"job":     dbus.MakeVariant("example"),
		"wait_ms": dbus.MakeVariant(uint32(30_000)),
	}
	for attempt := 0; ; attempt++ {
		// The export is the disk's from now on, also after its detach. Asked again, also after a lost answer, it is found.
		err := call(root, "EnsureVmExport", []interface{}{&path, &name, &created}, vm, disk, "", wanted)
		var refusal dbus.Error
		// The definition is kept: the disk is late.
		if errors.As(err, &refusal) && refusal.Name == notReady && attempt == 0 {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("disk %d of %s is not served ('nbdtrack exports' says why): %w", disk, vm, err)
		}
		break
	}
	if created {
		fmt.Println(name, "created")
	} else {
		fmt.Println(name, "was there")
	}
	return name, nil
}

// follow shows how the volume's Job goes, until there are no more signals.
func follow(signals <-chan *dbus.Signal, volume string) {
	jobs := map[dbus.ObjectPath]map[string]dbus.Variant{}
	show := func(of map[string]dbus.Variant) {
		fmt.Printf("%v: %v, %v clients\n", of["Operation"].Value(), of["Stage"].Value(), of["Clients"].Value())
	}
	for signal := range signals {
		switch signal.Name {
		case "org.freedesktop.DBus.ObjectManager.InterfacesAdded":
			var path dbus.ObjectPath
			var interfaces map[string]map[string]dbus.Variant
			if dbus.Store(signal.Body, &path, &interfaces) == nil && interfaces[job]["Target"].Value() == volume {
				jobs[path] = interfaces[job]
				show(jobs[path])
			}
		case "org.freedesktop.DBus.Properties.PropertiesChanged":
			if of := jobs[signal.Path]; of != nil {
				changed, _ := signal.Body[1].(map[string]dbus.Variant)
				for name, value := range changed {
					of[name] = value
				}
				show(of)
			}
		case job + ".Completed":
			if jobs[signal.Path] != nil {
				fmt.Println("done:", signal.Body[0])
			}
		}
	}
}

// prepareDetach returns when nothing of the volume is in flight or unflushed; meanwhile it shows the call's Job.
func prepareDetach(bus *dbus.Conn, root dbus.BusObject, volume string) error {
	rule := "type='signal',sender='org.nbdtrack1'"
	if err := bus.BusObject().Call("org.freedesktop.DBus.AddMatch", 0, rule).Err; err != nil {
		return err
	}
	// One that does not find room is dropped; these are few.
	signals := make(chan *dbus.Signal, 1024)
	bus.Signal(signals)
	followed := make(chan struct{})
	go func() {
		follow(signals, volume)
		close(followed)
	}()
	within := options{"timeout_ms": dbus.MakeVariant(uint32(30_000))}
	err := call(root, "PrepareDetach", nil, volume, within)
	// The job's signals came before the answer.
	bus.RemoveSignal(signals)
	close(signals)
	<-followed
	return err
}

func consume(vm string, disk uint32, volume, socket, attach, detach string) error {
	bus, err := connect()
	if err != nil {
		return err
	}
	defer bus.Close()
	root := bus.Object("org.nbdtrack1", "/org/nbdtrack1")
	if err := shell(attach); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	export, err := ensure(root, vm, disk, volume)
	if err != nil {
		return err
	}
	uri := "nbd+unix:///" + export + "?socket=" + socket
	if err := run(exec.Command("nbdinfo", "--size", uri)); err != nil {
		return fmt.Errorf("the job: %w", err)
	}
	if err := prepareDetach(bus, root, volume); err != nil {
		return fmt.Errorf("not detached: %w", err)
	}
	if err := shell(detach); err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	return nil
}

func main() {
	log.SetFlags(0)
	if len(os.Args) != 7 {
		log.Fatal("usage: volume VM_ID DISK PROFILE:ID SOCKET ATTACH DETACH")
	}
	disk, err := strconv.ParseUint(os.Args[2], 10, 32)
	if err != nil {
		log.Fatal(err)
	}
	if err := consume(os.Args[1], uint32(disk), os.Args[3], os.Args[4], os.Args[5], os.Args[6]); err != nil {
		log.Fatal(err)
	}
}
