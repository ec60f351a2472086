//! A new file before it has its name, so that none is half made under one. EDGE.
//!
//! It has no name at all where the file system has such files (`O_TMPFILE`, open(2)): a crash leaves nothing. Elsewhere, as on NFS, it has one of
//! its own, `.NAME.nbdtrack-new`, and is locked for as long as its maker lives: what a crash left there is known by that, and is taken away by the
//! next who makes or deletes a file in the folder.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use super::lock;

const ENDS: &[u8] = b".nbdtrack-new";
/// Whoever takes an abandoned file away can have ours for abandoned in the moment between its making and its lock.
const TRIES: usize = 64;

/// What is left of a file that was not to be.
#[derive(Debug, thiserror::Error)]
pub enum Left {
    #[error("the file is taken away again; should a power loss bring it back, remove it ({0})")]
    Perhaps(#[source] io::Error),
    #[error(
        "the file may be there, for it cannot be taken away again ({0}): remove it before it is made anew"
    )]
    There(#[source] io::Error),
}

/// A new file of ours, with the folder that it is in.
pub(super) struct Nameless<'a> {
    pub file: File,
    folder: &'a File,
    temporary: Option<OsString>,
}

impl Nameless<'_> {
    /// An empty one in `folder`, which is to have `name` there.
    pub fn make<'a>(folder: &'a File, name: &OsStr) -> io::Result<Nameless<'a>> {
        // What is on the disk of a VM is for whoever may read that disk.
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
        match openat(folder, ".", flags | OFlag::O_TMPFILE, mode) {
            Ok(file) => Ok(Nameless {
                file: File::from(file),
                folder,
                temporary: None,
            }),
            // open(2), O_TMPFILE: EOPNOTSUPP of file systems, EISDIR and ENOENT of kernels without it.
            Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::ENOENT | Errno::EINVAL) => {
                named(folder, name)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Gives it its name, unless something has it.
    pub fn place(&self, name: &OsStr) -> io::Result<()> {
        let Some(temporary) = self.temporary.as_deref() else {
            let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let follow = AtFlags::AT_SYMLINK_FOLLOW;
            return Ok(linkat(AT_FDCWD, own.as_str(), self.folder, name, follow)?);
        };
        if !has_name(self.folder, temporary, &self.file)? {
            return Err(io::Error::other(format!(
                "another file stands at {} by now",
                temporary.to_string_lossy()
            )));
        }
        let once = RenameFlags::RENAME_NOREPLACE;
        match renameat2(self.folder, temporary, self.folder, name, once) {
            // rename(2): EINVAL of file systems that cannot do that. A link does not replace either.
            Err(Errno::EINVAL | Errno::ENOSYS) => {
                linkat(self.folder, temporary, self.folder, name, AtFlags::empty())?;
                Ok(unlinkat(
                    self.folder,
                    temporary,
                    UnlinkatFlags::NoRemoveDir,
                )?)
            }
            done => Ok(done?),
        }
    }

    /// Takes it away before it has its name.
    pub fn discard(&self) {
        if let Some(temporary) = &self.temporary {
            // Where it cannot be removed now, the next sweep does.
            let _left = self.unlink(temporary);
        }
    }

    /// Takes it away again, with the name that it may have been given; what has that name and is another stays.
    ///
    /// # Errors
    /// [`Left`]
    pub fn take_back(&self, name: &OsStr) -> Result<(), Left> {
        self.discard();
        match self.unlink(name) {
            Ok(false) => Ok(()),
            Ok(true) => self.folder.sync_all().map_err(Left::Perhaps),
            Err(error) => Err(Left::There(error)),
        }
    }

    /// Whether it had this name, which it has no more.
    fn unlink(&self, name: &OsStr) -> io::Result<bool> {
        let has_it = match has_name(self.folder, name, &self.file) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => false,
            has_it => has_it?,
        };
        if has_it {
            unlinkat(self.folder, name, UnlinkatFlags::NoRemoveDir)?;
        }
        Ok(has_it)
    }
}

