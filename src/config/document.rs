//! One configuration file: TOML to values, each with its place. Goes on after a problem, so that all are told.

use std::collections::BTreeSet;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::bus_access::{BusAccess, bus_access};
use super::claim::claim;
use super::limits::{Limits, limits};
use super::place::{Place, Places, Problem};
use super::server::server;
use super::table::{Reading, Table};
use super::{ClaimRules, IdentityRules, Server, SourceFile};
use crate::correlation::{Definition, ExportName, Source};
use crate::identity::{Format, OptIn, VolumeId};

/// What one file holds, as far as it could be read.
#[derive(Default)]
pub(super) struct Document<'a> {
    pub(super) server: Server,
    pub(super) limits: Limits,
    pub(super) identity: IdentityRules,
    pub(super) claim: Option<ClaimRules>,
    pub(super) dbus: BusAccess,
    pub(super) exports: Vec<FoundExport<'a>>,
}

/// What a file is to the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Main,
    /// In `conf.d`: exports only.
    Part,
    /// What `x-settings` of nbd-server's configuration names: no exports, and nothing that is said there.
    Settings,
}

/// An export and where its name and its volume stand.
pub(super) struct FoundExport<'a> {
    pub(super) definition: Definition,
    pub(super) name_at: Place<'a>,
    pub(super) volume_at: Place<'a>,
}

impl<'a> Document<'a> {
    /// Reads one file; what is wrong goes to `problems`.
    pub(super) fn parse(
        file: &'a SourceFile,
        role: Role,
        problems: &mut Vec<Problem>,
    ) -> Document<'a> {
        let mut reading = Reading {
            places: Places::new(&file.path, &file.text),
            problems: Vec::new(),
        };
        let mut document = Document::default();
        if is_nbd_server(&file.text) {
            reading.tell(
                0..0,
                "this is an nbd-server configuration (it begins with [generic]); such a file is the main file or is \
                 included by one, and does not stand beside TOML",
            );
            problems.append(&mut reading.problems);
            return document;
        }
        let (root, errors) = DeTable::parse_recoverable(&file.text);
        for error in errors.iter().take(SYNTAX_PROBLEMS_MAX) {
            reading.tell(error.span().unwrap_or_default(), error.message());
        }
        // What the parser made up for a broken line is not to be complained of a second time.
        let broken: BTreeSet<usize> = reading.problems.iter().map(|p| p.line).collect();
        let syntax = reading.problems.len();
        let whole = syntax == 0;
        document.read(root, role, &mut reading);
        let told = reading.problems.into_iter().enumerate();
        let told = told.filter(|(at, p)| *at < syntax || !broken.contains(&p.line));
        problems.extend(told.map(|(_, p)| p));
        if !whole {
            // Half of a file is no configuration, and checks across files would speak of what is not there.
            document.exports.clear();
        }
        document
    }

    fn read(&mut self, root: Spanned<DeTable<'a>>, role: Role, reading: &mut Reading<'a>) {
        let mut table = Table::new(root.span(), root.into_inner(), "the file", reading);
        if role != Role::Part {
            if let Some(value) = table.take("identity") {
                self.identity = identity(value, table.reading);
            }
            if let Some(value) = table.take("limits") {
                self.limits = limits(value, table.reading);
            }
            if let Some(value) = table.take("claim") {
                self.claim = Some(claim(value, table.reading));
            }
            if let Some(value) = table.take("dbus") {
                self.dbus = bus_access(value, table.reading);
            }
            if let Some(value) = table.take("server") {
                self.server = server(value, role, &mut self.identity, table.reading);
            }
        } else {
            for key in ["server", "dbus", "limits", "identity", "claim"] {
                if let Some(value) = table.take(key) {
                    table.reading.tell(
                        value.span(),
                        format!("[{key}] belongs into the main file; a file in conf.d holds only [[export]]"),
                    );
                }
            }
        }
        if let Some(value) = table.take("export") {
            let span = value.span();
            match value.into_inner() {
                _ if role == Role::Settings => table.reading.tell(
                    span,
                    "[[export]]: the exports beside these settings are the sections of nbd-server's configuration",
                ),
                DeValue::Array(items) => {
                    for item in items {
                        self.exports.extend(export(item, table.reading));
                    }
                }
                _ => table
                    .reading
                    .tell(span, "expected [[export]], with two brackets"),
            }
        }
        let all = [
            "[server]",
            "[dbus]",
            "[limits]",
            "[identity]",
            "[claim]",
            "[[export]]",
        ];
        let (settings, export) = all.split_at(all.len() - 1);
        table.end(match role {
            Role::Main => &all,
            Role::Part => export,
            Role::Settings => settings,
        });
    }
}

