//! What a process has open, in words: so that who finds one descriptor too many says which.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Outcome;

/// Descriptors that are told one by one.
const TOLD_MAX: usize = 64;

/// The open descriptors of a process and what each leads to; see proc(5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptors(BTreeMap<u32, String>);

impl Descriptors {
    /// Of the process of this id. What is closed while they are read is left out.
    pub fn of(pid: u32) -> Outcome<Descriptors> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let sockets = sockets(&proc);
        let mut all = BTreeMap::new();
        for entry in std::fs::read_dir(proc.join("fd"))?.flatten() {
            let Ok(target) = std::fs::read_link(entry.path()) else {
                continue;
            };
            let mut target = target.to_string_lossy().into_owned();
            let inode = target.strip_prefix("socket:[");
            let inode = inode.and_then(|rest| rest.strip_suffix(']'));
            if let Some(what) = inode.and_then(|inode| sockets.get(inode)) {
                target += &format!(" ({what})");
            }
            all.insert(entry.file_name().to_string_lossy().parse()?, target);
        }
        Ok(Descriptors(all))
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// What leads where more often than `before`, and what all of it is, in words.
    pub fn beside(&self, before: &Descriptors) -> String {
        let was = before.kinds();
        let more: Vec<String> = self
            .kinds()
            .into_iter()
            .map(|(kind, now)| (was.get(&kind).copied().unwrap_or(0), now, kind))
            .filter(|(was, now, _)| now > was)
            .map(|(was, now, kind)| format!("{kind}: {was} -> {now}"))
            .collect();
        let first: Vec<_> = self.0.iter().take(TOLD_MAX).collect();
        format!(
            "more than before: {more:?}; of all {} the first are {first:?}",
            self.count()
        )
    }

    /// How often there is each kind of them: of two sockets, pipes or files of sysfs that differ in numbers alone it is one.
    fn kinds(&self) -> BTreeMap<String, usize> {
        let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
        for target in self.0.values() {
            let kind = target.replace(|c: char| c.is_ascii_digit(), "#");
            *kinds.entry(kind).or_default() += 1;
        }
        kinds
    }
}

/// Of the sockets that the process sees, by their inode's number: the protocol, and the path where there is one.
fn sockets(proc: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    // The column of the inode, from 0.
    for (table, column) in [("unix", 6), ("tcp", 9), ("tcp6", 9), ("netlink", 9)] {
        let lines = std::fs::read_to_string(proc.join("net").join(table)).unwrap_or_default();
        for line in lines.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let Some(inode) = words.get(column) else {
                continue;
            };
            let path = words.get(7).filter(|_| table == "unix");
            let what = path.map_or(table.to_owned(), |path| format!("{table} {path}"));
            all.insert((*inode).to_owned(), what);
        }
    }
    all
}