fn named<'a>(folder: &'a File, name: &OsStr) -> io::Result<Nameless<'a>> {
    sweep(folder);
    let mut temporary = b".".to_vec();
    temporary.extend_from_slice(name.as_bytes());
    temporary.extend_from_slice(ENDS);
    let temporary = OsString::from_vec(temporary);
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_CREAT | OFlag::O_EXCL;
    for _ in 0..TRIES {
        let file = match openat(folder, temporary.as_os_str(), flags, mode) {
            // Whoever sweeps may hold the one that we have just lost for a moment yet.
            Err(Errno::EEXIST) => {
                std::thread::yield_now();
                continue;
            }
            file => File::from(file?),
        };
        match lock::for_its_maker(&file) {
            Ok(true) if file.metadata()?.nlink() > 0 => {}
            // Someone sweeps it away.
            Ok(_) => continue,
            // No one who asks gets a lock here, so no one takes it away.
            Err(_) => {}
        }
        return Ok(Nameless {
            file,
            folder,
            temporary: Some(temporary),
        });
    }
    Err(io::Error::new(
        io::ErrorKind::ResourceBusy,
        format!(
            "{} is being made beside it, or was left there by a crash on a file system without locks: then remove it",
            temporary.to_string_lossy()
        ),
    ))
}

/// Takes away what makers that are no more left in `folder` under names of ours. What cannot be looked at or removed stays: it is in nobody's way.
pub(super) fn sweep(folder: &File) {
    let own = format!("/proc/self/fd/{}", folder.as_raw_fd());
    let Ok(entries) = std::fs::read_dir(own) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let bytes = name.as_bytes();
        if bytes.first() == Some(&b'.') && bytes.ends_with(ENDS) {
            let found = found(folder, &name);
            let _stays = found.and_then(|file| take_away(folder, &name, &file));
        }
    }
}

/// What has a name of ours in `folder`.
fn found(folder: &File, name: &OsStr) -> io::Result<File> {
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    Ok(File::from(openat(folder, name, flags, Mode::empty())?))
}

/// Takes away what was found under `name`, if its maker is gone and it is what has the name still.
fn take_away(folder: &File, name: &OsStr, found: &File) -> io::Result<()> {
    if !found.metadata()?.is_file() || !lock::for_its_maker(found)? {
        return Ok(());
    }
    // Locked by us: its maker is gone, and no one else removes it. What was so before the lock may be so no more: its maker gave it its name, or
    // another one took it away and makes a file under this name now. One that has two names has got its own by a link, and is somebody's.
    if found.metadata()?.nlink() == 1 && has_name(folder, name, found)? {
        unlinkat(folder, name, UnlinkatFlags::NoRemoveDir)?;
        tracing::info!(
            name = %name.to_string_lossy(),
            "a file that was being made when its maker ended is removed"
        );
    }
    Ok(())
}

