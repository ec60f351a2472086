//! Whether a backup that nothing writes to any more is sound, and what is in it. EDGE: reads all of it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};

use super::beneath::{self, FileError, Roots};
use super::lock::{self, Use};
use super::qcow2::check::{self, CheckError};
use super::qcow2::{self, ReadError};
use crate::correlation::{Inode, Proof};
use crate::identity::Format;

/// Bytes that are read at a time.
const PIECE: usize = 1 << 20;

/// Why a file is no backup.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("{0}")]
    File(#[from] FileError),
    #[error("{path}: in use: {by}")]
    Busy { path: String, by: String },
    /// It will not become one either.
    #[error("{path}: {errors} errors are in it; see: nbdtrack image check {path}")]
    Damaged { path: String, errors: u64 },
    #[error("{path}: {source}")]
    Check {
        path: String,
        #[source]
        source: CheckError,
    },
    #[error("{path}: {source}")]
    Read {
        path: String,
        #[source]
        source: ReadError,
    },
    /// Another file, or another image in it.
    #[error("{path}: it is not what was begun: {found}")]
    Other { path: String, found: String },
    #[error("{path}: it changed while it was read")]
    Changed { path: String },
    /// What was read is not what a later open by that path would find.
    #[error(
        "{path}: another file was put there while it was read, and nothing is known of that one"
    )]
    Replaced { path: String },
    #[error("{path}: {source}")]
    Kernel {
        path: String,
        #[source]
        source: io::Error,
    },
}

/// A sound backup. No one writes to its file while this is held.
pub struct Verified {
    pub proof: Proof,
    _held: File,
}

/// What a file has to be, before all of it is read: how long that takes is what the file says.
#[derive(Debug, Clone, Copy)]
pub enum Expected<'a> {
    Begun(&'a Begun),
    /// Its virtual size, in bytes.
    Size(u64),
}

/// What the file of a backup was begun as.
#[derive(Debug, Clone)]
pub struct Begun {
    /// Virtual, in bytes.
    pub size: u64,
    /// The absolute path of what it lies on.
    pub beneath: Option<String>,
    /// `None` where that is not known any more.
    pub made: Option<Inode>,
}

/// Makes the image at the absolute `path` durable, checks it, and reads all that is in it, where it is as `expected`; `progress` is told the share that is
/// done, from 0 to 1, and says whether to go on. Blocks for as long as that takes.
///
/// # Errors
/// [`VerifyError`]
pub fn verify(
    path: &str,
    roots: &Roots,
    expected: Expected<'_>,
    progress: &mut dyn FnMut(f64) -> bool,
) -> Result<Verified, VerifyError> {
    let kernel = |source| VerifyError::Kernel {
        path: path.to_owned(),
        source,
    };
    let found = roots.find(path, Format::Qcow2)?;
    let own = format!("/proc/self/fd/{}", found.file.as_raw_fd());
    let file = File::open(own).map_err(kernel)?;
    // Neither an export nor QEMU writes to it while this is held.
    lock::take(&file, path, Use::Read, None).map_err(|by| VerifyError::Busy {
        path: path.to_owned(),
        by,
    })?;
    file.sync_all().map_err(kernel)?;
    let before = stamp(&file).map_err(kernel)?;
    is_as_expected(&file, path, roots, expected)?;
    let checked = check::check(&file, &mut |share| progress(share * 0.1));
    let findings = checked.map_err(|source| VerifyError::Check {
        path: path.to_owned(),
        source,
    })?;
    if findings.errors > 0 {
        return Err(VerifyError::Damaged {
            path: path.to_owned(),
            errors: findings.errors,
        });
    }
    let mut digest = Sha256::new();
    let reading = file.try_clone().map_err(kernel)?;
    qcow2::read_all(reading, path, roots, PIECE, &mut |bytes, share| {
        digest.update(bytes);
        progress(0.1 + share * 0.9)
    })
    .map_err(|source| VerifyError::Read {
        path: path.to_owned(),
        source,
    })?;
    if stamp(&file).map_err(kernel)? != before {
        return Err(VerifyError::Changed {
            path: path.to_owned(),
        });
    }
    // What is said from here on is said of the path, and read was a file that had it when this began.
    let named = roots.find(path, Format::Qcow2)?;
    if named.incarnation != beneath::incarnation(&file, Format::Qcow2).map_err(kernel)? {
        return Err(VerifyError::Replaced {
            path: path.to_owned(),
        });
    }
    let (file_bytes, modified_ns) = before;
    let sha256 = digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let incarnation = |format| beneath::incarnation(&file, format).map_err(kernel);
    let proof = Proof {
        sha256,
        file_bytes,
        modified_ns,
        incarnations: [incarnation(Format::Raw)?, incarnation(Format::Qcow2)?],
    };
    Ok(Verified { proof, _held: file })
}

