//! `history`: the audit trail, a page at a time, as a table, JSON lines or CSV.

use std::io::Write;

use jiff::{SignedDuration, Timestamp, civil, tz::TimeZone};
use serde_json::{Map, Value};

use super::show::{print, to_json};
use super::table::{TableStyle, lay_out, printable};
use super::{Failure, History};
use crate::correlation::Inquiry;
use crate::dbus::RECORDS_MAX;
use crate::dbus::client::{Client, Properties};

/// The newest so many, unless told.
const LINES: u32 = 50;
/// Columns of the CSV. A promise: new ones come at the end.
const COLUMNS: [&str; 13] = [
    "id", "time", "kind", "export", "volume", "node", "diskseq", "old", "new", "detail", "peer",
    "uid", "unit",
];

/// Prints what is remembered.
pub async fn history(client: &Client, asked: &History, as_json: bool) -> Result<(), Failure> {
    let since_us = match &asked.since {
        Some(text) => since(text, Timestamp::now()).map_err(Failure::Argument)?,
        None => 0,
    };
    let all = asked.since.is_some() && asked.lines.is_none();
    let mut left = asked.lines.unwrap_or(if all { u32::MAX } else { LINES });
    let mut inquiry = Inquiry {
        export: asked.export.clone(),
        volume: asked.volume.clone(),
        since_us,
        after: 0,
        newest: !all,
        limit: left.min(RECORDS_MAX),
    };
    if !all && left > RECORDS_MAX {
        return Err(Failure::Argument(format!(
            "--lines: at most {RECORDS_MAX}; --since has no such bound"
        )));
    }
    let form = match (as_json, asked.csv) {
        (true, _) => Form::Json,
        (false, true) => Form::Csv,
        (false, false) => Form::Table,
    };
    let mut first = true;
    while left > 0 {
        inquiry.limit = left.min(RECORDS_MAX);
        let records = client.history(&inquiry).await.map_err(Failure::Client)?;
        let values: Vec<Value> = records.iter().map(value).collect();
        match form {
            Form::Json => json(&values)?,
            Form::Csv => to_csv(&values, first, std::io::stdout().lock())?,
            Form::Table if values.is_empty() && first => nothing()?,
            Form::Table => table(&values)?,
        }
        let asked_for = usize::try_from(inquiry.limit).unwrap_or(usize::MAX);
        let last = values.last().map(|value| Line::of(value).id);
        match last {
            Some(last) if values.len() == asked_for && !inquiry.newest => inquiry.after = last,
            _ => break,
        }
        left = left.saturating_sub(inquiry.limit);
        first = false;
    }
    Ok(())
}

/// How records are written.
enum Form {
    Table,
    Csv,
    Json,
}

fn json(values: &[Value]) -> std::io::Result<()> {
    let lines: String = values.iter().map(|value| format!("{value}\n")).collect();
    print(&lines)
}

/// For people; a program is told by the empty table.
fn nothing() -> std::io::Result<()> {
    match TableStyle::of_stdout().terminal {
        true => print("nothing is remembered of that\n"),
        false => table(&[]),
    }
}

fn table(values: &[Value]) -> std::io::Result<()> {
    let rows: Vec<Vec<String>> = values
        .iter()
        .map(|value| {
            let line = Line::of(value);
            vec![
                time(line.at_us),
                line.kind.clone(),
                line.who(),
                line.sentence(),
            ]
        })
        .collect();
    let look = TableStyle::of_stdout();
    print(&lay_out(&["TIME", "KIND", "BY", "WHAT"], &rows, look))
}

