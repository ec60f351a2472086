//! Which volume a path of the configuration means. PURE: what is known goes in, a verdict comes out.
//!
//! `exportname = /dev/vdc` names a path and means the volume that was there when the line was written. Names move, so a path is
//! believed once at most: then the section is *pinned* to what the disk says of itself, and follows that. A path is believed by
//! itself only when the disk that is there now was there before the line was written, and nobody else claims its volume. Everything
//! else waits for a person, who names the disk by its diskseq and so cannot confirm one that came a moment ago.
//!
//! All combinations stand in `pin_rule.txt`, and for people in `docs/pins.md`.

use std::collections::BTreeSet;

use super::facts::{BootId, DeviceNode, DiskSeq, ExportName};
use crate::identity::{Identity, primary};

/// A file that was written so soon after the boot began may be older: the clock is often set only then.
pub const BOOT_SLACK_US: u64 = 30_000_000;

/// Durable: what a section's path means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    pub export: ExportName,
    /// As the section had it when the pin was made; another path is another question.
    pub path: String,
    pub to: PinnedTo,
}

/// What a section is pinned to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum PinnedTo {
    /// The disk that says this of itself, wherever it is attached.
    Volume(Identity),
    /// A disk without an identity, for as long as it is attached: its number says nothing in another boot.
    Attachment { boot: BootId, diskseq: DiskSeq },
    /// Nothing, until a person says what. Durable, for a file that is written again for another reason looks as if the line were
    /// newer than the disk.
    Doubtful {
        /// What spoke against it when the line was first read; empty where that was not kept.
        why: String,
    },
}

/// The disk at a section's path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundDisk {
    pub node: DeviceNode,
    pub diskseq: DiskSeq,
    /// `None` while they have not been read.
    pub identities: Option<BTreeSet<Identity>>,
    pub serial: String,
    /// Bytes.
    pub size: u64,
    /// Since when this diskseq is known to have been at the path, in microseconds since 1970; the truth may be earlier.
    pub since_us: Option<u64>,
}

impl FoundDisk {
    /// What a section that means this disk is pinned to; `None` while that cannot be said.
    pub fn pinned_to(&self, boot: &BootId) -> Option<PinnedTo> {
        let identities = self.identities.as_ref()?;
        Some(match primary(identities) {
            Some(identity) => PinnedTo::Volume(identity.clone()),
            None => PinnedTo::Attachment {
                boot: boot.clone(),
                diskseq: self.diskseq,
            },
        })
    }

    /// Whether a pin means this disk.
    fn is(&self, to: &PinnedTo, boot: &BootId) -> bool {
        match to {
            PinnedTo::Volume(identity) => self
                .identities
                .as_ref()
                .is_some_and(|known| known.contains(identity)),
            PinnedTo::Attachment { boot: of, diskseq } => of == boot && *diskseq == self.diskseq,
            PinnedTo::Doubtful { .. } => false,
        }
    }

    /// The disk in words, for a person who has to tell it from another.
    pub fn describe(&self) -> String {
        let id = match &self.identities {
            None => "an identity that has not been read".to_owned(),
            Some(identities) => match primary(identities) {
                Some(identity) => identity.to_string(),
                None => "no identity".to_owned(),
            },
        };
        format!(
            "the disk with diskseq {} on {} ({id}, serial \"{}\", {} bytes)",
            self.diskseq, self.node, self.serial, self.size
        )
    }
}

/// What stands at a section's path now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AtPath {
    /// Nobody has looked yet, or the look failed, and why.
    Unknown(String),
    /// No disk, and why.
    Nothing(String),
    Disk(FoundDisk),
}

/// When the line with the path was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// Microseconds since 1970.
    At(u64),
    /// A time that proves nothing, and why.
    Unknown(&'static str),
}

impl Written {
    /// What a file's time of modification says, as a time by the clock of the daemon's start. All are in microseconds since 1970 as the
    /// clock is set now: `steady_us` is since when nobody has set it, and `ahead_us` how far ahead of the clock of the start it is.
    pub fn of_file(
        modified_us: u64,
        now_us: u64,
        boot_us: u64,
        steady_us: u64,
        ahead_us: i64,
    ) -> Written {
        if modified_us > now_us {
            return Written::Unknown("the file's time lies in the future");
        }
        if modified_us < boot_us.saturating_add(BOOT_SLACK_US) {
            return Written::Unknown("the file was written before this boot, or as it began");
        }
        if modified_us < steady_us {
            return Written::Unknown("the clock was set since the file was written");
        }
        Written::At(modified_us.saturating_add_signed(ahead_us.saturating_neg()))
    }
}

