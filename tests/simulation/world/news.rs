//! What of the machine reaches the middle: surveys and events, which are late, lost, doubled or in another order.

use nbdtrack::correlation::{DiskFacts, Event, Mark, Reading};

use super::{Broken, SLOTS, World, number};

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
                let known = matches!(facts.identities, Reading::Known(_));
                self.count_delivery(facts.number.minor, *mark, known);
                self.count_claim(*mark, facts);
            }
            Event::DiskGone { mark, number, .. } => self.count_delivery(number.minor, *mark, false),
            Event::Surveyed { mark, disks, .. } => {
                self.surveyed = true;
                disks
                    .iter()
                    .for_each(|facts| self.count_claim(*mark, facts));
                for slot in 0..SLOTS {
                    let facts = disks.iter().find(|facts| facts.number == number(slot));
                    let known =
                        facts.is_some_and(|facts| matches!(facts.identities, Reading::Known(_)));
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
                | Event::Surveyed { mark, .. } => *mark = Mark(self.mark),
                _ => {}
            }
        }
        self.apply(event);
    }

    fn count_claim(&mut self, mark: Mark, facts: &DiskFacts) {
        let claims = !facts.leaving && facts.holders.is_empty();
        let told = self.claims.entry(facts.diskseq).or_default();
        *told = (mark.0, claims).max(*told);
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
