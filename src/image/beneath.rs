//! Plain files by path: looked up beneath the configured roots, and never anything else. EDGE: reads names and inodes,
//! opens nothing for I/O.
//!
//! A path names one file now and another one later, so what is found comes as a descriptor (`O_PATH`) with the
//! number of its incarnation: which inode of which file system, made when.

use std::ffi::OsString;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::UNIX_EPOCH;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::sys::stat::Mode;

use crate::correlation::{DiskSeq, Inode};
use crate::identity::Format;

/// openat2(2): EAGAIN when a rename elsewhere made the kernel unsure that the path stays beneath. It says to try again.
const LOOK_UPS: usize = 8;

/// Why no file can be served from a path.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("{0}: not beneath any of the file_roots in [server]")]
    Outside(String),
    #[error(
        "{0}: a symbolic link or '..' leads out of the file_roots; give the path that it leads to"
    )]
    LeadsOut(String),
    #[error("{0}: there is no such file or folder")]
    Missing(String),
    #[error("{path}: {kind} is not served, only a regular file")]
    NotAFile { path: String, kind: &'static str },
    #[error("{path}: {source}")]
    Kernel { path: String, source: io::Error },
}

/// The folders beneath which files may be served; none means no file.
#[derive(Debug, Default)]
pub struct Roots(RwLock<Vec<PathBuf>>);

/// What stands under a path.
#[derive(Debug)]
pub struct FoundFile {
    /// Opened with `O_PATH`: fixes the inode, reads nothing.
    pub file: File,
    pub incarnation: DiskSeq,
}

impl Roots {
    pub fn new(roots: Vec<PathBuf>) -> Roots {
        Roots(RwLock::new(roots))
    }

    /// Other folders from now on; what is open stays open.
    pub fn set(&self, roots: Vec<PathBuf>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = roots;
    }

    /// The first of the folders.
    pub fn first(&self) -> Option<String> {
        let roots = self.0.read().unwrap_or_else(PoisonError::into_inner);
        roots.first()?.to_str().map(str::to_owned)
    }

    /// The folder that a path lies beneath, and the rest of the path.
    pub fn split<'a>(&self, path: &'a str) -> Option<(PathBuf, &'a Path)> {
        // The longest root first: a root inside another one is stricter.
        let roots = self.0.read().unwrap_or_else(PoisonError::into_inner);
        roots
            .iter()
            .filter_map(|root| Some((root, Path::new(path).strip_prefix(root).ok()?)))
            .max_by_key(|(root, _)| root.as_os_str().len())
            .map(|(root, below)| (root.clone(), below))
    }

    /// Looks the absolute `path` up, following no link that leads out of its root; what it finds is counted as a file of
    /// `format`. Blocks as its file system does.
    ///
    /// # Errors
    /// Says what stands there instead of a regular file.
    pub fn find(&self, path: &str, format: Format) -> Result<FoundFile, FileError> {
        let (root, below) = self
            .split(path)
            .ok_or_else(|| FileError::Outside(path.to_owned()))?;
        let refused = |source| refused(path, source);
        let root = open_root(&root).map_err(refused)?;
        let file = beneath(&root, below, OFlag::O_PATH).map_err(refused)?;
        let facts = file.metadata().map_err(refused)?;
        if let Some(kind) = other_kind(&facts) {
            let path = path.to_owned();
            return Err(FileError::NotAFile { path, kind });
        }
        Ok(FoundFile {
            incarnation: number(&facts, format),
            file,
        })
    }

    /// Which of the absolute `others`, each of which may be a link, is the file that stands under `path`. Blocks, and asks of no other than has the
    /// name that the file has in its folder: what lies elsewhere can hang.
    ///
    /// # Errors
    /// `path` leads to no file, or it cannot be told which this is.
    pub fn known_as<'a>(
        &self,
        path: &str,
        others: &'a [String],
    ) -> Result<Option<&'a str>, FileError> {
        let place = |file: &File| file.metadata().map(|facts| (facts.dev(), facts.ino()));
        let kernel = |source| refused(path, source);
        let file = self.find(path, Format::Raw)?.file;
        // proc_pid_fd(5): the path that was opened, without the links that led there.
        let own = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let own = own.map_err(kernel)?;
        let this = place(&file).map_err(kernel)?;
        for other in others {
            if Path::new(other.as_str()).file_name() != own.file_name() {
                continue;
            }
            match self.find(other, Format::Raw) {
                Ok(found) if place(&found.file).map_err(kernel)? == this => return Ok(Some(other)),
                Err(error @ FileError::Kernel { .. }) => return Err(error),
                Ok(_) | Err(_) => {}
            }
        }
        Ok(None)
    }

    /// Opens the folder that the absolute `path` would lie in, as [`Roots::find`] looks files up, and gives the last part of the path.
    ///
    /// # Errors
    /// Says what is in the way.
    pub fn folder(&self, path: &str) -> Result<(File, OsString), FileError> {
        let outside = || FileError::Outside(path.to_owned());
        let (root, below) = self.split(path).ok_or_else(outside)?;
        let name = below.file_name().ok_or_else(outside)?.to_owned();
        let parent = match below.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let shown = Path::new(path).parent().map(Path::to_string_lossy);
        let refused = |source| refused(&shown.unwrap_or_default(), source);
        let opened = open_root(&root)
            .and_then(|root| beneath(&root, parent, OFlag::O_RDONLY | OFlag::O_DIRECTORY));
        Ok((opened.map_err(refused)?, name))
    }
}

