//! The shipped policy on a real bus: who may own, call and hear what.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

mod bus;
mod polkit;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bus::{PrivateBus, block_on};
use futures_util::StreamExt;
use nbdtrack::correlation::{
    DeviceNode, DeviceNumber, Difference, DiskSeq, DiskView, ExportName, ExportView, Generation,
    Notice, Source, State,
};
use nbdtrack::dbus::{
    Access, Answer, Bus, Caller, JobView, Publication, Publisher, Stage, serve, serve_asking_polkit,
};
use polkit::Polkit;
use tokio::sync::mpsc;

/// Where a method is, how busctl writes its arguments, and whether the group may call it; root and the users that a policy
/// names may call all, others none.
type Row = (
    &'static str,
    &'static str,
    &'static str,
    &'static [&'static str],
    bool,
);

const ROOT: &str = "/org/nbdtrack1";
const LOG: &str = "/org/freedesktop/LogControl1";
const MANAGER: &str = "org.nbdtrack1.Manager";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

const CALLS: &[Row] = &[
    (ROOT, "org.freedesktop.DBus.Peer", "Ping", &[], true),
    (ROOT, "org.freedesktop.DBus.Peer", "GetMachineId", &[], true),
    (
        ROOT,
        "org.freedesktop.DBus.Introspectable",
        "Introspect",
        &[],
        true,
    ),
    (ROOT, PROPERTIES, "Get", &["ss", MANAGER, "X"], true),
    (ROOT, PROPERTIES, "GetAll", &["s", MANAGER], true),
    (
        ROOT,
        PROPERTIES,
        "Set",
        &["ssv", MANAGER, "X", "u", "1"],
        false,
    ),
    (
        ROOT,
        "org.freedesktop.DBus.ObjectManager",
        "GetManagedObjects",
        &[],
        true,
    ),
    (
        LOG,
        PROPERTIES,
        "GetAll",
        &["s", "org.freedesktop.LogControl1"],
        true,
    ),
    (
        LOG,
        PROPERTIES,
        "Set",
        &[
            "ssv",
            "org.freedesktop.LogControl1",
            "LogLevel",
            "s",
            "info",
        ],
        false,
    ),
    (ROOT, MANAGER, "GetExportStats", &["a{sv}", "0"], true),
    (ROOT, MANAGER, "GetMetrics", &["a{sv}", "0"], true),
    (
        ROOT,
        MANAGER,
        "AddExport",
        &["sa{sv}", "a", "1", "volume", "s", "loop:/x"],
        false,
    ),
    (
        ROOT,
        MANAGER,
        "EnsureVmExport",
        &["susa{sv}", "vm", "0", "web", "1", "volume", "s", "loop:/x"],
        false,
    ),
    (ROOT, MANAGER, "RemoveExport", &["sa{sv}", "a", "0"], false),
    (
        ROOT,
        MANAGER,
        "PrepareDetach",
        &["sa{sv}", "loop:/x", "0"],
        false,
    ),
    (
        ROOT,
        MANAGER,
        "CancelDetach",
        &["sa{sv}", "loop:/x", "0"],
        false,
    ),
    (
        ROOT,
        MANAGER,
        "ResolveConflict",
        &["sta{sv}", "a", "1", "0"],
        false,
    ),
    (ROOT, MANAGER, "ResolveVolume", &["a{sv}", "0"], true),
    (ROOT, MANAGER, "Rescan", &["a{sv}", "0"], false),
    (ROOT, MANAGER, "Reload", &["a{sv}", "0"], false),
    (ROOT, MANAGER, "ListSessions", &["a{sv}", "0"], true),
    (ROOT, MANAGER, "EndSession", &["ta{sv}", "1", "0"], false),
    (ROOT, MANAGER, "GetStats", &["a{sv}", "0"], true),
    (ROOT, MANAGER, "ExplainExport", &["sa{sv}", "a", "0"], true),
    (
        ROOT,
        MANAGER,
        "ExplainDisk",
        &["sa{sv}", "/dev/vdb", "0"],
        true,
    ),
    (ROOT, MANAGER, "GetHistory", &["a{sv}", "0"], true),
    (ROOT, MANAGER, "ListPins", &["a{sv}", "0"], true),
    (ROOT, MANAGER, "ListMappings", &["a{sv}", "0"], true),
    (ROOT, MANAGER, "PruneMappings", &["a{sv}", "0"], false),
    (
        ROOT,
        MANAGER,
        "ConfirmPin",
        &["sta{sv}", "a", "1", "0"],
        false,
    ),
    (ROOT, MANAGER, "Repin", &["sta{sv}", "a", "1", "0"], false),
    (ROOT, MANAGER, "Unpin", &["sa{sv}", "a", "0"], false),
    (
        ROOT,
        MANAGER,
        "CreateImage",
        &["sta{sv}", "a", "512", "0"],
        false,
    ),
    (
        ROOT,
        MANAGER,
        "BeginBackup",
        &["sua{sv}", "vm", "0", "0"],
        false,
    ),
    (ROOT, MANAGER, "FinishBackup", &["sa{sv}", "a", "0"], false),
    (ROOT, MANAGER, "DeleteBackup", &["sa{sv}", "a", "0"], false),
    (ROOT, MANAGER, "ListBackups", &["a{sv}", "0"], true),
    // What no table has is stopped by the bus, too, and does not reach the daemon.
    (ROOT, MANAGER, "NoSuchMethod", &[], false),
];

/// Where each property is.
const PROPERTIED: [(&str, &str); 4] = [
    ("/org/nbdtrack1/exports/a", "org.nbdtrack1.Export"),
    ("/org/nbdtrack1/volumes/loop_x", "org.nbdtrack1.Volume"),
    ("/org/nbdtrack1/jobs/1", "org.nbdtrack1.Job"),
    (LOG, "org.freedesktop.LogControl1"),
];

