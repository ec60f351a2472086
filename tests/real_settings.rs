//! In nbd-server's place with a file of ours beside its configuration (`x-settings`): the same command line, and the table of VMs' disks
//! in the appliance's MariaDB, which no key of nbd-server's could say.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Stdio;

use nix::sys::signal::Signal;
use support::bus::{Bus, Client as Caller};
use support::client::{Client, Endpoint};
use support::daemon::{STOP_LIMIT, binary, free_port};
use support::ground::{Ground, Need, real};
use support::loops::LoopDevice;
use support::mariadb::MariaDb;
use support::process::{Running, command};
use support::scene::{STEP_LIMIT, Volume};
use support::vm_disks::{VM, ensure_when_up, name};
use support::{Doing, Outcome, hold, trouble, until};

const NEEDS: &[Need] = &[
    Need::Loop,
    Need::Bus,
    Need::Tool("mariadbd"),
    Need::Tool("mariadb-install-db"),
    Need::Tool("mariadb"),
];

/// An nbd-server that is ours.
struct Place {
    config: PathBuf,
    log: PathBuf,
    endpoint: Endpoint,
    running: Option<Running>,
}

impl Place {
    fn new(ground: &Ground, bus: &Bus, settings: &str) -> Outcome<Place> {
        let place = Place {
            config: ground.file("nbd-server.conf"),
            log: ground.file("nbd-server.log"),
            endpoint: Endpoint::Tcp(([127, 0, 0, 1], free_port()?).into()),
            running: None,
        };
        let Endpoint::Tcp(address) = &place.endpoint else {
            trouble!("no address");
        };
        let text = format!(
            "[generic]\nallowlist = true\nlistenaddr = 127.0.0.1\nport = {}\nx-state = {}\nx-bus = {}\nx-settings = {}\n",
            address.port(),
            ground.file("state").display(),
            bus.address,
            ground.file("ours.toml").display()
        );
        fs::write(&place.config, text)?;
        fs::write(ground.file("ours.toml"), settings)?;
        Ok(place)
    }

    /// As an init script says it, but that it stays in the foreground.
    fn start(&mut self) -> Outcome<()> {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)?;
        let mut command = command(binary());
        command.arg0("nbd-server").arg("-C").arg(&self.config);
        command.arg("-p").arg(self.config.with_extension("pid"));
        command.arg("-d").stdout(Stdio::null()).stderr(log);
        self.running = Some(Running(command.spawn().doing("start nbd-server (ours)")?));
        Ok(())
    }

    fn stop(&mut self) -> Outcome<()> {
        let Some(mut running) = self.running.take() else {
            trouble!("it does not run");
        };
        running.signal(Signal::SIGTERM)?;
        let status = running.wait(STOP_LIMIT)?;
        hold!(status.success(), "it ended with {status}");
        Ok(())
    }
}

fn row(server: &MariaDb, unit: u32) -> Outcome<String> {
    server.sql(&format!(
        "SELECT device_path, status, state, owner FROM nbdtrack_vm_exports
         WHERE vm_id = '{VM}' AND disk_unit_number = {unit}"
    ))
}

fn row_is(server: &MariaDb, unit: u32, wanted: &str) -> Outcome<()> {
    let mut last = String::new();
    until(STEP_LIMIT, format!("row {unit} to be {wanted:?}"), || {
        last = row(server, unit)?;
        Ok((last == wanted).then_some(()))
    })
    .doing(format!("it is {last:?}"))
}

#[test]
fn appliance_with_nbd_servers_configuration_has_its_table_in_its_database() -> Outcome<()> {
    real("nbd-server's place and a database", NEEDS, |ground| {
        let server = MariaDb::make(ground.path(), &[])?;
        let bus = Bus::start(ground.path())?;
        let settings = format!(
            "[server]\n{}[limits]\nmax_connections_per_address = 1\n",
            server.store("one")
        );
        let mut place = Place::new(ground, &bus, &settings)?;
        let (mut nodes, mut volumes, mut devices) = (Vec::new(), Vec::new(), Vec::new());
        for name in ["vol-a", "vol-b"] {
            let volume = Volume::make(ground.path(), name, 4 << 20)?;
            let device = LoopDevice::add()?;
            device.attach(&volume.image)?;
            nodes.push(device.node());
            volumes.push(volume);
            devices.push(device);
        }
        place.start()?;
        let caller = Caller::connect(&bus)?;
        until(STEP_LIMIT, "the daemon", || Ok(caller.stats().ok()))?;

        // A call's row is there, with where the volume is.
        ensure_when_up(&caller, 0, &volumes[0].id())?;
        let serving = |node: &str| format!("{node}\tactive\tServing\tone");
        row_is(&server, 0, &serving(&nodes[0]))?;
        // What the appliance writes by itself is seen: a look at the table lies before it.
        until(STEP_LIMIT, "a look at the table", || {
            let rows = caller.stats()?.get("database_rows").map(|n| n.number());
            Ok((rows == Some(1)).then_some(()))
        })?;
        server.sql(&format!(
            "INSERT INTO vm_export_mappings (vm_id, disk_unit_number, vm_name, export_name, device_path, status, created_at, updated_at)
             VALUES ('{VM}', 1, 'web 1', '{}', '{}', 'active', UTC_TIMESTAMP(3), UTC_TIMESTAMP(3))",
            name(1),
            nodes[1]
        ))?;
        row_is(&server, 1, &serving(&nodes[1]))?;
        caller.reach_state(&name(1), "Serving", STEP_LIMIT)?;

        // Clients come to where nbd-server's file says; how many, the file beside it.
        let mut client = Client::open(&place.endpoint, &name(1))?;
        hold!(
            Client::open(&place.endpoint, &name(0)).is_err(),
            "a second client of one address was let in"
        );
        let written = client.write(0, &[7; 4096], true)?;
        hold!(written.is_ok(), "{written:?}");

        // What is wrong later is named, and changes nothing.
        let ours = ground.file("ours.toml");
        fs::write(&ours, settings.replace("[limits]", "lisen = []\n[limits]"))?;
        let wrong = format!("{}:5:1: [server]: unknown key \"lisen\"", ours.display());
        let options = support::bus::Options::new();
        let refused = caller.call("Reload", &(options,));
        hold!(
            matches!(&refused, Err(refusal) if refusal.text.contains(&wrong)),
            "{wrong}: {refused:?}"
        );
        hold!(client.flush()?.is_ok(), "a client was disturbed");
        client.leave()?;
        place.stop()?;
        // Nor does it start with it.
        place.start()?;
        let Some(running) = &mut place.running else {
            trouble!("it does not run");
        };
        let status = running.wait(STEP_LIMIT)?;
        let said = fs::read_to_string(&place.log)?;
        hold!(
            !status.success() && said.contains(&format!("nbd-server: {wrong}")),
            "{status}: {said}"
        );
        Ok(())
    })
}
