//! One look-up of one path: what stands there, who is in it that should not be, and what is to be watched for it. EDGE.

use super::known::{Found, Seen};
use super::notice::{Place, Watcher};
use crate::correlation::Mark;
use crate::identity::{Format, Identity};
use crate::image::beneath::{FileError, FoundFile, Roots};
use crate::image::block::Claims;
use crate::image::qcow2;

/// What stands under a path, and what is watched for it.
pub(super) type Looked = (Found, Vec<Place>);

/// What stands under the path of `file`, as of `began`, and what is watched for it. Blocks as its file system does.
pub(super) fn look_up(
    roots: &Roots,
    claims: &Claims,
    file: &Identity,
    watcher: Option<&Watcher>,
    began: Mark,
) -> Looked {
    let mut places = Vec::new();
    let (Some(path), Some(format)) = (file.file(), file.format()) else {
        return (Found::Nothing(format!("{file} is no file")), places);
    };
    // Before it is looked up: what changes after that is told.
    if let (Some(watcher), Some((root, below))) = (watcher, roots.split(path)) {
        match watcher.folders(&root, below) {
            Ok(found) => places = found,
            Err(error) => watcher.tell(path, &error),
        }
    }
    let found = match roots.find(path, format) {
        Ok(found) => found,
        Err(error) => return (not_found(&error), places),
    };
    if let Some(watcher) = watcher {
        match watcher.file(&found.file) {
            Ok(place) => places.push(place),
            Err(error) => watcher.tell(path, &error),
        }
    }
    let found = match claims.intruder(found.incarnation) {
        // What is done to it from now on is not ours to serve: the lease ends, and no new one begins while they are there.
        Some(by) => Found::Barred {
            incarnation: found.incarnation,
            why: format!("{path}: {by}"),
        },
        None => seen(path, format, &found, began),
    };
    (found, places)
}

/// What a look-up says that led to no file: that there is none, or nothing.
fn not_found(error: &FileError) -> Found {
    let why = error.to_string();
    match error {
        FileError::Missing(_) | FileError::LeadsOut(_) | FileError::NotAFile { .. } => {
            Found::Nothing(why)
        }
        // Roots that were narrowed forbid to ask, and what is open stays open.
        FileError::Outside(_) | FileError::Kernel { .. } => Found::Unasked {
            incarnation: None,
            why,
        },
    }
}

fn seen(path: &str, format: Format, found: &FoundFile, sized: Mark) -> Found {
    let incarnation = found.incarnation;
    let unasked = |error: &std::io::Error| Found::Unasked {
        incarnation: Some(incarnation),
        why: format!("{path}: {error}"),
    };
    // Now that the file is watched: what happened to it before that is not told.
    match format {
        Format::Raw => match found.file.metadata() {
            Ok(facts) => Found::File(Seen {
                incarnation,
                size: facts.len(),
                sized,
            }),
            Err(error) => unasked(&error),
        },
        Format::Qcow2 => match qcow2::virtual_size(&found.file) {
            Ok(Ok(size)) => Found::File(Seen {
                incarnation,
                size,
                sized,
            }),
            Ok(Err(refusal)) => Found::Barred {
                incarnation,
                why: format!("{path}: {refusal}"),
            },
            Err(error) => unasked(&error),
        },
    }
}
