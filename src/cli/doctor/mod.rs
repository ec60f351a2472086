//! `doctor`: looks at the machine for what keeps the daemon from serving, and says how to fix each. Changes nothing.

mod machine;

use std::path::Path;

use serde_json::json;

use super::show::{print, print_json};
use super::table::TableStyle;
use super::{Failure, bus_policy, check, take_over};
use crate::dbus::Bus;
use crate::dbus::client::{Client, ClientError};

/// How a look ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Good,
    /// Works, with a drawback.
    Warning,
    Bad,
}

struct Finding {
    what: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do; empty when good.
    fix: String,
}

/// What the daemon is started by on this machine, and how its log is read.
struct Home {
    service: &'static str,
    log: &'static str,
    config: &'static str,
}

const OWN: Home = Home {
    service: "nbdtrack",
    log: "journalctl -u nbdtrack",
    config: "/etc/nbdtrack",
};
/// In nbd-server's place.
const PLACE: Home = Home {
    service: "nbd-server",
    log: "journalctl -t nbd-server",
    config: "/etc/nbd-server/config",
};

fn home() -> &'static Home {
    match take_over::has_place() {
        true => &PLACE,
        false => &OWN,
    }
}

/// Looks at everything and prints it; fails when anything is bad.
pub async fn doctor(bus: &Bus, config: Option<&Path>, as_json: bool) -> Result<(), Failure> {
    let config = config.unwrap_or(Path::new(home().config));
    let mut findings = machine::look();
    findings.push(configuration(config));
    findings.push(policy(bus));
    findings.extend(daemon(bus).await);
    findings.push(rivals());
    let bad = findings
        .iter()
        .filter(|finding| finding.verdict == Verdict::Bad)
        .count();
    if as_json {
        let list: Vec<_> = findings
            .iter()
            .map(|f| json!({"what": f.what, "verdict": f.verdict.name(), "found": f.found, "fix": f.fix}))
            .collect();
        print_json(&json!(list))?;
    } else {
        let look = TableStyle::of_stdout();
        let lines: String = findings.iter().map(|finding| line(finding, look)).collect();
        print(&lines)?;
    }
    if bad > 0 {
        return Err(Failure::Unwell(bad));
    }
    Ok(())
}

fn line(finding: &Finding, look: TableStyle) -> String {
    let (mark, code) = match finding.verdict {
        Verdict::Good => ("good", "32"),
        Verdict::Warning => ("note", "33"),
        Verdict::Bad => ("BAD ", "31"),
    };
    let mark = if look.colour {
        format!("\x1b[{code}m{mark}\x1b[0m")
    } else {
        mark.to_owned()
    };
    let mut text = format!("{mark}  {}: {}\n", finding.what, finding.found);
    if !finding.fix.is_empty() {
        text.push_str(&format!("      fix: {}\n", finding.fix));
    }
    text
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Verdict::Good => "good",
            Verdict::Warning => "warning",
            Verdict::Bad => "bad",
        }
    }
}

fn good(what: &'static str, found: impl Into<String>) -> Finding {
    Finding {
        what,
        verdict: Verdict::Good,
        found: found.into(),
        fix: String::new(),
    }
}

fn trouble(what: &'static str, verdict: Verdict, found: impl Into<String>, fix: &str) -> Finding {
    Finding {
        what,
        verdict,
        found: found.into(),
        fix: fix.to_owned(),
    }
}

fn configuration(path: &Path) -> Finding {
    const WHAT: &str = "configuration";
    let problems = check::problems(path);
    match problems.first() {
        None => good(WHAT, format!("{} is good", path.display())),
        Some(first) => trouble(
            WHAT,
            Verdict::Bad,
            format!(
                "{first}{}",
                if problems.len() > 1 {
                    format!(" (and {} more)", problems.len() - 1)
                } else {
                    String::new()
                }
            ),
            "'nbdtrack check' tells all of it by file, line and column",
        ),
    }
}

