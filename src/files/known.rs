//! Which file stands under which watched path, as last seen, and what of it is news. PURE.
//!
//! A file is one disk to the middle, whatever its names: two paths of one inode are two identities of it, so two exports
//! of it meet there. In another format it is another disk, and the locks on the file keep the two apart. Of a path that leads to another file now, the newcomer is told before the one that was there goes:
//! to the middle they are twins for a moment, and what was being served is not replaced by what someone has put in its place
//! until a person confirms it.

use std::collections::{BTreeMap, BTreeSet};

use crate::correlation::{DeviceNode, DeviceNumber, DiskFacts, DiskSeq, Event, Mark, Reading};
use crate::identity::Identity;

/// What was found under a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub incarnation: DiskSeq,
    /// Bytes.
    pub size: u64,
}

/// The watched files.
#[derive(Debug, Default)]
pub struct Known {
    paths: BTreeMap<Identity, Result<DiskSeq, String>>,
    files: BTreeMap<DiskSeq, File>,
    marks: u64,
    numbers: u32,
}

#[derive(Debug)]
struct File {
    number: DeviceNumber,
    size: u64,
    /// Its paths, all in one format; never empty.
    paths: BTreeSet<Identity>,
}

impl Known {
    /// Takes in what stands under `path`, or why nothing does; says what is news in the order in which it is to be told.
    pub fn look(&mut self, path: &Identity, found: Result<Seen, String>) -> Vec<Event> {
        let before = self.paths.get(path).cloned();
        let mut news = Vec::new();
        if let Ok(seen) = &found {
            let known = self.files.get(&seen.incarnation);
            let same =
                known.is_some_and(|file| file.size == seen.size && file.paths.contains(path));
            if !same {
                let number = match known {
                    Some(file) => file.number,
                    None => self.next_number(),
                };
                let file = self.files.entry(seen.incarnation).or_insert(File {
                    number,
                    size: 0,
                    paths: BTreeSet::new(),
                });
                file.size = seen.size;
                file.paths.insert(path.clone());
                news.push(self.seen(seen.incarnation));
            }
        }
        if let Some(Ok(old)) = &before
            && found.as_ref().ok().map(|seen| seen.incarnation) != Some(*old)
        {
            news.extend(self.leave(*old, path));
        }
        if let Err(reason) = &found
            && before != Some(Err(reason.clone()))
        {
            news.push(Event::FileAbsent {
                file: path.clone(),
                reason: reason.clone(),
            });
        }
        self.paths
            .insert(path.clone(), found.map(|seen| seen.incarnation));
        news
    }

    /// The path is not watched any more.
    pub fn forget(&mut self, path: &Identity) -> Vec<Event> {
        match self.paths.remove(path) {
            Some(Ok(file)) => self.leave(file, path).into_iter().collect(),
            Some(Err(_)) | None => Vec::new(),
        }
    }

    /// That nothing stands under the path is news again: it is told when it is looked up next.
    pub fn forget_absence(&mut self, path: &Identity) {
        if let Some(Err(_)) = self.paths.get(path) {
            self.paths.remove(path);
        }
    }

    pub fn paths(&self) -> impl Iterator<Item = &Identity> {
        self.paths.keys()
    }

    fn leave(&mut self, file: DiskSeq, path: &Identity) -> Option<Event> {
        let known = self.files.get_mut(&file)?;
        known.paths.remove(path);
        if !known.paths.is_empty() {
            return Some(self.seen(file));
        }
        let known = self.files.remove(&file)?;
        Some(Event::DiskGone {
            mark: self.mark(),
            number: known.number,
            diskseq: Some(file),
        })
    }

    fn seen(&mut self, incarnation: DiskSeq) -> Event {
        let mark = self.mark();
        let file = &self.files[&incarnation];
        let first = file.paths.first().and_then(Identity::file);
        let first = first.unwrap_or_default().to_owned();
        Event::DiskSeen {
            mark,
            facts: DiskFacts {
                node: DeviceNode(first),
                number: file.number,
                diskseq: incarnation,
                size: file.size,
                // The open finds out.
                read_only: false,
                identities: Reading::Known(file.paths.clone()),
                serial: String::new(),
                wwid: String::new(),
                model: "file".to_owned(),
                holders: Vec::new(),
                leaving: false,
            },
        }
    }

