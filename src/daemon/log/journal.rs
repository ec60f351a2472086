//! The log as systemd's journal takes it: one datagram an event, its facts as fields, and a MESSAGE_ID for what the catalog explains
//! (`journalctl -x`, `packaging/nbdtrack.catalog`). Encoding is pure; the socket is written to by the log's own thread.

use std::fmt::Write as _;
use std::io;
use std::os::linux::fs::MetadataExt as _;
use std::os::unix::net::UnixDatagram;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_appender::non_blocking::NonBlocking;
use tracing_subscriber::layer::{Context, Layer};

/// Where journald listens (systemd-journald.service(8)).
const SOCKET: &str = "/run/systemd/journal/socket";

/// A longer value is cut: a datagram of all fields stays below the smallest send buffer, so that no memfd is needed.
const VALUE_BYTES_MAX: usize = 8 << 10;
/// Fields past these are left out.
const FIELDS_MAX: usize = 16;

/// The events that the catalog explains: the event's name, or the word of a decision of the middle, and the MESSAGE_ID, which is a
/// promise. New ones come from `systemd-id128 new`.
pub(super) const MESSAGES: &[(&str, &str)] = &[
    ("Absent", "738d3936505f41df8f60790672b6b3bf"),
    ("Opening", "8868e24afd69404fbbf64ab29c27f6e7"),
    ("Serving", "e466b53e73504047b33dd9d39f1084fe"),
    ("Draining", "0b3ed11774174662afcf05fa5be00301"),
    ("Released", "4952ed19db7c41b8b388e17c21bd2c00"),
    ("Ambiguous", "e03634baf88a4872a23446e5b726b77c"),
    ("Failed", "75ddf9036e874fa6b7b6779310b5ac95"),
    ("attached", "1c1cea662e9b4375a85fc8c9570c3b69"),
    ("detached", "03c32dc976534af29e1b964579ad4dc3"),
    ("resized", "e991987ecab043ceae77206f4c3072f5"),
    ("released", "de4f6e9ecb8d4329a2e0859e348999cb"),
    ("taken back", "7024a8756e30477e8d7f41b2469fdba4"),
    ("still attached", "64947c48777d4716b0f1b9ab68d37f83"),
    ("refused", "f866effe7a444994bcce12da5d5cface"),
    ("not durable", "89bf15fc552f4ee5a50e0264679a8d00"),
    ("moved", "e197123cfc64418a88fdc313271e7239"),
    ("pinned", "b54c1d74657e4c0f9fa17e6610fbd12a"),
    ("pin", "335f388ff14147f09920349747033efe"),
    ("store", "69705377c0bc463ab078822c4e0fee38"),
    ("survey", "2ea677ec29224760bdf8b2c4dd94fbc4"),
    ("config_reloaded", "c0b24da241714e5ea8d5458c9365b828"),
    ("config_refused", "d6ffc88be8d1432184b099ec04da594e"),
    ("ready", "460cf42589d64ba9ac543c1f30a04e12"),
    ("stopping", "094f0a234d4d4a009b30cbe062af3e6e"),
    ("stopped", "261289ffd35a4af79f23ccb57f760aa6"),
    ("drain_over", "a1c56823e58b40339f28fefccc156f6b"),
    ("disk_hung", "5f2ac5bf115d48439c9ab1d4f9737e1d"),
    ("disk_answered", "4c0e1b0d674446149ef92ef2d0750676"),
    ("events_lost", "241a74b6d8174c75b441bf276a8e8876"),
    ("bus_lost", "521fec30b980433fbd55633f59da0b9b"),
    ("bus_joined", "86f2fec68b73452c8bc80b0f223d83f2"),
    ("history_lost", "c612d2df1a394ca5913a4fa7fc78ad5e"),
    ("history_kept", "39380777fb224861a36dcc9ccf98784d"),
    ("limit_reached", "a4d99d62d1d34e53bb3ac9aa96f14218"),
    ("watchdog_silent", "27e74f3c6de242f5adce6016f6bf4420"),
];

/// Events whose message has what their fields have, in words; of those a zero says something, too.
const TOLD_IN_WORDS: &[&str] = &["config_reloaded"];