/// What is told in the test of signals; the last three are those of the standard interfaces.
const SIGNALS: [&str; 11] = [
    "VolumeAttached",
    "VolumeDetached",
    "VolumeRenamed",
    "VolumeResized",
    "ExportStateChanged",
    "IdentityConflict",
    "ConfigReloaded",
    "Completed",
    "PropertiesChanged",
    "InterfacesAdded",
    "InterfacesRemoved",
];

/// The names of an interface's members of one kind.
fn named(interface: &str, kind: &str) -> Vec<String> {
    if interface == "org.freedesktop.LogControl1" {
        // systemd's own interface (org.freedesktop.LogControl1(5)): properties only.
        let names: &[&str] = match kind {
            "property" => &["LogLevel", "LogTarget", "SyslogIdentifier"],
            _ => &[],
        };
        return names.iter().map(|name| (*name).to_owned()).collect();
    }
    let file = format!("{}/dbus/{interface}.xml", env!("CARGO_MANIFEST_DIR"));
    let xml = std::fs::read_to_string(file).unwrap();
    bus::members(&xml, interface)
        .iter()
        .filter_map(|member| {
            member
                .strip_prefix(kind)?
                .trim_start()
                .split([' ', ':'])
                .next()
        })
        .map(str::to_owned)
        .collect()
}

/// Root, a user whom the operator's own policy names, one of the group, and one who is neither.
const USERS: [&str; 4] = ["root", "games", "nobody", "daemon"];

/// What docs/dbus.md tells operators to write for a user of their own.
const NAMED: &str = r#"  <policy user="games">
    <allow send_destination="org.nbdtrack1"/>
    <allow receive_sender="org.nbdtrack1"/>
  </policy>
"#;

fn may(user: &str, group_may: bool) -> bool {
    match user {
        "root" | "games" => true,
        "nobody" => group_may,
        _ => false,
    }
}

/// Everything that there is to be seen.
fn shown() -> Vec<Publication> {
    let name = ExportName::parse("a").unwrap();
    let disk = DiskView {
        id: "loop:x".to_owned(),
        twin: false,
        identities: Vec::new(),
        serial: String::new(),
        wwid: String::new(),
        node: DeviceNode("/dev/loop1".to_owned()),
        number: DeviceNumber { major: 7, minor: 1 },
        diskseq: DiskSeq(1),
        size: 4096,
        read_only: false,
        model: String::new(),
        in_use: String::new(),
        exports: vec![name.clone()],
    };
    vec![Publication::Disk(disk), export(0), job(1)]
}

fn export(clients: u32) -> Publication {
    let view = ExportView {
        name: ExportName::parse("a").unwrap(),
        state: State::Serving,
        reason: String::new(),
        volume_id: "loop:/x".to_owned(),
        disk: None,
        node: None,
        generation: Generation(1),
        size: 4096,
        read_only: false,
        hidden: false,
        source: Source::Dbus,
        mapping: None,
    };
    Publication::Export { view, clients }
}

fn job_view(id: u64) -> JobView {
    JobView {
        id,
        operation: "prepare-detach",
        target: "loop:/x".to_owned(),
        exports: Vec::new(),
        caller: Caller {
            name: ":1.7".to_owned(),
            uid: Some(0),
            unit: String::new(),
        },
        started_usec: 1,
        deadline_usec: 2,
        stage: Stage::Draining,
        clients: 1,
        clients_max: 1,
    }
}

fn job(id: u64) -> Publication {
    Publication::Job(job_view(id))
}

/// The bus takes the groups from the connecting process, so each user comes with its own.
fn group_of(user: &str) -> String {
    let group = if user == "nobody" { "nogroup" } else { user };
    format!("--regid={group}")
}

/// Runs busctl as `user` and tells whether the bus let the call through.
fn let_through(address: &str, user: &str, words: &[&str]) -> bool {
    let output = Command::new("setpriv")
        .args([format!("--reuid={user}"), group_of(user)])
        .args(["--clear-groups", "busctl"])
        .arg(format!("--address={address}"))
        .args(words)
        .output()
        .expect("setpriv and busctl are installed (util-linux, systemd)");
    let text = String::from_utf8_lossy(&output.stderr);
    let denied = text.contains("Access denied")
        || text.contains("AccessDenied")
        || text.contains("rejected");
    assert!(output.status.success() || !text.is_empty());
    assert!(denied || !text.contains("Failed to connect"), "{text}");
    !denied
}

#[test]
fn the_tables_have_every_method_property_and_signal() {
    for interface in ["Manager", "Export", "Volume", "Job"] {
        let interface = format!("org.nbdtrack1.{interface}");
        for method in named(&interface, "method") {
            let there = CALLS
                .iter()
                .any(|(_, on, name, ..)| *on == interface && *name == method);
            assert!(there, "{interface}.{method} is not in the table");
        }
        for signal in named(&interface, "signal") {
            assert!(SIGNALS.contains(&signal.as_str()), "{interface}.{signal}");
        }
        let propertied = PROPERTIED.iter().any(|(_, on)| *on == interface);
        assert_eq!(
            propertied,
            !named(&interface, "property").is_empty(),
            "{interface}"
        );
    }
    for (_, interface) in PROPERTIED {
        assert!(named(interface, "property").len() > 2, "{interface}");
    }
}

#[test]
fn root_and_named_users_do_all_the_group_reads_and_others_nothing() {
    // nobody's group is nogroup on every Debian; games and daemon are in neither.
    let bus = PrivateBus::with_policy("nogroup", NAMED);
    walk_all(bus);
}

