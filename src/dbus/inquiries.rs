//! The Manager's members that ask why and what was: arguments in, a [`Call`] out; explanations and records to dictionaries. PURE.

use std::collections::BTreeMap;

use zbus::{Message, Variant};

use super::introspect::Method;
use super::manager::export_name;
use super::options::{Options, named, no_such_method, only_options};
use super::volume::text;
use super::{Call, Subject};
use crate::correlation::{Candidate, Explanation, Inquiry, Record, RequestError};

/// Records in one answer unless told; the trail's own bound is the most.
pub const RECORDS: u32 = 100;
/// The most records that one answer may have: each is at most some KiB, so an answer is at most a few MiB.
pub const RECORDS_MAX: u32 = 1_000;
/// The longest name of a disk, in bytes (Linux: `DISK_NAME_LEN` is 32, and a path before it).
const DISK_BYTES_MAX: usize = 256;

pub const EXPLAIN_EXPORT: Method = Method {
    name: "ExplainExport",
    takes: &[("name", "s"), ("options", "a{sv}")],
    gives: &[("explanation", "a{sv}")],
};
pub const EXPLAIN_DISK: Method = Method {
    name: "ExplainDisk",
    takes: &[("disk", "s"), ("options", "a{sv}")],
    gives: &[("explanation", "a{sv}")],
};
pub const GET_HISTORY: Method = Method {
    name: "GetHistory",
    takes: &[("options", "a{sv}")],
    gives: &[("records", "aa{sv}")],
};

pub const GET_EXPORT_STATS: Method = Method {
    name: "GetExportStats",
    takes: &[("options", "a{sv}")],
    gives: &[("stats", "a{sa{st}}")],
};
pub const GET_METRICS: Method = Method {
    name: "GetMetrics",
    takes: &[("options", "a{sv}")],
    gives: &[("openmetrics", "s")],
};

/// Reads the call out of a message of one of the methods above.
///
/// # Errors
/// `InvalidArgument`, naming the argument; `NotSupported` for another method.
pub fn parse(method: &str, message: &Message) -> Result<Call, RequestError> {
    match method {
        "ExplainExport" => {
            let (name, options) = named(message)?;
            options.end()?;
            Ok(Call::Explain(Subject::Export(export_name(&name)?)))
        }
        "ExplainDisk" => {
            let (disk, options) = named(message)?;
            options.end()?;
            explain_disk(disk)
        }
        "GetHistory" => history(only_options(message)?),
        "GetExportStats" => only_options(message)?.end().map(|()| Call::Measures),
        "GetMetrics" => only_options(message)?.end().map(|()| Call::Metrics),
        other => Err(no_such_method(other)),
    }
}

fn explain_disk(disk: String) -> Result<Call, RequestError> {
    if disk.is_empty() || disk.len() > DISK_BYTES_MAX || disk.contains(char::is_control) {
        return Err(RequestError::InvalidArgument(format!(
            "disk: has to be a node like /dev/vdb or a DiskSeq, of at most {DISK_BYTES_MAX} bytes"
        )));
    }
    Ok(Call::Explain(Subject::Disk(disk)))
}

fn history(mut options: Options) -> Result<Call, RequestError> {
    let export = options.text("export")?;
    if let Some(name) = &export {
        export_name(name)?;
    }
    let volume = options.text("volume")?;
    let since_us = options.number("since_us")?.unwrap_or(0);
    let after = options.number("after")?.unwrap_or(0);
    let newest = options.truth("newest")?.unwrap_or(false);
    let limit = options.number("limit")?.unwrap_or(RECORDS.into());
    options.end()?;
    let limit = u32::try_from(limit)
        .ok()
        .filter(|limit| (1..=RECORDS_MAX).contains(limit))
        .ok_or_else(|| {
            RequestError::InvalidArgument(format!(
                "option limit: from 1 to {RECORDS_MAX}, this is {limit}"
            ))
        })?;
    Ok(Call::History(Inquiry {
        export,
        volume,
        since_us,
        after,
        newest,
        limit,
    }))
}

pub type Dictionary = BTreeMap<&'static str, Variant<'static>>;