    fn mark(&mut self) -> Mark {
        self.marks += 1;
        Mark(self.marks)
    }

    fn next_number(&mut self) -> DeviceNumber {
        // They begin again after 2^32 files; one that is still in use is passed over.
        loop {
            self.numbers = self.numbers.wrapping_add(1);
            let number = DeviceNumber::of_file(self.numbers);
            if self.files.values().all(|file| file.number != number) {
                return number;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Scheme;

    fn at(path: &str) -> Identity {
        Identity::new(Scheme::File, path)
    }

    fn file(n: u8, size: u64) -> Result<Seen, String> {
        let incarnation = DiskSeq::of_file(&[n]);
        Ok(Seen { incarnation, size })
    }

    fn told(news: &[Event]) -> Vec<String> {
        news.iter()
            .map(|event| match event {
                Event::DiskSeen { facts, .. } => {
                    let Reading::Known(identities) = &facts.identities else {
                        return "unread".to_owned();
                    };
                    let paths: Vec<&str> = identities.iter().filter_map(Identity::file).collect();
                    format!(
                        "{} is {} bytes at {}",
                        name(facts.diskseq),
                        facts.size,
                        paths.join(" ")
                    )
                }
                Event::DiskGone { diskseq, .. } => {
                    format!("{} is gone", diskseq.map_or("?", name))
                }
                Event::FileAbsent { file, reason } => {
                    format!("{}: {reason}", file.file().unwrap_or("?"))
                }
                other => format!("{other:?}"),
            })
            .collect()
    }

    fn name(diskseq: DiskSeq) -> &'static str {
        match diskseq {
            a if a == DiskSeq::of_file(b"a") => "a",
            b if b == DiskSeq::of_file(b"b") => "b",
            _ => "?",
        }
    }

    #[test]
    fn only_news_is_told() {
        let mut known = Known::default();
        assert_eq!(
            told(&known.look(&at("/p"), file(b'a', 5))),
            ["a is 5 bytes at /p"]
        );
        assert!(known.look(&at("/p"), file(b'a', 5)).is_empty());
        assert_eq!(
            told(&known.look(&at("/p"), file(b'a', 9))),
            ["a is 9 bytes at /p"]
        );
        let gone = known.look(&at("/p"), Err("none".to_owned()));
        assert_eq!(told(&gone), ["a is gone", "/p: none"]);
        assert!(known.look(&at("/p"), Err("none".to_owned())).is_empty());
        known.forget_absence(&at("/p"));
        let again = known.look(&at("/p"), Err("none".to_owned()));
        assert_eq!(told(&again), ["/p: none"], "to who asks anew");
        known.look(&at("/p"), file(b'a', 5));
        known.forget_absence(&at("/p"));
        assert!(known.look(&at("/p"), file(b'a', 5)).is_empty());
    }

    #[test]
    fn a_replacement_is_told_before_the_one_that_it_replaces_goes() {
        let mut known = Known::default();
        known.look(&at("/p"), file(b'a', 5));
        let news = told(&known.look(&at("/p"), file(b'b', 5)));
        assert_eq!(news, ["b is 5 bytes at /p", "a is gone"]);
    }

    #[test]
    fn two_names_of_one_file_are_one_disk_with_two_identities() {
        let mut known = Known::default();
        known.look(&at("/p"), file(b'a', 5));
        let second = told(&known.look(&at("/q"), file(b'a', 5)));
        assert_eq!(second, ["a is 5 bytes at /p /q"]);
        assert_eq!(told(&known.forget(&at("/p"))), ["a is 5 bytes at /q"]);
        assert_eq!(told(&known.forget(&at("/q"))), ["a is gone"]);
        assert_eq!(known.paths().count(), 0);
    }
}
