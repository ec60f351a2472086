//! What is worth remembering of what happened: the lines of the audit trail. PURE: no clock, the time is given.

use super::{Correlation, Generation, Notice, State};

/// The longest text in a record, in bytes: the trail is bounded by its number of records, so each has to be bounded too.
pub const RECORD_TEXT_BYTES_MAX: usize = 1_024;

/// What kind of thing happened. The names are a promise to those who read `--json` and CSV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecordKind {
    /// The daemon began to keep the trail.
    Started,
    Attached,
    Detached,
    Renamed,
    Resized,
    Conflict,
    /// Any other state of an export.
    State,
    /// An export was bound to a disk for the first time since the start.
    Served,
    /// An export was bound anew: another disk, or the same one attached again.
    Switched,
    /// An export is not served for a reason that waits for a person.
    Refused,
    /// A client came, left, or was turned away.
    Client,
    /// Someone called a method that changes something.
    Call,
    /// Records could not be kept.
    Lost,
}

impl RecordKind {
    pub const ALL: [RecordKind; 13] = [
        RecordKind::Started,
        RecordKind::Attached,
        RecordKind::Detached,
        RecordKind::Renamed,
        RecordKind::Resized,
        RecordKind::Conflict,
        RecordKind::State,
        RecordKind::Served,
        RecordKind::Switched,
        RecordKind::Refused,
        RecordKind::Client,
        RecordKind::Call,
        RecordKind::Lost,
    ];

    pub fn name(self) -> &'static str {
        match self {
            RecordKind::Started => "started",
            RecordKind::Attached => "attached",
            RecordKind::Detached => "detached",
            RecordKind::Renamed => "renamed",
            RecordKind::Resized => "resized",
            RecordKind::Conflict => "conflict",
            RecordKind::State => "state",
            RecordKind::Served => "served",
            RecordKind::Switched => "switched",
            RecordKind::Refused => "refused",
            RecordKind::Client => "client",
            RecordKind::Call => "call",
            RecordKind::Lost => "lost",
        }
    }

    /// Kinds that share a bound: a flood of clients must not push out what disks and callers did.
    pub fn class(self) -> RecordClass {
        match self {
            RecordKind::Client => RecordClass::Clients,
            RecordKind::Call => RecordClass::Calls,
            _ => RecordClass::Machine,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RecordClass {
    Machine,
    Calls,
    Clients,
}

impl RecordClass {
    pub const ALL: [RecordClass; 3] = [
        RecordClass::Machine,
        RecordClass::Calls,
        RecordClass::Clients,
    ];
}

/// One line of the trail. Empty text and 0 are "does not apply".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Given by the trail; grows.
    pub id: u64,
    /// Microseconds since 1970 UTC, by the machine's clock of that moment.
    pub at_us: u64,
    pub kind: RecordKind,
    pub export: String,
    /// `profile:id` of an export, or `scheme:value` of a disk.
    pub volume: String,
    pub node: String,
    pub diskseq: u64,
    pub old: String,
    /// The new state, node or size; the method of a call; `came`, `left` or `refused` of a client.
    pub new: String,
    /// Why, or how a call ended.
    pub detail: String,
    /// Unique bus name of a caller, or address of a client.
    pub peer: String,
    pub uid: Option<u32>,
    /// The systemd unit of a caller.
    pub unit: String,
}

impl Record {
    /// A record of which only the kind is known yet.
    pub fn new(kind: RecordKind, at_us: u64) -> Record {
        Record {
            id: 0,
            at_us,
            kind,
            export: String::new(),
            volume: String::new(),
            node: String::new(),
            diskseq: 0,
            old: String::new(),
            new: String::new(),
            detail: String::new(),
            peer: String::new(),
            uid: None,
            unit: String::new(),
        }
    }

    /// Cuts every text to [`RECORD_TEXT_BYTES_MAX`], at a character.
    pub fn bounded(mut self) -> Record {
        for text in [
            &mut self.export,
            &mut self.volume,
            &mut self.node,
            &mut self.old,
            &mut self.new,
            &mut self.detail,
            &mut self.peer,
            &mut self.unit,
        ] {
            let end = text.floor_char_boundary(RECORD_TEXT_BYTES_MAX);
            text.truncate(end);
        }
        self
    }
}

/// Which records are asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inquiry {
    /// Of this export, or of this volume: one of them is enough. All when both are missing.
    pub export: Option<String>,
    pub volume: Option<String>,
    pub since_us: u64,
    /// Those after this id.
    pub after: u64,
    /// The newest rather than the first; they come in order all the same.
    pub newest: bool,
    /// At most so many.
    pub limit: u32,
}