/// What there is to judge of one section.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    pub path: &'a str,
    pub pin: Option<&'a Pin>,
    pub at: &'a AtPath,
    pub written: Written,
    /// `x-trust-path`: a new pin needs no proof that the disk was there when the line was written.
    pub trust_path: bool,
    /// Another export that claims the volume of the disk at the path, under another path or none.
    pub claimed_by: Option<&'a ExportName>,
    pub boot: &'a BootId,
}

/// What a section's path means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The pin, and nothing at the path speaks against it.
    Keep,
    /// The pin, though this disk is at the path.
    KeepAgainst(FoundDisk),
    /// What is at the path, from now on.
    Pin(PinnedTo),
    /// What a person says, who is shown this disk.
    Confirm { found: FoundDisk, why: String },
    /// It cannot be said yet.
    Undecided(String),
}

/// Judges one section. Total; the same question has the same answer.
pub fn judge(question: Question<'_>) -> Verdict {
    let Question {
        path,
        pin,
        at,
        boot,
        ..
    } = question;
    let open = |pin: &Pin| pin.to.open_in(boot);
    match (pin, at) {
        (Some(pin), AtPath::Disk(found)) if pin.path == path && open(pin).is_none() => {
            match found.is(&pin.to, boot) {
                true => Verdict::Keep,
                // What it is has not been read: nothing speaks against the pin yet.
                false if found.identities.is_none() => Verdict::Keep,
                false => Verdict::KeepAgainst(found.clone()),
            }
        }
        (Some(pin), AtPath::Unknown(_) | AtPath::Nothing(_))
            if pin.path == path && open(pin).is_none() =>
        {
            Verdict::Keep
        }
        // The line was changed, and means the volume that it meant.
        (Some(pin), AtPath::Disk(found)) if found.is(&pin.to, boot) => Verdict::Pin(pin.to.clone()),
        (_, AtPath::Unknown(reason) | AtPath::Nothing(reason)) => {
            Verdict::Undecided(reason.clone())
        }
        (pin, AtPath::Disk(found)) => {
            let same = pin.filter(|pin| pin.path == path);
            judge_new(question, same.and_then(open), found)
        }
    }
}

impl PinnedTo {
    /// Why this names no disk in this boot, so that a person has to.
    fn open_in(&self, boot: &BootId) -> Option<String> {
        match self {
            PinnedTo::Volume(_) => None,
            // Invariant 12: a number of another boot names no disk of this one.
            PinnedTo::Attachment { boot: of, .. } => (of != boot).then(|| {
                "the pin was to a disk without an identity, which no other boot knows".to_owned()
            }),
            PinnedTo::Doubtful { why } => {
                let text = "it was in doubt when the line was first read";
                Some(match why.as_str() {
                    "" => text.to_owned(),
                    why => format!("{text} ({why})"),
                })
            }
        }
    }
}

/// A disk that the section was not pinned to.
fn judge_new(question: Question<'_>, open: Option<String>, found: &FoundDisk) -> Verdict {
    let Some(to) = found.pinned_to(question.boot) else {
        return Verdict::Undecided(format!(
            "the identity of {} has not been read yet",
            found.node
        ));
    };
    let confirm = |why: String| Verdict::Confirm {
        found: found.clone(),
        why,
    };
    if let Some(other) = question.claimed_by {
        return confirm(format!("export {other} claims the same volume"));
    }
    if question.trust_path {
        return Verdict::Pin(to);
    }
    if let Some(why) = open {
        return confirm(why);
    }
    match (question.written, found.since_us) {
        (Written::Unknown(why), _) => {
            confirm(format!("when the line was written is not known: {why}"))
        }
        (Written::At(_), None) => {
            confirm("since when this disk has been there is not known".to_owned())
        }
        // Also of the same microsecond: what came first is not known.
        (Written::At(written), Some(since)) if since >= written => {
            confirm("this disk came after the line was written".to_owned())
        }
        (Written::At(_), Some(_)) => Verdict::Pin(to),
    }
}

/// Why a section whose pin needs a person is not served, with the command by which it is.
pub fn confirmation(name: &ExportName, path: &str, found: &FoundDisk, why: &str) -> String {
    format!(
        "pin needs confirmation: {path} holds {}, but {why}; if it is meant, 'nbdtrack pins confirm {name} --diskseq {}'",
        found.describe(),
        found.diskseq
    )
}

