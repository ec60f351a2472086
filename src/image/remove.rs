//! Taking a file away that nothing has open, durably. EDGE.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use nix::unistd::{UnlinkatFlags, unlinkat};

use super::beneath::{FileError, Roots};
use super::describe::{self, Content, DescribeError, Described};
use super::lock::{self, Use};
use super::nameless;
use super::qcow2::header::Refusal;
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
    /// What an image lies on may be lost with it.
    #[error(
        "{path}: not removed, for the image {image} may lie on it, and it cannot be told: {why}; make that readable, or remove the export of the image first"
    )]
    Untold {
        path: String,
        image: String,
        why: Box<DescribeError>,
    },
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

/// What files that are taken are, whatever path leads to them, with their paths.
#[derive(Debug, Clone)]
pub struct Places(BTreeMap<Inode, String>);

impl Places {
    /// Blocks.
    ///
    /// # Errors
    /// It cannot be told what one of them is.
    pub fn of(taken: &[&Taken]) -> Result<Places, RemoveError> {
        let places = taken.iter().map(|file| {
            let at = place(&file.held).map_err(|error| file.kernel(error))?;
            Ok((at, file.path.clone()))
        });
        places.collect::<Result<_, _>>().map(Places)
    }
}

/// Which of the images at the absolute `others` lies on one of these files, at whatever depth: the path of the file, and the image. Blocks; `goes_on`
/// hears of each image that was looked at, for there can be thousands, and says whether anyone waits for the next one.
///
/// # Errors
/// [`RemoveError::Unwanted`]; [`RemoveError::Untold`] of an image that is there and does not say all that it lies on.
pub fn lies_on(
    Places(held): &Places,
    others: &[String],
    roots: &Roots,
    goes_on: &dyn Fn() -> bool,
) -> Result<Option<(String, String)>, RemoveError> {
    let Some(first) = held.values().next() else {
        return Ok(None);
    };
    for other in others {
        if !goes_on() {
            let path = first.clone();
            return Err(RemoveError::Unwanted { path });
        }
        let on = lies_on_held(other, held, roots).map_err(|why| RemoveError::Untold {
            path: first.clone(),
            image: other.clone(),
            why: Box::new(why),
        })?;
        if let Some(path) = on {
            return Ok(Some((path.clone(), other.clone())));
        }
    }
    Ok(None)
}

/// The device and the inode of a file.
type Inode = (u64, u64);

fn place(file: &File) -> io::Result<Inode> {
    file.metadata().map(|facts| (facts.dev(), facts.ino()))
}

/// Which of the `held` files the image lies on. An error is no word that it lies on none: an export that cannot be read today is one whose file system
/// is away, as often as not.
fn lies_on_held<'a>(
    image: &str,
    held: &'a BTreeMap<Inode, String>,
    roots: &Roots,
) -> Result<Option<&'a String>, DescribeError> {
    let (layers, cut_short) = match describe::chain(image, Format::Qcow2, roots) {
        // What has no bytes lies on nothing.
        Err(DescribeError::File(FileError::Missing(_) | FileError::NotAFile { .. })) => {
            return Ok(None);
        }
        layers => layers?,
    };
    for layer in layers.iter().skip(1) {
        let found = roots.find(&layer.path, Format::Raw)?;
        let at = place(&found.file).map_err(|source| DescribeError::Kernel {
            path: layer.path.clone(),
            source,
        })?;
        if let Some(path) = held.get(&at) {
            return Ok(Some(path));
        }
    }
    if let Some(error) = cut_short {
        return Err(error);
    }
    match layers.last().map(|last: &Described| (last, &last.content)) {
        // The file of a raw export.
        Some((_, Content::Unread(Refusal::NotQcow2))) if layers.len() == 1 => Ok(None),
        Some((last, Content::Unread(refusal))) => Err(DescribeError::Refused {
            path: last.path.clone(),
            refusal: refusal.clone(),
        }),
        Some((_, Content::Raw | Content::Qcow2(_))) | None => Ok(None),
    }
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

    fn image(path: &str, backing: Option<&str>, roots: &Roots) {
        let new = NewImage {
            format: Format::Qcow2,
            size: Some(1 << 20),
            cluster_bytes: None,
            backing: backing.map(|backing| (backing.to_owned(), Format::Qcow2)),
            preallocation: Preallocation::Off,
        };
        create(path, roots, &new, &|| true).unwrap();
    }

    /// An image `top` on `middle`, and that on `base`.
    fn three_layers(path: &dyn Fn(&str) -> String, roots: &Roots) {
        image(&path("base"), None, roots);
        image(&path("middle"), Some("base"), roots);
        image(&path("top"), Some("middle"), roots);
    }

    #[test]
    fn what_lies_on_a_file_is_found_at_any_depth() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots::new(vec![dir.path().to_owned()]);
        let text = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        three_layers(&text, &roots);
        image(&text("alone"), None, &roots);
        let taken = |name: &str| take(&text(name), &roots).unwrap().unwrap();
        let others = [text("gone"), text("alone"), text("top")];
        let on = |names: &[&str]| {
            let files: Vec<Taken> = names.iter().map(|name| taken(name)).collect();
            let files: Vec<&Taken> = files.iter().collect();
            let places = Places::of(&files).unwrap();
            lies_on(&places, &others, &roots, &|| true).unwrap()
        };
        assert_eq!(on(&["base"]), Some((text("base"), text("top"))));
        assert_eq!(on(&["alone", "base"]), Some((text("base"), text("top"))));
        assert_eq!(on(&["top", "alone"]), None);
    }

    /// An exported image whose chain could not be followed counted as one that lies on nothing: with a middle on a file system that was not mounted, the
    /// base of both was removed.
    #[test]
    fn an_image_that_does_not_say_what_it_lies_on_is_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots::new(vec![dir.path().to_owned()]);
        let text = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        three_layers(&text, &roots);
        std::fs::write(text("raw"), b"the file of a raw export").unwrap();
        std::fs::create_dir(text("folder")).unwrap();
        let base = take(&text("base"), &roots).unwrap().unwrap();
        let on = |image: &str| {
            let images = [text(image)];
            let places = Places::of(&[&base]).unwrap();
            let found = lies_on(&places, &images, &roots, &|| true);
            found.map(|found| found.is_some())
        };
        let untold = |image: &str, why: &str| {
            let found = on(image);
            let Err(RemoveError::Untold { image: told, .. }) = &found else {
                panic!("{image}: {found:?}");
            };
            assert_eq!(*told, text(image));
            let said = found.unwrap_err().to_string();
            assert!(said.contains(why), "{said}");
        };
        assert!(on("top").unwrap());
        for nothing in ["raw", "folder", "gone"] {
            assert!(!on(nothing).unwrap(), "{nothing}");
        }
        // ENAMETOOLONG stands for all that the kernel can say.
        untold(&"long".repeat(64), "too long");
        std::fs::rename(text("middle"), text("away")).unwrap();
        untold("top", "there is no such file");
        std::fs::write(text("middle"), b"no image").unwrap();
        untold("top", "does not begin as a QCOW2 image");
        let images = [text("top")];
        let nothing = Places::of(&[]).unwrap();
        let none = lies_on(&nothing, &images, &roots, &|| true);
        assert!(none.unwrap().is_none(), "nothing is removed");
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
            let places = Places::of(&[&taken]).unwrap();
            lies_on(&places, &others, &roots, &goes_on)
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