fn policy(bus: &Bus) -> Finding {
    const WHAT: &str = "D-Bus policy";
    if *bus != Bus::System {
        return good(WHAT, "another bus than the system's has its own");
    }
    if let Some(path) = bus_policy::open_to_all() {
        return trouble(
            WHAT,
            Verdict::Bad,
            format!(
                "{} lets everybody's calls reach the daemon, which asks polkit about them only with [dbus] polkit = true",
                path.display()
            ),
            "put the shipped org.nbdtrack1-polkit.conf in its place, or take it away, then 'systemctl reload dbus'",
        );
    }
    let found = bus_policy::PLACES
        .iter()
        .map(|place| format!("{place}/org.nbdtrack1.conf"))
        .find(|path| Path::new(path).exists());
    let group = read("/etc/group")
        .lines()
        .any(|line| line.starts_with("nbdtrack:"));
    match found {
        None => trouble(
            WHAT,
            Verdict::Bad,
            "org.nbdtrack1.conf is not installed: the bus does not let the daemon have its name",
            "install the package, or copy dbus/org.nbdtrack1.conf to /etc/dbus-1/system.d, then 'systemctl reload dbus'",
        ),
        Some(_) if !group => trouble(
            WHAT,
            Verdict::Warning,
            "there is no group nbdtrack, so only root may ask",
            "'systemd-sysusers', then 'systemctl reload dbus'",
        ),
        Some(path) => good(WHAT, format!("{path} is there, and the group nbdtrack")),
    }
}

async fn daemon(bus: &Bus) -> Vec<Finding> {
    const WHAT: &str = "daemon";
    let Home { service, log, .. } = home();
    let client = match Client::connect(bus).await {
        Ok(client) => client,
        Err(error) => {
            return vec![trouble(
                WHAT,
                Verdict::Bad,
                error.to_string(),
                &format!("'systemctl start dbus {service}', then '{log}'"),
            )];
        }
    };
    match client.stats().await {
        Ok(stats) => {
            let count = |name: &str| stats.get(name).copied().unwrap_or(0);
            let mut findings = vec![good(
                WHAT,
                format!(
                    "runs on bus {bus} with {} exports and {} disks",
                    count("exports"),
                    count("disks")
                ),
            )];
            for (name, what, fix) in [
                (
                    "orphans",
                    "disks that hang with requests in flight",
                    "look into 'dmesg' and the hypervisor for them",
                ),
                (
                    "history_lost",
                    "records that the history could not keep",
                    "make room on the state's disk ('df /var/lib/nbdtrack')",
                ),
                (
                    "udev_late_reads",
                    "disks whose identity was read too late",
                    "look into 'dmesg' for slow disks",
                ),
                (
                    "connections_over_limit",
                    "clients turned away over max_connections",
                    "raise max_connections",
                ),
                (
                    "threads_over_limit",
                    "requests that waited for a thread",
                    "look for slow disks with 'nbdtrack top'",
                ),
            ] {
                if count(name) > 0 {
                    findings.push(trouble(
                        WHAT,
                        Verdict::Warning,
                        format!("{} {what}", count(name)),
                        fix,
                    ));
                }
            }
            findings
        }
        Err(ClientError::Denied(text) | ClientError::PasswordWanted(text)) => vec![trouble(
            WHAT,
            Verdict::Warning,
            format!("runs, and this user may not ask it: {text}"),
            "be root, or join the group nbdtrack",
        )],
        Err(error) => vec![trouble(
            WHAT,
            Verdict::Bad,
            format!("is there and does not answer: {error}"),
            &format!("'{log}', 'systemctl restart {service}'"),
        )],
    }
}

/// Others that open disks by their path, which is what this program is there to end.
fn rivals() -> Finding {
    const WHAT: &str = "other NBD servers";
    const NAMES: [&str; 4] = ["nbd-server", "qemu-nbd", "nbdkit", "nbdublk"];
    let mut found: Vec<String> = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            let name = name.trim();
            (NAMES.contains(&name) && !take_over::is_nbdtrack(pid))
                .then(|| format!("{name} (process {pid})"))
        })
        .collect();
    found.sort();
    if found.is_empty() {
        return good(WHAT, "none runs");
    }
    trouble(
        WHAT,
        Verdict::Warning,
        format!(
            "{}: it may write a disk that an export serves, and hold port 10809",
            found.join(", ")
        ),
        match take_over::has_place() {
            // The service is nbdtrack.
            true => "let only one of them serve a volume: end the process",
            false => "let only one of them serve a volume: 'systemctl disable --now nbd-server'",
        },
    )
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}