/// What is said of a section whose path holds another disk than the one that it is pinned to.
pub fn mismatch(name: &ExportName, path: &str, to: &PinnedTo, found: &FoundDisk) -> String {
    format!(
        "IdentityMismatch: pinned to {to}, while {path} holds {}; the pin holds; if the other disk is meant, \
         'nbdtrack repin {name} --diskseq {}'",
        found.describe(),
        found.diskseq
    )
}

impl std::fmt::Display for PinnedTo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PinnedTo::Volume(identity) => identity.fmt(f),
            PinnedTo::Attachment { diskseq, .. } => write!(f, "diskseq {diskseq} of this boot"),
            PinnedTo::Doubtful { .. } => f.write_str("nothing"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;
    use crate::identity::Scheme;

    const PINNED: &str = include_str!("pin_rule.txt");
    const PATH: &str = "/dev/vdc";

    fn boot(name: &str) -> BootId {
        BootId(name.to_owned())
    }

    fn identity(value: &str) -> Identity {
        Identity::new(Scheme::VirtioSerial, value)
    }

    fn name(text: &str) -> ExportName {
        ExportName::parse(text).unwrap()
    }

    fn disk(diskseq: u64, identities: Option<&[&str]>) -> FoundDisk {
        FoundDisk {
            node: DeviceNode(PATH.to_owned()),
            diskseq: DiskSeq(diskseq),
            identities: identities.map(|all| all.iter().map(|one| identity(one)).collect()),
            serial: "s".to_owned(),
            size: 512,
            since_us: Some(100),
        }
    }

    fn pins() -> Vec<(&'static str, Option<Pin>)> {
        let pin = |path: &str, to| {
            Some(Pin {
                export: name("a"),
                path: path.to_owned(),
                to,
            })
        };
        let attachment = |of: &str, diskseq| PinnedTo::Attachment {
            boot: boot(of),
            diskseq: DiskSeq(diskseq),
        };
        vec![
            ("no pin", None),
            (
                "pinned to volume A",
                pin(PATH, PinnedTo::Volume(identity("A"))),
            ),
            (
                "pinned to volume A by another path",
                pin("/dev/vdb", PinnedTo::Volume(identity("A"))),
            ),
            ("pinned to attachment 7", pin(PATH, attachment("now", 7))),
            (
                "pinned to attachment 7 by another path",
                pin("/dev/vdb", attachment("now", 7)),
            ),
            (
                "pinned to attachment 7 of another boot",
                pin(PATH, attachment("before", 7)),
            ),
            (
                "pinned to attachment 7 of another boot by another path",
                pin("/dev/vdb", attachment("before", 7)),
            ),
            ("in doubt", pin(PATH, doubtful())),
            ("in doubt by another path", pin("/dev/vdb", doubtful())),
        ]
    }

    fn doubtful() -> PinnedTo {
        let why = "diskseq 3: a reason".to_owned();
        PinnedTo::Doubtful { why }
    }

    fn places() -> Vec<(&'static str, AtPath)> {
        vec![
            ("not looked", AtPath::Unknown("unlooked".to_owned())),
            ("no disk", AtPath::Nothing("nothing".to_owned())),
            ("disk A", AtPath::Disk(disk(8, Some(&["A"])))),
            ("disk B", AtPath::Disk(disk(9, Some(&["B"])))),
            ("disk 7 without identity", AtPath::Disk(disk(7, Some(&[])))),
            ("disk 6 without identity", AtPath::Disk(disk(6, Some(&[])))),
            ("disk 7, unread", AtPath::Disk(disk(7, None))),
            ("disk 6, unread", AtPath::Disk(disk(6, None))),
        ]
    }

    fn word(verdict: &Verdict) -> String {
        match verdict {
            Verdict::Keep => "keep".to_owned(),
            Verdict::KeepAgainst(_) => "keep, and say that the path disagrees".to_owned(),
            Verdict::Pin(to) => format!("pin to {to}"),
            Verdict::Confirm { why, .. } => format!("confirm: {why}"),
            Verdict::Undecided(reason) => format!("wait: {reason}"),
        }
    }

    /// Every combination of pin, path, time, trust and claim; those that do not differ by the last three are one line.
    fn table() -> String {
        let other = name("other");
        let boot = boot("now");
        let mut text = String::new();
        for (pin_words, pin) in pins() {
            writeln!(text, "{pin_words}").unwrap();
            for (place_words, at) in places() {
                let mut rows: Vec<(String, String)> = Vec::new();
                for (words, written, since) in [
                    ("was there", Written::At(101), Some(100)),
                    ("came in the same moment", Written::At(100), Some(100)),
                    ("came after", Written::At(99), Some(100)),
                    ("since when is not known", Written::At(101), None),
                    ("unknown time", Written::Unknown("odd"), Some(100)),
                ] {
                    for (trusted, trust_path) in [("", false), (", trusted", true)] {
                        for (claimed, claimed_by) in [("", None), (", claimed", Some(&other))] {
                            let mut at = at.clone();
                            if let AtPath::Disk(found) = &mut at {
                                found.since_us = since;
                            }
                            let verdict = judge(Question {
                                path: PATH,
                                pin: pin.as_ref(),
                                at: &at,
                                written,
                                trust_path,
                                claimed_by,
                                boot: &boot,
                            });
                            rows.push((format!("{words}{trusted}{claimed}"), word(&verdict)));
                        }
                    }
                }
                if rows.iter().all(|(_, verdict)| *verdict == rows[0].1) {
                    rows = vec![("whatever else".to_owned(), rows[0].1.clone())];
                }
                for (case, verdict) in rows {
                    writeln!(text, "  {place_words:24} {case:44} {verdict}").unwrap();
                }
            }
        }
        text
    }

    #[test]
    fn all_combinations_of_path_pin_and_disk_are_as_they_were_read() {
        let table = table();
        if std::env::var_os("NBDTRACK_ACCEPT").is_some() {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/correlation/pin_rule.txt");
            std::fs::write(path, &table).unwrap();
            return;
        }
        for (at, (new, old)) in table.lines().zip(PINNED.lines()).enumerate() {
            assert_eq!(new, old, "line {}; accept with NBDTRACK_ACCEPT=1", at + 1);
        }
        assert_eq!(table.len(), PINNED.len());
    }

    /// What must never be, said apart from the table, which someone may accept by mistake.
    #[test]
    fn a_newcomer_at_the_path_is_never_taken_by_itself() {
        let boot = boot("now");
        for (words, pin) in pins() {
            for (_, at) in places() {
                let AtPath::Disk(found) = &at else { continue };
                for written in [Written::At(100), Written::At(7), Written::Unknown("odd")] {
                    let verdict = judge(Question {
                        path: PATH,
                        pin: pin.as_ref(),
                        at: &at,
                        written,
                        trust_path: false,
                        claimed_by: None,
                        boot: &boot,
                    });
                    if let Verdict::Pin(to) = &verdict {
                        let known = pin.as_ref().map(|pin| &pin.to);
                        assert_eq!(known, Some(to), "{words}: {found:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_time_that_proves_nothing_is_not_believed() {
        let boot_us = 1_000_000_000;
        let now = boot_us + 70_000_000;
        let of = |modified| Written::of_file(modified, now, boot_us, 0, 0);
        assert_eq!(of(now), Written::At(now));
        assert!(matches!(of(now + 1), Written::Unknown(_)));
        assert!(matches!(
            of(boot_us + BOOT_SLACK_US - 1),
            Written::Unknown(_)
        ));
        assert_eq!(
            of(boot_us + BOOT_SLACK_US),
            Written::At(boot_us + BOOT_SLACK_US)
        );
        // The clock was set an hour ahead five seconds ago.
        let (steady, ahead) = (now - 5_000_000, 3_600_000_000);
        let of = |modified| Written::of_file(modified, now, boot_us, steady, ahead);
        assert!(matches!(of(steady - 1), Written::Unknown(_)));
        let told = steady.checked_add_signed(-ahead).unwrap_or(0);
        assert_eq!(of(steady), Written::At(told));
        let back = Written::of_file(now, now, boot_us, steady, -ahead);
        assert_eq!(back, Written::At(now + 3_600_000_000));
    }

    #[test]
    fn what_is_told_names_the_disk_and_the_command() {
        let found = disk(9, Some(&["B"]));
        let to = PinnedTo::Volume(identity("A"));
        let text = mismatch(&name("job"), PATH, &to, &found);
        for part in [
            "IdentityMismatch",
            "virtio-serial:A",
            "virtio-serial:B",
            "diskseq 9",
            "512 bytes",
            "nbdtrack repin job --diskseq 9",
        ] {
            assert!(text.contains(part), "{text}");
        }
        let text = confirmation(&name("job"), PATH, &found, "why");
        assert!(
            text.contains("nbdtrack pins confirm job --diskseq 9"),
            "{text}"
        );
    }
}
