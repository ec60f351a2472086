//! EDGE: what `doctor` looks at in the machine: its kernel and events, disks, limits and udev.

use std::path::Path;

use super::{Finding, Verdict, good, read, trouble};

pub(super) fn look() -> Vec<Finding> {
    vec![kernel(), uevents(), devices(), limits(), udevd(), rules()]
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
