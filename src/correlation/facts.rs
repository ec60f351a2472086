//! Facts that come in from outside: disks, definitions of exports, what the store remembers.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::pin_rule::Pin;
use super::vm::{Mapping, VmDisk};
use crate::identity::{Identity, Scheme, VolumeId};

/// The longest export name, in bytes (NBD proto.md, "Values": strings SHOULD NOT exceed 4096 bytes).
pub const EXPORT_NAME_BYTES_MAX: usize = 4096;

/// All exports together, of the configuration and of callers: some ten times what one machine can have disks for, and
/// bounded because each costs memory and a line in LIST (invariant 10).
pub const EXPORTS_MAX: usize = 65_536;

/// A valid export name: 1 to 4,096 bytes of UTF-8 without control characters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExportName(std::sync::Arc<str>);

/// Why a string is no export name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExportNameError {
    #[error("an export name cannot be empty")]
    Empty,
    #[error("an export name has at most {EXPORT_NAME_BYTES_MAX} bytes, this one has {0}")]
    TooLong(usize),
    #[error("an export name cannot contain the control character U+{0:04X}")]
    Control(u32),
}

impl ExportName {
    pub fn parse(text: &str) -> Result<ExportName, ExportNameError> {
        if text.is_empty() {
            return Err(ExportNameError::Empty);
        }
        if text.len() > EXPORT_NAME_BYTES_MAX {
            return Err(ExportNameError::TooLong(text.len()));
        }
        if let Some(c) = text.chars().find(|c| c.is_control()) {
            return Err(ExportNameError::Control(c.into()));
        }
        Ok(ExportName(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A kernel device number (`dev_t`). The same number is given to the next disk of that name, so it
/// never identifies a disk without its [`DiskSeq`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber {
    pub major: u32,
    pub minor: u32,
}

impl DeviceNumber {
    /// A number for the `n`th file that is watched, since what is observed is told apart by its number. Linux's majors have
    /// 12 bits (`linux/kdev_t.h`), so no device has it.
    pub fn of_file(n: u32) -> DeviceNumber {
        DeviceNumber {
            major: 1 << 12,
            minor: n,
        }
    }

    pub fn is_file(self) -> bool {
        self.major == 1 << 12
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// The kernel's disk sequence number (Linux ≥ 5.15, `/sys/block/X/diskseq`): one attachment of a disk within
/// one boot. It only grows, and 0 is never used. Of a plain file it is the number of its incarnation ([`DiskSeq::of_file`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskSeq(pub u64);

/// Set in the number of a file, which is no count. The kernel counts disks from 1 and does not come so far.
const FILE_BIT: u64 = 1 << 52;

impl DiskSeq {
    /// The number of a plain file's incarnation, made of `bytes` that tell which one it is. 53 bits at most, so that a reader of
    /// JSON who takes numbers for doubles gets it whole.
    pub fn of_file(bytes: &[u8]) -> DiskSeq {
        // FNV-1a, 64 bits: the same in every build, for the number is stored.
        let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
        DiskSeq(FILE_BIT | (hash ^ (hash >> 52)) & (FILE_BIT - 1))
    }

    /// A file, and no disk of the kernel's.
    pub fn is_file(self) -> bool {
        self.0 & FILE_BIT != 0
    }
}

impl fmt::Display for DiskSeq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A device node's path, `/dev/vdb`. What it names can change at any time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNode(pub String);

impl fmt::Display for DeviceNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Counts observations of the machine. Facts that were read before a newer observation of the same
/// device are stale and are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Mark(pub u64);

/// What is known of a disk's identities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reading {
    /// Read, and complete; may be empty.
    Known(BTreeSet<Identity>),
    /// Read, but not all of it.
    Partly(Box<PartlyRead>),
    /// Not read (yet): it took too long, or the kernel refused. What was known before stays.
    Unknown(String),
    /// Something says that the disk may be another one by now. What was known before stays, in doubt until the next reading.
    Doubtful(String),
    /// Of a file: its paths, of which some could not be looked up again. Those are in doubt.
    Paths(Box<FilePaths>),
}

/// The paths of a file, complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilePaths {
    pub all: BTreeSet<Identity>,
    /// Of them those that nobody can say to lead to it still, each with the reason.
    pub unasked: BTreeMap<Identity, String>,
}

/// What could be read of a disk's identities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartlyRead {
    pub read: BTreeSet<Identity>,
    /// The schemes whose attributes could not be read, each with the reason.
    pub unread: BTreeMap<Scheme, String>,
}

impl Reading {
    /// What was read, if anything was.
    pub fn read(&self) -> Option<&BTreeSet<Identity>> {
        match self {
            Reading::Known(read) => Some(read),
            Reading::Partly(partly) => Some(&partly.read),
            Reading::Paths(paths) => Some(&paths.all),
            Reading::Unknown(_) | Reading::Doubtful(_) => None,
        }
    }
}

/// A device that is built on a disk and holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The kernel's name, `dm-0`.
    pub name: String,
    pub kind: HolderKind,
}

/// What a holder makes of the disks beneath it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HolderKind {
    /// A map of multipath: each disk beneath it is one way to the volume, and the map is the volume.
    Multipath,
    /// An array of md: a disk beneath it is a part of something else.
    Array,
    /// LVM and whatever else: what it has on the disk says nothing of whose the disk is.
    Other,
}

