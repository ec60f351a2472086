//! Which disk an export serves. PURE: no I/O, no clock, no thread; the same state, time and event give
//! the same actions.
//!
//! [`Correlation`] owns all that is known: the disks of the machine, the exports that someone wants, what is
//! held open, and what was promised to callers. [`Correlation::apply`] is the only place where it changes. It is
//! *level-triggered*: an event changes facts, and then each export that the facts concern is settled
//! anew, so a lost, doubled or reordered event costs time and never truth (invariant 4).
//!
//! What this costs: work of several steps (add, remove, detach) is written as records that wait for their
//! events, where a task of its own would read as a line of awaits. What it gives: one owner, no
//! lock, and a simulation that drives a hundred thousand schedules through the same code that ships.

mod answers;
mod backup_calls;
pub mod backup_name;
mod backups;
mod binding;
mod check;
mod configure;
mod conflicts;
mod contested;
mod detach;
mod disks;
mod doubt;
mod enact;
mod ensure;
mod explain;
mod facts;
mod holds;
mod index;
mod kept_mappings;
mod membership;
mod messages;
mod new_image;
mod observe;
mod open_refusal;
mod owners;
mod pin_calls;
pub mod pin_rule;
mod pin_steps;
mod pins;
mod record;
mod removal;
mod request_error;
mod requests;
mod resolution;
mod rows;
mod sections;
mod settle;
mod step;
mod topic;
#[cfg(test)]
mod transitions;
mod vacant;
mod view;
mod views;
mod vm;
mod wanting;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

pub use backup_calls::{BackupFiles, BeginBackup, Children, Interrupted};
pub use backups::{
    Backup, BackupChange, BackupState, Backups, CompleteBackup, Inode, Proof, UnfinishedBackup,
};
pub use explain::{Candidate, Explanation};
pub use facts::*;
pub use messages::*;
pub use new_image::{CreateImage, NewImage, Preallocation, file_in};
pub use open_refusal::OpenRefusal;
pub use pin_calls::PinView;
pub use pin_rule::{AtPath, FoundDisk, Pin, PinnedTo, Written};
pub use pins::{ConfiguredSection, NamedPath, PathFound, SectionsChange};
pub use record::*;
pub use request_error::RequestError;
pub use topic::Topic;
pub use view::*;
pub use vm::*;

use crate::identity::{Identity, VolumeId};
use binding::Binding;
use conflicts::{Contest, LeftConflict};
use detach::{Detach, Released};
use disks::Disks;
use holds::Holds;
use index::{Index, Ordered};
use membership::Waiter;
use pins::Pins;
use requests::Persisting;
use wanting::Wanting;

/// Nobody waits for the answer to this request.
pub const INTERNAL: RequestId = RequestId(0);

/// Up to so many exports debug builds check every invariant after every step.
const CHECKED_EXPORTS_MAX: usize = 200;

/// What the middle is told once.
#[derive(Debug, Clone)]
pub struct Settings {
    pub boot: BootId,
    /// An open that takes longer is given up; its late answer is ignored.
    pub open_within: Duration,
    /// Requests in flight on a fenced disk may take so long before they are an orphan.
    pub cut_within: Duration,
    /// The drain when no caller names another.
    pub drain_within: Duration,
    /// A disk of which something says that it may be another one may take so long to say what it is; then its sessions are cut.
    pub confirm_within: Duration,
    /// A released disk that is still attached after this is worth a warning.
    pub detach_grace: Duration,
    /// When the daemon began, in microseconds since 1970 by the machine's clock.
    pub started_us: u64,
}

impl Settings {
    pub fn new(boot: BootId) -> Settings {
        Settings {
            boot,
            open_within: Duration::from_secs(10),
            cut_within: Duration::from_secs(5),
            drain_within: Duration::from_secs(30),
            confirm_within: Duration::from_secs(10),
            detach_grace: Duration::from_secs(300),
            started_us: 0,
        }
    }
}

/// What a timer is for. A timer that comes after its reason has gone is ignored.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Export(ExportName),
    Waiters(ExportName),
    Detach(RequestId),
    Grace(DiskSeq),
    Doubt(DiskSeq),
}

/// An export that has to end before it goes or is defined anew.
#[derive(Debug, Clone)]
struct Leaving {
    /// Whoever waits for it to be gone; at most the calls that D-Bus lets in.
    requests: Vec<RequestId>,
    how: EndHow,
    /// The caller wanted the clients gone at any price, so an orphan is no failure.
    hard: bool,
    replacement: Option<Definition>,
    /// The last flush failed, in words.
    unflushed: Option<String>,
}

#[derive(Debug, Clone)]
struct Export {
    definition: Definition,
    candidates: BTreeSet<Identity>,
    /// Invariant 5: nothing is served before its definition is stored.
    durable: bool,
    binding: Binding,
    /// Given to the lease that came last.
    generation: Generation,
    conflict: Option<Contest>,
    /// Whose disk it is, as the store has it.
    mapping: Option<Mapping>,
    mapped_by: RequestId,
    /// What it is from now on, once that is stored.
    moving: Option<Definition>,
    leaving: Option<Leaving>,
    /// Removed, durably, but for the clients that it has.
    hidden: bool,
    waiters: Vec<Waiter>,
    /// How a lease is to end when the facts allow it time.
    ending: EndHow,
    /// When an open is late, or a failed one is tried again.
    due: Option<Duration>,
    attempts: u32,
}

