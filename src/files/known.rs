//! Which file stands under which watched path, as last seen, and what of it is news. PURE.
//!
//! A file is one disk to the middle, whatever its names: two paths of one inode are two identities of it, so two exports
//! of it meet there. In another format it is another disk, and the locks on the file keep the two apart. Of a path that leads to another file now, the newcomer is told before the one that was there goes:
//! to the middle they are twins for a moment, and what was being served is not replaced by what someone has put in its place
//! until a person confirms it.
//!
//! A file leaves by what was answered, and by nothing else. A look-up that failed (no descriptor left, a server of NFS that lost its handle) says nothing of
//! the file: it is known as before, and in doubt under that path.

use std::collections::BTreeMap;

use crate::correlation::{
    DeviceNode, DeviceNumber, DiskFacts, DiskSeq, Event, FilePaths, Mark, Reading,
};
use crate::identity::Identity;

/// What was found under a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub incarnation: DiskSeq,
    /// Bytes.
    pub size: u64,
    /// When that look-up began.
    pub sized: Mark,
}

/// What a look-up of a path came to; each reason in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    File(Seen),
    /// The path leads to no file that could be served: that much is proven.
    Nothing(String),
    /// This file stands there and is not to be served as it is now. It has not left.
    Barred {
        incarnation: DiskSeq,
        why: String,
    },
    /// The question has no answer; with the file that stands there, where that much was answered.
    Unasked {
        incarnation: Option<DiskSeq>,
        why: String,
    },
}

/// What a path was seen to lead to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    File(DiskSeq),
    /// To no file, and why.
    Nothing(String),
}

/// The watched files.
#[derive(Debug, Default)]
pub struct Known {
    paths: BTreeMap<Identity, Place>,
    files: BTreeMap<DiskSeq, File>,
    numbers: u32,
}

#[derive(Debug)]
struct File {
    number: DeviceNumber,
    size: u64,
    /// When the look-up began that read the size. All that is told of the file is as of then: look-ups of its other paths may have begun before and end after.
    sized: Mark,
    /// When its size was read on what was opened last. What was read before counts no more, so that it is told again what is found.
    opened: Mark,
    /// Its paths, all in one format, never empty; each with the reason why it could not be asked for again.
    paths: BTreeMap<Identity, Option<String>>,
}

/// How a file is no more what a path leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leave {
    /// It is not there.
    Gone,
    /// It is there as far as is known, and not to be served, or not looked at any more.
    Barred,
}

impl Known {
    /// Takes in what stands under `path`, or why nothing does; says what is news in the order in which it is to be told.
    pub fn look(&mut self, path: &Identity, found: Found) -> Vec<Event> {
        let before = match self.paths.get(path) {
            Some(Place::File(file)) => Some(*file),
            Some(Place::Nothing(_)) | None => None,
        };
        match found {
            Found::File(seen) => {
                let mut news: Vec<Event> = self.come(path, &seen).into_iter().collect();
                if let Some(old) = before.filter(|old| *old != seen.incarnation) {
                    news.extend(self.leave(old, path, Leave::Gone));
                }
                self.paths
                    .insert(path.clone(), Place::File(seen.incarnation));
                news
            }
            Found::Nothing(why) => self.nothing(path, before, Leave::Gone, why),
            Found::Barred { incarnation, why } => {
                let how = if before == Some(incarnation) {
                    Leave::Barred
                } else {
                    Leave::Gone
                };
                self.nothing(path, before, how, why)
            }
            Found::Unasked { incarnation, why } => {
                let same = before.filter(|old| incarnation.is_none_or(|found| found == *old));
                match same {
                    Some(file) => self.doubt(file, path, why).into_iter().collect(),
                    None => self.nothing(path, before, Leave::Gone, why),
                }
            }
        }
    }

    /// The size of this file was read on what is open of it.
    pub fn opened(&mut self, file: DiskSeq, mark: Mark) {
        if let Some(file) = self.files.get_mut(&file) {
            file.opened = file.opened.max(mark);
        }
    }

    /// The path is not watched any more. That says nothing of the file: one that was given up stays so.
    pub fn forget(&mut self, path: &Identity) -> Vec<Event> {
        match self.paths.remove(path) {
            Some(Place::File(file)) => self.leave(file, path, Leave::Barred).into_iter().collect(),
            Some(Place::Nothing(_)) | None => Vec::new(),
        }
    }

    /// That nothing stands under the path is news again: it is told when it is looked up next.
    pub fn forget_absence(&mut self, path: &Identity) {
        if let Some(Place::Nothing(_)) = self.paths.get(path) {
            self.paths.remove(path);
        }
    }

    pub fn paths(&self) -> impl Iterator<Item = &Identity> {
        self.paths.keys()
    }

    /// The paths of files that could not be asked for again.
    pub fn doubted(&self) -> impl Iterator<Item = &Identity> {
        let paths = self.files.values().flat_map(|file| &file.paths);
        paths.filter_map(|(path, why)| why.is_some().then_some(path))
    }