/// Holds the file against what it has to be, by what its header says; what it reads as is not asked.
fn is_as_expected(
    file: &File,
    path: &str,
    roots: &Roots,
    expected: Expected<'_>,
) -> Result<(), VerifyError> {
    let kernel = |source| VerifyError::Kernel {
        path: path.to_owned(),
        source,
    };
    let other = |found: String| {
        let path = path.to_owned();
        Err(VerifyError::Other { path, found })
    };
    let size = match expected {
        Expected::Begun(begun) => begun.size,
        Expected::Size(size) => size,
    };
    if let Expected::Begun(Begun {
        made: Some(made), ..
    }) = expected
        && *made != beneath::inode(file).map_err(kernel)?
    {
        return other("another file stands there now".to_owned());
    }
    let read = |source| VerifyError::Read {
        path: path.to_owned(),
        source,
    };
    let header = qcow2::describe_header(file).map_err(kernel)?;
    let header = header.map_err(|refusal| read(refusal.into()))?;
    if header.size != size {
        return other(format!("{} bytes, and not {size}", header.size));
    }
    let Expected::Begun(begun) = expected else {
        return Ok(());
    };
    let on = qcow2::backing_path(&header, path).map_err(|error| read(error.into()))?;
    match (&on, &begun.beneath) {
        (None, None) => Ok(()),
        (Some((on, Format::Qcow2)), Some(begun)) => {
            let found = roots.find(on, Format::Qcow2)?.incarnation;
            if found == roots.find(begun, Format::Qcow2)?.incarnation {
                return Ok(());
            }
            other(format!("it lies on {on}, and not on {begun}"))
        }
        (Some((on, _)), _) => other(format!("it lies on {on}")),
        (None, Some(begun)) => other(format!("it does not lie on {begun}")),
    }
}

/// Whether a file is, by its length and time, as it was when `proof` was made.
pub fn unchanged(stamp: Stamp, proof: &Proof) -> bool {
    stamp == (proof.file_bytes, proof.modified_ns)
}

/// Bytes of a file, and when it was last changed, in nanoseconds since 1970.
pub type Stamp = (u64, u64);

/// The stamp of the file at `path`. Blocks.
///
/// # Errors
/// There is no such file.
pub fn stamp_of(path: &str, roots: &Roots) -> Result<Stamp, FileError> {
    let found = roots.find(path, Format::Qcow2)?;
    stamp(&found.file).map_err(|source| FileError::Kernel {
        path: path.to_owned(),
        source,
    })
}