/// The file opened the daemon's own name, and a daemon that asks no one took every local user for root: without the key in its
/// configuration, or in nbd-server's place.
#[test]
fn the_file_for_polkit_lets_nobody_reach_a_daemon_that_asks_no_one() {
    let file = include_str!("../dbus/org.nbdtrack1-polkit.conf");
    let policy = file.split_once("<busconfig>").unwrap().1;
    let policy = policy.split_once("</busconfig>").unwrap().0;
    let bus = PrivateBus::with_policy("nogroup", &format!("{NAMED}{policy}"));
    walk_all(bus);
}

/// Tries everything as everyone, at a daemon that leaves it to the bus.
fn walk_all(bus: PrivateBus) {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    let address = bus.address.clone();
    block_on(async move {
        let (commands, mut queue) = mpsc::channel(64);
        let publisher = serve(&Bus::parse(&address).unwrap(), commands)
            .await
            .unwrap();
        publisher.offer(shown());
        tokio::spawn(async move {
            while let Some(command) = queue.recv().await {
                let _ = command.reply.send(Ok(Answer::Done));
            }
        });
        println!("{:<62} {USERS:?}", "method or properties");
        for &(path, interface, method, arguments, group_may) in CALLS {
            let mut words = vec!["call", "org.nbdtrack1", path, interface, method];
            words.extend(arguments);
            walk(
                &address,
                &format!("{interface}.{method}"),
                &words,
                group_may,
            )
            .await;
        }
        for (path, interface) in PROPERTIED {
            for property in named(interface, "property") {
                let words = ["get-property", "org.nbdtrack1", path, interface, &property];
                walk(&address, &format!("{interface}.{property}"), &words, true).await;
            }
            // The bus stops a Set by its name alone, whatever it would set: one of each interface stands for all.
            let property = &named(interface, "property")[0];
            let mut words = vec!["call", "org.nbdtrack1", path, PROPERTIES, "Set"];
            words.extend(["ssv", interface, property, "u", "1"]);
            let what = format!("{interface}.{property} set");
            walk(&address, &what, &words, false).await;
        }
        drop(publisher);
        // Once the name is free, only root gets it.
        for user in USERS {
            for name in ["org.nbdtrack1", "org.nbdtrack1.Polkit"] {
                let output = Command::new("setpriv")
                    .args([format!("--reuid={user}"), group_of(user)])
                    .args(["--clear-groups", "busctl"])
                    .arg(format!("--address={address}"))
                    .args([
                        "call",
                        "org.freedesktop.DBus",
                        "/org/freedesktop/DBus",
                        "org.freedesktop.DBus",
                    ])
                    .args(["RequestName", "su", name, "4"])
                    .output()
                    .unwrap();
                let owns = output.status.success();
                assert_eq!(owns, user == "root", "{user}: own {name}");
            }
        }
    });
}

/// Tries one call as every user, and prints the row.
async fn walk(address: &str, what: &str, words: &[&str], group_may: bool) {
    let mut row = Vec::new();
    for user in USERS {
        let address = address.to_owned();
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let asked = tokio::task::spawn_blocking(move || {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let_through(&address, user, &words)
        });
        let through = asked.await.unwrap();
        assert_eq!(through, may(user, group_may), "{user}: {what}");
        row.push(if through { "yes" } else { "no" });
    }
    println!("{what:<62} {row:?}");
}

#[test]
fn every_signal_reaches_root_the_named_and_the_group_and_no_one_else() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    let bus = PrivateBus::with_policy("nogroup", NAMED);
    let address = bus.address.clone();
    block_on(async move {
        let (commands, _queue) = mpsc::channel(64);
        let publisher = serve(&Bus::parse(&address).unwrap(), commands)
            .await
            .unwrap();
        let mut listeners = Vec::new();
        for user in USERS {
            let child = Command::new("setpriv")
                .args([format!("--reuid={user}"), group_of(user)])
                .arg("--clear-groups")
                .args(["timeout", "5", "gdbus", "monitor", "--address", &address])
                .args(["--dest", "org.nbdtrack1"])
                .stdout(std::process::Stdio::piped())
                .spawn()
                .expect("gdbus is installed (libglib2.0-bin)");
            listeners.push((user, child));
        }
        let (diskseq, id) = (DiskSeq(1), "loop:x".to_owned());
        let node = DeviceNode("/dev/loop1".to_owned());
        let told = |notice| Publication::Signal(notice);
        // Told again and again, for a busy machine may take its time to start the listeners.
        for round in 0..40 {
            let gone = vec![Publication::DiskGone(diskseq)];
            let signals = vec![
                export(round),
                told(Notice::Attached {
                    diskseq,
                    id: id.clone(),
                    node: node.clone(),
                }),
                told(Notice::Detached {
                    diskseq,
                    id: id.clone(),
                    node: node.clone(),
                }),
                told(Notice::Renamed {
                    diskseq,
                    id: id.clone(),
                    old: node.clone(),
                    new: node.clone(),
                }),
                told(Notice::Resized {
                    diskseq,
                    id: id.clone(),
                    old: 1,
                    new: 2,
                }),
                told(Notice::ExportState {
                    export: ExportName::parse("a").unwrap(),
                    old: State::Absent,
                    new: State::Serving,
                    reason: String::new(),
                }),
                told(Notice::IdentityConflict {
                    id: id.clone(),
                    disks: Vec::new(),
                }),
                told(Notice::Reloaded(Difference::default())),
                Publication::JobDone {
                    job: job_view(round.into()),
                    result: Ok(()),
                },
            ];
            for batch in [shown(), signals, gone] {
                publisher.offer(batch);
                assert!(publisher.flush(std::time::Duration::from_secs(5)).await);
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        for (user, child) in listeners {
            let heard = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
            let text = String::from_utf8(heard.await.unwrap().stdout).unwrap();
            for signal in SIGNALS {
                assert_eq!(text.contains(signal), may(user, true), "{user}: {signal}");
            }
        }
    });
}

#[test]
fn the_command_line_says_who_may_when_the_policy_refuses() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    let bus = PrivateBus::with_group("nogroup");
    let address = bus.address.clone();
    block_on(async move {
        let (commands, _queue) = mpsc::channel(64);
        let _publisher = serve(&Bus::parse(&address).unwrap(), commands)
            .await
            .unwrap();
        // Another user may not be let into the folder of the build.
        let folder = tempfile::tempdir().unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(folder.path(), open).unwrap();
        let program = folder.path().join("nbdtrack");
        // By another process: a child that a test beside this one forks would hold our descriptor, and nobody could run the copy yet.
        let copied = Command::new("cp")
            .arg(env!("CARGO_BIN_EXE_nbdtrack"))
            .arg(&program)
            .status();
        assert!(copied.unwrap().success());
        for (user, command, code) in [
            ("daemon", &["exports"][..], 5),
            ("nobody", &["exports"], 0),
            ("nobody", &["rescan"], 5),
        ] {
            let mut run = Command::new("setpriv");
            run.args([format!("--reuid={user}"), group_of(user)])
                .arg("--clear-groups");
            run.arg(&program).args(["--bus", &address]).args(command);
            let output = tokio::task::spawn_blocking(move || run.output().unwrap())
                .await
                .unwrap();
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(
                output.status.code(),
                Some(code),
                "{user} {command:?}: {text}"
            );
            assert_eq!(text.contains("the group nbdtrack"), code == 5, "{text}");
        }
    });
}

