//! The shipped policy on a real bus: who may own, call and hear what.

#![allow(clippy::unwrap_used, clippy::panic)] // A test ends where something is missing.

mod bus;

use std::process::Command;

use bus::{PrivateBus, block_on};
use nbdtrack::dbus::{Answer, Bus, serve};
use tokio::sync::mpsc;

const CALLS: [(&str, &str, &[&str], bool); 16] = [
    ("org.freedesktop.DBus.Peer", "Ping", &[], true),
    (
        "org.freedesktop.DBus.Introspectable",
        "Introspect",
        &[],
        true,
    ),
    (
        "org.freedesktop.DBus.Properties",
        "GetAll",
        &["s", "org.nbdtrack1.Manager"],
        true,
    ),
    (
        "org.freedesktop.DBus.ObjectManager",
        "GetManagedObjects",
        &[],
        true,
    ),
    (
        "org.nbdtrack1.Manager",
        "ResolveVolume",
        &["a{sv}", "0"],
        true,
    ),
    ("org.nbdtrack1.Manager", "GetStats", &["a{sv}", "0"], true),
    (
        "org.nbdtrack1.Manager",
        "ExplainExport",
        &["sa{sv}", "a", "0"],
        true,
    ),
    (
        "org.nbdtrack1.Manager",
        "ExplainDisk",
        &["sa{sv}", "/dev/vdb", "0"],
        true,
    ),
    ("org.nbdtrack1.Manager", "GetHistory", &["a{sv}", "0"], true),
    (
        "org.nbdtrack1.Manager",
        "AddExport",
        &["sa{sv}", "a", "1", "volume", "s", "loop:/x"],
        false,
    ),
    (
        "org.nbdtrack1.Manager",
        "RemoveExport",
        &["sa{sv}", "a", "0"],
        false,
    ),
    (
        "org.nbdtrack1.Manager",
        "PrepareDetach",
        &["sa{sv}", "loop:/x", "0"],
        false,
    ),
    (
        "org.nbdtrack1.Manager",
        "CancelDetach",
        &["sa{sv}", "loop:/x", "0"],
        false,
    ),
    (
        "org.nbdtrack1.Manager",
        "ResolveConflict",
        &["sta{sv}", "a", "1", "0"],
        false,
    ),
    ("org.nbdtrack1.Manager", "Rescan", &["a{sv}", "0"], false),
    (
        "org.freedesktop.DBus.Properties",
        "Set",
        &["ssv", "org.nbdtrack1.Manager", "X", "u", "1"],
        false,
    ),
];

/// The bus takes the groups from the connecting process, so each user comes with its own.
fn group_of(user: &str) -> String {
    let group = if user == "nobody" { "nogroup" } else { user };
    format!("--regid={group}")
}

/// Runs busctl as `user` and tells whether the bus let the call through.
fn let_through(address: &str, user: &str, call: (&str, &str, &[&str])) -> bool {
    let output = Command::new("setpriv")
        .args([format!("--reuid={user}"), group_of(user)])
        .args(["--clear-groups", "busctl"])
        .arg(format!("--address={address}"))
        .args(["call", "org.nbdtrack1", "/org/nbdtrack1", call.0, call.1])
        .args(call.2)
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
fn root_does_all_the_group_reads_and_others_nothing() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    // nobody's group is nogroup on every Debian; daemon is in neither.
    let bus = PrivateBus::with_group("nogroup");
    let address = bus.address.clone();
    block_on(async move {
        let (commands, mut queue) = mpsc::channel(64);
        let publisher = serve(&Bus::parse(&address).unwrap(), commands)
            .await
            .unwrap();
        tokio::spawn(async move {
            while let Some(command) = queue.recv().await {
                let _ = command.reply.send(Ok(Answer::Done));
            }
        });
        for (interface, method, arguments, reading) in CALLS {
            for (user, allowed) in [("root", true), ("nobody", reading), ("daemon", false)] {
                let address = address.clone();
                let asked = tokio::task::spawn_blocking(move || {
                    let_through(&address, user, (interface, method, arguments))
                });
                assert_eq!(
                    asked.await.unwrap(),
                    allowed,
                    "{user}: {interface}.{method}"
                );
            }
        }
        drop(publisher);
        // Once the name is free, only root gets it.
        for (user, allowed) in [("nobody", false), ("root", true)] {
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
                .args(["RequestName", "su", "org.nbdtrack1", "4"])
                .output()
                .unwrap();
            assert_eq!(output.status.success(), allowed, "{user}: own");
        }
    });
}

#[test]
fn signals_reach_root_and_the_group_and_no_one_else() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    let bus = PrivateBus::with_group("nogroup");
    let address = bus.address.clone();
    block_on(async move {
        let (commands, _queue) = mpsc::channel(64);
        let publisher = serve(&Bus::parse(&address).unwrap(), commands)
            .await
            .unwrap();
        let mut listeners = Vec::new();
        for user in ["root", "nobody", "daemon"] {
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
        // Told again and again, for a busy machine may take its time to start the listeners.
        for _ in 0..40 {
            publisher.offer(vec![nbdtrack::dbus::Publication::Signal(
                nbdtrack::correlation::Notice::IdentityConflict {
                    id: "loop:/x".to_owned(),
                    disks: Vec::new(),
                },
            )]);
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        for (user, child) in listeners {
            let heard = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
            let text = String::from_utf8(heard.await.unwrap().stdout).unwrap();
            assert_eq!(
                text.contains("IdentityConflict"),
                user != "daemon",
                "{user}: {text}"
            );
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
        std::fs::copy(env!("CARGO_BIN_EXE_nbdtrack"), &program).unwrap();
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