fn refused(path: &str, source: io::Error) -> FileError {
    let path = path.to_owned();
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => FileError::Missing(path),
        Some(libc::EXDEV | libc::ELOOP) => FileError::LeadsOut(path),
        _ => FileError::Kernel { path, source },
    }
}

fn open_root(root: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(root)
}

/// The incarnation of an opened file of this format.
///
/// # Errors
/// What fstat(2) gives.
pub(super) fn incarnation(file: &File, format: Format) -> io::Result<DiskSeq> {
    Ok(number(&file.metadata()?, format))
}

/// The inode of a file, which may be opened with `O_PATH`.
///
/// # Errors
/// What fstat(2) gives.
pub(super) fn inode(file: &File) -> io::Result<Inode> {
    let facts = file.metadata()?;
    Ok(Inode {
        number: facts.ino(),
        born_ns: born_ns(&facts),
    })
}

fn beneath(folder: &File, path: &Path, flags: OFlag) -> io::Result<File> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let mut tries = 0;
    loop {
        tries += 1;
        match openat2(folder, path, how) {
            Err(Errno::EAGAIN | Errno::EINTR) if tries < LOOK_UPS => {}
            Err(Errno::ENOSYS) => return in_steps(folder, path, flags),
            other => return Ok(File::from(other?)),
        }
    }
}

/// Resolves as openat2(2) does with RESOLVE_BENEATH, where that is not to be had: before Linux 5.6, and under systemd's
/// RestrictSUIDSGID=, whose filter cannot see the flags of an openat2 and answers ENOSYS to each (systemd, src/shared/seccomp-util.c,
/// seccomp_restrict_sxid).
///
/// Each step opens one name in a folder that is held and follows no link; where a link leads is resolved here, and `..` goes back to the
/// folder that was come through, so that a rename elsewhere leads nowhere else.
fn in_steps(root: &File, path: &Path, flags: OFlag) -> io::Result<File> {
    let leads_out = || io::Error::from(Errno::EXDEV);
    let mut held = vec![root.try_clone()?];
    let mut left: Vec<OsString> = parts(path);
    let mut links = 0;
    while let Some(name) = left.pop() {
        if name == ".." {
            held.pop();
        }
        let Some(folder) = held.last() else {
            return Err(leads_out());
        };
        if name == ".." || name == "." {
            continue;
        }
        if name == "/" {
            return Err(leads_out());
        }
        let step = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let found = File::from(openat(folder, name.as_os_str(), step, Mode::empty())?);
        if found.metadata()?.file_type().is_symlink() {
            links += 1;
            if links > LINKS_MAX {
                return Err(Errno::ELOOP.into());
            }
            left.extend(parts(Path::new(&readlinkat(&found, "")?)));
        } else if held.len() < DEPTH_MAX {
            held.push(found);
        } else {
            return Err(Errno::ENAMETOOLONG.into());
        }
    }
    let Some(found) = held.pop() else {
        return Err(leads_out());
    };
    if flags.contains(OFlag::O_PATH) {
        return Ok(found);
    }
    // Only folders are opened otherwise; of anything else the kernel says that it is none.
    let again = openat(&found, ".", flags | OFlag::O_CLOEXEC, Mode::empty())?;
    Ok(File::from(again))
}

