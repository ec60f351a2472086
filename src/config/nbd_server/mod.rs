//! nbd-server's configuration, read as the stock server reads it, with what it does not do made good. PURE.
//!
//! | file | what |
//! |---|---|
//! | `mod.rs` | all files together: the server, the sections, what stays as it was |
//! | `key_file.rs` | GLib's GKeyFile: the text |
//! | `keys.rs` | the table of keys and what becomes of each |
//! | `section.rs` | one section: its export |
//! | `command_line.rs` | an export that the command line names |
//!
//! A section that cannot be honoured is refused by name and the others are read on; a file that GLib would not read
//! leaves all its sections as they were. So one appliance's half-written file ends nobody's session.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

mod command_line;
#[cfg(test)]
mod glib_tests;
pub(crate) mod key_file;
mod keys;
mod section;
#[cfg(test)]
mod tests;

use super::place::Problem;
use crate::identity::{Format, VolumeId};
pub use command_line::{COMMAND_LINE, CommandLine};
use key_file::{Group, KeyFile, shown};
pub use keys::{Fate, GENERIC, GENERIC_OURS, Key, Kind, SECTION};
pub use section::{Access, Backing, Section};
use section::{Remarks, Values};

/// One file, or why it could not be read.
#[derive(Debug, Clone)]
pub struct IniFile {
    pub path: PathBuf,
    /// What was not UTF-8 is U+FFFD in it; a value that has one is refused, a comment is not.
    pub text: Result<String, String>,
}

/// `[generic]`, as far as the daemon needs it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Generic {
    /// Hosts or addresses; empty for all of this machine's.
    pub listen: Vec<String>,
    /// A number or a service's name.
    pub port: Option<String>,
    pub unix: Option<PathBuf>,
    /// TCP beside the Unix socket.
    pub dual: bool,
    pub include: Option<PathBuf>,
    /// Whether LIST is answered.
    pub list: bool,
    pub state: Option<PathBuf>,
    pub bus: Option<String>,
    /// Everyone may connect where an authfile cannot be read, as with the stock server.
    pub missing_authfile_allows: bool,
    /// `x-file-roots`: the folders beneath which files may be served; empty for those of the sections' own files.
    pub file_roots: Vec<PathBuf>,
    /// Files that change are read again without being asked.
    pub watch: bool,
}

/// What was read before, for what cannot be read now.
pub type LastGood = BTreeMap<String, Section>;

/// All files, judged.
#[derive(Debug, Default)]
pub struct Judged {
    /// `None` when the main file cannot be used: then everything stays as it was.
    pub generic: Option<Generic>,
    /// What is to be served, by name, including what stays as it was.
    pub sections: LastGood,
    /// Refused by name, and not served before either.
    pub refused: usize,
    /// The sections that stand in the files, taken or not.
    pub standing: BTreeSet<String>,
    /// A file could not be read or parsed.
    pub unread: bool,
    pub problems: Vec<Problem>,
    pub warnings: Vec<Problem>,
}

/// The folder that the main file includes, asked before the folder is read.
pub fn include_of(main: &IniFile) -> Option<PathBuf> {
    let text = main.text.as_ref().ok()?;
    let parsed = KeyFile::parse(&main.path, text).ok()?;
    let generic = parsed.groups.first().filter(|g| g.name == GENERIC_GROUP)?;
    let folder = generic.entries.get("includedir")?.string().ok()?;
    Some(folder.into())
}

/// Judges the main file (the first) and the included ones, in byte order of their names.
///
/// `strict` makes every warning a problem of its section or file.
pub fn judge(files: &[IniFile], last: &LastGood, strict: bool) -> Judged {
    let mut judged = Judged::default();
    let mut origin: BTreeMap<String, (PathBuf, usize)> = BTreeMap::new();
    for (at, file) in files.iter().enumerate() {
        let main = at == 0;
        let text = match &file.text {
            Ok(text) => text,
            Err(message) => {
                judged.unread = true;
                judged.keep_file(&file.path, last);
                judged.problems.push(whole(&file.path, message.clone()));
                continue;
            }
        };
        let parsed = match KeyFile::parse(&file.path, text) {
            Ok(parsed) => parsed,
            Err(problem) => {
                judged.unread = true;
                judged.keep_file(&file.path, last);
                judged.problems.push(problem);
                continue;
            }
        };
        let mut groups = parsed.groups.iter();
        if main {
            match groups.next() {
                Some(group) if group.name == GENERIC_GROUP => {
                    let mut remarks = Remarks::default();
                    let generic = generic(group, &mut remarks);
                    judged.note(&mut remarks, strict);
                    judged.generic = remarks.problems.is_empty().then_some(generic);
                    judged.problems.append(&mut remarks.problems);
                }
                _ => {
                    judged.keep_file(&file.path, last);
                    judged.problems.push(whole(
                        &file.path,
                        "the first section has to be [generic]".to_owned(),
                    ));
                    continue;
                }
            }
        }
        for group in groups {
            judged.section(&file.path, group, last, strict, &mut origin);
        }
    }
    judged
}

