//! One section as an export. PURE: keys in, a [`Section`] or everything that is wrong with it out.

use std::path::{Path, PathBuf};

use super::key_file::{Entry, Group, shown};
use super::keys::{Fate, Key, Kind, SECTION};
use crate::config::place::Problem;
use crate::correlation::ExportName;
use crate::identity::{Format, VolumeId};

/// An export as its section describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    pub name: ExportName,
    /// Where the section begins.
    pub file: PathBuf,
    pub line: usize,
    pub backing: Backing,
    pub read_only: bool,
    pub share: bool,
    /// `x-trust-path`: whatever disk is found at the path is the volume.
    pub trust_path: bool,
    /// `x-default`: clients that name no export get this one.
    pub unnamed: bool,
    pub access: Access,
}

/// What an export serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// `x-volume`.
    Volume(VolumeId),
    /// `exportname = /dev/…`: the volume that was there when the line was written.
    Device(PathBuf),
    /// `exportname = /file`, and `x-format`.
    File(PathBuf, Format),
}

/// Who may use an export, and how.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Access {
    pub authfile: Option<PathBuf>,
    /// Live connections at one time; 0 for no limit.
    pub connections_max: u32,
    /// Every write is durable before it is answered.
    pub sync: bool,
    /// What clients are told; `None` for what the disk says.
    pub rotational: Option<bool>,
}

/// What is wrong with a section, and what is only odd.
#[derive(Debug, Clone, Default)]
pub(super) struct Remarks {
    pub problems: Vec<Problem>,
    pub warnings: Vec<Problem>,
}

/// Reads an export's section; `None` when `remarks.problems` has more than before.
pub(super) fn read(file: &Path, group: &Group<'_>, remarks: &mut Remarks) -> Option<Section> {
    let before = remarks.problems.len();
    let of = format!("[{}]", shown(group.name));
    let values = Values::read(group, &of, &[&SECTION], remarks);
    let name = match ExportName::parse(group.name) {
        Ok(name) => Some(name),
        Err(error) => {
            remarks
                .problems
                .push(group.at.problem(format!("{of}: {error}")));
            None
        }
    };
    let backing = backing(&values, &of, remarks);
    let connections_max = match values.integer("maxconnections") {
        // The stock server takes a negative number for none.
        Some(number) => u32::try_from(number).unwrap_or(0),
        None => 0,
    };
    if let Some((style, entry)) = values.text("virtstyle")
        && let Err(message) = virtstyle(style)
    {
        remarks
            .problems
            .push(entry.at.problem(format!("{of}: virtstyle: {message}")));
    }
    let section = Section {
        name: name?,
        file: file.to_owned(),
        line: group.at.line,
        backing: backing?,
        read_only: values.truth("readonly"),
        share: values.truth("x-share"),
        trust_path: values.truth("x-trust-path"),
        unnamed: values.truth("x-default"),
        access: Access {
            authfile: values.text("authfile").map(|(text, _)| text.into()),
            connections_max,
            sync: values.truth("sync"),
            rotational: values.boolean("rotational"),
        },
    };
    (remarks.problems.len() == before).then_some(section)
}

fn backing(values: &Values<'_>, of: &str, remarks: &mut Remarks) -> Option<Backing> {
    let named = values.text("exportname");
    if let Some((text, entry)) = values.text("x-volume") {
        if named.is_none() {
            remarks.warnings.push(entry.at.problem(format!(
                "{of}: without exportname the stock server would not read this file"
            )));
        }
        return match VolumeId::parse(text) {
            Ok(volume) => Some(Backing::Volume(volume)),
            Err(error) => {
                remarks
                    .problems
                    .push(entry.at.problem(format!("{of}: x-volume {error}")));
                None
            }
        };
    }
    let Some((text, entry)) = named else {
        remarks.problems.push(
            values
                .at
                .problem(format!("{of}: exportname is missing (nbd-server(5)); say exportname = /dev/NAME, or x-volume = PROFILE:ID")),
        );
        return None;
    };
    let refuse = |message: String| Some(entry.at.problem(format!("{of}: exportname {message}")));
    let style = values.text("virtstyle").map(|(style, _)| style);
    let filled = filled(text, style);
    let problem = if !text.starts_with('/') {
        refuse(format!("\"{}\": expected an absolute path", shown(text)))
    } else if text.contains('\0') || text.len() > PATH_BYTES_MAX {
        refuse("is no path".to_owned())
    } else {
        let why = filled.as_ref().err();
        why.and_then(|why| refuse(format!("\"{}\": {why}", shown(text))))
    };
    if let Some(problem) = problem {
        remarks.problems.push(problem);
        return None;
    }
    let text = filled.as_deref().unwrap_or(text);
    let device = text.starts_with("/dev/");
    match (values.text("x-format"), device) {
        (Some((_, entry)), true) => {
            let message = format!("{of}: x-format is of a file, and exportname is a device");
            remarks.problems.push(entry.at.problem(message));
            None
        }
        (None, true) => Some(Backing::Device(text.into())),
        (said, false) => match file_format(text, said.map(|(word, _)| word)) {
            Ok(format) => Some(Backing::File(text.into(), format)),
            Err(message) => {
                let at = said.map_or(entry, |(_, entry)| entry).at;
                remarks
                    .problems
                    .push(at.problem(format!("{of}: x-format {message}")));
                None
            }
        },
    }
}