/// The parts of a path, the last one first.
fn parts(path: &Path) -> Vec<OsString> {
    let parts = path.components().rev();
    parts.map(|part| part.as_os_str().to_owned()).collect()
}

/// As many as the kernel follows (path_resolution(7)).
const LINKS_MAX: usize = 40;
/// Folders that are held at one time, each by a descriptor; nobody's backups lie so deep.
const DEPTH_MAX: usize = 128;

fn other_kind(facts: &Metadata) -> Option<&'static str> {
    let kind = facts.file_type();
    if kind.is_file() {
        return None;
    }
    Some(if kind.is_dir() {
        "a folder"
    } else if kind.is_block_device() {
        "a block device (name it as a volume)"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "what stands there"
    })
}

/// The same file has the same number in every process: a release that was stored before a restart is known after it. The
/// time of birth tells an inode number that was used again from the file that had it before, where the file system keeps one.
/// What an image holds and the bytes that it is made of are two disks.
fn number(facts: &Metadata, format: Format) -> DiskSeq {
    let mut bytes = Vec::with_capacity(32);
    bytes.extend(facts.dev().to_le_bytes());
    bytes.extend(facts.ino().to_le_bytes());
    bytes.extend(born_ns(facts).to_le_bytes());
    if format != Format::Raw {
        bytes.extend(format.name().as_bytes());
    }
    DiskSeq::of_file(&bytes)
}