impl Holder {
    /// The names of holders, in words.
    pub fn names(holders: &[Holder]) -> String {
        let names: Vec<&str> = holders.iter().map(|holder| holder.name.as_str()).collect();
        names.join(", ")
    }
}

/// One attached disk as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFacts {
    pub node: DeviceNode,
    pub number: DeviceNumber,
    pub diskseq: DiskSeq,
    /// Bytes.
    pub size: u64,
    pub read_only: bool,
    pub identities: Reading,
    /// As shown to people; identities decide.
    pub serial: String,
    pub wwid: String,
    pub model: String,
    /// What holds the disk; empty when nothing does.
    pub holders: Vec<Holder>,
    /// Its owner asked it to go and waits for us to close it (the loop driver's `autoclear`).
    pub leaving: bool,
}

/// Who defined an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    Config,
    Dbus,
    /// A section of nbd-server's configuration.
    NbdServer,
}

impl Source {
    pub fn name(self) -> &'static str {
        match self {
            Source::Config => "config",
            Source::Dbus => "dbus",
            Source::NbdServer => "nbd-server",
        }
    }

    /// It stands in a file, and goes when it is taken out there.
    pub fn is_file(self) -> bool {
        self != Source::Dbus
    }
}

/// An export as someone wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    pub name: ExportName,
    pub volume: VolumeId,
    pub read_only: bool,
    /// A second writable export of the same volume is allowed when all of them say so.
    pub share: bool,
    /// Reads and writes go past the page cache.
    pub direct: bool,
    pub source: Source,
}

impl Definition {
    /// Whether the other serves the same bytes in the same way, whoever defined it and under whatever name.
    pub fn serves_as(&self, other: &Definition) -> bool {
        let of = |d: &Definition| (d.read_only, d.share, d.direct);
        self.volume == other.volume && of(self) == of(other)
    }

    /// Whether both may be defined as writers of one disk, because of two sections the first that a client binds has it: that is
    /// judged at each connection, and not here.
    pub fn takes_turns_with(&self, other: &Definition) -> bool {
        self.source == Source::NbdServer && other.source == Source::NbdServer
    }

    /// Whether both may write to one disk. One through the page cache and one past it may not: a page that one of them
    /// has in memory and writes back whole would undo what the other wrote to a part of it (open(2), "O_DIRECT").
    pub fn shares_with(&self, other: &Definition) -> bool {
        self.share && other.share && self.direct == other.direct
    }
}

/// The kernel's boot id; diskseq starts again with each.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootId(pub String);

/// Durable: this attachment was given up by `PrepareDetach`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// The volume as the caller named it.
    pub volume: VolumeId,
    pub diskseq: DiskSeq,
    pub boot: BootId,
}

/// Durable: several disks claimed a volume, and nobody has said which of them it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// Whose volume it was. The conflict can outlive it.
    pub export: ExportName,
    /// `None` where that was not kept: then it is the export's, whatever that has.
    pub volume: Option<VolumeId>,
    /// Whom the export served when the second came; `None` when they were found together.
    pub first: Option<DiskSeq>,
    pub boot: BootId,
}

/// What the store holds at start.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Remembered {
    pub exports: Vec<Definition>,
    pub releases: Vec<Release>,
    pub conflicts: Vec<Conflict>,
    /// Those that are active.
    pub mappings: Vec<Mapping>,
    pub pins: Vec<Pin>,
}

/// One change of the store. All changes of one order are one transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    PutExport(Definition),
    DeleteExport(ExportName),
    PutRelease(Release),
    DeleteRelease {
        diskseq: DiskSeq,
        boot: BootId,
    },
    PutConflict(Conflict),
    /// Also one whose volume was not kept.
    DeleteConflict {
        export: ExportName,
        volume: VolumeId,
    },
    /// The mapping of a VM's disk is active.
    PutMapping(Mapping),
    /// It is inactive: its export is gone.
    RetireMapping(VmDisk),
    PutPin(Pin),
    DeletePin(ExportName),
}