/// What polkit's action `dangerous` is for; every other method of the Manager that the group may not call is `change`.
const DANGEROUS: [&str; 5] = [
    "ResolveConflict",
    "ConfirmPin",
    "Repin",
    "Unpin",
    "DeleteBackup",
];

/// Of each kind of call some.
const KINDS: [&str; 6] = [
    "Ping",
    "GetManagedObjects",
    "Set",
    "AddExport",
    "Rescan",
    "Repin",
];

/// Calls whose arguments alone make them dangerous.
const HARD: [Row; 4] = [
    (
        ROOT,
        MANAGER,
        "RemoveExport",
        &["sa{sv}", "a", "1", "mode", "s", "hard"],
        false,
    ),
    (
        ROOT,
        MANAGER,
        "PrepareDetach",
        &["sa{sv}", "loop:/x", "1", "hard", "b", "true"],
        false,
    ),
    // A drain without time is a cut.
    (
        ROOT,
        MANAGER,
        "RemoveExport",
        &["sa{sv}", "a", "1", "timeout_ms", "u", "0"],
        false,
    ),
    (
        ROOT,
        MANAGER,
        "PrepareDetach",
        &["sa{sv}", "loop:/x", "1", "timeout_ms", "u", "0"],
        false,
    ),
];

/// Root, a user of `[dbus] users`, one of the group, one whom a rule lets read and change, one about whom no rule says anything.
const ASKED: [&str; 5] = ["root", "games", "nobody", "daemon", "bin"];

const RULES: &str = r#"
polkit.addRule(function(action, subject) {
    if (subject.user != "daemon") return polkit.Result.NOT_HANDLED;
    if (action.id == "org.nbdtrack1.dangerous") return polkit.Result.NO;
    if (action.id == "org.nbdtrack1.change" && action.lookup("method") == "Rescan") return polkit.Result.NO;
    return polkit.Result.YES;
});
"#;

fn uid(user: &str) -> u32 {
    nix::unistd::User::from_name(user)
        .unwrap()
        .unwrap()
        .uid
        .as_raw()
}

/// Serves with polkit in place; every call that reaches the loop is answered.
async fn asking(address: &str) -> Publisher {
    let (commands, mut queue) = mpsc::channel(64);
    let access = Access {
        users: BTreeSet::from([uid("games")]),
        group: Some(
            nix::unistd::Group::from_name("nogroup")
                .unwrap()
                .unwrap()
                .gid
                .as_raw(),
        ),
    };
    let bus = Bus::parse(address).unwrap();
    let publisher = serve_asking_polkit(&bus, commands, access, Arc::new(|_, _, _, _| ()))
        .await
        .unwrap();
    publisher.offer(shown());
    tokio::spawn(async move {
        while let Some(command) = queue.recv().await {
            let _ = command.reply.send(Ok(Answer::Done));
        }
    });
    publisher
}

/// busctl as `user`.
fn busctl(address: &str, user: &str, words: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args([format!("--reuid={user}"), group_of(user)])
        .args(["--clear-groups", "busctl"])
        .arg(format!("--address={address}"))
        .args(words);
    command
}

