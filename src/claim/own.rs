//! Whether the machine itself uses a disk, or waits for it. EDGE: reads `/proc`, `/sys`, `/etc` and `/dev`; asks blkid(8) what
//! stands on the disk only while fstab(5) names a content that no other disk has.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use super::spec::{self, Spec};
use crate::correlation::DeviceNumber;
use crate::mounts::mounts;

/// A disk may take this long to show its content; udev's own limit for a whole event is 180 s.
const PROBE_WITHIN: Duration = Duration::from_secs(10);
/// More partitions than this are not looked at (the kernel's own limit is 256).
const PARTITIONS_MAX: usize = 256;

/// A disk and its partitions.
pub struct Family {
    /// Kernel names by device number, the disk among them.
    members: BTreeMap<DeviceNumber, String>,
    folders: Vec<PathBuf>,
}

impl Family {
    /// # Errors
    /// What the kernel says, for example that there is no such disk.
    pub fn of(number: DeviceNumber) -> io::Result<Family> {
        let disk = fs::canonicalize(format!("/sys/dev/block/{number}"))?;
        let mut family = Family {
            members: BTreeMap::from([(number, name(&disk))]),
            folders: vec![disk.clone()],
        };
        for entry in fs::read_dir(&disk)? {
            let path = entry?.path();
            if !path.join("partition").exists() || family.folders.len() > PARTITIONS_MAX {
                continue;
            }
            // One that goes meanwhile is no error.
            if let Some(number) = fs::read_to_string(path.join("dev"))
                .ok()
                .and_then(|text| parse_number(text.trim()))
            {
                family.members.insert(number, name(&path));
                family.folders.push(path);
            }
        }
        Ok(family)
    }

    fn has_node(&self, path: &Path) -> bool {
        node_number(path).is_some_and(|number| self.members.contains_key(&number))
    }

    /// Whether something is built on the disk, is mounted from it, or swaps to it.
    pub fn in_use(&self) -> Option<String> {
        for folder in &self.folders {
            let holders = fs::read_dir(folder.join("holders")).ok();
            if let Some(Ok(holder)) = holders.and_then(|mut found| found.next()) {
                return Some(format!("held by {}", holder.file_name().to_string_lossy()));
            }
        }
        // udevd has a mount namespace of its own.
        let table = fs::read_to_string("/proc/1/mountinfo").unwrap_or_default();
        for mount in mounts(&table) {
            let number = parse_number(mount.number);
            // The source, for btrfs, whose files have numbers of their own.
            let source = mount.source;
            let ours = number.is_some_and(|number| self.members.contains_key(&number))
                || (source.starts_with("/dev/") && self.has_node(Path::new(source)));
            if ours {
                return Some(format!("mounted at {}", mount.point));
            }
        }
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        let mut files = swaps
            .lines()
            .skip(1)
            .filter_map(|l| l.split_whitespace().next());
        files
            .any(|file| self.has_node(Path::new(file)))
            .then(|| "swap is on it".to_owned())
    }

