//! What of the machine reaches the middle: surveys and events, which are late, lost, doubled or in another order.

use std::collections::BTreeSet;

use nbdtrack::correlation::{DiskFacts, Event, Mark, Reading};

use super::{Broken, SLOTS, VOLUMES, World, number};

impl World {
    pub fn survey(&mut self, unread: u8, routine: bool) {
        self.mark += 1;
        self.survey_wanted = false;
        let disks: Vec<DiskFacts> = (0..SLOTS)
            .filter_map(|slot| self.facts(slot, unread >> slot & 1 == 0))
            .collect();
        let mark = Mark(self.mark);
        self.observations.push_back(Event::Surveyed {
            mark,
            disks,
            routine,
        });
        for slot in 0..SLOTS {
            if unread >> slot & 1 == 1 {
                self.observe(slot, true);
            }
        }
    }

    /// A survey that misses a disk which is there.
    pub fn blind(&mut self, slot: u8) {
        self.survey(0, false);
        if let Some(Event::Surveyed { disks, .. }) = self.observations.back_mut() {
            disks.retain(|facts| facts.number != number(slot));
        }
        // Until a better one the model is wrong.
        self.survey_wanted = true;
    }

    /// The disk does not say what it is, for a moment or until the next survey: it answers with nothing, or reports that it may be another one.
    pub fn silent(&mut self, slot: u8, how: u8) {
        self.say(
            slot,
            match how % 2 {
                0 => Reading::Known(BTreeSet::new()),
                _ => Reading::Doubtful("it was reset".to_owned()),
            },
        );
        match how % 4 {
            3 => self.say(slot, Reading::Unknown("it does not answer".to_owned())),
            _ => self.observe(slot, true),
        }
    }

    /// What is there is not to be served, for a moment.
    pub fn bar(&mut self, slot: u8) {
        if self.slots[usize::from(slot)].is_none() {
            return;
        }
        self.mark += 1;
        self.observations.push_back(Event::DiskBarred {
            mark: Mark(self.mark),
            number: number(slot),
        });
        self.observe(slot, true);
    }

    /// The next observation of this slot says this.
    pub fn say(&mut self, slot: u8, identities: Reading) {
        let before = self.observations.len();
        self.observe(slot, false);
        if self.observations.len() > before
            && let Some(Event::DiskSeen { facts, .. }) = self.observations.back_mut()
        {
            facts.identities = identities;
        }
    }

    /// The disk's capacity cannot be read, for a moment.
    pub fn sizeless(&mut self, slot: u8) {
        self.observe(slot, true);
        if let Some(Event::DiskSeen { facts, .. }) = self.observations.back_mut()
            && facts.number == number(slot)
        {
            facts.size = 0;
        }
        self.observe(slot, true);
    }

    pub fn lose(&mut self, index: u8) {
        if self.observations.is_empty() {
            return;
        }
        let index = usize::from(index) % self.observations.len();
        self.observations.remove(index);
        self.survey_wanted = self.broken != Broken::NoSurveyAfterLoss;
    }

    pub fn double(&mut self, index: u8) {
        if self.observations.is_empty() {
            return;
        }
        let event = self.observations[usize::from(index) % self.observations.len()].clone();
        self.observations.push_back(event);
    }

    pub fn deliver(&mut self, index: u8) {
        if self.observations.is_empty() {
            return;
        }
        let index = usize::from(index) % self.observations.len();
        let Some(mut event) = self.observations.remove(index) else {
            return;
        };
        match &event {
            Event::DiskSeen { mark, facts } => {
                let known = self.says_what_it_is(facts);
                self.count_delivery(facts.number.minor, *mark, known);
                self.count_doubt(*mark, facts);
                self.count_claim(*mark, facts);
            }
            Event::DiskGone { mark, number, .. } | Event::DiskBarred { mark, number } => {
                self.count_delivery(number.minor, *mark, false);
            }
            Event::Surveyed { mark, disks, .. } => {
                self.surveyed = true;
                disks
                    .iter()
                    .for_each(|facts| self.count_claim(*mark, facts));
                disks
                    .iter()
                    .for_each(|facts| self.count_doubt(*mark, facts));
                for slot in 0..SLOTS {
                    let facts = disks.iter().find(|facts| facts.number == number(slot));
                    let known = facts.is_some_and(|facts| self.says_what_it_is(facts));
                    self.count_delivery(u32::from(slot), *mark, known);
                }
            }
            _ => {}
        }
        if self.broken == Broken::MarksAtDelivery {
            self.mark += 1;
            match &mut event {
                Event::DiskSeen { mark, .. }
                | Event::DiskGone { mark, .. }
                | Event::DiskBarred { mark, .. }
                | Event::Surveyed { mark, .. } => *mark = Mark(self.mark),
                _ => {}
            }
        }
        self.apply(event);
    }

    /// Nothing, from a disk that has an identity, is no word of it.
    fn says_what_it_is(&self, facts: &DiskFacts) -> bool {
        let slot = usize::try_from(facts.number.minor).expect("a small number");
        let is_blank = self.slots[slot]
            .as_ref()
            .is_none_or(|disk| disk.volume >= VOLUMES);
        matches!(&facts.identities, Reading::Known(read) if !read.is_empty() || is_blank)
    }

    fn count_claim(&mut self, mark: Mark, facts: &DiskFacts) {
        let claims = !facts.leaving && facts.holders.is_empty();
        let told = self.claims.entry(facts.diskseq).or_default();
        *told = (mark.0, claims).max(*told);
    }

    /// Since when it is said that this disk may be another one.
    fn count_doubt(&mut self, mark: Mark, facts: &DiskFacts) {
        let slot = usize::try_from(facts.number.minor).expect("a small number");
        let newest = mark.0 >= self.delivered[slot];
        if matches!(facts.identities, Reading::Doubtful(_)) && newest {
            let since = self.in_doubt.get(&facts.diskseq);
            let since = since.map_or(self.now, |(_, since)| *since);
            self.in_doubt.insert(facts.diskseq, (mark.0, since));
        } else if self.says_what_it_is(facts) {
            let told = |(doubted, _): &(u64, _)| *doubted <= mark.0;
            if self.in_doubt.get(&facts.diskseq).is_some_and(told) {
                self.in_doubt.remove(&facts.diskseq);
            }
        }
    }

    fn count_delivery(&mut self, slot: u32, mark: Mark, known: bool) {
        let slot = usize::try_from(slot).expect("a small number");
        if mark.0 < self.delivered[slot] {
            return;
        }
        self.delivered[slot] = mark.0;
        if known {
            self.delivered_known[slot] = mark.0;
        }
    }
}
