//! The table of VMs' disks in a Galera cluster of two nodes, a daemon on each: what both do at once fails certification on one node,
//! is begun anew there, and ends with one row that one of them owns.

use support::bus::Refused;
use support::ground::{Ground, Need, real, tell};
use support::loops::LoopDevice;
use support::mariadb::{GALERA, MariaDb};
use support::scene::{STEP_LIMIT, Scene, Volume};
use support::vm_disks::{ensure, ensure_now, ensure_when_up, name};
use support::{Doing, Outcome, hold, trouble, until};

const NEEDS: &[Need] = &[
    Need::Loop,
    Need::Bus,
    Need::Tool("mariadbd"),
    Need::Tool("mariadb-install-db"),
    Need::Tool("mariadb"),
    Need::Tool(GALERA),
];
const BYTES: u64 = 4 << 20;

/// A daemon with two volumes of its own, on a node of the cluster.
fn appliance(ground: &Ground, place: &str, owner: &str, node: &MariaDb) -> Outcome<Scene> {
    let folder = ground.file(place);
    std::fs::create_dir(&folder)?;
    let mut scene = Scene::told_in(&folder, node.store(owner), &[])?;
    for name in ["vol-a", "vol-b"] {
        let volume = Volume::make(&folder, name, BYTES)?;
        let device = LoopDevice::add()?;
        device.attach(&volume.image)?;
        scene.volumes.push(volume);
        scene.devices.push(device);
    }
    Ok(scene)
}

/// Both nodes have the same rows, with these owners.
fn rows_are(nodes: &[MariaDb; 2], wanted: &str) -> Outcome<()> {
    for node in nodes {
        let mut last = String::new();
        until(STEP_LIMIT, format!("rows to be {wanted:?}"), || {
            last = node.sql(
                "SELECT disk_unit_number, status, state, owner FROM nbdtrack_vm_exports ORDER BY disk_unit_number",
            )?;
            Ok((last == wanted).then_some(()))
        })
        .doing(format!("they are {last:?}"))?;
    }
    Ok(())
}

/// How far `two`'s node lets writes go: slow_launch_time means nothing to it, and a trigger can read it.
#[derive(Clone, Copy)]
enum Gate {
    /// Neither its own nor those of the other node.
    Shut = 2,
    /// Its own.
    Own = 3,
    All = 4,
}

impl Gate {
    /// Writes of the other node are applied by a thread of the server itself. The trigger is on this node alone.
    fn make(node: &MariaDb) -> Outcome<()> {
        let waits = |gate: Gate| {
            let gate = gate as u8;
            format!("WHILE @@GLOBAL.slow_launch_time < {gate} DO DO SLEEP(0.01); END WHILE")
        };
        let trigger = format!(
            "CREATE TRIGGER gate BEFORE INSERT ON vm_export_mappings FOR EACH ROW BEGIN
             IF USER() LIKE 'nbdtrack@%' THEN {}; ELSE {}; END IF; END",
            waits(Gate::Own),
            waits(Gate::All)
        );
        Gate::Shut.set(node)?;
        node.sql("SET GLOBAL slave_run_triggers_for_rbr = YES")?;
        node.sql(&format!(
            "SET SESSION wsrep_on = OFF;\nDELIMITER //\n{trigger}//"
        ))?;
        Ok(())
    }

    fn set(self, node: &MariaDb) -> Outcome<()> {
        node.sql(&format!("SET GLOBAL slow_launch_time = {}", self as u8))?;
        Ok(())
    }
}

/// Waits until a write waits at the node's gate: one of a daemon's (`Execute`), or one that the other node sent (`Sleep`).
fn waits_at_gate(node: &MariaDb, command: &str) -> Outcome<()> {
    until(STEP_LIMIT, format!("a {command} at the gate"), || {
        let waiting = node.sql(&format!(
            "SELECT COUNT(*) FROM information_schema.processlist WHERE command = '{command}' AND state = 'User sleep'"
        ))?;
        Ok((waiting != "0").then_some(()))
    })
}

fn columns(node: &MariaDb) -> Outcome<String> {
    node.sql("SELECT * FROM vm_export_mappings WHERE disk_unit_number < 2 ORDER BY id")
}