/// What busctl says on its way out; empty when the call did what it should.
async fn said(address: &str, user: &str, words: &[&str]) -> String {
    let mut command = busctl(address, user, words);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap();
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn words<'a>(&(path, interface, method, arguments, _): &Row) -> Vec<&'a str> {
    let mut words = vec!["call", "org.nbdtrack1", path, interface, method];
    words.extend(arguments);
    words
}

#[test]
fn with_polkit_root_named_users_and_the_reading_group_are_not_asked_and_others_are() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    block_on(async move {
        let bus = polkit::bus("nogroup");
        let test =
            "with_polkit_root_named_users_and_the_reading_group_are_not_asked_and_others_are";
        let Some(_polkit) = Polkit::start(test, &bus, RULES).await else {
            return;
        };
        let publisher = asking(&bus.address).await;
        let mut listeners = Vec::new();
        for user in ["nobody", "daemon"] {
            let child = Command::new("setpriv")
                .args([format!("--reuid={user}"), group_of(user)])
                .args(["--clear-groups", "timeout", "60", "gdbus", "monitor"])
                .args(["--address", &bus.address, "--dest", "org.nbdtrack1"])
                .stdout(Stdio::piped())
                .spawn()
                .expect("gdbus is installed (libglib2.0-bin)");
            listeners.push((user, child));
        }
        for (at, row) in CALLS.iter().chain(&HARD).enumerate() {
            let (_, interface, method, arguments, group_may) = *row;
            let free = interface == "org.freedesktop.DBus.Peer" || method == "NoSuchMethod";
            let hard = HARD.iter().any(|(.., hard, _)| *hard == arguments);
            let dangerous = hard || DANGEROUS.contains(&method);
            for user in ASKED {
                // Those two are told by every row what it is; of the others each kind of row tells.
                if !["nobody", "bin"].contains(&user) && !hard && !KINDS.contains(&method) {
                    continue;
                }
                let may = match user {
                    "root" | "games" => true,
                    "nobody" => group_may,
                    "daemon" => group_may || !dangerous && method != "Rescan",
                    _ => false,
                };
                let text = said(&bus.address, user, &words(row)).await;
                let action = match (group_may, dangerous) {
                    (true, _) => "org.nbdtrack1.read",
                    (_, true) => "org.nbdtrack1.dangerous",
                    (_, false) => "org.nbdtrack1.change",
                };
                let refused = text.contains("polkit") && text.contains(action);
                assert_eq!(
                    !refused,
                    may || free,
                    "{user}: {interface}.{method}: {text}"
                );
                assert!(!text.contains("Access denied"), "{user}: {method}: {text}");
            }
            publisher.offer(vec![export(u32::try_from(at).unwrap())]);
        }
        for (user, mut child) in listeners {
            let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
            let mut text = String::new();
            std::io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut text).unwrap();
            child.wait().unwrap();
            let hears = user == "nobody";
            assert_eq!(text.contains("PropertiesChanged"), hears, "{user}: {text}");
        }
    });
}

#[test]
fn with_polkit_a_password_is_asked_for_only_when_the_call_allows_it() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    block_on(async move {
        let bus = polkit::bus("nogroup");
        let test = "with_polkit_a_password_is_asked_for_only_when_the_call_allows_it";
        let Some(_polkit) = Polkit::start(test, &bus, RULES).await else {
            return;
        };
        let _publisher = asking(&bus.address).await;
        let rescan = [
            "call",
            "org.nbdtrack1",
            ROOT,
            MANAGER,
            "Rescan",
            "a{sv}",
            "0",
        ];
        let mut quiet = vec!["--allow-interactive-authorization=no"];
        quiet.extend(rescan);
        let text = said(&bus.address, "bin", &quiet).await;
        assert!(text.contains("does not allow to ask for one"), "{text}");
        let text = said(&bus.address, "bin", &rescan).await;
        assert!(text.contains("no authentication agent"), "{text}");
        let link = bus.connect().await;
        for right in [true, false] {
            // The shell waits until the agent of its process is there, and becomes busctl.
            let mut command = Command::new("setpriv");
            command
                .args(["--reuid=bin", "--regid=bin", "--clear-groups", "sh", "-c"])
                .arg("echo here; read -r _; exec busctl \"$@\"")
                .args(["sh", &format!("--address={}", bus.address)])
                .args(rescan)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            let mut child = command.spawn().unwrap();
            let mut line = String::new();
            let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
            output.read_line(&mut line).unwrap();
            let pid = child.id();
            let mut input = child.stdin.take().unwrap();
            let answering = polkit::answer_one(&link, pid, right);
            let going = tokio::task::spawn_blocking(move || {
                input.write_all(b"\n").unwrap();
                child.wait_with_output().unwrap()
            });
            // The call cannot be made before the agent is registered, which the first of the two does at once.
            let (asked, ended) = tokio::join!(answering, going);
            let ended = ended.unwrap();
            let text = String::from_utf8_lossy(&ended.stderr);
            assert_eq!(asked.action, "org.nbdtrack1.change");
            assert!(
                asked.text.contains("Authentication is required"),
                "{}",
                asked.text
            );
            assert_eq!(ended.status.success(), right, "{text}");
            assert_eq!(text.contains("no password was given"), !right, "{text}");
        }
    });
}

/// A command on a terminal of its own, as `bin`, where the private bus is the system's and a password of root is known.
struct AtTerminal {
    child: Child,
    /// `None` at the end of the input.
    keyboard: Option<std::process::ChildStdin>,
    screen: std::sync::mpsc::Receiver<Vec<u8>>,
    /// Without the name of the terminal, which is shown first.
    shown: String,
    name: String,
}

impl AtTerminal {
    const PASSWORD: &str = "only in this namespace";
    /// shadow(5), with that password.
    const SHADOW: &str = "root:$6$nbdtrack$3BWNjBZnMmStuKkwDnWp6f/plqcQXahPFc93fRfizHM0oEmSWVGAqro0bNvlt4oBXQka4vUey1i6Jbf0NmTje.:20000:0:99999:7:::\n";
    /// `script` gives the terminal; what pkttyagent and its setuid helper read below /etc and /run is the test's.
    const PLACE: &str = "set -e; mount --make-rprivate /; mount -t tmpfs none /run; mkdir /run/dbus; \
        ln -s \"$1\" /run/dbus/system_bus_socket; \
        touch /run/nbdtrack; mount --bind \"$4\" /run/nbdtrack; \
        mount --bind \"$2/shadow\" /etc/shadow; mount --bind \"$2/pam.d\" /etc/pam.d; \
        exec script --quiet --return --echo always --command \"$3\" /dev/null";