impl Correlation {
    /// The record of a notice; `None` for one that is only an order to look at a view.
    pub fn record(&self, notice: &Notice, at_us: u64) -> Option<Record> {
        let of_disk = |kind, diskseq: &super::DiskSeq, id: &str, node: &str| Record {
            volume: id.to_owned(),
            node: node.to_owned(),
            diskseq: diskseq.0,
            ..Record::new(kind, at_us)
        };
        Some(match notice {
            // A reload is its caller's record.
            Notice::Export(_) | Notice::Disk(_) | Notice::Exports(_) | Notice::Reloaded(_) => {
                return None;
            }
            Notice::Attached { diskseq, id, node } => {
                of_disk(RecordKind::Attached, diskseq, id, &node.0)
            }
            Notice::Detached { diskseq, id, node } => {
                of_disk(RecordKind::Detached, diskseq, id, &node.0)
            }
            Notice::Renamed {
                diskseq,
                id,
                old,
                new,
            } => Record {
                old: old.0.clone(),
                new: new.0.clone(),
                ..of_disk(RecordKind::Renamed, diskseq, id, &new.0)
            },
            Notice::Resized {
                diskseq,
                id,
                old,
                new,
            } => Record {
                old: old.to_string(),
                new: new.to_string(),
                ..of_disk(RecordKind::Resized, diskseq, id, &self.node_of(*diskseq))
            },
            Notice::ExportState {
                export,
                old,
                new,
                reason,
            } => {
                let view = self.export(export);
                let generation = view.as_ref().map_or(Generation(0), |view| view.generation);
                let disk = view.as_ref().and_then(|view| view.disk);
                Record {
                    export: export.to_string(),
                    volume: view.map(|view| view.volume_id).unwrap_or_default(),
                    node: disk.map(|disk| self.node_of(disk)).unwrap_or_default(),
                    diskseq: disk.map_or(0, |disk| disk.0),
                    old: old.name().to_owned(),
                    new: new.name().to_owned(),
                    detail: reason.clone(),
                    ..Record::new(kind_of(*new, generation), at_us)
                }
            }
            Notice::IdentityConflict { id, disks } => {
                let disks: Vec<String> = disks
                    .iter()
                    .map(|disk| format!("{} (diskseq {disk})", self.node_of(*disk)))
                    .collect();
                Record {
                    volume: id.clone(),
                    detail: disks.join(", "),
                    ..Record::new(RecordKind::Conflict, at_us)
                }
            }
        })
    }
}

fn kind_of(new: State, generation: Generation) -> RecordKind {
    match new {
        State::Serving if generation > Generation(1) => RecordKind::Switched,
        State::Serving => RecordKind::Served,
        State::Ambiguous | State::Failed => RecordKind::Refused,
        State::Absent | State::Opening | State::Draining | State::Released => RecordKind::State,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_at_a_character_and_never_longer_than_the_bound() {
        let mut record = Record::new(RecordKind::Call, 1);
        record.detail = "é".repeat(2_000);
        record.export = format!("x{}", "é".repeat(2_000));
        let bounded = record.bounded();
        assert_eq!(bounded.detail.len(), RECORD_TEXT_BYTES_MAX);
        assert_eq!(bounded.export.len(), RECORD_TEXT_BYTES_MAX - 1);
    }

    #[test]
    fn every_kind_has_a_name_of_its_own() {
        let names: std::collections::BTreeSet<&str> =
            RecordKind::ALL.iter().map(|kind| kind.name()).collect();
        assert_eq!(names.len(), RecordKind::ALL.len());
    }

    #[test]
    fn the_second_binding_is_a_switch_and_trouble_is_a_refusal() {
        assert_eq!(kind_of(State::Serving, Generation(1)), RecordKind::Served);
        assert_eq!(kind_of(State::Serving, Generation(2)), RecordKind::Switched);
        assert_eq!(
            kind_of(State::Ambiguous, Generation(2)),
            RecordKind::Refused
        );
        assert_eq!(kind_of(State::Absent, Generation(2)), RecordKind::State);
    }
}
