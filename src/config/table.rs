//! A TOML table while it is being read: keys are taken out by name, what is left over is unknown. Each value goes
//! through serde; each problem keeps its place.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use super::place::{Places, Problem};

/// One file while it is being read: what is wrong so far.
pub(super) struct Reading<'a> {
    pub(super) places: Places<'a>,
    pub(super) problems: Vec<Problem>,
}

impl Reading<'_> {
    pub(super) fn tell(&mut self, span: Range<usize>, message: impl Into<String>) {
        let problem = self.places.at(span).problem(message);
        self.problems.push(problem);
    }
}

/// A table whose keys are taken out one by one; what is left over is unknown.
pub(super) struct Table<'t, 'a> {
    span: Range<usize>,
    table: DeTable<'a>,
    what: &'static str,
    pub(super) reading: &'t mut Reading<'a>,
    spans: Vec<(&'static str, Range<usize>)>,
}

impl<'t, 'a> Table<'t, 'a> {
    pub(super) fn new(
        span: Range<usize>,
        table: DeTable<'a>,
        what: &'static str,
        reading: &'t mut Reading<'a>,
    ) -> Table<'t, 'a> {
        Table {
            span,
            table,
            what,
            reading,
            spans: Vec::new(),
        }
    }

    pub(super) fn of(
        value: Spanned<DeValue<'a>>,
        what: &'static str,
        reading: &'t mut Reading<'a>,
    ) -> Option<Table<'t, 'a>> {
        let span = value.span();
        match value.into_inner() {
            DeValue::Table(table) => Some(Table::new(span, table, what, reading)),
            _ => {
                reading.tell(span, format!("expected a table, {what}"));
                None
            }
        }
    }

    pub(super) fn take(&mut self, key: &'static str) -> Option<Spanned<DeValue<'a>>> {
        let value = self.table.remove(key)?;
        self.spans.push((key, value.span()));
        Some(value)
    }

    /// The value of a key by serde; one of another type is told and counts as absent.
    pub(super) fn get<T: Deserialize<'a>>(&mut self, key: &'static str) -> Option<Spanned<T>> {
        let value = self.take(key)?;
        let span = value.span();
        match T::deserialize(ValueDeserializer::from(value)) {
            Ok(value) => Some(Spanned::new(span, value)),
            Err(error) => {
                let at = error.span().unwrap_or(span);
                self.reading.tell(at, format!("{key}: {}", error.message()));
                None
            }
        }
    }

    pub(super) fn require<T: Deserialize<'a>>(&mut self, key: &'static str) -> Option<Spanned<T>> {
        if !self.table.contains_key(key) {
            let message = format!("{}: {key} is missing", self.what);
            self.reading.tell(self.span.clone(), message);
        }
        self.get(key)
    }

    pub(super) fn number(
        &mut self,
        key: &'static str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Option<u64> {
        let number = self.get::<i64>(key)?;
        match u64::try_from(*number.get_ref()) {
            Ok(value) if range.contains(&value) => Some(value),
            _ => {
                let (low, high) = range.into_inner();
                let message = format!("{key} = {}: expected {low} to {high}", number.get_ref());
                self.reading.tell(number.span(), message);
                None
            }
        }
    }

    pub(super) fn path(&mut self, key: &'static str) -> Option<PathBuf> {
        let path = self.get::<String>(key)?;
        let text = path.get_ref();
        if !text.starts_with('/') || text.contains('\0') {
            // A daemon's working directory is not what the operator thinks of.
            let message = format!("{key} \"{text}\": expected an absolute path");
            self.reading.tell(path.span(), message);
            return None;
        }
        Some(PathBuf::from(path.into_inner()))
    }

    pub(super) fn tell_at(&mut self, key: &str, message: String) {
        let span = self.spans.iter().find(|(name, _)| *name == key);
        let span = span.map_or(self.span.clone(), |(_, span)| span.clone());
        self.reading.tell(span, message);
    }

    /// Refuses what was not taken.
    pub(super) fn end(self, expected: &[&str]) {
        let left: BTreeSet<(usize, String)> = self
            .table
            .iter()
            .map(|(key, _)| (key.span().start, key.get_ref().to_string()))
            .collect();
        for (at, key) in left {
            let expected = expected.join(", ");
            let shown: String = key.chars().take(100).flat_map(char::escape_debug).collect();
            let whose = match NBD_SERVER_KEYS.contains(&key.as_str()) {
                true => " (nbd-server's, not read here)",
                false => "",
            };
            let message = format!(
                "{}: unknown key \"{shown}\"{whose}, expected one of {expected}",
                self.what
            );
            self.reading.tell(at..at, message);
        }
    }
}

/// What an operator who comes from nbd-server may write out of habit (nbd-server(5)).
const NBD_SERVER_KEYS: [&str; 36] = [
    "generic",
    "exportname",
    "listenaddr",
    "port",
    "unixsock",
    "duallisten",
    "includedir",
    "allowlist",
    "max_threads",
    "force_tls",
    "tlsonly",
    "certfile",
    "keyfile",
    "cacertfile",
    "tlsprio",
    "oldstyle",
    "user",
    "group",
    "authfile",
    "filesize",
    "virtstyle",
    "prerun",
    "postrun",
    "transactionlog",
    "datalog",
    "readonly",
    "multifile",
    "treefiles",
    "copyonwrite",
    "cowdir",
    "sparse_cow",
    "waitfile",
    "maxconnections",
    "rotational",
    "temporary",
    "timeout",
];
