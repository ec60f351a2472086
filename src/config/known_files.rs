//! EDGE: nbd-server's configuration read again, without what is as it was: of a file whose facts are those of the last reading, nothing is
//! read or judged anew.
//!
//! The kernel gives a file a new change time with each write, which nobody can set; but its clock for that ticks in milliseconds, on some
//! file systems in seconds. So a file that was read within such a tick of its last change is read once more.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Pace;
use super::files::TOTAL_BYTES_MAX;
use super::ini_files::{included, nothing_at, of_line, says_nothing, source, spend, written_us};
use super::nbd_server::{CommandLine, IniFile, JudgedFile, Part};

/// Longer than the kernel's tick of file times (at most 10 ms).
const TICK: Duration = Duration::from_millis(100);
/// Longer than the tick of a file system that keeps whole seconds (FAT: two).
const COARSE_TICK: Duration = Duration::from_secs(3);

/// What is known of the files as they were read last.
#[derive(Debug, Default)]
pub struct KnownFiles {
    /// The included ones, by their paths' bytes: paths by themselves are compared part by part.
    included: HashMap<OsString, KnownFile>,
    /// There was a main file, so that one that is missing is not one that says nothing.
    had_main: bool,
}

#[derive(Debug)]
struct KnownFile {
    facts: Facts,
    /// It was read longer than a tick after its last change.
    settled: bool,
    file: ReadFile,
}

/// What the kernel says of a file without its content.
#[derive(Debug, PartialEq, Eq)]
struct Facts {
    device: u64,
    inode: u64,
    bytes: u64,
    /// Seconds and nanoseconds since 1970.
    modified: (i64, i64),
    changed: (i64, i64),
}

/// A file that was read, or not, and judged for itself.
#[derive(Debug, Clone)]
pub struct ReadFile {
    pub judged: Arc<JudgedFile>,
    /// When it was last written, in microseconds since 1970; `None` when it could not be read, or is no file.
    pub written_us: Option<u64>,
}

impl Facts {
    fn of(facts: &Metadata) -> Facts {
        Facts {
            device: facts.dev(),
            inode: facts.ino(),
            bytes: facts.len(),
            modified: (facts.mtime(), facts.mtime_nsec()),
            changed: (facts.ctime(), facts.ctime_nsec()),
        }
    }

    /// Its last change was so long before `now` that a later one has another time.
    fn settled_at(&self, now: SystemTime) -> bool {
        let (seconds, nanoseconds) = self.changed;
        let tick = if nanoseconds == 0 { COARSE_TICK } else { TICK };
        let since = u64::try_from(seconds)
            .ok()
            .zip(u32::try_from(nanoseconds).ok());
        let changed = since.map(|(s, ns)| UNIX_EPOCH + Duration::new(s, ns));
        changed.is_some_and(|changed| now.duration_since(changed).is_ok_and(|age| age > tick))
    }
}

impl KnownFiles {
    /// Reads what changed, and gives all files, the main one first; as [`super::read_ini_beside`], but that a main file that was there cannot be
    /// missing. `now` is a time before the call. Blocks as files do: not for the event loop.
    pub fn read_again(
        &mut self,
        main: &Path,
        line: Option<&CommandLine>,
        now: SystemTime,
        pace: &Pace,
    ) -> Vec<ReadFile> {
        let mut left = TOTAL_BYTES_MAX;
        let mut read = Vec::new();
        let (file, part, written_us) = match line.is_some() && !self.had_main && says_nothing(main)
        {
            true => (nothing_at(main), Part::NoMain, None),
            false => {
                let (file, written_us) = taken(main, &mut left);
                (file, Part::Main, written_us)
            }
        };
        self.had_main |= written_us.is_some();
        let listed = included(&file);
        read.push(ReadFile::of(&file, part, written_us));
        let mut before = std::mem::take(&mut self.included);
        match listed {
            Ok(paths) => {
                for path in paths {
                    pace.step();
                    let known = before.remove(path.as_os_str());
                    read.push(self.take(path, known, now, &mut left));
                }
            }
            Err(unlisted) => {
                // Its files may be there again in a moment.
                self.included = before;
                read.push(ReadFile::of(&unlisted, Part::Folder, None));
            }
        }
        read.extend(line.map(|line| ReadFile::of(&of_line(line), Part::Included, None)));
        read
    }

    fn take(
        &mut self,
        path: PathBuf,
        known: Option<KnownFile>,
        now: SystemTime,
        left: &mut u64,
    ) -> ReadFile {
        let same = known.filter(|known| {
            known.settled && fs::metadata(&path).is_ok_and(|facts| Facts::of(&facts) == known.facts)
        });
        if let Some(known) = same
            && spend(known.facts.bytes, left).is_ok()
        {
            let file = known.file.clone();
            self.included.insert(path.into_os_string(), known);
            return file;
        }
        match source(&path, left) {
            Ok(read) => {
                let facts = Facts::of(&read.facts);
                let written_us = Some(written_us(&read.facts));
                let text = Ok(read.text);
                let file = ReadFile::of(
                    &IniFile {
                        path: path.clone(),
                        text,
                    },
                    Part::Included,
                    written_us,
                );
                let settled = facts.settled_at(now);
                let known = KnownFile {
                    facts,
                    settled,
                    file: file.clone(),
                };
                self.included.insert(path.into_os_string(), known);
                file
            }
            Err(message) => {
                let text = Err(message);
                ReadFile::of(&IniFile { path, text }, Part::Included, None)
            }
        }
    }
}