impl Judged {
    fn section(
        &mut self,
        file: &Path,
        group: &Group<'_>,
        last: &LastGood,
        strict: bool,
        origin: &mut BTreeMap<String, (PathBuf, usize)>,
    ) {
        let mut remarks = Remarks::default();
        if group.name == GENERIC_GROUP {
            self.problems.push(
                group.at.problem(
                    "[generic] belongs into the main file; here every section is an export",
                ),
            );
            return;
        }
        self.standing.insert(group.name.to_owned());
        let section = section::read(file, group, &mut remarks);
        self.note(&mut remarks, strict);
        if let Some((other, line)) = origin.get(group.name) {
            remarks.problems.push(group.at.problem(format!(
                "[{}] stands in {}:{line} already; one name is one export, so what was served goes on and neither \
                 is taken anew",
                shown(group.name),
                other.display()
            )));
            // Neither can be said to be the one that is meant.
            self.sections.remove(group.name);
        }
        origin
            .entry(group.name.to_owned())
            .or_insert_with(|| (file.to_owned(), group.at.line));
        if section.as_ref().is_some_and(|section| section.unnamed)
            && let Some(other) = self.unnamed_beside(group.name)
        {
            remarks.problems.push(group.at.problem(format!(
                "[{}]: x-default stands in [{}] already; clients that name no export get one",
                shown(group.name),
                shown(other)
            )));
        }
        match section.filter(|_| remarks.problems.is_empty()) {
            Some(section) => {
                self.sections.insert(group.name.to_owned(), section);
            }
            None => {
                self.refused += 1;
                self.keep(group.name, last);
            }
        }
        self.problems.append(&mut remarks.problems);
    }

    fn unnamed_beside(&self, name: &str) -> Option<&str> {
        let mut others = self.sections.iter().filter(|(other, _)| *other != name);
        let (other, _) = others.find(|(_, section)| section.unnamed)?;
        Some(other)
    }

    fn note(&mut self, remarks: &mut Remarks, strict: bool) {
        let list = if strict {
            &mut remarks.problems
        } else {
            &mut self.warnings
        };
        list.append(&mut remarks.warnings);
    }

    fn keep(&mut self, name: &str, last: &LastGood) {
        if let Some(section) = last.get(name) {
            self.sections.insert(name.to_owned(), section.clone());
        }
    }

    fn keep_file(&mut self, file: &Path, last: &LastGood) {
        // Of a folder that cannot be listed, all its files.
        let of = |section: &Section| section.file == file || section.file.parent() == Some(file);
        for (name, section) in last.iter().filter(|(_, section)| of(section)) {
            self.sections
                .entry(name.clone())
                .or_insert_with(|| section.clone());
        }
    }
}

fn generic(group: &Group<'_>, remarks: &mut Remarks) -> Generic {
    let of = "[generic]";
    let values = Values::read(group, of, &[&GENERIC, &GENERIC_OURS], remarks);
    let text = |name: &str| values.text(name).map(|(text, _)| text.to_owned());
    let missing = values.text("x-missing-authfile");
    if let Some((word, entry)) = &missing
        && !["allow", "deny"].contains(word)
    {
        remarks.problems.push(entry.at.problem(format!(
            "{of}: x-missing-authfile \"{}\": allow or deny",
            shown(word)
        )));
    }
    Generic {
        listen: text("listenaddr")
            .map(|list| {
                list.split(',')
                    .map(|one| one.trim().to_owned())
                    .filter(|one| !one.is_empty())
                    .take(LISTEN_MAX)
                    .collect()
            })
            .unwrap_or_default(),
        port: text("port"),
        unix: text("unixsock").map(PathBuf::from),
        dual: values.truth("duallisten"),
        include: text("includedir").map(PathBuf::from),
        list: values.truth("allowlist"),
        state: text("x-state").map(PathBuf::from),
        bus: text("x-bus"),
        missing_authfile_allows: missing.is_some_and(|(word, _)| word == "allow"),
        file_roots: file_roots(&values, of, remarks),
        watch: values.truth("x-watch-config"),
    }
}

/// Absolute paths, with commas between them.
fn file_roots(values: &section::Values<'_>, of: &str, remarks: &mut Remarks) -> Vec<PathBuf> {
    let Some((list, entry)) = values.text("x-file-roots") else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for root in list
        .split(',')
        .map(str::trim)
        .filter(|root| !root.is_empty())
    {
        // As a served path is written, so that one is beneath the other or is not.
        match VolumeId::of_file(root, Format::Raw) {
            Ok(_) if found.len() < LISTEN_MAX => found.push(PathBuf::from(root)),
            Ok(_) => break,
            Err(_) => remarks.problems.push(entry.at.problem(format!(
                "{of}: x-file-roots \"{}\": expected the absolute path of a folder, without '//', '.', '..' or a '/' at its end",
                shown(root)
            ))),
        }
    }
    found
}

/// A problem of a file as a whole.
fn whole(file: &Path, message: String) -> Problem {
    Problem {
        file: file.to_owned(),
        line: 1,
        column: 1,
        message,
    }
}

const GENERIC_GROUP: &str = "generic";
const LISTEN_MAX: usize = 64;