/// Whether standard error is the journal (systemd.exec(5), JOURNAL_STREAM).
pub(super) fn is_stderr() -> bool {
    let Some(stream) = std::env::var("JOURNAL_STREAM").ok() else {
        return false;
    };
    std::fs::metadata("/proc/self/fd/2")
        .is_ok_and(|stderr| stream == format!("{}:{}", stderr.st_dev(), stderr.st_ino()))
}

/// The way to journald. It may restart: each datagram finds it anew.
pub(super) struct Socket(UnixDatagram);

impl Socket {
    pub fn open() -> io::Result<Socket> {
        let socket = UnixDatagram::unbound()?;
        // A journal that is not there is no journal to log to.
        std::fs::metadata(SOCKET)?;
        Ok(Socket(socket))
    }
}

impl io::Write for Socket {
    /// One event: what is written at once is one datagram.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        self.0.send_to(event, SOCKET)?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hands events to the log's thread; `queue` never waits and counts what it drops.
pub(super) struct Journal {
    pub queue: NonBlocking,
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut facts = Facts::default();
        event.record(&mut facts);
        let data = event.metadata();
        let message = encode(
            &facts,
            *data.level(),
            data.name(),
            data.file().zip(data.line()),
        );
        // The writer takes all of it or counts it.
        let _taken = io::Write::write(&mut self.queue.clone(), &message);
    }
}

/// An event's message and fields, as text.
#[derive(Default)]
struct Facts {
    message: String,
    fields: Vec<(&'static str, String)>,
}

impl Facts {
    fn put(&mut self, field: &Field, value: String) {
        if field.name() == "message" {
            self.message = value;
        } else if self.fields.len() < FIELDS_MAX {
            self.fields.push((field.name(), value));
        }
    }
}

impl Visit for Facts {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.put(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.to_owned());
    }
}

/// journald's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL).
fn encode(facts: &Facts, level: Level, name: &str, place: Option<(&str, u32)>) -> Vec<u8> {
    let in_words = TOLD_IN_WORDS.contains(&name);
    // Nothing is told of what an event does not have.
    let told = |value: &str| !value.is_empty() && (in_words || value != "0");
    let fields = facts.fields.iter().filter(|(_, value)| told(value));
    let mut text = facts.message.clone();
    for (name, value) in fields.clone().filter(|_| !in_words) {
        // The text alone is what `journalctl` shows.
        let number = value.bytes().all(|digit| digit.is_ascii_digit());
        let _infallible = match number {
            true => write!(text, " {name}={value}"),
            false => write!(text, " {name}={value:?}"),
        };
    }
    let mut message = Vec::with_capacity(512);
    put(&mut message, "MESSAGE", &text);
    put(&mut message, "PRIORITY", priority(level));
    put(&mut message, "SYSLOG_IDENTIFIER", "nbdtrack");
    if let Some(id) = message_id(name).or_else(|| message_id(&facts.message)) {
        put(&mut message, "MESSAGE_ID", id);
    }
    if let Some((file, line)) = place {
        put(&mut message, "CODE_FILE", file);
        put(&mut message, "CODE_LINE", &line.to_string());
    }
    for (name, value) in fields {
        put(&mut message, &field_name(name), value);
    }
    message
}

fn message_id(name: &str) -> Option<&'static str> {
    let (_, id) = MESSAGES.iter().find(|(known, _)| *known == name)?;
    Some(id)
}

/// The fields that docs/install.md promises have plain names, the others are marked as ours.
fn field_name(name: &str) -> String {
    match name {
        "node" => "DEVICE_NODE".to_owned(),
        "export" | "volume" | "diskseq" | "generation" | "reason" => name.to_ascii_uppercase(),
        other => format!("NBDTRACK_{}", other.to_ascii_uppercase()),
    }
}

/// syslog(3)
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        Level::DEBUG | Level::TRACE => "7",
    }
}