    fn come(&mut self, path: &Identity, seen: &Seen) -> Option<Event> {
        let known = self.files.get(&seen.incarnation);
        let same = known.is_some_and(|file| {
            let is_told = file.sized >= file.opened;
            is_told && file.size == seen.size && file.paths.get(path) == Some(&None)
        });
        if same {
            return None;
        }
        let number = match known {
            Some(file) => file.number,
            None => self.next_number(),
        };
        let file = self.files.entry(seen.incarnation).or_insert(File {
            number,
            size: 0,
            sized: Mark::default(),
            opened: Mark::default(),
            paths: BTreeMap::new(),
        });
        if seen.sized >= file.sized {
            (file.size, file.sized) = (seen.size, seen.sized);
        }
        file.paths.insert(path.clone(), None);
        Some(self.seen(seen.incarnation))
    }

    fn nothing(
        &mut self,
        path: &Identity,
        before: Option<DiskSeq>,
        how: Leave,
        why: String,
    ) -> Vec<Event> {
        let left = before.and_then(|file| self.leave(file, path, how));
        let mut news: Vec<Event> = left.into_iter().collect();
        let nothing = Place::Nothing(why.clone());
        if self.paths.insert(path.clone(), nothing.clone()) != Some(nothing) {
            news.push(Event::FileAbsent {
                file: path.clone(),
                reason: why,
            });
        }
        news
    }

    fn doubt(&mut self, file: DiskSeq, path: &Identity, why: String) -> Option<Event> {
        let doubt = self.files.get_mut(&file)?.paths.get_mut(path)?;
        if doubt.as_ref() == Some(&why) {
            return None;
        }
        *doubt = Some(why);
        Some(self.seen(file))
    }

    fn leave(&mut self, file: DiskSeq, path: &Identity, how: Leave) -> Option<Event> {
        let known = self.files.get_mut(&file)?;
        known.paths.remove(path);
        if !known.paths.is_empty() {
            return Some(self.seen(file));
        }
        let File {
            number,
            sized: mark,
            ..
        } = self.files.remove(&file)?;
        Some(match how {
            Leave::Gone => Event::DiskGone {
                mark,
                number,
                diskseq: Some(file),
            },
            Leave::Barred => Event::DiskBarred { mark, number },
        })
    }