impl Export {
    /// The definition that it has, or is about to have.
    fn planned(&self) -> &Definition {
        let replacement = || self.leaving.as_ref()?.replacement.as_ref();
        self.moving
            .as_ref()
            .or_else(replacement)
            .unwrap_or(&self.definition)
    }

    /// The definitions beside which another one has to stand: until a move is stored it may not be.
    fn claims(&self) -> impl Iterator<Item = &Definition> {
        let before = self.moving.as_ref().map(|_| &self.definition);
        std::iter::once(self.planned()).chain(before)
    }

    /// It leaves, and nothing of its name comes after it.
    fn goes(&self) -> bool {
        match &self.leaving {
            Some(leaving) => leaving.replacement.is_none(),
            None => self.hidden,
        }
    }
}

/// The model of the machine and of what is wanted of it.
#[derive(Debug, Clone)]
pub struct Correlation {
    settings: Settings,
    now: Duration,
    disks: Disks,
    /// False until the first survey: what is not known to be the only claimant is not served.
    surveyed: bool,
    exports: Ordered<ExportName, Export>,
    by_candidate: Index<Identity, Wanting>,
    /// The exports whose `conflict` is there.
    in_conflict: BTreeSet<ExportName>,
    /// The exports that open a disk once another open of it has been answered: [`Binding::waits_for`].
    ///
    /// [`Binding::waits_for`]: binding::Binding::waits_for
    waiting: BTreeMap<DiskSeq, BTreeSet<ExportName>>,
    /// Exports that wait for their lease to end and then are defined anew.
    replacing: BTreeSet<ExportName>,
    /// Grows with each export that is defined or forgotten.
    membership: u64,
    holds: Holds,
    /// Which disk and export an open is for; an export that gave it up is `None`.
    tickets: BTreeMap<Ticket, (DiskSeq, Option<ExportName>)>,
    released: BTreeMap<DiskSeq, Released>,
    /// Disks that were not read yet when these volumes were given up.
    promised: BTreeMap<DiskSeq, BTreeSet<VolumeId>>,
    /// As the store gave them, until their disk is seen.
    remembered_releases: Vec<Release>,
    /// What is left of conflicts whose export is not there, by its name and their volume.
    left_conflicts: BTreeMap<(ExportName, VolumeId), LeftConflict>,
    /// As the store gave them, without their volume, until their export is defined: the configuration is read after the store.
    remembered_conflicts: BTreeMap<ExportName, Contest>,
    /// Exports that stand in the files of the configuration and cannot be taken; `None` while not all files could be read.
    in_the_files: Option<BTreeSet<ExportName>>,
    /// As the store gave them, until their export is defined, or can stand in no file of the configuration.
    remembered_mappings: BTreeMap<ExportName, Mapping>,
    detaches: BTreeMap<RequestId, Detach>,
    persisting: BTreeMap<RequestId, Persisting>,
    /// What waits for the number of an export's clients, which is told at once.
    counting: BTreeMap<RequestId, Request>,
    timers: BTreeSet<(Duration, Timer)>,
    last_nodes: Index<String, DeviceNode>,
    pins: Pins,
    /// Why there is no file under a path that an export wants; at most one for each.
    absent_files: Index<Identity, String>,
    last_ticket: Ticket,
    stopping: bool,
    out: Vec<Action>,
}

impl Correlation {
    pub fn new(settings: Settings, remembered: Remembered) -> Correlation {
        let mut correlation = Correlation {
            now: Duration::ZERO,
            disks: Disks::new(settings.boot.clone(), settings.confirm_within),
            settings,
            surveyed: false,
            exports: Ordered::default(),
            by_candidate: Index::default(),
            in_conflict: BTreeSet::new(),
            waiting: BTreeMap::new(),
            replacing: BTreeSet::new(),
            membership: 0,
            holds: Holds::default(),
            tickets: BTreeMap::new(),
            released: BTreeMap::new(),
            promised: BTreeMap::new(),
            remembered_releases: remembered.releases,
            left_conflicts: BTreeMap::new(),
            remembered_conflicts: BTreeMap::new(),
            in_the_files: None,
            remembered_mappings: remembered
                .mappings
                .into_iter()
                .map(|mapping| (mapping.disk.export(), mapping))
                .collect(),
            detaches: BTreeMap::new(),
            persisting: BTreeMap::new(),
            counting: BTreeMap::new(),
            timers: BTreeSet::new(),
            last_nodes: Index::default(),
            pins: Pins::new(remembered.pins),
            absent_files: Index::default(),
            last_ticket: Ticket(0),
            stopping: false,
            out: Vec::new(),
        };
        for conflict in remembered.conflicts {
            // A diskseq says nothing in another boot.
            let same_boot = conflict.boot == correlation.settings.boot;
            let contest = Contest {
                first: conflict.first.filter(|_| same_boot),
            };
            match conflict.volume {
                Some(volume) => {
                    let left = LeftConflict::new(contest, &volume);
                    let key = (conflict.export, volume);
                    correlation.left_conflicts.insert(key, left);
                }
                None => {
                    let known = &mut correlation.remembered_conflicts;
                    known.insert(conflict.export, contest);
                }
            }
        }
        for definition in remembered.exports {
            correlation.insert_export(definition, true);
        }
        correlation
    }