fn stamp(file: &File) -> io::Result<Stamp> {
    let facts = file.metadata()?;
    let since = facts.modified()?.duration_since(UNIX_EPOCH);
    let modified = since.map_or(0, |since| since.as_nanos());
    Ok((facts.len(), u64::try_from(modified).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::correlation::{NewImage, Preallocation};
    use crate::image::create::create;

    #[test]
    fn a_file_is_read_only_as_what_was_begun() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots::new(vec![dir.path().to_owned()]);
        let text = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let make = |name: &str, backing: Option<&str>| {
            let new = NewImage {
                format: Format::Qcow2,
                size: Some(1 << 20),
                cluster_bytes: None,
                backing: backing.map(|backing| (backing.to_owned(), Format::Qcow2)),
                preallocation: Preallocation::Off,
            };
            create(&text(name), &roots, &new, &|| true).unwrap().inode
        };
        let (full, other) = (make("full", None), make("other", None));
        make("child", Some("full"));
        let verified = |name: &str, beneath: Option<&str>, made: Option<Inode>, size: u64| {
            let begun = Begun {
                size,
                beneath: beneath.map(text),
                made,
            };
            let expected = Expected::Begun(&begun);
            match verify(&text(name), &roots, expected, &mut |_| true) {
                Ok(_) => true,
                Err(VerifyError::Other { .. }) => false,
                Err(error) => unreachable!("{error}"),
            }
        };
        assert!(verified("full", None, Some(full), 1 << 20));
        assert!(verified("full", None, None, 1 << 20));
        assert!(!verified("full", None, Some(other), 1 << 20));
        assert!(!verified("full", None, None, 2 << 20));
        assert!(!verified("full", Some("other"), None, 1 << 20));
        assert!(verified("child", Some("full"), None, 1 << 20));
        assert!(!verified("child", Some("other"), None, 1 << 20));
        assert!(!verified("child", None, None, 1 << 20));
    }

    /// A file of 1 EiB in the place of a parent was read to its end before it was told that this is not that.
    #[test]
    fn what_has_another_size_is_not_read_and_what_nobody_waits_for_is_not_read_on() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots::new(vec![dir.path().to_owned()]);
        let path = dir.path().join("a").to_str().unwrap().to_owned();
        let new = NewImage {
            format: Format::Qcow2,
            size: Some(1 << 50),
            cluster_bytes: Some(2 << 20),
            backing: None,
            preallocation: Preallocation::Off,
        };
        create(&path, &roots, &new, &|| true).unwrap();
        let mut steps = 0;
        let mut few = |_| {
            steps += 1;
            steps < 10
        };
        let other = verify(&path, &roots, Expected::Size(1 << 20), &mut few);
        assert!(matches!(other, Err(VerifyError::Other { .. })));
        // Each piece is one: it is a matter of hours.
        let ended = verify(&path, &roots, Expected::Size(1 << 50), &mut few);
        let told = ended.err().map(|error| error.to_string());
        assert!(told.is_some_and(|told| told.contains("ended before all of it")));
        assert_eq!(steps, 10);
    }

    /// The word that the one file was sound, and its SHA-256, were kept for the other one, which nobody had read.
    #[test]
    fn what_is_put_at_the_path_while_another_file_is_read_is_not_taken_for_that() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots::new(vec![dir.path().to_owned()]);
        let text = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let new = NewImage {
            format: Format::Qcow2,
            size: Some(1 << 20),
            cluster_bytes: None,
            backing: None,
            preallocation: Preallocation::Off,
        };
        let verified = |then: &dyn Fn()| {
            for name in ["a", "b"] {
                let _gone = std::fs::remove_file(text(name));
                create(&text(name), &roots, &new, &|| true).unwrap();
            }
            let mut done = false;
            verify(&text("a"), &roots, Expected::Size(1 << 20), &mut |_| {
                if !std::mem::replace(&mut done, true) {
                    then();
                }
                true
            })
        };
        assert!(verified(&|| {}).is_ok());
        let replaced = verified(&|| std::fs::rename(text("b"), text("a")).unwrap());
        assert!(matches!(replaced, Err(VerifyError::Replaced { .. })));
        let gone = verified(&|| std::fs::remove_file(text("a")).unwrap());
        assert!(matches!(
            gone,
            Err(VerifyError::File(FileError::Missing(_)))
        ));
        // By its own inode it is what was read, whatever name leads there.
        let same = verified(&|| {
            std::fs::rename(text("a"), text("b")).unwrap();
            std::os::unix::fs::symlink("b", text("a")).unwrap();
        });
        assert!(same.is_ok());
    }
}