#[test]
fn what_fails_certification_is_begun_anew_and_one_daemon_has_the_row() -> Outcome<()> {
    real("a Galera cluster", NEEDS, |ground| {
        let nodes = MariaDb::cluster(ground.path())?;
        let [first, second] = &nodes;
        let one = appliance(ground, "one", "one", first)?;
        let mut two = appliance(ground, "two", "two", second)?;
        let own = [one.volumes[0].id(), two.volumes[0].id()];
        let (client_one, client_two) = (&one.client, &two.client);
        // Different disks, at once.
        std::thread::scope(|scope| -> Outcome<()> {
            let other = scope.spawn(|| ensure_when_up(client_two, 1, &own[1]));
            ensure_when_up(client_one, 0, &own[0])?;
            other
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        let theirs = "0\tactive\tServing\tone\n1\tactive\tServing\ttwo";
        rows_are(&nodes, theirs)?;
        let before = columns(first)?;

        // One disk, at once: what `two` writes stands in its transaction while what `one` wrote has come and is not applied.
        Gate::make(second)?;
        let failed = || second.status("wsrep_local_cert_failures");
        let failures = failed()?;
        let contested = two.volumes[1].id();
        let refused = std::thread::scope(|scope| -> Outcome<Refused> {
            let loser = scope.spawn(|| ensure(client_two, 2, &contested));
            waits_at_gate(second, "Execute")?;
            match ensure_now(client_one, 2, "serial:not-there") {
                // Kept, and there is no such disk.
                Err(refusal) if refusal.is("NotReady") => {}
                other => trouble!("{other:?}"),
            }
            waits_at_gate(second, "Sleep")?;
            Gate::Own.set(second)?;
            until(STEP_LIMIT, "a failed certification", || {
                Ok((failed()? > failures).then_some(()))
            })?;
            Gate::All.set(second)?;
            match loser
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            {
                Err(refusal) => Ok(refusal),
                Ok(created) => trouble!("two daemons have disk 2 (created: {created})"),
            }
        })?;
        hold!(
            refused.is("InUse") && refused.text.contains("\"one\""),
            "{refused:?}"
        );
        let stats = two.client.stats()?;
        let retried = stats["database_retried"].number();
        tell(&format!(
            "Galera: {} failed certifications on the second node, {retried} transactions begun anew",
            failed()? - failures
        ));
        hold!(retried > 0, "{stats:?}");
        hold!(
            two.client.export(&name(2))?.is_none(),
            "one export, and it is the other's"
        );
        // What lost goes on.
        hold!(ensure(&two.client, 3, &contested)?, "a new export");
        let all = format!("{theirs}\n2\tactive\tAbsent\tone\n3\tactive\tServing\ttwo");
        rows_are(&nodes, &all)?;
        for node in &nodes {
            hold!(columns(node)? == before, "rows of others are as they were");
        }
        two.stop()?;
        one_name_is_one_daemons(ground, &nodes, one)
    })
}

/// The lock of the server is each node's own.
fn one_name_is_one_daemons(ground: &Ground, nodes: &[MariaDb; 2], mut one: Scene) -> Outcome<()> {
    let [first, second] = nodes;
    let mut other = appliance(ground, "other", "one", second)?;
    let volume = other.volumes[0].id();
    let refused = |scene: &Scene, words: &str, unit: u32, volume: &str| -> Outcome<()> {
        until(STEP_LIMIT, format!("the log to say {words:?}"), || {
            let log = std::fs::read_to_string(&scene.home.log)?;
            Ok(log.contains(words).then_some(()))
        })?;
        match ensure_now(&scene.client, unit, volume) {
            Err(refusal) if refusal.is("NotReady") && refusal.text.contains("is away") => Ok(()),
            other => trouble!("two daemons have one name: {other:?}"),
        }
    };
    refused(&other, "to another node of the cluster", 4, &volume)?;
    ensure_when_up(&one.client, 5, &one.volumes[1].id())?;

    // It does not say that it ends.
    one.kill()?;
    refused(&other, "to another node of the cluster", 4, &volume)?;
    // By the server's clock its time is over; to wait for that takes 10 s, and as long as the next attempt is away.
    first.sql("UPDATE nbdtrack_leases SET until_at = UTC_TIMESTAMP(6) - INTERVAL 1 SECOND WHERE owner = 'one'")?;
    until(STEP_LIMIT, "the name to be taken over", || {
        other.client.rescan()?;
        match ensure_now(&other.client, 4, &volume) {
            Err(refusal) if refusal.text.contains("is away") => Ok(None),
            _kept => Ok(Some(())),
        }
    })?;
    ensure_when_up(&other.client, 4, &volume)?;
    let leases = "SELECT owner, COUNT(DISTINCT instance) FROM nbdtrack_leases WHERE owner = 'one' GROUP BY owner";
    hold!(first.sql(leases)? == "one\t1", "the lease");
    // The first is back, and is the second now.
    one.start()?;
    refused(&one, "to another node of the cluster", 4, &volume)?;

    // Taken for dead, and not dead: nothing of it gets in.
    first.sql(
        "UPDATE nbdtrack_leases SET instance = 'a-third', node = 'elsewhere', until_at = UTC_TIMESTAMP(6) + INTERVAL 1 HOUR WHERE owner = 'one'",
    )?;
    // Not what it has: that is answered from the local store.
    refused(&other, "in this cluster by now", 6, &other.volumes[1].id())?;
    one.stop()?;
    other.stop()
}
