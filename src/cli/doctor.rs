//! `doctor`: looks at the machine for what keeps the daemon from serving, and says how to fix each. Changes nothing.

use std::path::Path;

use serde_json::json;

use super::show::{print, print_json};
use super::table::Look;
use super::{Failure, bus_policy, check};
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

/// Looks at everything and prints it; fails when anything is bad.
pub async fn doctor(bus: &Bus, config: &Path, as_json: bool) -> Result<(), Failure> {
    let mut findings = vec![kernel(), uevents(), devices(), limits(), udevd(), rules()];
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
        let look = Look::of_stdout();
        let lines: String = findings.iter().map(|finding| line(finding, look)).collect();
        print(&lines)?;
    }
    if bad > 0 {
        return Err(Failure::Unwell(bad));
    }
    Ok(())
}

fn line(finding: &Finding, look: Look) -> String {
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

/// diskseq tells two disks of one name apart: Linux 5.15.
fn kernel() -> Finding {
    const WHAT: &str = "kernel";
    let release = read("/proc/sys/kernel/osrelease");
    match is_new_enough(&release) {
        Some(true) => good(WHAT, format!("Linux {release} numbers its disks (diskseq)")),
        Some(false) => trouble(
            WHAT,
            Verdict::Bad,
            format!("Linux {release} does not number its disks"),
            "run Linux 5.15 or newer",
        ),
        None => trouble(
            WHAT,
            Verdict::Warning,
            "its version cannot be read",
            "mount /proc",
        ),
    }
}

fn is_new_enough(release: &str) -> Option<bool> {
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some((major, minor) >= (5, 15))
}

/// Events of disks reach only the network namespace of the machine.
fn uevents() -> Finding {
    const WHAT: &str = "kernel events";
    match nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Netlink,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        nix::sys::socket::SockProtocol::NetlinkKObjectUEvent,
    ) {
        Ok(_socket) => {
            let ours = std::fs::read_link("/proc/self/ns/net").ok();
            let first = std::fs::read_link("/proc/1/ns/net").ok();
            if first.is_some() && ours != first {
                return trouble(
                    WHAT,
                    Verdict::Warning,
                    "this is another network namespace than that of the machine's first process",
                    "run the daemon in the machine's own network namespace (a container: --network host)",
                );
            }
            good(WHAT, "a netlink socket for them can be opened")
        }
        Err(error) => trouble(
            WHAT,
            Verdict::Bad,
            format!("no netlink socket: {error}"),
            "allow AF_NETLINK (systemd: RestrictAddressFamilies)",
        ),
    }
}

fn devices() -> Finding {
    const WHAT: &str = "disks";
    let disks: Vec<String> = std::fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| {
            !["ram", "zram", "dm-", "md", "loop"]
                .iter()
                .any(|kind| name.starts_with(kind))
        })
        .collect();
    let refused = disks.iter().find_map(|name| {
        let node = format!("/dev/{name}");
        match std::fs::File::open(&node) {
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Some(node),
            _ => None,
        }
    });
    match refused {
        _ if disks.is_empty() => trouble(
            WHAT,
            Verdict::Warning,
            "this machine shows no disk but loop devices",
            "a container needs /sys and /dev of the machine",
        ),
        Some(node) => trouble(
            WHAT,
            Verdict::Warning,
            format!("{node} cannot be opened by this user"),
            "run 'nbdtrack doctor' as root, as the daemon runs",
        ),
        None => good(WHAT, format!("{} can be opened", disks.join(", "))),
    }
}

fn limits() -> Finding {
    const WHAT: &str = "open files";
    use nix::sys::resource::{Resource, getrlimit};
    const WANTED: u64 = 8_192;
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard < WANTED => trouble(
            WHAT,
            Verdict::Warning,
            format!("at most {hard} here, and each client and each disk is one"),
            "raise LimitNOFILE in the unit, or 'ulimit -Hn'",
        ),
        Ok((_, hard)) => good(WHAT, format!("at most {hard}")),
        Err(error) => trouble(
            WHAT,
            Verdict::Warning,
            error.to_string(),
            "see getrlimit(2)",
        ),
    }
}

fn udevd() -> Finding {
    const WHAT: &str = "udev";
    if Path::new("/run/udev/control").exists() {
        return good(WHAT, "udevd runs");
    }
    trouble(
        WHAT,
        Verdict::Warning,
        "udevd does not run: disks are followed on the kernel's events alone, and no one makes links in /dev/disk",
        "nothing, if that is meant; else 'systemctl start systemd-udevd'",
    )
}

fn rules() -> Finding {
    const WHAT: &str = "udev rules";
    let places = [
        "/usr/lib/udev/rules.d",
        "/lib/udev/rules.d",
        "/etc/udev/rules.d",
    ];
    let found = places
        .iter()
        .map(|place| format!("{place}/60-nbdtrack.rules"))
        .find(|path| Path::new(path).exists());
    match found {
        Some(path) => good(WHAT, format!("{path} is there")),
        None => trouble(
            WHAT,
            Verdict::Warning,
            "60-nbdtrack.rules is not installed: LVM, md and mounts may take a disk before it is served",
            "install the package, or copy rules/60-nbdtrack.rules to /etc/udev/rules.d",
        ),
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
    let client = match Client::connect(bus).await {
        Ok(client) => client,
        Err(error) => {
            return vec![trouble(
                WHAT,
                Verdict::Bad,
                error.to_string(),
                "'systemctl start dbus nbdtrack', then 'journalctl -u nbdtrack'",
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
            "'journalctl -u nbdtrack', 'systemctl restart nbdtrack'",
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
            NAMES
                .contains(&name)
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
        "let only one of them serve a volume: 'systemctl disable --now nbd-server'",
    )
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_judged_by_its_numbers() {
        assert_eq!(is_new_enough("5.15.0-91-generic"), Some(true));
        assert_eq!(is_new_enough("6.1.0"), Some(true));
        assert_eq!(is_new_enough("5.10.0-28"), Some(false));
        assert_eq!(is_new_enough("5"), None);
    }
}
