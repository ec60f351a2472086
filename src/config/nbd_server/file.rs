//! One file of nbd-server's configuration, judged for itself: what of it does not depend on the others. PURE.
//!
//! So a file that is as it was need not be judged again when another one has changed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::key_file::{Group, KeyFile};
use super::section::{self, Remarks, Section};
use super::{GENERIC_GROUP, Generic, IniFile};
use crate::config::place::{Place, Problem};

/// One file, judged for itself.
#[derive(Debug)]
pub struct JudgedFile {
    pub path: PathBuf,
    pub(super) part: Part,
    /// It could not be read or parsed, or is not there.
    pub(super) unread: bool,
    /// Why nothing of it is taken.
    pub(super) refused: Option<Problem>,
    /// Of the main file, and what is to be said of it.
    pub(super) generic: Option<(Generic, Remarks)>,
    pub(super) found: Vec<FoundSection>,
}

/// A section as it stands in a file.
#[derive(Debug)]
pub(super) struct FoundSection {
    pub name: String,
    line: usize,
    column: usize,
    /// `None` when it cannot be honoured, as the remarks say.
    pub section: Option<Arc<Section>>,
    pub remarks: Remarks,
}

/// What a file is of a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The file that has `[generic]`.
    Main,
    /// In its place beside a command line, where there is none: what may stand in one that comes is not known.
    NoMain,
    /// Every other: one that it includes, or what a command line says.
    Included,
    /// The folder of those that it includes, which cannot be listed.
    Folder,
}

impl JudgedFile {
    pub fn of(file: &IniFile, part: Part) -> JudgedFile {
        let mut judged = JudgedFile {
            path: file.path.clone(),
            part,
            unread: part == Part::NoMain,
            refused: None,
            generic: None,
            found: Vec::new(),
        };
        let text = file.text.as_ref();
        let text = text.map_err(|message| whole(&file.path, message.clone()));
        let groups = match text.and_then(|text| KeyFile::parse(&file.path, text)) {
            Ok(parsed) => parsed.groups,
            Err(problem) => {
                judged.unread = true;
                judged.refused = Some(problem);
                return judged;
            }
        };
        let mut groups = groups.iter();
        if matches!(part, Part::Main | Part::NoMain) {
            let Some(group) = groups.next().filter(|group| group.name == GENERIC_GROUP) else {
                let message = "the first section has to be [generic]".to_owned();
                judged.refused = Some(whole(&file.path, message));
                return judged;
            };
            let mut remarks = Remarks::default();
            judged.generic = Some((super::generic(group, &mut remarks), remarks));
        }
        let found = groups.map(|group| FoundSection::of(&file.path, group));
        judged.found = found.collect();
        judged
    }
}

impl FoundSection {
    fn of(file: &Path, group: &Group<'_>) -> FoundSection {
        let mut remarks = Remarks::default();
        let section = match group.name {
            GENERIC_GROUP => None,
            _ => section::read(file, group, &mut remarks),
        };
        FoundSection {
            name: group.name.to_owned(),
            line: group.at.line,
            column: group.at.column,
            section: section.map(Arc::new),
            remarks,
        }
    }

    pub fn place<'a>(&self, file: &'a Path) -> Place<'a> {
        Place {
            file,
            line: self.line,
            column: self.column,
        }
    }
}

/// A problem of a file as a whole.
pub(super) fn whole(file: &Path, message: String) -> Problem {
    Problem {
        file: file.to_owned(),
        line: 1,
        column: 1,
        message,
    }
}
