//! A real polkitd on a private bus, with the actions that are shipped and rules of the test's own; ends with the test.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use zbus::{Connection, Message, MessageStream, OwnedVariant, Variant};

use super::bus::PrivateBus;

const NAME: &str = "org.freedesktop.PolicyKit1";
const PATH: &str = "/org/freedesktop/PolicyKit1/Authority";
const AUTHORITY: &str = "org.freedesktop.PolicyKit1.Authority";
const PROGRAM: &str = "/usr/lib/polkit-1/polkitd";
const BUS_POLICY: &str = "/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf";
/// The agent of a test, at its connection.
const AGENT: &str = "/org/nbdtrack1/test/agent";

/// A bus whose policy lets everyone's calls through to the daemon and to polkit. `group` stands in for `nbdtrack`.
pub fn bus(group: &str) -> PrivateBus {
    let ours = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/dbus/org.nbdtrack1-polkit.conf"
    );
    let include = |path: &str| format!("<include ignore_missing=\"yes\">{path}</include>\n");
    PrivateBus::with_policy(group, &(include(ours) + &include(BUS_POLICY)))
}

pub struct Polkit {
    daemon: Child,
    /// What it has mounted.
    _folder: tempfile::TempDir,
}

impl Polkit {
    /// Starts one; prints why and returns `None` where that cannot be.
    pub async fn start(test: &str, bus: &PrivateBus, rules: &str) -> Option<Polkit> {
        if let Some(reason) = missing() {
            skip(test, &reason);
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| {
            let place = folder.path().join(name);
            std::fs::create_dir(&place).unwrap();
            std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o755)).unwrap();
            place
        };
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let (actions, own, vendors) = (place("actions"), place("rules"), place("vendors"));
        let action = concat!(env!("CARGO_MANIFEST_DIR"), "/dbus/org.nbdtrack1.policy");
        std::fs::copy(action, actions.join("org.nbdtrack1.policy")).unwrap();
        std::fs::write(own.join("50-test.rules"), rules).unwrap();
        // The machine's own actions and rules have no say: what polkitd sees of them is the test's, in a mount namespace.
        let script = "mount --make-rprivate / && mount --bind \"$1\" /usr/share/polkit-1/actions && \
            mount --bind \"$2\" /etc/polkit-1/rules.d && mount --bind \"$3\" /usr/share/polkit-1/rules.d && \
            exec \"$4\" --no-debug";
        let daemon = Command::new("unshare")
            .args(["--mount", "sh", "-c", script, "sh"])
            .args([&actions, &own, &vendors])
            .arg(PROGRAM)
            .env("DBUS_SYSTEM_BUS_ADDRESS", &bus.address)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("unshare is installed (util-linux)");
        let mut polkit = Polkit {
            daemon,
            _folder: folder,
        };
        polkit.wait(bus).await;
        Some(polkit)
    }

    async fn wait(&mut self, bus: &PrivateBus) {
        let link = bus.connect().await;
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let dbus = "org.freedesktop.DBus";
            let asked = link.call_method(Some(dbus), "/", Some(dbus), "NameHasOwner", &NAME);
            if asked.await.unwrap().body().deserialize::<bool>().unwrap() {
                return;
            }
            let ended = self.daemon.try_wait().unwrap();
            assert!(ended.is_none(), "polkitd ended: {ended:?}");
            assert!(Instant::now() < until, "polkitd is not on the bus");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Makes it stand still, or go on.
    pub fn freeze(&self, frozen: bool) {
        use nix::sys::signal::{Signal, kill};
        let signal = if frozen {
            Signal::SIGSTOP
        } else {
            Signal::SIGCONT
        };
        kill(
            nix::unistd::Pid::from_raw(self.daemon.id().try_into().unwrap()),
            signal,
        )
        .unwrap();
    }
}

impl Drop for Polkit {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn missing() -> Option<String> {
    for (file, package) in [(PROGRAM, "polkitd"), (BUS_POLICY, "polkitd")] {
        if !Path::new(file).exists() {
            return Some(format!("{file} is missing (apt install {package})"));
        }
    }
    let mounting = Command::new("unshare")
        .args(["--mount", "mount", "--make-rprivate", "/"])
        .output()
        .unwrap();
    (!mounting.status.success()).then(|| "no right to a mount namespace of its own".to_owned())
}

/// As tests/support/ground.rs does.
pub fn skip(test: &str, reason: &str) {
    let line = format!("SKIPPED: {test}: {reason}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("NBDTRACK_SKIPS")
        && let Ok(mut file) = std::fs::OpenOptions::new().append(true).open(path)
    {
        let _ = file.write_all(line.as_bytes());
    }
}

/// One question that the agent was asked: the action, and the text that the person sees.
pub struct Asked {
    pub action: String,
    pub text: String,
}

/// Registers this process, which is root, as the authentication agent of the process `pid`, and answers its one question: with a
/// password that was right (which the setuid helper of polkit would tell), or with none.
pub async fn answer_one(link: &Connection, pid: u32, right: bool) -> Asked {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // proc_pid_stat(5): field 22, and the second may hold blanks.
    let after = stat.rsplit(") ").next().unwrap();
    let started: u64 = after.split(' ').nth(19).unwrap().parse().unwrap();
    let subject = BTreeMap::from([
        ("pid", Variant::new(pid)),
        ("start-time", Variant::new(started)),
    ]);
    let mut calls = MessageStream::from(link);
    let registered = (("unix-process", subject), "C", AGENT);
    link.call_method(
        Some(NAME),
        PATH,
        Some(AUTHORITY),
        "RegisterAuthenticationAgent",
        &registered,
    )
    .await
    .unwrap();
    loop {
        let call = calls.next().await.unwrap().unwrap();
        let header = call.header();
        if header
            .member()
            .is_none_or(|member| member.as_str() != "BeginAuthentication")
        {
            continue;
        }
        type Question = (
            String,
            String,
            String,
            BTreeMap<String, String>,
            String,
            Vec<(String, BTreeMap<String, OwnedVariant>)>,
        );
        let (action, text, _icon, _details, cookie, _who): Question =
            call.body().deserialize().unwrap();
        if right {
            let root = ("unix-user", BTreeMap::from([("uid", Variant::new(0_u32))]));
            let body = (0_u32, cookie.as_str(), root);
            link.call_method(
                Some(NAME),
                PATH,
                Some(AUTHORITY),
                "AuthenticationAgentResponse2",
                &body,
            )
            .await
            .unwrap();
        }
        // As agents do when the person closes the dialog.
        let cancelled = "org.freedesktop.PolicyKit1.Error.Cancelled";
        let done = match right {
            true => Message::method_return(&header).build(&()),
            false => Message::error(&header, cancelled).build(&"dismissed"),
        };
        link.send(&done.unwrap()).await.unwrap();
        return Asked { action, text };
    }
}