fn identity<'a>(value: Spanned<DeValue<'a>>, reading: &mut Reading<'a>) -> IdentityRules {
    let mut rules = IdentityRules::default();
    let Some(mut table) = Table::of(value, "[identity]", reading) else {
        return rules;
    };
    for item in table
        .get::<Vec<Spanned<String>>>("allow")
        .map(Spanned::into_inner)
        .unwrap_or_default()
    {
        match OptIn::ALL
            .into_iter()
            .find(|class| class.name() == item.get_ref())
        {
            Some(class) => {
                rules.allow.insert(class);
            }
            None => table.reading.tell(
                item.span(),
                format!("allow \"{}\": expected \"gpt\" or \"slot\"", item.get_ref()),
            ),
        }
    }
    table.end(&["allow"]);
    rules
}

fn export<'a>(value: Spanned<DeValue<'a>>, reading: &mut Reading<'a>) -> Option<FoundExport<'a>> {
    let mut table = Table::of(value, "[[export]]", reading)?;
    let name = table.require::<String>("name");
    let shown = name.as_ref().map_or("?", |name| name.get_ref()).to_owned();
    let of = format!("export \"{shown}\"");
    let said = table.get::<String>("format");
    let path = table.get::<String>("path");
    let mut format = Format::Raw;
    if said.is_some() || path.is_some() {
        let span = said.as_ref().or(path.as_ref()).map(Spanned::span);
        let of_path = path.as_ref().map_or("", |path| path.get_ref());
        match Format::told(of_path, said.as_ref().map(|said| said.get_ref().as_str())) {
            Ok(told) => format = told,
            Err(message) => {
                let span = span.unwrap_or_default();
                table.reading.tell(span, format!("{of}: format: {message}"));
            }
        }
    }
    if path.is_none()
        && format != Format::Raw
        && let Some(said) = &said
    {
        let message = format!("{of}: format = \"qcow2\" is of a file: say path, not volume");
        table.reading.tell(said.span(), message);
    }
    let volume = match &path {
        Some(path) => {
            if let Some(volume) = table.take("volume") {
                table.reading.tell(
                    volume.span(),
                    format!("{of}: volume and path: give one of them"),
                );
            }
            Some(Spanned::new(
                path.span(),
                format!("{}:{}", format.scheme().name(), path.get_ref()),
            ))
        }
        None => table.require::<String>("volume"),
    };
    let read_only = table.get("read_only").is_some_and(Spanned::into_inner);
    let share = table.get("share").is_some_and(Spanned::into_inner);
    let direct = table.get("direct").is_some_and(Spanned::into_inner);
    if let Some(word) = table.get::<String>("on_detach")
        && word.get_ref() != "disconnect"
    {
        table.reading.tell(
            word.span(),
            format!(
                "{of}: on_detach = \"{}\" is not there yet; only \"disconnect\" is",
                word.get_ref()
            ),
        );
    }
    table.end(&[
        "name",
        "volume",
        "path",
        "format",
        "read_only",
        "share",
        "direct",
        "on_detach",
    ]);
    let name = name.and_then(|name| match ExportName::parse(name.get_ref()) {
        Ok(parsed) => Some((parsed, reading.places.at(name.span()))),
        Err(error) => {
            reading.tell(name.span(), format!("name: {error}"));
            None
        }
    });
    let volume = volume.and_then(|volume| match VolumeId::parse(volume.get_ref()) {
        Ok(parsed) => Some((parsed, reading.places.at(volume.span()))),
        Err(error) => {
            let key = path.as_ref().map_or("volume", |_| "path");
            reading.tell(volume.span(), format!("{of}: {key} {error}"));
            None
        }
    });
    let ((name, name_at), (volume, volume_at)) = (name?, volume?);
    let definition = Definition {
        name,
        volume,
        read_only,
        share,
        direct,
        source: Source::Config,
    };
    Some(FoundExport {
        definition,
        name_at,
        volume_at,
    })
}

/// Whether the first line that says anything is nbd-server's (its manual: the first section must be [generic]).
pub(super) fn is_nbd_server(text: &str) -> bool {
    text.lines()
        .map(str::trim)
        .find(|line| !line.is_empty() && !line.starts_with(['#', ';']))
        .is_some_and(|line| line.starts_with("[generic]"))
}

/// Enough to mend a file by; a binary one has thousands.
const SYNTAX_PROBLEMS_MAX: usize = 20;
