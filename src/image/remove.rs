//! Taking a file away that nothing has open, durably. EDGE.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use nix::unistd::{UnlinkatFlags, unlinkat};

use super::beneath::{FileError, Roots};
use super::describe::{self, Described};
use super::lock::{self, Use};
use super::nameless;
use crate::identity::Format;

/// Why a file was not taken away.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{path}: in use: {by}")]
    Busy { path: String, by: String },
    /// To take the name away would take another file, or a link only.
    #[error(
        "{path}: a symbolic link, or another file than was found first, has this name: nothing is removed; see to the name, or delete the backup with --keep-files"
    )]
    NotIts { path: String },
    #[error("{path}: not removed, for nobody waits for it any more")]
    Unwanted { path: String },
    #[error("{path}: {source}")]
    Kernel {
        path: String,
        #[source]
        source: io::Error,
    },
}

/// A file that nobody reads or writes while this is held.
pub struct Taken {
    path: String,
    folder: File,
    name: OsString,
    held: File,
}

/// Takes the file at the absolute `path`, to be removed; `None` when it is gone already. Blocks.
///
/// # Errors
/// [`RemoveError`]: anyone reads or writes it.
pub fn take(path: &str, roots: &Roots) -> Result<Option<Taken>, RemoveError> {
    let kernel = |source| RemoveError::Kernel {
        path: path.to_owned(),
        source,
    };
    let found = match roots.find(path, Format::Raw) {
        Err(FileError::Missing(_)) => {
            // One whose making was cut off can have left something under another name.
            if let Ok((folder, _)) = roots.folder(path) {
                nameless::sweep(&folder);
            }
            return Ok(None);
        }
        found => found?,
    };
    let own = format!("/proc/self/fd/{}", found.file.as_raw_fd());
    let file = File::open(own).map_err(kernel)?;
    // As a writer: whoever reads it lets no one write either. Held until the name is gone.
    lock::take(&file, path, Use::Write, None).map_err(|by| RemoveError::Busy {
        path: path.to_owned(),
        by,
    })?;
    let (folder, name) = roots.folder(path)?;
    let taken = Taken {
        path: path.to_owned(),
        folder,
        name,
        held: file,
    };
    taken.has_its_name()?;
    Ok(Some(taken))
}