/// What records look like.
pub fn records(records: &[Record]) -> Vec<Dictionary> {
    records.iter().map(record).collect()
}

/// What an explanation and the events that led there look like.
pub fn explained(explanation: &Explanation, events: &[Record], remark: &str) -> Dictionary {
    let Explanation {
        subject,
        state,
        why,
        volume,
        identities,
        candidates,
        more,
        advice,
    } = explanation;
    Dictionary::from([
        ("subject", string(subject)),
        ("state", string(state)),
        ("why", string(why)),
        ("volume", string(volume)),
        ("identities", strings(identities)),
        (
            "candidates",
            Variant::new(candidates.iter().map(candidate).collect::<Vec<_>>()),
        ),
        ("more", Variant::new(*more)),
        ("advice", strings(advice)),
        ("events", Variant::new(records(events))),
        ("events_missing", string(remark)),
    ])
}

fn candidate(candidate: &Candidate) -> Dictionary {
    let Candidate {
        export,
        node,
        diskseq,
        verdict,
        matched,
        unmatched,
        obstacles,
    } = candidate;
    Dictionary::from([
        ("export", string(export)),
        ("node", string(node)),
        ("diskseq", Variant::new(*diskseq)),
        ("verdict", string(verdict)),
        ("matched", strings(matched)),
        ("unmatched", strings(unmatched)),
        ("obstacles", strings(obstacles)),
    ])
}

/// A record has only the keys that apply.
fn record(record: &Record) -> Dictionary {
    let mut dictionary = Dictionary::from([
        ("id", Variant::new(record.id)),
        ("at_us", Variant::new(record.at_us)),
        ("kind", string(record.kind.name())),
    ]);
    for (key, value) in [
        ("export", &record.export),
        ("volume", &record.volume),
        ("node", &record.node),
        ("old", &record.old),
        ("new", &record.new),
        ("detail", &record.detail),
        ("peer", &record.peer),
        ("unit", &record.unit),
    ] {
        if !value.is_empty() {
            dictionary.insert(key, string(value));
        }
    }
    if record.diskseq != 0 {
        dictionary.insert("diskseq", Variant::new(record.diskseq));
    }
    if let Some(uid) = record.uid {
        dictionary.insert("uid", Variant::new(uid));
    }
    dictionary
}

fn string(value: &str) -> Variant<'static> {
    Variant::new(text(value))
}

fn strings(values: &[String]) -> Variant<'static> {
    Variant::new(values.iter().map(|value| text(value)).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options<const N: usize>(
        pairs: [(&'static str, Variant<'static>); N],
    ) -> BTreeMap<&'static str, Variant<'static>> {
        pairs.into()
    }

    fn with<B: serde::Serialize + zbus::DynamicType>(
        method: &str,
        body: &B,
    ) -> Result<Call, RequestError> {
        let message = Message::method_call("/org/nbdtrack1", method);
        parse(method, &message.build(body).unwrap())
    }

    #[test]
    fn history_has_defaults_and_a_bound() {
        let Ok(Call::History(inquiry)) = with("GetHistory", &options([])) else {
            panic!("refused");
        };
        assert_eq!((inquiry.limit, inquiry.newest), (RECORDS, false));
        for limit in [0_u64, 1_001, u64::MAX] {
            let refused = with("GetHistory", &options([("limit", Variant::new(limit))]));
            let text = refused.unwrap_err().to_string();
            assert!(text.contains("from 1 to 1000"), "{text}");
        }
        let refused = with("GetHistory", &options([("colour", Variant::new("red"))]));
        assert!(refused.unwrap_err().to_string().contains("option colour"));
    }

    #[test]
    fn a_disk_is_named_in_few_bytes_and_without_control_characters() {
        for disk in ["", "/dev/\u{1b}[2J", &"x".repeat(257)] {
            assert!(with("ExplainDisk", &(disk, options([]))).is_err(), "{disk}");
        }
        assert_eq!(
            with("ExplainDisk", &("/dev/vdb", options([]))).unwrap(),
            Call::Explain(Subject::Disk("/dev/vdb".to_owned()))
        );
    }
}
