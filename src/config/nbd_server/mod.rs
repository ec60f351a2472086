//! nbd-server's configuration, read as the stock server reads it, with what it does not do made good. PURE.
//!
//! | file | what |
//! |---|---|
//! | `mod.rs` | all files together: the server, the sections, what stays as it was |
//! | `file.rs` | one file, judged for itself |
//! | `key_file.rs` | GLib's GKeyFile: the text |
//! | `keys.rs` | the table of keys and what becomes of each |
//! | `section.rs` | one section: its export |
//! | `command_line.rs` | an export that the command line names |
//!
//! A section that cannot be honoured is refused by name and the others are read on; a file that GLib would not read
//! leaves all its sections as they were. So one appliance's half-written file ends nobody's session.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

mod command_line;
mod file;
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
use file::FoundSection;
pub use file::{JudgedFile, Part};
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
    pub user: Option<Named>,
    pub group: Option<Named>,
    /// `x-settings`: a file in the form of `nbdtrack.toml`, for what no key here says.
    pub settings: Option<Named>,
}

/// A user, a group or a file, as it was named; whether there is one the reader of the name finds out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    pub name: String,
    file: PathBuf,
    line: usize,
    column: usize,
}

impl Named {
    fn of(values: &Values<'_>, key: &str) -> Option<Named> {
        let (name, entry) = values.text(key)?;
        Some(Named {
            name: name.to_owned(),
            file: entry.at.file.to_owned(),
            line: entry.at.line,
            column: entry.at.column,
        })
    }

    /// A problem with the place of the name.
    pub fn problem(&self, message: String) -> Problem {
        Problem {
            file: self.file.clone(),
            line: self.line,
            column: self.column,
            message,
        }
    }
}

/// What was read before, for what cannot be read now. Shared with the files that it was read from: a reload makes none of it anew.
pub type LastGood = BTreeMap<String, Arc<Section>>;

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
    /// A file could not be read or parsed, or there is no main file: sections may stand there that are not known.
    pub unread: bool,
    pub problems: Vec<Problem>,
    pub warnings: Vec<Problem>,
}

/// The folder that the main file includes, asked before the folder is read.
pub fn include_of(main: &IniFile) -> Option<PathBuf> {
    path_of(main, "includedir")
}

/// The file that `x-settings` names, for who watches it.
pub fn settings_path_of(main: &IniFile) -> Option<PathBuf> {
    path_of(main, "x-settings")
}

fn path_of(main: &IniFile, key: &str) -> Option<PathBuf> {
    let text = main.text.as_ref().ok()?;
    let parsed = KeyFile::parse(&main.path, text).ok()?;
    let generic = parsed.groups.first().filter(|g| g.name == GENERIC_GROUP)?;
    let path = generic.entries.get(key)?.string().ok()?;
    Some(path.into())
}

/// Judges the main file (the first) and the included ones, in byte order of their names.
pub fn judge(files: &[IniFile], last: &LastGood) -> Judged {
    let mut files = files.iter();
    let main = files.next().map(|main| JudgedFile::of(main, Part::Main));
    let included = files.map(|file| JudgedFile::of(file, Part::Included));
    let files: Vec<JudgedFile> = main.into_iter().chain(included).collect();
    judge_together(&files, last)
}

/// As [`judge`], of files that were judged each for itself, the main file first.
pub fn judge_together<'a>(
    files: impl IntoIterator<Item = &'a JudgedFile>,
    last: &LastGood,
) -> Judged {
    let mut judged = Judged::default();
    let mut origin = HashMap::new();
    let mut main = None;
    for file in files {
        let main = *main.get_or_insert(&*file.path);
        judged.unread |= file.unread;
        if let Some(problem) = &file.refused {
            match file.part {
                Part::Folder => judged.keep_included(main, last),
                Part::Main | Part::NoMain | Part::Included => judged.keep_file(&file.path, last),
            }
            judged.problems.push(problem.clone());
            continue;
        }
        if let Some((generic, remarks)) = &file.generic {
            let mut remarks = remarks.clone();
            judged.warnings.append(&mut remarks.warnings);
            judged.generic = remarks.problems.is_empty().then(|| generic.clone());
            judged.problems.append(&mut remarks.problems);
        }
        for found in &file.found {
            judged.section(&file.path, found, last, &mut origin);
        }
    }
    judged
}