    fn run(bus: &PrivateBus, folder: &std::path::Path, command: &str) -> AtTerminal {
        let socket = bus.address.strip_prefix("unix:path=").unwrap();
        let line = format!("tty; exec setpriv --reuid=bin --regid=bin --clear-groups {command}");
        let mut place = Command::new("unshare");
        place.args(["--mount", "sh", "-c", Self::PLACE, "sh", socket]);
        place
            .arg(folder)
            .arg(line)
            .arg(env!("CARGO_BIN_EXE_nbdtrack"));
        place.env("LC_ALL", "C").env_remove("LANGUAGE");
        place.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = place.spawn().unwrap();
        let mut output = child.stdout.take().unwrap();
        let (sender, screen) = std::sync::mpsc::channel();
        // Ends with the output, and so with the command.
        std::thread::spawn(move || {
            let mut part = [0; 4096];
            while let Ok(read @ 1..) = std::io::Read::read(&mut output, &mut part) {
                let _ = sender.send(part[..read].to_vec());
            }
        });
        let mut at = AtTerminal {
            keyboard: child.stdin.take(),
            child,
            screen,
            shown: String::new(),
            name: String::new(),
        };
        at.until("\n");
        let (name, rest) = at.shown.split_once('\n').unwrap();
        (at.name, at.shown) = (name.trim().to_owned(), rest.to_owned());
        at
    }

    fn enter(&mut self, line: &str) {
        writeln!(self.keyboard.as_ref().unwrap(), "{line}").unwrap();
    }

    /// Types what is not shown. Who asks for it prints the question first, then throws away what was typed and ends the echo by one
    /// call (tcsetattr(3), `TCSAFLUSH`): what is typed before that is lost.
    fn enter_unseen(&mut self, line: &str) {
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            let mut stty = Command::new("stty");
            let terminal = stty.args(["-a", "-F", &self.name]).output().unwrap();
            let text = String::from_utf8_lossy(&terminal.stdout);
            if text.split_whitespace().any(|flag| flag == "-echo") {
                break;
            }
            assert!(Instant::now() < until, "{} echoes: {text}", self.name);
            std::thread::sleep(Duration::from_millis(10));
        }
        self.enter(line);
    }

    fn until(&mut self, wanted: &str) {
        let until = Instant::now() + Duration::from_secs(30);
        while !self.shown.contains(wanted) {
            let left = until.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(left) {
                Ok(part) => self.shown += &String::from_utf8_lossy(&part),
                Err(_) => panic!("no {wanted:?} on the terminal: {:?}", self.shown),
            }
        }
    }

    /// What was shown, and the exit code.
    fn end(mut self) -> (String, Option<i32>) {
        // What else it asks is answered with the end of the input.
        self.keyboard = None;
        while let Ok(part) = self.screen.recv() {
            self.shown += &String::from_utf8_lossy(&part);
        }
        let code = self.child.wait().unwrap().code();
        (std::mem::take(&mut self.shown), code)
    }
}

impl Drop for AtTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The operator was never asked: polkit passes over an agent that is registered as a fallback where the caller has no login session.
#[test]
fn with_polkit_the_person_at_a_terminal_is_asked_without_a_login_session() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    let test = "with_polkit_the_person_at_a_terminal_is_asked_without_a_login_session";
    for tool in ["script", "pkttyagent"] {
        if Command::new(tool).arg("--version").output().is_err() {
            return polkit::skip(test, &format!("{tool} is missing"));
        }
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("shadow"), AtTerminal::SHADOW).unwrap();
    std::fs::create_dir(folder.path().join("pam.d")).unwrap();
    let pam = "auth required pam_unix.so\naccount required pam_unix.so\n";
    std::fs::write(folder.path().join("pam.d/polkit-1"), pam).unwrap();
    block_on(async move {
        let bus = polkit::bus("nogroup");
        let Some(_polkit) = Polkit::start(test, &bus, RULES).await else {
            return;
        };
        let _publisher = asking(&bus.address).await;
        let link = bus.connect().await;
        let run = |line: &str| AtTerminal::run(&bus, folder.path(), line);

        let mut at = run("/run/nbdtrack rescan");
        let (shown, code) = tokio::task::spawn_blocking(move || {
            at.until("Password: ");
            at.enter_unseen(AtTerminal::PASSWORD);
            at.until("rescanned");
            at.end()
        })
        .await
        .unwrap();
        assert!(
            shown.contains("AUTHENTICATING FOR org.nbdtrack1.change"),
            "{shown}"
        );
        assert_eq!(code, Some(0), "{shown}");

        let at = run("/run/nbdtrack --no-ask-password rescan");
        let began = Instant::now();
        let (shown, code) = tokio::task::spawn_blocking(move || at.end()).await.unwrap();
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "at once: {shown}"
        );
        assert!(
            shown.contains("polkit wants a password for org.nbdtrack1.change"),
            "{shown}"
        );
        assert!(shown.contains("without --no-ask-password"), "{shown}");
        assert!(!shown.contains("AUTHENTICATING"), "{shown}");
        assert_eq!(code, Some(5), "{shown}");

        // An agent that asks already, as a desktop's does, goes on asking, and nothing is heard of another one.
        let mut at = run("sh -c 'echo pid $$; read -r _; exec /run/nbdtrack rescan'");
        let mut at = tokio::task::spawn_blocking(move || {
            at.until("\n");
            at
        })
        .await
        .unwrap();
        let pid = at
            .shown
            .trim()
            .strip_prefix("pid ")
            .unwrap()
            .parse()
            .unwrap();
        let answering = polkit::answer_one(&link, pid, true);
        let going = tokio::task::spawn_blocking(move || {
            at.enter("");
            at.until("rescanned");
            at.end()
        });
        let (asked, ended) = tokio::join!(answering, going);
        let (shown, code) = ended.unwrap();
        assert_eq!(asked.action, "org.nbdtrack1.change");
        let rest = shown.split_once('\n').unwrap().1;
        assert_eq!(rest.trim(), "rescanned", "{shown}");
        assert_eq!(code, Some(0), "{shown}");
    });
}