impl ReadFile {
    fn of(file: &IniFile, part: Part, written_us: Option<u64>) -> ReadFile {
        ReadFile {
            judged: Arc::new(JudgedFile::of(file, part)),
            written_us,
        }
    }
}

fn taken(path: &Path, left: &mut u64) -> (IniFile, Option<u64>) {
    let read = source(path, left);
    let written_us = read.as_ref().ok().map(|read| written_us(&read.facts));
    let file = IniFile {
        path: path.to_owned(),
        text: read.map(|read| read.text),
    };
    (file, written_us)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::nbd_server::judge_together;

    /// Some files, and a clock that is far enough ahead for all of them to be settled.
    struct Folder {
        folder: tempfile::TempDir,
        known: KnownFiles,
    }

    impl Folder {
        fn of(names: &[&str]) -> Folder {
            let folder = tempfile::tempdir().unwrap();
            let conf = folder.path().join("conf.d");
            fs::create_dir(&conf).unwrap();
            let main = format!("[generic]\nincludedir = {}\n", conf.display());
            fs::write(folder.path().join("config"), main).unwrap();
            let known = KnownFiles::default();
            let made = Folder { folder, known };
            for name in names {
                made.write(name, "/dev/x");
            }
            made
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(format!("conf.d/{name}.conf"))
        }

        fn write(&self, name: &str, device: &str) {
            let path = self.path(name);
            let changed = || fs::metadata(&path).map(|facts| (facts.ctime(), facts.ctime_nsec()));
            let before = changed().ok();
            // Until the kernel's clock for it has ticked.
            while changed().ok() == before {
                fs::write(&path, format!("[{name}]\nexportname = {device}\n")).unwrap();
            }
        }

        fn read(&mut self, ahead: Duration) -> Vec<ReadFile> {
            let main = self.folder.path().join("config");
            self.known
                .read_again(&main, None, SystemTime::now() + ahead, &Pace::default())
        }
    }

    /// The included files that are the very ones of the reading before.
    fn kept(before: &[ReadFile], after: &[ReadFile]) -> Vec<String> {
        let same = |file: &&ReadFile| before.iter().any(|b| Arc::ptr_eq(&b.judged, &file.judged));
        let names = after.iter().filter(same);
        names
            .map(|file| {
                file.judged
                    .path
                    .file_stem()
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .to_owned()
            })
            .collect()
    }

    const LATER: Duration = Duration::from_secs(60);

    #[test]
    fn what_is_as_it_was_is_not_read_again_and_what_changed_is_whatever_its_times_say() {
        let mut folder = Folder::of(&["a", "b", "c", "d"]);
        let first = folder.read(LATER);
        assert_eq!(kept(&first, &folder.read(LATER)), ["a", "b", "c", "d"]);
        // As long as it was, and with the time that it had.
        let file = fs::File::options()
            .write(true)
            .open(folder.path("a"))
            .unwrap();
        let times = file.metadata().unwrap().modified().unwrap();
        folder.write("a", "/dev/y");
        file.set_modified(times).unwrap();
        // Another file in its place.
        fs::rename(folder.path("b"), folder.folder.path().join("b")).unwrap();
        folder.write("b", "/dev/y");
        fs::remove_file(folder.path("c")).unwrap();
        folder.write("e", "/dev/x");
        let second = folder.read(LATER);
        assert_eq!(kept(&first, &second), ["d"]);
        assert_eq!(second[1].written_us, first[1].written_us);
        let judged = judge_together(second.iter().map(|file| &*file.judged), &Default::default());
        let served: Vec<_> = judged
            .sections
            .iter()
            .map(|(name, section)| format!("{name} {:?}", section.backing))
            .collect();
        assert_eq!(
            served,
            [
                "a Device(\"/dev/y\")",
                "b Device(\"/dev/y\")",
                "d Device(\"/dev/x\")",
                "e Device(\"/dev/x\")"
            ]
        );
    }

    #[test]
    fn a_file_that_was_read_in_the_moment_of_its_change_is_read_once_more() {
        let mut folder = Folder::of(&["a"]);
        let first = folder.read(Duration::ZERO);
        let second = folder.read(LATER);
        assert!(kept(&first, &second).is_empty());
        assert_eq!(kept(&second, &folder.read(LATER)), ["a"]);
        let at = |nanoseconds: i64, age_ms: u64| {
            let facts = Facts {
                device: 1,
                inode: 1,
                bytes: 1,
                modified: (0, 0),
                changed: (1_000, nanoseconds),
            };
            facts
                .settled_at(UNIX_EPOCH + Duration::from_secs(1_000) + Duration::from_millis(age_ms))
        };
        assert!(at(1, 200) && !at(1, 90));
        assert!(at(0, 3_200) && !at(0, 2_500), "whole seconds");
        assert!(!at(900_000_000, 100), "it changes in what is still to come");
    }

    #[test]
    fn what_cannot_be_read_is_told_each_time_and_what_comes_back_is_read() {
        let mut folder = Folder::of(&["a", "b"]);
        let first = folder.read(LATER);
        let first = judge_together(first.iter().map(|file| &*file.judged), &Default::default());
        let b = folder.path("b");
        // What is listed and cannot be read, as one that vanishes between the two.
        let gone = |path: &Path| std::os::unix::fs::symlink("/nowhere/at/all", path);
        let fifo = |path: &Path| {
            let mode = nix::sys::stat::Mode::S_IRUSR;
            nix::unistd::mkfifo(path, mode).map_err(std::io::Error::from)
        };
        let empty = |path: &Path| fs::write(path, "");
        type Make = fn(&Path) -> std::io::Result<()>;
        let broken: [(Make, &str); 3] = [
            (empty, "the file is empty"),
            (gone, "No such file"),
            (fifo, "not a regular file"),
        ];
        for (make, says) in broken {
            fs::remove_file(&b).unwrap();
            make(&b).unwrap();
            for _ in 0..2 {
                let read = folder.read(LATER);
                let judged = judge_together(read.iter().map(|file| &*file.judged), &first.sections);
                let told = judged.problems[0].to_string();
                assert!(judged.unread && told.contains(says), "{told}");
                assert!(told.contains("b.conf:1:1"), "{told}");
                assert_eq!(judged.sections, first.sections);
            }
        }
        fs::remove_file(&b).unwrap();
        folder.write("b", "/dev/z");
        let before = folder.read(LATER);
        let (conf, aside) = (
            folder.folder.path().join("conf.d"),
            folder.folder.path().join("aside"),
        );
        fs::rename(&conf, &aside).unwrap();
        let unlisted = folder.read(LATER);
        assert_eq!(unlisted.len(), 2);
        assert!(unlisted[1].written_us.is_none());
        fs::rename(&aside, &conf).unwrap();
        assert_eq!(kept(&before, &folder.read(LATER)), ["a", "b"]);
    }

    /// What was included from elsewhere went with the name of its folder, and with the file that has it.
    #[test]
    fn a_folder_or_a_main_file_that_is_not_there_takes_nothing_along() {
        let mut folder = Folder::of(&["a", "b"]);
        let main = folder.folder.path().join("config");
        let line = CommandLine::new("1234", "/dev/line", false, None, None).unwrap();
        let mut read = |last: &_| {
            let now = SystemTime::now() + LATER;
            let pace = Pace::default();
            let read = folder.known.read_again(&main, Some(&line), now, &pace);
            judge_together(read.iter().map(|file| &*file.judged), last)
        };
        let names = |judged: &super::super::nbd_server::Judged| {
            let names = judged.sections.keys().map(String::as_str);
            names.collect::<Vec<_>>().join(" ")
        };
        let text = fs::read_to_string(&main).unwrap();
        fs::write(&main, format!("{text}[here]\nexportname = /dev/here\n")).unwrap();
        let first = read(&Default::default());
        assert_eq!(names(&first), "a b default here");
        // Mistyped, and with a section of its own taken out, which is meant.
        fs::write(&main, text.replace("conf.d", "conf.b")).unwrap();
        let mistyped = read(&first.sections);
        assert_eq!(names(&mistyped), "a b default");
        assert!(mistyped.unread && mistyped.problems[0].message.contains("includedir"));
        fs::write(&main, &text).unwrap();
        assert_eq!(names(&read(&mistyped.sections)), "a b default");
        // An editor has it for a moment.
        let aside = main.with_extension("aside");
        fs::rename(&main, &aside).unwrap();
        let missing = read(&first.sections);
        assert!(missing.generic.is_none(), "everything stays as it was");
        assert!(missing.problems[0].message.contains("No such file"));
        fs::rename(&aside, &main).unwrap();
        assert_eq!(names(&read(&first.sections)), "a b default");
        // Where there never was one, there is none.
        fs::remove_file(&main).unwrap();
        folder.known = KnownFiles::default();
        let now = SystemTime::now() + LATER;
        let none = folder
            .known
            .read_again(&main, Some(&line), now, &Pace::default());
        let judged = judge_together(none.iter().map(|file| &*file.judged), &Default::default());
        assert_eq!(names(&judged), "default");
        assert!(
            judged.unread && judged.problems.is_empty(),
            "what a main file would say is not known, and is no fault"
        );
    }
}
