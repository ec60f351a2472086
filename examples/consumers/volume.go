// What a Volume Daemon does with a volume, by godbus: attach, export, a job over NBD, prepare the detach, detach.
//
//	volume EXPORT PROFILE:ID SOCKET ATTACH DETACH
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
	"time"

	"github.com/godbus/dbus"
)

const (
	manager  = "org.nbdtrack1.Manager."
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

func serve(root dbus.BusObject, export, volume string) error {
	var path dbus.ObjectPath
	var created bool
	wanted := options{"volume": dbus.MakeVariant(volume), "wait_ms": dbus.MakeVariant(uint32(30_000))}
	for attempt := 0; ; attempt++ {
		// Answers when it serves; asked again, also after a lost answer, it answers the same.
		err := call(root, "AddExport", []interface{}{&path, &created}, export, wanted)
		var refusal dbus.Error
		// The definition is kept: the disk is late.
		if errors.As(err, &refusal) && refusal.Name == notReady && attempt == 0 {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s does not serve ('nbdtrack explain %s' says why): %w", export, export, err)
		}
		break
	}
	if created {
		fmt.Println(path, "created")
	} else {
		fmt.Println(path, "was there")
	}
	return nil
}

func consume(export, volume, socket, attach, detach string) error {
	bus, err := connect()
	if err != nil {
		return err
	}
	defer bus.Close()
	root := bus.Object("org.nbdtrack1", "/org/nbdtrack1")
	if err := shell(attach); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	if err := serve(root, export, volume); err != nil {
		return err
	}
	uri := "nbd+unix:///" + export + "?socket=" + socket
	if err := run(exec.Command("nbdinfo", "--size", uri)); err != nil {
		return fmt.Errorf("the job: %w", err)
	}
	// Nothing of it is in flight or unflushed once this has answered.
	within := options{"timeout_ms": dbus.MakeVariant(uint32(30_000))}
	if err := call(root, "PrepareDetach", nil, volume, within); err != nil {
		return fmt.Errorf("not detached: %w", err)
	}
	if err := shell(detach); err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	return call(root, "RemoveExport", nil, export, options{})
}

func main() {
	log.SetFlags(0)
	if len(os.Args) != 6 {
		log.Fatal("usage: volume EXPORT PROFILE:ID SOCKET ATTACH DETACH")
	}
	if err := consume(os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5]); err != nil {
		log.Fatal(err)
	}
}