fn to_csv(values: &[Value], header: bool, out: impl Write) -> std::io::Result<()> {
    let mut writer = csv::Writer::from_writer(out);
    if header {
        writer.write_record(COLUMNS).map_err(failed)?;
    }
    for value in values {
        let fields = COLUMNS.map(|column| match column {
            "time" => time(Line::of(value).at_us),
            column => match value.get(column) {
                Some(Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
                None => String::new(),
            },
        });
        writer.write_record(fields).map_err(failed)?;
    }
    writer.flush()
}

fn failed(error: csv::Error) -> std::io::Error {
    match error.into_kind() {
        csv::ErrorKind::Io(error) => error,
        other => std::io::Error::other(format!("{other:?}")),
    }
}

fn value(record: &Properties) -> Value {
    let map: Map<String, Value> = record
        .iter()
        .map(|(key, value)| (key.clone(), to_json(value)))
        .collect();
    Value::Object(map)
}

/// One record, as far as it is shown to people.
pub struct Line {
    pub id: u64,
    pub at_us: u64,
    pub kind: String,
    export: String,
    volume: String,
    node: String,
    diskseq: u64,
    old: String,
    new: String,
    detail: String,
    peer: String,
    uid: Option<u64>,
    unit: String,
}

impl Line {
    pub fn of(value: &Value) -> Line {
        let text = |key: &str| match value.get(key).and_then(Value::as_str) {
            None | Some("") => String::new(),
            Some(text) => printable(text),
        };
        let number = |key: &str| value.get(key).and_then(Value::as_u64);
        Line {
            id: number("id").unwrap_or(0),
            at_us: number("at_us").unwrap_or(0),
            kind: text("kind"),
            export: text("export"),
            volume: text("volume"),
            node: text("node"),
            diskseq: number("diskseq").unwrap_or(0),
            old: text("old"),
            new: text("new"),
            detail: text("detail"),
            peer: text("peer"),
            uid: number("uid"),
            unit: text("unit"),
        }
    }

    /// Who did it: the caller's user and unit, or the client's address.
    pub fn who(&self) -> String {
        let uid = self.uid.map(|uid| format!("uid {uid}"));
        let parts = [uid.as_deref(), Some(&self.unit), Some(&self.peer)];
        let parts: Vec<&str> = parts
            .into_iter()
            .flatten()
            .filter(|part| !part.is_empty())
            .collect();
        parts.join(" ")
    }

    /// What happened, in one line.
    pub fn sentence(&self) -> String {
        let whose = if self.export.is_empty() {
            &self.volume
        } else {
            &self.export
        };
        let change = match (self.old.is_empty(), self.new.is_empty()) {
            (false, false) => format!("{} -> {}", self.old, self.new),
            _ => format!("{}{}", self.old, self.new),
        };
        let place = match (self.node.is_empty(), self.diskseq) {
            (true, 0) => String::new(),
            (true, diskseq) => format!("diskseq {diskseq}"),
            (false, diskseq) => format!("{} (diskseq {diskseq})", self.node),
        };
        let told: Vec<&str> = [change.as_str(), place.as_str(), self.detail.as_str()]
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect();
        match (whose.is_empty(), told.is_empty()) {
            (true, _) => told.join(", "),
            (false, true) => whose.clone(),
            (false, false) => format!("{whose}: {}", told.join(", ")),
        }
    }
}

/// RFC 3339 in UTC, to the millisecond.
pub fn time(at_us: u64) -> String {
    let micros = i64::try_from(at_us).unwrap_or(i64::MAX);
    match Timestamp::from_microsecond(micros) {
        Ok(at) => format!("{at:.3}"),
        Err(_) => "-".to_owned(),
    }
}

/// `2h`, `3 days`, `2026-11-25`, `2026-11-25T04:00`, each in local time, or a time with its zone.
fn since(text: &str, now: Timestamp) -> Result<u64, String> {
    let wrong = || {
        format!(
            "--since {text:?}: write how long ago (2h, 30m, 7d) or when (2026-11-25, 2026-11-25T04:00, \
             2026-11-25T04:00:00Z)"
        )
    };
    let at = if let Ok(span) = text.parse::<jiff::Span>() {
        let days_are_24_hours = jiff::SpanRelativeTo::days_are_24_hours();
        let ago: SignedDuration = span.to_duration(days_are_24_hours).map_err(|_| wrong())?;
        now.checked_sub(ago.abs()).map_err(|_| wrong())?
    } else if let Ok(at) = text.parse::<Timestamp>() {
        at
    } else {
        let at: civil::DateTime = text.parse().map_err(|_| wrong())?;
        TimeZone::system().to_timestamp(at).map_err(|_| wrong())?
    };
    Ok(u64::try_from(at.as_microsecond()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn since_takes_an_age_or_a_time_and_says_what_it_takes() {
        let now: Timestamp = "2026-11-25T12:00:00Z".parse().unwrap();
        let us = |text: &str| {
            text.parse::<Timestamp>()
                .unwrap()
                .as_microsecond()
                .cast_unsigned()
        };
        assert_eq!(since("2h", now), Ok(us("2026-11-25T10:00:00Z")));
        assert_eq!(since("7 days", now), Ok(us("2026-11-18T12:00:00Z")));
        assert_eq!(
            since("2026-11-24T01:02:03Z", now),
            Ok(us("2026-11-24T01:02:03Z"))
        );
        assert!(since("2026-11-24", now).is_ok());
        for text in ["", "soon", "2026-13-01"] {
            assert!(
                since(text, now).unwrap_err().contains("how long ago"),
                "{text}"
            );
        }
    }

    #[test]
    fn csv_quotes_what_has_commas_quotes_and_line_ends() {
        let records = [
            json!({"id": 7, "at_us": 1_000_000, "kind": "call", "new": "AddExport",
            "detail": "a \"b\", c\nd", "uid": 0}),
        ];
        let mut out = Vec::new();
        to_csv(&records, true, &mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "id,time,kind,export,volume,node,diskseq,old,new,detail,peer,uid,unit\n\
             7,1970-01-01T00:00:01.000Z,call,,,,,,AddExport,\"a \"\"b\"\", c\nd\",,0,\n"
        );
    }
}