/// Nanoseconds since 1970; 0 where the file system does not keep it.
fn born_ns(facts: &Metadata) -> u128 {
    let born = facts.created().ok();
    let since = born.and_then(|born| born.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |since| since.as_nanos())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn found(roots: &Roots, path: &Path) -> Result<DiskSeq, FileError> {
        roots
            .find(path.to_str().unwrap(), Format::Raw)
            .map(|found| found.incarnation)
    }

    /// A link to a complete backup was written through once the backup's file system had another number than when it was finished.
    #[test]
    fn a_file_is_known_by_its_path_through_any_link() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("served");
        std::fs::create_dir_all(root.join("in")).unwrap();
        std::fs::write(root.join("in/a"), b"a").unwrap();
        std::fs::write(root.join("b"), b"b").unwrap();
        symlink("in/a", root.join("latest")).unwrap();
        symlink("in", root.join("folder")).unwrap();
        let text = |path: &str| root.join(path).to_str().unwrap().to_owned();
        let roots = Roots::new(vec![root.clone()]);
        let known = |path: &str, others: &[String]| {
            let found = roots.known_as(&text(path), others).unwrap();
            found.map(str::to_owned)
        };
        let backups = [text("gone/a"), text("in/a")];
        for path in ["in/a", "latest", "folder/a"] {
            assert_eq!(known(path, &backups), Some(text("in/a")), "{path}");
        }
        assert_eq!(known("latest", &[text("folder/a")]), Some(text("folder/a")));
        assert_eq!(known("b", &backups), None);
        assert_eq!(known("in/a", &[text("b"), text("latest")]), None);
        assert!(roots.known_as(&text("gone"), &backups).is_err());
        // One that cannot be looked up may be it: ENAMETOOLONG stands for all that the kernel can say.
        let unknown = [text(&format!("{}/a", "long".repeat(64)))];
        let told = roots.known_as(&text("latest"), &unknown);
        assert!(matches!(told, Err(FileError::Kernel { .. })), "{told:?}");
        assert_eq!(known("b", &unknown), None, "it has another name");
    }

    #[test]
    fn only_regular_files_beneath_a_root_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("served");
        std::fs::create_dir_all(root.join("in")).unwrap();
        std::fs::write(root.join("in/a"), b"a").unwrap();
        std::fs::write(dir.path().join("secret"), b"s").unwrap();
        symlink("in/a", root.join("near")).unwrap();
        symlink("../secret", root.join("far")).unwrap();
        symlink(root.join("in/a"), root.join("absolute")).unwrap();
        symlink("/proc/self/exe", root.join("magic")).unwrap();
        nix::unistd::mkfifo(&root.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
        let roots = Roots::new(vec![root.clone()]);

        let a = found(&roots, &root.join("in/a")).unwrap();
        assert_eq!(found(&roots, &root.join("near")).unwrap(), a);
        for name in ["far", "absolute", "magic"] {
            let refused = found(&roots, &root.join(name));
            assert!(matches!(refused, Err(FileError::LeadsOut(_))), "{name}");
        }
        for name in ["in", "fifo", "socket"] {
            let refused = found(&roots, &root.join(name));
            assert!(matches!(refused, Err(FileError::NotAFile { .. })), "{name}");
        }
        let outside = found(&roots, &dir.path().join("secret"));
        assert!(matches!(outside, Err(FileError::Outside(_))));
        // A name that only begins as the root does.
        let beside = found(&roots, &dir.path().join("served-too"));
        assert!(matches!(beside, Err(FileError::Outside(_))));
        let missing = found(&roots, &root.join("in/b"));
        assert!(matches!(missing, Err(FileError::Missing(_))));
        let none = found(&Roots::default(), &root.join("in/a"));
        assert!(matches!(none, Err(FileError::Outside(_))));
    }

    /// Under systemd's RestrictSUIDSGID= there is no openat2: with the unit that ships no file was served and no image made.
    #[test]
    fn steps_find_and_refuse_what_the_kernel_finds_and_refuses() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("served");
        std::fs::create_dir_all(root.join("in/deep")).unwrap();
        std::fs::write(root.join("in/a"), b"a").unwrap();
        std::fs::write(dir.path().join("secret"), b"s").unwrap();
        for (target, name) in [
            ("in/a", "near"),
            ("../secret", "far"),
            ("in/../../served/in/a", "out_and_back"),
            ("in/deep/../a", "back"),
            ("deep", "in/link"),
            ("..", "in/up"),
            ("/proc/self/exe", "magic"),
            ("loop", "loop"),
            ("missing", "dangling"),
            ("a/", "in/slash"),
        ] {
            symlink(target, root.join(name)).unwrap();
        }
        symlink(root.join("in/a"), root.join("absolute")).unwrap();
        let opened = open_root(&root).unwrap();
        let folder = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let mut agreed = Vec::new();
        for name in [
            "in/a",
            "near",
            "far",
            "out_and_back",
            "back",
            "in/link/../a",
            "in/up/in/a",
            "in/up/near",
            "in/up/..",
            "magic",
            "loop",
            "dangling",
            "absolute",
            "in",
            "in/deep",
            "in/link",
            ".",
            "in/..",
            "..",
            "../served/in/a",
            "in/a/b",
            "none",
            "in/none/a",
            "/in/a",
        ] {
            for flags in [OFlag::O_PATH, folder] {
                let told = |found: io::Result<File>| match found {
                    Ok(file) => Ok(file.metadata().unwrap().ino()),
                    Err(error) => Err(error.raw_os_error()),
                };
                let theirs = told(beneath(&opened, Path::new(name), flags));
                let ours = told(in_steps(&opened, Path::new(name), flags));
                assert_eq!(ours, theirs, "{name} {flags:?}");
                agreed.push(ours.is_ok());
            }
        }
        assert!(agreed.contains(&true) && agreed.contains(&false));
        let deep = "in/../".repeat(1_000) + "in/a";
        assert!(in_steps(&opened, Path::new(&deep), OFlag::O_PATH).is_ok());
        let many = root.join("d/".repeat(200));
        std::fs::create_dir_all(&many).unwrap();
        let error = in_steps(&opened, Path::new(&"d/".repeat(200)), OFlag::O_PATH).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENAMETOOLONG));
    }

    #[test]
    fn a_hard_link_is_the_same_file_and_a_replacement_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, new] = ["a", "b", "new"].map(|name| dir.path().join(name));
        std::fs::write(&a, b"old").unwrap();
        std::fs::hard_link(&a, &b).unwrap();
        std::fs::write(&new, b"new").unwrap();
        let roots = Roots::new(vec![dir.path().to_owned()]);
        let first = found(&roots, &a).unwrap();
        assert_eq!(found(&roots, &b).unwrap(), first);
        assert!(first.is_file());
        std::fs::rename(&new, &a).unwrap();
        assert_ne!(found(&roots, &a).unwrap(), first);
        assert_eq!(found(&roots, &b).unwrap(), first);
    }
}