impl Judged {
    fn section<'a>(
        &mut self,
        file: &'a Path,
        found: &'a FoundSection,
        last: &LastGood,
        origin: &mut HashMap<&'a str, (&'a Path, usize)>,
    ) {
        let name = found.name.as_str();
        let at = found.place(file);
        if name == GENERIC_GROUP {
            self.problems.push(
                at.problem("[generic] belongs into the main file; here every section is an export"),
            );
            return;
        }
        self.standing.insert(name.to_owned());
        let mut remarks = found.remarks.clone();
        self.warnings.append(&mut remarks.warnings);
        if let Some((other, line)) = origin.get(name) {
            remarks.problems.push(at.problem(format!(
                "[{}] stands in {}:{line} already; one name is one export, so what was served goes on and neither \
                 is taken anew",
                shown(name),
                other.display()
            )));
            // Neither can be said to be the one that is meant.
            self.sections.remove(name);
        }
        origin.entry(name).or_insert((file, at.line));
        if found
            .section
            .as_ref()
            .is_some_and(|section| section.unnamed)
            && let Some(other) = self.unnamed_beside(name)
        {
            remarks.problems.push(at.problem(format!(
                "[{}]: x-default stands in [{}] already; clients that name no export get one",
                shown(name),
                shown(other)
            )));
        }
        let section = found.section.as_ref();
        match section.filter(|_| remarks.problems.is_empty()) {
            Some(section) => {
                self.sections.insert(name.to_owned(), Arc::clone(section));
            }
            None => {
                self.refused += 1;
                self.keep(name, last);
            }
        }
        self.problems.append(&mut remarks.problems);
    }

    fn unnamed_beside(&self, name: &str) -> Option<&str> {
        let mut others = self.sections.iter().filter(|(other, _)| *other != name);
        let (other, _) = others.find(|(_, section)| section.unnamed)?;
        Some(other)
    }

    fn keep(&mut self, name: &str, last: &LastGood) {
        if let Some(section) = last.get(name) {
            self.sections.insert(name.to_owned(), Arc::clone(section));
        }
    }

    fn keep_file(&mut self, file: &Path, last: &LastGood) {
        self.keep_those(last, |section| section.file == file);
    }

    /// All that was included, from this folder or, where its name is mistyped, from another one.
    fn keep_included(&mut self, main: &Path, last: &LastGood) {
        let others = [main, Path::new(COMMAND_LINE)];
        self.keep_those(last, |section| !others.contains(&&*section.file));
    }

    fn keep_those(&mut self, last: &LastGood, which: impl Fn(&Section) -> bool) {
        for (name, section) in last.iter().filter(|(_, section)| which(section)) {
            self.sections
                .entry(name.clone())
                .or_insert_with(|| Arc::clone(section));
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
        user: Named::of(&values, "user"),
        group: Named::of(&values, "group"),
        settings: settings(&values, of, remarks),
    }
}

fn settings(values: &Values<'_>, of: &str, remarks: &mut Remarks) -> Option<Named> {
    let named = Named::of(values, "x-settings")?;
    if named.name.starts_with('/') && !named.name.contains('\0') {
        return Some(named);
    }
    remarks.problems.push(named.problem(format!(
        "{of}: x-settings \"{}\": expected the absolute path of a file",
        shown(&named.name)
    )));
    None
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

const GENERIC_GROUP: &str = "generic";
const LISTEN_MAX: usize = 64;
