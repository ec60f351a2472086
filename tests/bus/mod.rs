//! A private bus for one test, with the shipped policy; ends with the test.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]
#![allow(
    dead_code,
    reason = "each program that includes this module uses a part of it"
)]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

pub struct PrivateBus {
    pub address: String,
    folder: tempfile::TempDir,
    daemon: Child,
}

impl PrivateBus {
    /// A bus with the shipped policy for its group `nbdtrack`, which a test machine need not have.
    pub fn open() -> PrivateBus {
        PrivateBus::with_group("nbdtrack")
    }

    /// A bus with the shipped policy, where `group` stands in for `nbdtrack`.
    pub fn with_group(group: &str) -> PrivateBus {
        PrivateBus::with_policy(group, "")
    }

    /// As [`Self::with_group`], and what an operator has added.
    pub fn with_policy(group: &str, added: &str) -> PrivateBus {
        let folder = tempfile::tempdir().unwrap();
        let root = env!("CARGO_MANIFEST_DIR");
        let policy = std::fs::read_to_string(format!("{root}/dbus/org.nbdtrack1.conf")).unwrap();
        let policy = policy.replace("group=\"nbdtrack\"", &format!("group=\"{group}\""));
        let policy = policy.replace("</busconfig>", &format!("{added}</busconfig>"));
        std::fs::write(folder.path().join("org.nbdtrack1.conf"), policy).unwrap();
        let here = folder.path().display().to_string();
        let config = include_str!("system.conf")
            .replace("SOCKET", &format!("{here}/bus"))
            .replace("POLICY", &format!("{here}/org.nbdtrack1.conf"));
        std::fs::write(folder.path().join("bus.conf"), config).unwrap();
        // Other users connect through this folder.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(folder.path(), open).unwrap();
        let daemon = start(folder.path());
        let address = format!("unix:path={here}/bus");
        PrivateBus {
            address,
            folder,
            daemon,
        }
    }

    /// Makes the bus stand still, or go on.
    pub fn freeze(&self, frozen: bool) {
        use nix::sys::signal::{Signal, kill};
        let signal = if frozen {
            Signal::SIGSTOP
        } else {
            Signal::SIGCONT
        };
        let pid = nix::unistd::Pid::from_raw(self.daemon.id().try_into().unwrap());
        kill(pid, signal).unwrap();
    }

    pub fn restart(&mut self) {
        self.stop();
        let _ = std::fs::remove_file(self.folder.path().join("bus"));
        self.daemon = start(self.folder.path());
    }

    pub async fn connect(&self) -> zbus::Connection {
        zbus::connection::Builder::address(self.address.as_str())
            .build()
            .await
            .unwrap()
    }

    fn stop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

impl Drop for PrivateBus {
    fn drop(&mut self) {
        self.stop();
    }
}

fn start(folder: &std::path::Path) -> Child {
    let mut daemon = Command::new("dbus-daemon")
        .arg(format!("--config-file={}/bus.conf", folder.display()))
        .args(["--nofork", "--nopidfile", "--print-address=1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("dbus-daemon is installed (package dbus)");
    let mut line = String::new();
    BufReader::new(daemon.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.starts_with("unix:"), "dbus-daemon did not start");
    daemon
}

/// Runs a test on one thread, as the daemon runs, for at most two minutes.
pub fn block_on(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let limited = async { tokio::time::timeout(Duration::from_secs(120), test).await };
    runtime.block_on(limited).expect("the test ends in time");
}

/// The members of an interface in introspection data: `method AddExport in:name:s …`, in order within each.
pub fn members(xml: &str, interface: &str) -> BTreeSet<String> {
    let start = xml
        .find(&format!("<interface name=\"{interface}\""))
        .expect("the interface is there");
    let end = start + xml[start..].find("</interface>").unwrap();
    let mut found: Vec<String> = Vec::new();
    for tag in xml[start..end].split('<').skip(2) {
        let attribute = |name: &str| {
            let at = tag.find(&format!(" {name}=\""))? + name.len() + 3;
            Some(&tag[at..at + tag[at..].find('"')?])
        };
        let kind = tag.split([' ', '>', '/']).next().unwrap();
        let name = attribute("name").unwrap_or("");
        match kind {
            "method" | "signal" => found.push(format!("{kind} {name}")),
            "property" => found.push(format!(
                "property {name}:{}:{}",
                attribute("type").unwrap(),
                attribute("access").unwrap()
            )),
            "arg" => {
                let arg = format!(
                    " {}:{name}:{}",
                    attribute("direction").unwrap_or("out"),
                    attribute("type").unwrap()
                );
                found.last_mut().unwrap().push_str(&arg);
            }
            _ => {}
        }
    }
    found.into_iter().collect()
}

/// The members in the XML file that no sentence describes.
pub fn undocumented(interface: &str) -> BTreeSet<String> {
    let file = format!("{}/dbus/{interface}.xml", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(file).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    lines
        .windows(2)
        .filter(|pair| {
            let tag = pair[0].trim_start();
            ["<interface ", "<method ", "<signal ", "<property ", "<arg "]
                .iter()
                .any(|t| tag.starts_with(t))
        })
        .filter(|pair| !(pair[1].contains("DocString") && pair[1].contains(".\"/>")))
        .map(|pair| pair[0].trim().to_owned())
        .collect()
}
