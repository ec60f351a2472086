//! Time, crashes and restarts, and how all of it comes to rest.

use std::collections::BTreeSet;
use std::time::Duration;

use nbdtrack::correlation::{BootId, Conflict, Correlation, DiskSeq, Event, Remembered};

use super::{Broken, SLOTS, World, index_of, settings};

impl World {
    pub fn pass(&mut self, time: Duration) {
        self.now += time;
        self.apply(Event::TimePassed);
    }

    /// To the next deadline, if it is not further away than `most`.
    pub fn pass_to_deadline(&mut self, most: Duration) -> bool {
        match self.middle.deadline() {
            Some(due) if due <= self.now + most => {
                self.now = self.now.max(due);
                self.apply(Event::TimePassed);
                true
            }
            Some(_) | None => false,
        }
    }

    pub fn stop(&mut self) {
        self.stopped = true;
        self.apply(Event::Stopping);
    }

    /// The daemon dies, the kernel closes what it held, and it is started again.
    pub fn crash(&mut self, reboot: bool, kept: u8) {
        for _ in 0..kept {
            self.keep(false);
        }
        // A cancellation that is stored has taken effect, whether its caller heard of it or not.
        for (_, seqs) in std::mem::take(&mut self.cancels) {
            let kept = |seq: &DiskSeq| {
                self.store
                    .releases
                    .iter()
                    .any(|release| release.diskseq == *seq)
            };
            let taken_back: Vec<DiskSeq> = seqs.into_iter().filter(|seq| !kept(seq)).collect();
            self.given_up.retain(|seq| !taken_back.contains(seq));
        }
        if reboot {
            self.boot += 1;
            self.next_seq = 1;
            self.given_up.clear();
            for slot in (0..SLOTS).rev() {
                if let Some(disk) = self.slots[usize::from(slot)].take() {
                    self.plug(slot, disk.volume);
                }
            }
        }
        self.start();
    }

    pub(super) fn start(&mut self) {
        self.observations.clear();
        self.delivered.fill(0);
        self.delivered_known.fill(0);
        self.opens.clear();
        self.handles.clear();
        self.answers.clear();
        self.leases.clear();
        self.current.clear();
        self.refused.clear();
        self.hidden.clear();
        self.occupied.clear();
        self.newest.clear();
        self.writes.clear();
        self.pending.clear();
        self.stopped = false;
        self.survey_wanted = true;
        self.now = Duration::ZERO;
        self.surveyed = false;
        self.claims.clear();
        self.in_doubt.clear();
        self.promised.clear();
        let boot = BootId(format!("boot{}", self.boot));
        let conflicts: Vec<Conflict> = self.store.conflicts.values().cloned().collect();
        self.conflicts = conflicts
            .iter()
            .filter_map(|conflict| {
                let volume = index_of(conflict.volume.as_ref()?)?;
                let first = conflict.first.filter(|_| conflict.boot == boot);
                Some(((conflict.export.clone(), volume), first))
            })
            .collect();
        self.doubts.clear();
        self.equals.clear();
        for ((_, volume), first) in self.conflicts.clone() {
            self.doubt(volume, first);
        }
        let present: BTreeSet<DiskSeq> = self.slots.iter().flatten().map(|disk| disk.seq).collect();
        self.releases = self
            .store
            .releases
            .iter()
            .filter(|release| release.boot == boot && present.contains(&release.diskseq))
            .map(|release| release.diskseq)
            .collect();
        let remembered = Remembered {
            exports: self.store.exports.values().cloned().collect(),
            releases: match self.broken {
                Broken::ReleaseForgotten => Vec::new(),
                _ => self.store.releases.clone(),
            },
            conflicts: if self.broken == Broken::ConflictForgotten {
                Vec::new()
            } else {
                conflicts
            },
            mappings: self.store.mappings.values().cloned().collect(),
            pins: self.store.pins.values().cloned().collect(),
        };
        self.middle = Correlation::new(settings(self.boot, self.broken), remembered);
        let actions = self.middle.start();
        self.note(|| "-- start".to_owned());
        self.perform_all(actions);
        self.told.clear();
        let config = self.config.clone();
        self.configure(config);
    }

    /// Delivers and answers everything, surveys, and lets time go by until nothing is left to do; then every export
    /// is where the machine says that it should be.
    pub fn rest(&mut self) {
        for disk in self.slots.iter_mut().flatten() {
            disk.busy = false;
        }
        self.settle_all();
        if self.broken != Broken::NoSurveyAfterLoss || self.survey_wanted {
            self.survey(0, false);
        }
        self.settle_all();
        let mut rounds = 0;
        while self.violation.is_none() && self.pass_to_deadline(Duration::from_secs(100)) {
            self.settle_all();
            rounds += 1;
            if rounds > 200 {
                return self.fail("does not come to rest");
            }
        }
        self.judge_rest();
        while self.violation.is_none() && self.pass_to_deadline(Duration::from_secs(1000)) {
            self.settle_all();
            rounds += 1;
            if rounds > 300 {
                return self.fail("does not come to rest");
            }
        }
        if self.violation.is_none() && self.middle.deadline().is_some() {
            self.fail("a deadline is left over");
        }
        self.judge_rest();
    }

    pub fn settle_all(&mut self) {
        for _ in 0..200 {
            if self.violation.is_some() {
                return;
            }
            if self.survey_wanted {
                self.survey(0, false);
            }
            let ending = self.leases.values().any(|lease| lease.ending.is_some());
            if self.observations.is_empty()
                && self.opens.is_empty()
                && self.answers.is_empty()
                && self.writes.is_empty()
                && !ending
            {
                return;
            }
            self.deliver(0);
            self.open(0, 0);
            for lease in self.leases.values_mut() {
                lease.in_flight = 0;
            }
            self.end_lease(0, false);
            self.keep(false);
            self.answer(0);
        }
        self.fail("does not settle");
    }
}