/// Whether `name` in `folder` is this file, and no link to it.
pub(super) fn has_name(folder: &File, name: &OsStr, file: &File) -> io::Result<bool> {
    let named = fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let facts = file.metadata()?;
    Ok((named.st_dev, named.st_ino) == (facts.dev(), facts.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &std::path::Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn a_name_that_someone_took_meanwhile_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let folder = File::open(dir.path()).unwrap();
        std::fs::write(dir.path().join("a"), b"theirs").unwrap();
        let name = OsStr::new("a");
        let unnamed = Nameless::make(&folder, name).unwrap();
        let placed = unnamed.place(name).unwrap_err();
        assert_eq!(placed.raw_os_error(), Some(libc::EEXIST));
        // As where there are no files without a name.
        let ours = named(&folder, name).unwrap();
        let placed = ours.place(name).unwrap_err();
        assert_eq!(placed.raw_os_error(), Some(libc::EEXIST));
        assert_eq!(std::fs::read(dir.path().join("a")).unwrap(), b"theirs");
        ours.place(OsStr::new("b")).unwrap();
        assert_eq!(names(dir.path()).len(), 2, "{:?}", names(dir.path()));
    }

    /// What a kill left on a file system without O_TMPFILE stayed for ever; and where the next daemon had the same process id, as in a
    /// container, no file of that name could be made any more.
    #[test]
    fn what_a_maker_that_is_gone_left_is_in_nobodys_way_and_goes_and_what_is_being_made_stays() {
        let dir = tempfile::tempdir().unwrap();
        let folder = File::open(dir.path()).unwrap();
        for name in [
            ".a.nbdtrack-new",
            ".b.nbdtrack-new",
            ".c.new",
            "nbdtrack-new",
        ] {
            std::fs::write(dir.path().join(name), b"x").unwrap();
        }
        let being_made = named(&folder, OsStr::new("a")).unwrap();
        let mut left = names(dir.path());
        left.sort();
        assert_eq!(left, [".a.nbdtrack-new", ".c.new", "nbdtrack-new"]);
        sweep(&folder);
        let other = named(&folder, OsStr::new("a")).err().unwrap().to_string();
        assert!(other.contains("is being made"), "{other}");
        being_made.place(OsStr::new("a")).unwrap();
        drop(being_made);
        sweep(&folder);
        assert!(dir.path().join("a").exists());
        named(&folder, OsStr::new("d")).unwrap().discard();
        assert!(!dir.path().join(".d.nbdtrack-new").exists());
    }

    /// Whoever swept looked first and locked then: what it had found was taken away meanwhile, and under that name it removed what another made.
    #[test]
    fn a_sweep_that_comes_late_takes_nothing_that_another_makes_under_the_same_name() {
        let dir = tempfile::tempdir().unwrap();
        let folder = File::open(dir.path()).unwrap();
        let (name, temporary) = (OsStr::new("a"), OsStr::new(".a.nbdtrack-new"));
        std::fs::write(dir.path().join(temporary), b"left").unwrap();
        let late = found(&folder, temporary).unwrap();
        let ours = named(&folder, name).unwrap();
        take_away(&folder, temporary, &late).unwrap();
        assert_eq!(names(dir.path()), [".a.nbdtrack-new"]);
        // And where the one that it found has got its own name meanwhile, and its maker has done with it.
        drop(late);
        let late = found(&folder, temporary).unwrap();
        ours.place(name).unwrap();
        drop(ours);
        let next = named(&folder, name).unwrap();
        take_away(&folder, temporary, &late).unwrap();
        let mut left = names(dir.path());
        left.sort();
        assert_eq!(left, [".a.nbdtrack-new", "a"]);
        // What is not its own any more is neither named nor removed.
        std::fs::remove_file(dir.path().join(temporary)).unwrap();
        std::fs::write(dir.path().join(temporary), b"another's").unwrap();
        assert!(next.place(OsStr::new("b")).is_err());
        next.take_back(OsStr::new("b")).unwrap();
        assert_eq!(
            std::fs::read(dir.path().join(temporary)).unwrap(),
            b"another's"
        );
    }

    /// Of makers that came at once after a crash, each swept what the other had begun.
    #[test]
    fn makers_that_come_at_once_after_a_crash_all_make_their_own() {
        const MAKERS: usize = 8;
        for turn in 0..40 {
            let dir = tempfile::tempdir().unwrap();
            for n in 0..MAKERS {
                let left = dir.path().join(format!(".f{n}.nbdtrack-new"));
                std::fs::write(left, b"left").unwrap();
            }
            let start = std::sync::Barrier::new(MAKERS);
            std::thread::scope(|threads| {
                for n in 0..MAKERS {
                    let (path, start) = (dir.path(), &start);
                    threads.spawn(move || {
                        let folder = File::open(path).unwrap();
                        let name = format!("f{n}");
                        start.wait();
                        // Who sweeps can hold the name for longer than is tried.
                        let ours = loop {
                            match named(&folder, OsStr::new(&name)) {
                                Ok(ours) => break ours,
                                Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {}
                                Err(error) => unreachable!("{error}"),
                            }
                        };
                        std::fs::write(path.join(format!(".{name}.nbdtrack-new")), &name).unwrap();
                        ours.place(OsStr::new(&name)).unwrap();
                    });
                }
            });
            let mut left = names(dir.path());
            left.sort();
            let all: Vec<String> = (0..MAKERS).map(|n| format!("f{n}")).collect();
            assert_eq!(left, all, "turn {turn}");
            for name in all {
                let text = std::fs::read_to_string(dir.path().join(&name)).unwrap();
                assert_eq!(text, name);
            }
        }
    }
}