fn put(message: &mut Vec<u8>, name: &str, value: &str) {
    let value = &value[..value.floor_char_boundary(VALUE_BYTES_MAX)];
    message.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        // What has a line's end in it goes with its length, so that it cannot be taken for a field.
        message.push(b'\n');
        let length = u64::try_from(value.len()).unwrap_or(u64::MAX);
        message.extend_from_slice(&length.to_le_bytes());
    } else {
        message.push(b'=');
    }
    message.extend_from_slice(value.as_bytes());
    message.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::correlation::{State, Topic};

    fn facts(message: &str, fields: &[(&'static str, &str)]) -> Facts {
        Facts {
            message: message.to_owned(),
            fields: fields
                .iter()
                .map(|(name, value)| (*name, (*value).to_owned()))
                .collect(),
        }
    }

    #[test]
    fn a_decision_is_one_message_with_its_id_and_its_facts_as_fields() {
        let facts = facts("Serving", &[("export", "vol-a"), ("node", "/dev/vdb")]);
        let message = String::from_utf8(encode(&facts, Level::INFO, "event", None)).unwrap();
        let expected = "MESSAGE=Serving export=\"vol-a\" node=\"/dev/vdb\"\nPRIORITY=6\nSYSLOG_IDENTIFIER=nbdtrack\n\
            MESSAGE_ID=e466b53e73504047b33dd9d39f1084fe\nEXPORT=vol-a\nDEVICE_NODE=/dev/vdb\n";
        assert_eq!(message, expected);
    }

    #[test]
    fn a_reload_reads_as_a_sentence_with_its_zeroes_and_others_pass_over_theirs() {
        let reloaded = facts("added 1, refused 0", &[("added", "1"), ("refused", "0")]);
        let message = encode(&reloaded, Level::INFO, "config_reloaded", None);
        let message = String::from_utf8(message).unwrap();
        assert!(
            message.starts_with("MESSAGE=added 1, refused 0\n"),
            "{message}"
        );
        assert!(
            message.ends_with("NBDTRACK_ADDED=1\nNBDTRACK_REFUSED=0\n"),
            "{message}"
        );
        let absent = facts("Absent", &[("generation", "0"), ("diskseq", "7")]);
        let message = encode(&absent, Level::INFO, "event", None);
        let message = String::from_utf8(message).unwrap();
        assert!(
            message.starts_with("MESSAGE=Absent diskseq=7\n"),
            "{message}"
        );
        assert!(!message.contains("GENERATION"), "{message}");
    }

    #[test]
    fn what_comes_from_outside_cannot_make_a_field() {
        let facts = facts("refused", &[("reason", "x\nPRIORITY=0")]);
        let message = encode(&facts, Level::WARN, "event", None);
        let forged = b"\nREASON\n\x0c\0\0\0\0\0\0\0x\nPRIORITY=0\n";
        assert!(message.ends_with(forged));
        let lines = message.split(|byte| *byte == b'\n');
        assert_eq!(
            lines.filter(|line| line.starts_with(b"PRIORITY=4")).count(),
            1
        );
    }

    #[test]
    fn a_message_stays_small_enough_for_a_datagram() {
        let long = "ä".repeat(100_000);
        let fields = [("reason", long.as_str()); FIELDS_MAX];
        let message = encode(&facts("x", &fields), Level::INFO, "event", None);
        assert!(message.len() < 160 << 10, "{}", message.len());
    }

    #[test]
    fn everything_that_the_middle_logs_has_a_message_id() {
        let states = State::ALL.into_iter().map(Topic::State);
        for topic in states.chain(Topic::EVENTS) {
            let name = topic.name();
            assert!(MESSAGES.iter().any(|(known, _)| *known == name), "{name}");
        }
    }

    #[test]
    fn every_message_id_is_one_of_its_own_and_the_catalog_explains_it() {
        let catalog = include_str!("../../../packaging/nbdtrack.catalog");
        let explained = catalog.lines().filter_map(|line| line.strip_prefix("-- "));
        let explained: std::collections::BTreeSet<&str> = explained.collect();
        let ids: std::collections::BTreeSet<&str> = MESSAGES.iter().map(|(_, id)| *id).collect();
        assert_eq!(ids.len(), MESSAGES.len());
        assert_eq!(explained, ids);
        assert!(
            ids.iter()
                .all(|id| id.len() == 32 && u128::from_str_radix(id, 16).is_ok())
        );
    }
}