    /// Whether fstab(5), crypttab(5) or the kernel's command line names the disk or something on it. `names` are what the disk
    /// says of itself, `id_path` is udev's name of its place: links of a disk that has just come are not there yet.
    pub fn wanted(&self, names: &BTreeSet<String>, id_path: Option<&str>) -> Option<String> {
        let mut unresolved = Vec::new();
        let mut stacked = false;
        for (place, spec) in configured() {
            let path = match &spec {
                Spec::Path(path) => path,
                Spec::Content { link, .. } => link,
            };
            if path.exists() {
                if self.has_node(path) {
                    return Some(format!("{place} names {}", path.display()));
                }
                // Another disk is it; this one may be a copy.
                continue;
            }
            match spec {
                Spec::Path(path) => match link_of(&path) {
                    Link::Id(link) => {
                        if names
                            .iter()
                            .any(|name| !name.is_empty() && link.contains(name))
                        {
                            return Some(format!("{place} names {}", path.display()));
                        }
                    }
                    Link::Place(link) => {
                        if id_path.is_some_and(|id| link.contains(id)) {
                            return Some(format!("{place} names {}", path.display()));
                        }
                    }
                    Link::Stacked => stacked = true,
                    Link::Name => {}
                },
                Spec::Content {
                    property, value, ..
                } => unresolved.push((place, property, value)),
            }
        }
        if unresolved.is_empty() && !stacked {
            return None;
        }
        for name in self.members.values() {
            let found = match probe(&Path::new("/dev").join(name)) {
                Ok(found) => found,
                Err(reason) => return Some(format!("{name} may be what is waited for: {reason}")),
            };
            for (place, property, value) in &unresolved {
                let here = found.get(*property).map(|text| spec::decoded(text));
                if here.is_some_and(|here| here.eq_ignore_ascii_case(value)) {
                    return Some(format!("{place} names {value}"));
                }
            }
            // Part of something that is not there yet: it could be what is waited for.
            let kind = found.get("ID_FS_USAGE").map_or("", String::as_str);
            if stacked && matches!(kind, "raid" | "crypto") {
                return Some(format!("{name} is part of a stack that is waited for"));
            }
        }
        None
    }
}

enum Link<'a> {
    /// `by-id`: has the disk's own words in it.
    Id(&'a str),
    /// `by-path`.
    Place(&'a str),
    /// A name that device-mapper or md gives.
    Stacked,
    /// A kernel's name, whose node would be there.
    Name,
}

fn link_of(path: &Path) -> Link<'_> {
    let text = path.to_str().unwrap_or_default();
    if let Some(link) = text.strip_prefix("/dev/disk/by-id/") {
        Link::Id(link)
    } else if let Some(link) = text.strip_prefix("/dev/disk/by-path/") {
        Link::Place(link)
    } else if text.starts_with("/dev/md") || text["/dev/".len().min(text.len())..].contains('/') {
        Link::Stacked
    } else {
        Link::Name
    }
}

/// What the machine's own configuration names, and where.
fn configured() -> Vec<(&'static str, Spec)> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let fstab = spec::in_table(&read("/etc/fstab"), 0);
    let crypttab = spec::in_table(&read("/etc/crypttab"), 1);
    let words = spec::in_command_line(&read("/proc/cmdline"));
    let named = |place: &'static str, specs: Vec<Spec>| specs.into_iter().map(move |s| (place, s));
    named("fstab", fstab)
        .chain(named("crypttab", crypttab))
        .chain(named("the kernel's command line", words))
        .collect()
}

/// What blkid(8) finds on a device, by udev's names.
fn probe(node: &Path) -> Result<BTreeMap<String, String>, String> {
    let child = Command::new("blkid")
        .args(["-p", "-o", "udev"])
        .arg(node)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("blkid: {e}"))?;
    // Channel: one answer. Thread: ends with blkid, or with this process, which does not wait for a hung disk; blkid itself then
    // ends when its disk answers.
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let _late = sender.send(child.wait_with_output());
    });
    let out = receiver
        .recv_timeout(PROBE_WITHIN)
        .map_err(|_| format!("blkid took longer than {} s", PROBE_WITHIN.as_secs()))?
        .map_err(|e| format!("blkid: {e}"))?;
    // blkid(8): 2 is "nothing found".
    if !matches!(out.status.code(), Some(0 | 2)) {
        return Err(format!("blkid: {}", out.status));
    }
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    Ok(pairs
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect())
}

fn node_number(path: &Path) -> Option<DeviceNumber> {
    let found = fs::metadata(path).ok()?;
    if !found.file_type().is_block_device() {
        return None;
    }
    Some(DeviceNumber {
        major: u32::try_from(nix::sys::stat::major(found.rdev())).ok()?,
        minor: u32::try_from(nix::sys::stat::minor(found.rdev())).ok()?,
    })
}

/// `MAJOR:MINOR`.
pub fn parse_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.split_once(':')?;
    Some(DeviceNumber {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    })
}

fn name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}