/// A daemon of its own, ended with the test.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn on_the_bus(link: &zbus::Connection) {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let dbus = "org.freedesktop.DBus";
        let asked = link.call_method(
            Some(dbus),
            "/",
            Some(dbus),
            "NameHasOwner",
            &"org.nbdtrack1",
        );
        if asked.await.unwrap().body().deserialize::<bool>().unwrap() {
            return;
        }
        assert!(Instant::now() < until, "the daemon is not on the bus");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Answers as systemd does, for `process`; each other question stays unanswered.
async fn answer_as_systemd(link: zbus::Connection, process: u32) {
    let mut messages = zbus::MessageStream::from(&link);
    while let Some(message) = messages.next().await {
        let message = message.unwrap();
        let header = message.header();
        if header
            .member()
            .is_none_or(|member| member != "GetUnitByPID")
            || message.body().deserialize::<u32>().unwrap() != process
        {
            continue;
        }
        let unit = "/org/freedesktop/systemd1/unit/volumed_2eservice";
        let unit = zbus::ObjectPath::try_from(unit).unwrap();
        let answer = zbus::Message::method_return(&header).build(&unit).unwrap();
        link.send(&answer).await.unwrap();
    }
}

/// The shipped unit hides others' processes from the daemon, and the history had no caller's unit.
#[test]
fn a_caller_whose_process_is_hidden_has_the_unit_that_systemd_says() {
    const HIDING: &str = "mount --make-rprivate / && mount -t proc -o hidepid=invisible proc /proc";
    let test = "a_caller_whose_process_is_hidden_has_the_unit_that_systemd_says";
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    let hiding = Command::new("unshare")
        .args(["--mount", "sh", "-c", HIDING])
        .output()
        .unwrap();
    if !hiding.status.success() {
        return polkit::skip(test, "no right to mount a /proc of its own");
    }
    block_on(async move {
        let systemd = "<policy user=\"root\"><allow own=\"org.freedesktop.systemd1\"/>\
            <allow send_destination=\"org.freedesktop.systemd1\"/></policy>";
        let bus = PrivateBus::with_policy("nogroup", systemd);
        let systemd = bus.connect().await;
        let name = "org.freedesktop.systemd1";
        systemd.request_name(name).await.unwrap();
        tokio::spawn(answer_as_systemd(systemd, std::process::id()));
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("nbdtrack.toml");
        std::fs::write(&config, "[server]\nlisten = []\n").unwrap();
        // As the unit has it: ProtectProc=invisible, CapabilityBoundingSet=CAP_NET_ADMIN, and not the group root, from which nothing is hidden.
        let script = format!(
            "{HIDING} && exec setpriv --regid=nogroup --clear-groups --bounding-set=-all,+net_admin --inh-caps=-all \"$@\""
        );
        let mut serve = Command::new("unshare");
        serve.args(["--mount", "sh", "-c", &script, "sh"]);
        serve.args([env!("CARGO_BIN_EXE_nbdtrack"), "--bus", &bus.address]);
        serve.arg("serve").arg("--config").arg(&config);
        serve.arg("--state").arg(folder.path().join("state"));
        let _served = Served(serve.stderr(Stdio::null()).spawn().unwrap());
        let link = bus.connect().await;
        on_the_bus(&link).await;
        let none: BTreeMap<&str, zbus::Variant<'_>> = BTreeMap::new();
        let reload = link.call_method(Some("org.nbdtrack1"), ROOT, Some(MANAGER), "Reload", &none);
        reload.await.unwrap();
        // By a process that systemd says nothing of: the call is carried out, and has no unit.
        let began = Instant::now();
        let mut end = vec!["call", "org.nbdtrack1", ROOT, MANAGER, "EndSession"];
        end.extend(["ta{sv}", "1", "0"]);
        let text = said(&bus.address, "root", &end).await;
        assert!(text.contains("no session 1"), "{text}");
        let took = began.elapsed();
        assert!(took < Duration::from_secs(5), "systemd is silent: {took:?}");
        let shown = Command::new(env!("CARGO_BIN_EXE_nbdtrack"))
            .args(["--bus", &bus.address, "--json", "history"])
            .output()
            .unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        let unit_of = |method: &str| {
            let records = shown
                .lines()
                .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
            let mut units = records
                .filter(|record| record["kind"] == "call" && record["new"] == method)
                .map(|record| record["unit"].clone());
            units
                .next()
                .unwrap_or_else(|| panic!("no {method} in {shown}"))
        };
        assert_eq!(unit_of("Reload"), "volumed.service", "{shown}");
        assert_eq!(unit_of("EndSession").as_str().unwrap_or(""), "", "{shown}");
    });
}

