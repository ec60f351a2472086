//! What one export is bound to, and the words of its machine: what reaches it and what it orders. PURE.

use super::facts::DiskSeq;
use super::messages::{EndHow, Generation, Ticket};
use super::view::State;

/// A lease on an opened disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Held {
    pub diskseq: DiskSeq,
    pub generation: Generation,
    /// Bytes, as agreed with the clients.
    pub size: u64,
    pub read_only: bool,
}

/// Why an export has failed; callers are answered by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    Open,
    Busy,
    /// Another export writes to the disk.
    InUse,
    /// A person has to say which volume a path means.
    Unpinned,
    Orphan,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Binding {
    Absent {
        reason: String,
    },
    /// `ticket` is `None` while another open of the same disk is outstanding.
    Opening {
        diskseq: DiskSeq,
        ticket: Option<Ticket>,
    },
    Serving(Held),
    Draining {
        held: Held,
        cut: bool,
        reason: String,
    },
    Released {
        diskseq: DiskSeq,
        reason: String,
    },
    Ambiguous {
        held: Option<Held>,
        reason: String,
    },
    Failed {
        diskseq: Option<DiskSeq>,
        failure: Failure,
        reason: String,
    },
}

impl Binding {
    pub fn state(&self) -> State {
        match self {
            Binding::Absent { .. } => State::Absent,
            Binding::Opening { .. } => State::Opening,
            Binding::Serving(_) => State::Serving,
            Binding::Draining { .. } => State::Draining,
            Binding::Released { .. } => State::Released,
            Binding::Ambiguous { .. } => State::Ambiguous,
            Binding::Failed { .. } => State::Failed,
        }
    }

    /// The lease that exists, if any.
    pub fn held(&self) -> Option<Held> {
        match self {
            Binding::Serving(held) | Binding::Draining { held, .. } => Some(*held),
            Binding::Ambiguous { held, .. } => *held,
            Binding::Absent { .. }
            | Binding::Opening { .. }
            | Binding::Released { .. }
            | Binding::Failed { .. } => None,
        }
    }

    /// The lease that may go on. One that ends is of no account for where the export belongs next.
    pub fn kept(&self) -> Option<Held> {
        match self {
            Binding::Serving(held) => Some(*held),
            Binding::Ambiguous { held, .. } => *held,
            Binding::Absent { .. }
            | Binding::Opening { .. }
            | Binding::Draining { .. }
            | Binding::Released { .. }
            | Binding::Failed { .. } => None,
        }
    }

    /// The disk that this export is on, or would be.
    pub fn diskseq(&self) -> Option<DiskSeq> {
        match self {
            Binding::Opening { diskseq, .. } | Binding::Released { diskseq, .. } => Some(*diskseq),
            Binding::Failed { diskseq, .. } => *diskseq,
            Binding::Serving(_) | Binding::Draining { .. } | Binding::Ambiguous { .. } => {
                self.held().map(|held| held.diskseq)
            }
            Binding::Absent { .. } => None,
        }
    }

    /// The disk that it opens once another open of that has been answered.
    pub fn waits_for(&self) -> Option<DiskSeq> {
        match self {
            Binding::Opening {
                diskseq,
                ticket: None,
            } => Some(*diskseq),
            _ => None,
        }
    }

    pub fn reason(&self) -> &str {
        match self {
            Binding::Opening { .. } => "opening the disk",
            Binding::Serving(_) => "",
            Binding::Absent { reason }
            | Binding::Draining { reason, .. }
            | Binding::Released { reason, .. }
            | Binding::Ambiguous { reason, .. }
            | Binding::Failed { reason, .. } => reason,
        }
    }
}

/// Where the facts say that an export should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Want {
    Nothing {
        reason: String,
    },
    Disk(DiskSeq),
    Released {
        diskseq: DiskSeq,
        reason: String,
    },
    /// `keep` is the disk whose sessions may go on, when it still claims the volume.
    Ambiguous {
        keep: Option<DiskSeq>,
        reason: String,
    },
    Blocked {
        failure: Failure,
        reason: String,
    },
}

/// What reaches the machine. Answers have been matched against ticket and generation before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cue {
    Want(Want),
    Opened {
        size: u64,
        read_only: bool,
    },
    OpenRefused {
        failure: Failure,
        reason: String,
    },
    OpenExpired {
        reason: String,
    },
    /// Time to try a failed open again.
    RetryDue(Want),
    Closed(Want),
    TimedOut {
        reason: String,
    },
}

/// What the machine needs to know to order things.
#[derive(Debug, Clone, Copy)]
pub(super) struct Context {
    /// A fresh ticket, or `None` while an open of the wanted disk is outstanding.
    pub ticket: Option<Ticket>,
    /// The generation that a next lease gets.
    pub generation: Generation,
    /// How a lease that has to end should end.
    pub ending: EndHow,
}

/// What the machine orders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Order {
    Open {
        diskseq: DiskSeq,
        ticket: Ticket,
    },
    /// The answer to this open, when it comes, is to be closed.
    Cancel {
        ticket: Ticket,
    },
    Serve {
        ticket: Ticket,
        held: Held,
    },
    Unseal {
        generation: Generation,
    },
    End {
        generation: Generation,
        how: EndHow,
    },
}