/// Which of the images at the absolute `others` lies on one of these files, at whatever depth: the path of the file, and the image. Blocks; `goes_on`
/// hears of each image that was looked at, for there can be thousands, and says whether anyone waits for the next one.
///
/// # Errors
/// [`RemoveError::Unwanted`]; or it cannot be told what one of the files is.
pub fn lies_on<'a, 'b>(
    taken: &[&'a Taken],
    others: &'b [String],
    roots: &Roots,
    goes_on: &dyn Fn() -> bool,
) -> Result<Option<(&'a str, &'b str)>, RemoveError> {
    let place = |file: &File| file.metadata().map(|facts| (facts.dev(), facts.ino()));
    let mut held = BTreeMap::new();
    for file in taken {
        let at = place(&file.held).map_err(|error| file.kernel(error))?;
        held.insert(at, file.path.as_str());
    }
    let held_as = |layer: &Described| {
        let found = roots.find(&layer.path, Format::Raw).ok()?;
        held.get(&place(&found.file).ok()?).copied()
    };
    for other in others {
        if !goes_on() {
            let path = taken.first().map_or("", |file| file.path.as_str());
            let path = path.to_owned();
            return Err(RemoveError::Unwanted { path });
        }
        // One that cannot be read lies on nothing that is known.
        let Ok((layers, _)) = describe::chain(other, Format::Qcow2, roots) else {
            continue;
        };
        if let Some(path) = layers.iter().skip(1).find_map(held_as) {
            return Ok(Some((path, other)));
        }
    }
    Ok(None)
}

impl Taken {
    /// Removes it, durably. Blocks.
    ///
    /// # Errors
    /// [`RemoveError::NotIts`]: something else has its name by now; or [`RemoveError::Kernel`].
    pub fn remove(self) -> Result<(), RemoveError> {
        self.has_its_name()?;
        let kernel = |source| self.kernel(source);
        unlinkat(
            &self.folder,
            self.name.as_os_str(),
            UnlinkatFlags::NoRemoveDir,
        )
        .map_err(|error| kernel(error.into()))?;
        self.folder.sync_all().map_err(kernel)
    }

    /// unlinkat(2) takes a name and not a file, so the name is held against the file that is locked as late as can be.
    fn has_its_name(&self) -> Result<(), RemoveError> {
        let has_it = nameless::has_name(&self.folder, &self.name, &self.held);
        if has_it.map_err(|error| self.kernel(error))? {
            return Ok(());
        }
        Err(RemoveError::NotIts {
            path: self.path.clone(),
        })
    }

    fn kernel(&self, source: io::Error) -> RemoveError {
        RemoveError::Kernel {
            path: self.path.clone(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::correlation::{NewImage, Preallocation};
    use crate::image::create::create;

    #[test]
    fn what_lies_on_a_file_is_found_at_any_depth() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots::new(vec![dir.path().to_owned()]);
        let text = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        for (name, backing) in [
            ("base", None),
            ("middle", Some("base")),
            ("top", Some("middle")),
            ("alone", None),
        ] {
            let new = NewImage {
                format: Format::Qcow2,
                size: Some(1 << 20),
                cluster_bytes: None,
                backing: backing.map(|backing| (backing.to_owned(), Format::Qcow2)),
                preallocation: Preallocation::Off,
            };
            create(&text(name), &roots, &new, &|| true).unwrap();
        }
        let taken = |name: &str| take(&text(name), &roots).unwrap().unwrap();
        let others = [text("gone"), text("alone"), text("top")];
        let on = |names: &[&str]| {
            let files: Vec<Taken> = names.iter().map(|name| taken(name)).collect();
            let files: Vec<&Taken> = files.iter().collect();
            let found = lies_on(&files, &others, &roots, &|| true).unwrap();
            found.map(|(file, image)| (file.to_owned(), image.to_owned()))
        };
        assert_eq!(on(&["base"]), Some((text("base"), text("top"))));
        assert_eq!(on(&["alone", "base"]), Some((text("base"), text("top"))));
        assert_eq!(on(&["top", "alone"]), None);
    }

    /// A look at all exported images was one step, and a deletion beside some thousand of them took longer than one may.
    #[test]
    fn each_image_that_is_looked_at_is_a_step_and_who_does_not_wait_is_told_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots::new(vec![dir.path().to_owned()]);
        let text = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(text("a"), b"a").unwrap();
        let taken = take(&text("a"), &roots).unwrap().unwrap();
        let others: Vec<String> = (0..100).map(|n| text(&n.to_string())).collect();
        let steps = std::cell::Cell::new(0);
        let until = |last: usize| {
            steps.set(0);
            let goes_on = || {
                steps.set(steps.get() + 1);
                steps.get() <= last
            };
            lies_on(&[&taken], &others, &roots, &goes_on)
        };
        assert!(matches!(until(usize::MAX), Ok(None)));
        assert_eq!(steps.get(), others.len());
        for last in [0, 99] {
            let unwanted = until(last);
            assert!(
                matches!(unwanted, Err(RemoveError::Unwanted { .. })),
                "{unwanted:?}"
            );
        }
    }

    /// What was locked was the file, and what went was whatever had its name then.
    #[test]
    fn a_name_is_taken_away_only_while_it_is_the_files_own() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots::new(vec![dir.path().to_owned()]);
        let path = dir.path().join("a");
        let text = path.to_str().unwrap();
        std::fs::write(&path, b"its own").unwrap();
        let taken = take(text, &roots).unwrap().unwrap();
        let other = dir.path().join("b");
        std::fs::write(&other, b"another's").unwrap();
        std::fs::rename(&other, &path).unwrap();
        let removed = taken.remove();
        assert!(
            matches!(removed, Err(RemoveError::NotIts { .. })),
            "{removed:?}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"another's");

        // The link would go, and the data stay.
        std::fs::rename(&path, &other).unwrap();
        std::os::unix::fs::symlink("b", &path).unwrap();
        assert!(matches!(
            take(text, &roots),
            Err(RemoveError::NotIts { .. })
        ));
        assert!(path.is_symlink() && other.exists());

        std::fs::remove_file(&path).unwrap();
        std::fs::rename(&other, &path).unwrap();
        take(text, &roots).unwrap().unwrap().remove().unwrap();
        assert!(take(text, &roots).unwrap().is_none());
    }
}