    /// What has to be carried out before the first event: every known export is refused until it serves.
    pub fn start(&mut self) -> Vec<Action> {
        let names: Vec<ExportName> = self.exports.keys().cloned().collect();
        for name in names {
            // One that came to the volume late may have been stored without it, when the daemon died.
            self.inherit_conflict(&name);
            self.settle(&name);
            self.refuse(&name);
            self.out.push(Action::Tell(Notice::Export(name)));
        }
        std::mem::take(&mut self.out)
    }

    /// Moves one step and says what to do about it; never fails, never waits. `now` is the time since
    /// the start and never goes back.
    pub fn apply(&mut self, now: Duration, event: Event) -> Vec<Action> {
        self.now = self.now.max(now);
        self.disks.now = self.now;
        match event {
            Event::DiskSeen { mark, facts } => {
                let changes = self.disks.seen(mark, facts);
                self.observe(changes);
            }
            Event::DiskGone {
                mark,
                number,
                diskseq,
            } => {
                let changes = self.disks.gone(mark, number, diskseq);
                self.observe(changes);
                // Also of a disk that a survey had missed.
                if let Some(gone) = diskseq.filter(|gone| self.disks.get(*gone).is_none()) {
                    self.end_release(gone);
                }
            }
            Event::DiskBarred { mark, number } => {
                let changes = self.disks.barred(mark, number);
                self.observe(changes);
            }
            Event::FileAbsent { file, reason } => self.on_file_absent(file, reason),
            Event::Surveyed {
                mark,
                disks,
                routine,
            } => self.on_surveyed(mark, disks, routine),
            Event::DiskOpened { ticket, result } => self.on_opened(ticket, result),
            Event::Dropped { ticket } => self.on_dropped(ticket),
            Event::LeaseEnded {
                export,
                generation,
                end,
            } => self.on_lease_ended(&export, generation, end),
            Event::Persisted { request, result } => self.on_persisted(request, result),
            Event::Asked { request, what } => self.on_asked(request, what),
            Event::Counted { request, clients } => self.on_counted(request, clients),
            Event::Sections(change) => self.on_sections(change),
            Event::Unused { export } => self.on_unused(&export),
            Event::TimePassed => self.on_time_passed(),
            Event::Stopping => self.on_stopping(),
        }
        self.answer_detaches();
        // It looks at everything, so of a large model it would make every step slow.
        debug_assert!(
            self.exports.len() > CHECKED_EXPORTS_MAX || self.check() == Ok(()),
            "{:?}",
            self.check()
        );
        std::mem::take(&mut self.out)
    }

    /// When `Event::TimePassed` is wanted next.
    pub fn deadline(&self) -> Option<Duration> {
        self.timers.first().map(|(due, _)| *due)
    }

    /// Nothing is held open: a stop may go on.
    pub fn is_idle(&self) -> bool {
        self.holds.is_empty()
    }

    /// Leases that a hung disk has not given up.
    pub fn orphans(&self) -> usize {
        self.holds.orphans()
    }

    fn on_time_passed(&mut self) {
        while let Some((due, timer)) = self.timers.first().cloned() {
            if due > self.now {
                break;
            }
            self.timers.pop_first();
            match timer {
                Timer::Export(name) => self.on_export_due(&name),
                Timer::Waiters(name) => self.answer_waiters(&name),
                Timer::Detach(request) => self.on_detach_due(request),
                Timer::Grace(diskseq) => self.on_grace_over(diskseq),
                // Whoever is bound to a disk that is still in doubt is cut off; of another disk nothing follows.
                Timer::Doubt(diskseq) => self.settle_on(diskseq),
            }
        }
    }

    fn on_stopping(&mut self) {
        self.stopping = true;
        let names: Vec<ExportName> = self.exports.keys().cloned().collect();
        for name in names {
            self.settle(&name);
            // Nobody who waits for an export to serve will see it any more.
            if let Some(export) = self.exports.get_mut(&name) {
                export
                    .waiters
                    .iter_mut()
                    .for_each(|waiter| waiter.due = self.now);
            }
            self.answer_waiters(&name);
        }
    }

    fn remind(&mut self, due: Duration, timer: Timer) {
        self.timers.insert((due, timer));
    }

    /// The exports of a volume that presents one of these identities.
    fn exports_of(&self, identities: &BTreeSet<Identity>) -> BTreeSet<ExportName> {
        identities
            .iter()
            .filter_map(|i| self.by_candidate.get(i))
            .flat_map(Wanting::names)
            .cloned()
            .collect()
    }
}