/// Of the two calls with which a person is asked the first stood there as refused, and the true refusal behind it within a minute was only
/// counted.
#[test]
fn whom_polkit_refuses_stands_in_the_history_once_for_many() {
    const CALLS: usize = 20;
    const RULES: &str = r#"
polkit.addRule(function(action, subject) {
    if (subject.user == "bin" && action.id == "org.nbdtrack1.dangerous") return polkit.Result.NO;
    return polkit.Result.NOT_HANDLED;
});
"#;
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    block_on(async move {
        let bus = polkit::bus("nogroup");
        let test = "whom_polkit_refuses_stands_in_the_history_once_for_many";
        let Some(_polkit) = Polkit::start(test, &bus, RULES).await else {
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("nbdtrack.toml");
        std::fs::write(&config, "[server]\nlisten = []\n[dbus]\npolkit = true\n").unwrap();
        let nbdtrack = || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_nbdtrack"));
            command.args(["--bus", &bus.address]);
            command
        };
        let mut serve = nbdtrack();
        serve.arg("serve").arg("--config").arg(&config);
        serve.arg("--state").arg(folder.path().join("state"));
        let _served = Served(serve.stderr(Stdio::null()).spawn().unwrap());
        let link = bus.connect().await;
        on_the_bus(&link).await;
        // A password would let the user detach, and none cut clients off.
        let gently: &[&str] = &["PrepareDetach", "sa{sv}", "serial:x", "0"];
        let hard: &[&str] = &[
            "PrepareDetach",
            "sa{sv}",
            "serial:x",
            "1",
            "hard",
            "b",
            "true",
        ];
        let reload: &[&str] = &["Reload", "a{sv}", "0"];
        for (words, calls) in [(gently, CALLS), (hard, CALLS), (reload, 1)] {
            let call = [&["call", "org.nbdtrack1", ROOT, MANAGER], words].concat();
            let texts = (0..calls).map(|_| said(&bus.address, "bin", &call));
            for text in futures_util::future::join_all(texts).await {
                // One user has ten questions at a time; the others are told to come again, and are no refusal.
                assert!(text.contains("polkit") || text.contains("busy"), "{text}");
            }
        }
        let shown = nbdtrack().args(["--json", "history"]).output().unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        let calls: Vec<serde_json::Value> = shown
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .filter(|record: &serde_json::Value| record["uid"] == uid("bin"))
            .collect();
        let details: Vec<_> = calls
            .iter()
            .map(|record| record["detail"].as_str().unwrap_or(""))
            .collect();
        let wanted = |method: &str| {
            format!(
                "not carried out: {method}: polkit wants a password for org.nbdtrack1.change, and the caller has no authentication agent \
                 that asks for it"
            )
        };
        let no = "refused: PrepareDetach: polkit does not let this user do org.nbdtrack1.dangerous";
        assert_eq!(
            details,
            [wanted("PrepareDetach"), no.to_owned(), wanted("Reload")],
            "one for each: {shown}"
        );
    });
}

#[test]
fn a_polkit_that_is_absent_or_hangs_denies_and_holds_up_no_one_else() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    block_on(async move {
        let bus = polkit::bus("nogroup");
        let publisher = asking(&bus.address).await;
        let stats = [
            "call",
            "org.nbdtrack1",
            ROOT,
            MANAGER,
            "GetStats",
            "a{sv}",
            "0",
        ];
        let text = said(&bus.address, "daemon", &stats).await;
        assert!(text.contains("polkit cannot be asked"), "{text}");
        let text = said(&bus.address, "nobody", &stats).await;
        assert!(text.is_empty(), "the group needs no polkit: {text}");
        let test = "a_polkit_that_is_absent_or_hangs_denies_and_holds_up_no_one_else";
        let Some(polkit) = Polkit::start(test, &bus, RULES).await else {
            return;
        };
        let text = said(&bus.address, "daemon", &stats).await;
        assert!(text.is_empty(), "{text}");
        let link = bus.connect().await;
        polkit.freeze(true);
        // Enough for all questions that one user may have at one time, and a few more.
        let mut flood = Vec::new();
        for _ in 0..14 {
            let mut command = busctl(
                &bus.address,
                "daemon",
                &["--allow-interactive-authorization=no"],
            );
            command.args(stats).stderr(Stdio::piped());
            flood.push(command.spawn().unwrap());
        }
        let began = Instant::now();
        for _ in 0..20 {
            let none: BTreeMap<&str, zbus::Variant<'_>> = BTreeMap::new();
            let asked = link.call_method(
                Some("org.nbdtrack1"),
                ROOT,
                Some(MANAGER),
                "GetStats",
                &none,
            );
            asked.await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let took = began.elapsed();
        assert!(
            took < Duration::from_secs(3),
            "root waited with the others: {took:?}"
        );
        let answers: Vec<String> = tokio::task::spawn_blocking(move || {
            let ended = flood
                .into_iter()
                .map(|child| child.wait_with_output().unwrap());
            ended
                .map(|output| String::from_utf8_lossy(&output.stderr).into_owned())
                .collect()
        })
        .await
        .unwrap();
        let late = answers
            .iter()
            .filter(|text| text.contains("did not answer within 5 s"));
        let busy = answers
            .iter()
            .filter(|text| text.contains("too many calls"));
        assert_eq!((late.count(), busy.count()), (10, 4), "{answers:?}");
        polkit.freeze(false);
        let text = said(&bus.address, "daemon", &stats).await;
        assert!(text.is_empty(), "it goes on: {text}");
        drop(publisher);
    });
}

#[test]
fn the_actions_that_are_shipped_are_those_that_are_asked_for() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/dbus/org.nbdtrack1.policy");
    let text = std::fs::read_to_string(file).unwrap();
    let ids: Vec<&str> = text
        .split("<action id=\"")
        .skip(1)
        .map(|rest| rest.split('"').next().unwrap())
        .collect();
    let wanted = ["read", "change", "dangerous"].map(|name| format!("org.nbdtrack1.{name}"));
    assert_eq!(ids, wanted);
    // Nothing is anyone's without a password of an administrator, and what is dangerous asks for it each time.
    for (kept, action) in text
        .split("<action id")
        .skip(1)
        .zip(&wanted)
        .map(|(part, id)| (part.contains("_keep"), id))
    {
        assert_eq!(kept, action != "org.nbdtrack1.dangerous", "{action}");
    }
    assert!(!text.contains(">yes<") && !text.contains("auth_self"));
}