/// What nothing was said of is raw, as with the stock server, but for what is named as an image: served as its bytes it would be
/// of use to no one. That it is one is seen when it is looked up.
fn file_format(path: &str, said: Option<&str>) -> Result<Format, String> {
    match said {
        None if path.to_ascii_lowercase().ends_with(".qcow2") => Ok(Format::Qcow2),
        said => Format::told(path, said),
    }
}

/// A path as the stock server fills it in for each client: by printf(3), with the client's address, unless `virtstyle` is `none`
/// (`set_peername` in nbd-server.c).
fn filled(path: &str, style: Option<&str>) -> Result<String, &'static str> {
    if style.is_some_and(|style| style.starts_with("none")) {
        return Ok(path.to_owned());
    }
    let mut text = String::with_capacity(path.len());
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        if c == '%' {
            match chars.next() {
                Some('%') => {}
                Some('s') => return Err(EACH_CLIENT),
                _ => return Err(FORMAT),
            }
        }
        text.push(c);
    }
    Ok(text)
}

const EACH_CLIENT: &str = "a path for each client's address (%s) is refused: an export is one volume for all; give each client a section \
    with an authfile of its own, or say virtstyle = none if the file is called so";
const FORMAT: &str = "the stock server takes a '%' for a format of printf(3); write %% for one that is meant, or say virtstyle = none";

/// As the stock server compares: by the beginning of the word.
fn virtstyle(text: &str) -> Result<(), String> {
    if ["none", "ipliteral", "iphash"]
        .iter()
        .any(|style| text.starts_with(style))
    {
        return Ok(());
    }
    match text.strip_prefix("cidrhash") {
        Some(rest) if text.len() < 10 => Err(format!("\"cidrhash{rest}\": the length is missing")),
        Some(_) => Ok(()),
        None => Err(format!(
            "\"{}\": expected none, ipliteral, iphash or cidrhash N",
            shown(text)
        )),
    }
}

/// The values of one group that were written and could be read.
pub(super) struct Values<'a> {
    pub at: crate::config::place::Place<'a>,
    found: Vec<(&'static str, Value, Entry<'a>)>,
}

enum Value {
    Boolean(bool),
    Integer(i64),
    Text(String),
}

impl<'a> Values<'a> {
    /// Reads every known key by its kind. What is refused or cannot be read is a problem, what is unknown a warning.
    pub(super) fn read(
        group: &Group<'a>,
        of: &str,
        tables: &[&'static [Key]],
        remarks: &mut Remarks,
    ) -> Values<'a> {
        let mut found = Vec::new();
        for (name, entry) in &group.entries {
            let known = tables
                .iter()
                .flat_map(|table| table.iter())
                .find(|key| key.name == *name);
            let Some(key) = known else {
                let (whose, list) = match name.starts_with("x-") {
                    true => ("no key of nbdtrack has this name", &mut remarks.problems),
                    false => (
                        "unknown key, ignored as the stock server does",
                        &mut remarks.warnings,
                    ),
                };
                list.push(entry.at.problem(format!("{of}: {}: {whose}", shown(name))));
                continue;
            };
            let value = match key.kind {
                Kind::Boolean => entry.boolean().map(Value::Boolean),
                Kind::Integer => entry.integer().map(|number| Value::Integer(number.into())),
                Kind::Integer64 => entry.int64().map(Value::Integer),
                Kind::Text => entry.string().map(Value::Text),
            };
            let value = match value {
                Ok(value) => value,
                Err(message) => {
                    remarks
                        .problems
                        .push(entry.at.problem(format!("{of}: {}: {message}", key.name)));
                    continue;
                }
            };
            let asks = match &value {
                Value::Boolean(set) => *set,
                Value::Integer(number) => *number != 0,
                Value::Text(_) => true,
            };
            match key.fate {
                Fate::Refused(reason) if asks => {
                    remarks.problems.push(
                        entry
                            .at
                            .problem(format!("{of}: {} is refused: {reason}", key.name)),
                    );
                    continue;
                }
                Fate::Accepted(reason) if asks && TOLD.contains(&key.name) => {
                    remarks.warnings.push(
                        entry
                            .at
                            .problem(format!("{of}: {} changes nothing: {reason}", key.name)),
                    );
                }
                _ => {}
            }
            found.push((key.name, value, *entry));
        }
        Values {
            at: group.at,
            found,
        }
    }

    pub(super) fn truth(&self, name: &str) -> bool {
        self.boolean(name) == Some(true)
    }

    pub(super) fn boolean(&self, name: &str) -> Option<bool> {
        self.found.iter().find_map(|(key, value, _)| match value {
            Value::Boolean(said) if *key == name => Some(*said),
            _ => None,
        })
    }

    pub(super) fn integer(&self, name: &str) -> Option<i64> {
        self.found.iter().find_map(|(key, value, _)| match value {
            Value::Integer(number) if *key == name => Some(*number),
            _ => None,
        })
    }

    pub(super) fn text(&self, name: &str) -> Option<(&str, Entry<'a>)> {
        self.found
            .iter()
            .find_map(|(key, value, entry)| match value {
                Value::Text(text) if *key == name => Some((text.as_str(), *entry)),
                _ => None,
            })
    }
}

/// Keys whose writer may expect something to happen; the others are offered anyway.
const TOLD: [&str; 2] = ["timeout", "tlsprio"];

/// Linux's PATH_MAX.
const PATH_BYTES_MAX: usize = 4_095;