    fn seen(&self, incarnation: DiskSeq) -> Event {
        let file = &self.files[&incarnation];
        let first = file.paths.keys().next().and_then(Identity::file);
        let first = first.unwrap_or_default().to_owned();
        Event::DiskSeen {
            mark: file.sized,
            facts: DiskFacts {
                node: DeviceNode(first),
                number: file.number,
                diskseq: incarnation,
                size: file.size,
                // The open finds out.
                read_only: false,
                identities: file.reading(),
                serial: String::new(),
                wwid: String::new(),
                model: "file".to_owned(),
                holders: Vec::new(),
                leaving: false,
            },
        }
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

impl File {
    fn reading(&self) -> Reading {
        let all = self.paths.keys().cloned().collect();
        let unasked: BTreeMap<Identity, String> = self
            .paths
            .iter()
            .filter_map(|(path, why)| Some((path.clone(), why.clone()?)))
            .collect();
        if unasked.is_empty() {
            return Reading::Known(all);
        }
        Reading::Paths(Box::new(FilePaths { all, unasked }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Scheme;

    fn at(path: &str) -> Identity {
        Identity::new(Scheme::File, path)
    }

    fn file(n: u8, size: u64) -> Found {
        read_at(1, n, size)
    }

    fn read_at(mark: u64, n: u8, size: u64) -> Found {
        Found::File(Seen {
            incarnation: DiskSeq::of_file(&[n]),
            size,
            sized: Mark(mark),
        })
    }

    fn none() -> Found {
        Found::Nothing("none".to_owned())
    }

    fn unasked(incarnation: Option<u8>) -> Found {
        Found::Unasked {
            incarnation: incarnation.map(|n| DiskSeq::of_file(&[n])),
            why: "EMFILE".to_owned(),
        }
    }

    fn told(news: &[Event]) -> Vec<String> {
        news.iter()
            .map(|event| match event {
                Event::DiskSeen { facts, .. } => {
                    let identities = facts.identities.read().unwrap();
                    let paths: Vec<&str> = identities.iter().filter_map(Identity::file).collect();
                    let doubt = match &facts.identities {
                        Reading::Paths(paths) => paths
                            .unasked
                            .iter()
                            .map(|(path, why)| format!(", but {}: {why}", path.file().unwrap()))
                            .collect(),
                        _ => String::new(),
                    };
                    format!(
                        "{} is {} bytes at {}{doubt}",
                        name(facts.diskseq),
                        facts.size,
                        paths.join(" ")
                    )
                }
                Event::DiskGone { diskseq, .. } => {
                    format!("{} is gone", diskseq.map_or("?", name))
                }
                Event::DiskBarred { .. } => "barred".to_owned(),
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
        let gone = known.look(&at("/p"), none());
        assert_eq!(told(&gone), ["a is gone", "/p: none"]);
        assert!(known.look(&at("/p"), none()).is_empty());
        known.forget_absence(&at("/p"));
        let again = known.look(&at("/p"), none());
        assert_eq!(told(&again), ["/p: none"], "to who asks anew");
        known.look(&at("/p"), file(b'a', 5));
        known.forget_absence(&at("/p"));
        assert!(known.look(&at("/p"), file(b'a', 5)).is_empty());
    }

    /// A file was made longer while it was being opened. What was read of it before was told as news that came after, and its new clients were cut off.
    #[test]
    fn a_size_is_told_as_of_the_beginning_of_its_look_up_and_again_after_an_open() {
        let mut known = Known::default();
        let marks = |news: &[Event]| -> Vec<u64> {
            let mark = |event: &Event| match event {
                Event::DiskSeen { mark, .. }
                | Event::DiskGone { mark, .. }
                | Event::DiskBarred { mark, .. } => mark.0,
                other => panic!("{other:?}"),
            };
            news.iter().map(mark).collect()
        };
        let a = DiskSeq::of_file(b"a");
        assert_eq!(marks(&known.look(&at("/p"), read_at(3, b'a', 5))), [3]);
        // The look-up of another name began before that one: the file is as long as the later one read.
        let second = known.look(&at("/q"), read_at(2, b'a', 4));
        assert_eq!(told(&second), ["a is 5 bytes at /p /q"]);
        assert_eq!(marks(&second), [3]);
        // 4 is under way, the file is opened.
        known.opened(a, Mark(5));
        let late = known.look(&at("/p"), read_at(4, b'a', 7));
        assert_eq!((told(&late).len(), marks(&late)), (1, vec![4]));
        // Of that nothing counts, so it is told again.
        let again = known.look(&at("/p"), read_at(6, b'a', 7));
        assert_eq!(told(&again), ["a is 7 bytes at /p /q"]);
        assert_eq!(marks(&again), [6]);
        assert!(known.look(&at("/q"), read_at(7, b'a', 7)).is_empty());
        assert_eq!(marks(&known.forget(&at("/p"))), [6]);
        assert_eq!(marks(&known.forget(&at("/q"))), [6]);
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
        assert_eq!(told(&known.forget(&at("/q"))), ["barred"]);
        assert_eq!(known.paths().count(), 0);
    }

    /// For want of a descriptor every file was told to be gone: all clients were cut off, and a file that was given up was opened again.
    #[test]
    fn a_look_up_that_was_not_answered_tells_of_no_file_that_it_is_gone() {
        let mut known = Known::default();
        known.look(&at("/p"), file(b'a', 5));
        for _ in 0..2 {
            known.look(&at("/p"), file(b'a', 5));
            let doubt = told(&known.look(&at("/p"), unasked(None)));
            assert_eq!(doubt, ["a is 5 bytes at /p, but /p: EMFILE"]);
            assert!(known.look(&at("/p"), unasked(Some(b'a'))).is_empty());
            assert_eq!(known.doubted().collect::<Vec<_>>(), [&at("/p")]);
        }
        // The other name is as good as before, and is told when it comes meanwhile.
        let second = told(&known.look(&at("/q"), file(b'a', 5)));
        assert_eq!(second, ["a is 5 bytes at /p /q, but /p: EMFILE"]);
        let again = told(&known.look(&at("/p"), file(b'a', 5)));
        assert_eq!(again, ["a is 5 bytes at /p /q"]);
        assert_eq!(known.doubted().count(), 0);
        // Not asked, and never seen.
        assert_eq!(told(&known.look(&at("/r"), unasked(None))), ["/r: EMFILE"]);
        assert_eq!(known.doubted().count(), 0);
        // What cannot be read is another file, by what was answered.
        known.forget(&at("/q"));
        let other = told(&known.look(&at("/p"), unasked(Some(b'b'))));
        assert_eq!(other, ["a is gone", "/p: EMFILE"]);
    }

    #[test]
    fn a_file_that_is_not_to_be_served_as_it_is_has_not_left() {
        let mut known = Known::default();
        let barred = |n| Found::Barred {
            incarnation: DiskSeq::of_file(&[n]),
            why: "it backs loop0".to_owned(),
        };
        known.look(&at("/p"), file(b'a', 5));
        let news = told(&known.look(&at("/p"), barred(b'a')));
        assert_eq!(news, ["barred", "/p: it backs loop0"]);
        assert!(known.look(&at("/p"), barred(b'a')).is_empty());
        known.look(&at("/p"), file(b'a', 5));
        let news = told(&known.look(&at("/p"), barred(b'b')));
        assert_eq!(news, ["a is gone", "/p: it backs loop0"], "another file");
    }
}
