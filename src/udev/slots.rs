//! Which disk is read next. PURE: no read is done here.
//!
//! One read per device number is in flight and at most one more is owed, however many events came; a disk
//! that has not answered an earlier read (it hangs) is never asked again before it did, only the kernel is
//! asked about it.

use std::collections::{BTreeMap, VecDeque};

use crate::correlation::DeviceNumber;

/// Reads in flight. Few, because sysfs reads take microseconds; more than one, because a slow disk must not
/// hold up the others (each gives its place back at its deadline).
const READS_MAX: usize = 16;
/// Disks that hang, each with a thread of the blocking pool; past this, no other disk is asked until one of them
/// answers. What was in flight when the last place went may hang, too: so 143 threads hang, 16 read and 1 lists,
/// and all others of the pool (`daemon`) are never this room's (invariant 11).
const HUNG_MAX: usize = 128;

/// Who wants a disk read. An event's reading is told by itself, a survey's with its survey.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    Survey,
    Event,
}

/// A read to be started.
#[derive(Debug, PartialEq, Eq)]
pub struct Start {
    pub number: DeviceNumber,
    /// Why the device itself is not to be asked.
    pub shallow: Option<&'static str>,
}

#[derive(Debug, Default)]
struct Slot {
    reading: Option<Why>,
    owed: Option<Why>,
    hung: bool,
    /// The next read is not to ask the device: its attributes have just come, late.
    answered: bool,
}

#[derive(Debug, Default)]
pub struct Slots {
    slots: BTreeMap<DeviceNumber, Slot>,
    /// Numbers with `owed`; may hold leftovers. Bounded by the number of devices and, because a number is
    /// added only when `owed` rises, by two entries each.
    urgent: VecDeque<DeviceNumber>,
    later: VecDeque<DeviceNumber>,
    reading: usize,
    hung: usize,
}

impl Slots {
    pub fn want(&mut self, number: DeviceNumber, why: Why) {
        let slot = self.slots.entry(number).or_default();
        if slot.owed >= Some(why) {
            return;
        }
        slot.owed = Some(why);
        match why {
            Why::Event => self.urgent.push_back(number),
            Why::Survey => self.later.push_back(number),
        }
    }

    /// The next read, if there is one and a place for it.
    pub fn start(&mut self) -> Option<Start> {
        if self.reading >= READS_MAX {
            return None;
        }
        // A number whose read is in flight stays owed; `finish` queues it again.
        while let Some(number) = self.urgent.pop_front().or_else(|| self.later.pop_front()) {
            let Some(slot) = self.slots.get_mut(&number) else {
                continue;
            };
            if slot.reading.is_some() || slot.owed.is_none() {
                continue;
            }
            slot.reading = slot.owed.take();
            self.reading += 1;
            let shallow = if slot.hung {
                Some("the disk has not answered an earlier read")
            } else if slot.answered {
                Some("the disk's answer is being confirmed")
            } else if self.hung >= HUNG_MAX {
                Some("too many other disks do not answer")
            } else {
                None
            };
            return Some(Start { number, shallow });
        }
        None
    }

    /// The read has ended; says who wanted it.
    pub fn finish(&mut self, number: DeviceNumber) -> Option<Why> {
        let slot = self.slots.get_mut(&number)?;
        let why = slot.reading.take();
        slot.answered = false;
        if why.is_some() {
            self.reading -= 1;
        }
        match slot.owed {
            Some(Why::Event) => self.urgent.push_back(number),
            Some(Why::Survey) => self.later.push_back(number),
            None if slot.hung => {}
            None => {
                self.slots.remove(&number);
            }
        }
        why
    }

    /// The read has not ended in time: its place is given back, and a shallow one is owed to whoever wanted it.
    pub fn hang(&mut self, number: DeviceNumber) {
        let Some(slot) = self.slots.get_mut(&number) else {
            return;
        };
        if !slot.hung {
            slot.hung = true;
            self.hung += 1;
        }
        if let Some(why) = self.finish(number) {
            self.want(number, why);
        }
    }

    /// The disk has answered after all: its facts are to be confirmed, without asking it again.
    pub fn answered(&mut self, number: DeviceNumber) {
        let slot = self.slots.entry(number).or_default();
        if slot.hung {
            slot.hung = false;
            self.hung -= 1;
        }
        slot.answered = true;
        self.want(number, Why::Event);
    }

    /// Nothing is owed and nothing in flight.
    pub fn idle(&self) -> bool {
        self.reading == 0 && self.slots.values().all(|slot| slot.owed.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: DeviceNumber = DeviceNumber { major: 7, minor: 1 };
    const B: DeviceNumber = DeviceNumber { major: 7, minor: 2 };

    fn number(start: Option<Start>) -> Option<DeviceNumber> {
        start.map(|s| s.number)
    }

    #[test]
    fn a_burst_of_events_is_one_read_and_one_more() {
        let mut slots = Slots::default();
        for _ in 0..1000 {
            slots.want(A, Why::Event);
        }
        assert_eq!(number(slots.start()), Some(A));
        assert_eq!(slots.start(), None);
        for _ in 0..1000 {
            slots.want(A, Why::Event);
        }
        assert_eq!(slots.start(), None, "one in flight per device");
        assert!(slots.urgent.len() <= 2);
        assert_eq!(slots.finish(A), Some(Why::Event));
        assert_eq!(number(slots.start()), Some(A));
        assert_eq!(slots.finish(A), Some(Why::Event));
        assert_eq!(slots.start(), None);
        assert!(slots.idle());
        assert!(slots.slots.is_empty());
    }

    #[test]
    fn events_go_before_the_survey_and_raise_its_reads() {
        let mut slots = Slots::default();
        slots.want(A, Why::Survey);
        slots.want(B, Why::Survey);
        slots.want(B, Why::Event);
        assert_eq!(number(slots.start()), Some(B));
        assert_eq!(slots.finish(B), Some(Why::Event));
        assert_eq!(number(slots.start()), Some(A));
        assert_eq!(slots.finish(A), Some(Why::Survey));
        assert_eq!(slots.start(), None);
    }

    #[test]
    fn a_survey_that_finds_a_read_in_flight_is_owed_its_own() {
        let mut slots = Slots::default();
        slots.want(A, Why::Event);
        slots.start();
        slots.want(A, Why::Survey);
        assert_eq!(slots.finish(A), Some(Why::Event));
        assert_eq!(number(slots.start()), Some(A));
        assert_eq!(slots.finish(A), Some(Why::Survey));
    }

    #[test]
    fn a_hung_disk_is_not_asked_again_until_it_answers() {
        let mut slots = Slots::default();
        slots.want(A, Why::Event);
        assert_eq!(slots.start().unwrap().shallow, None);
        slots.hang(A);
        assert!(slots.start().unwrap().shallow.is_some());
        assert_eq!(slots.finish(A), Some(Why::Event));
        slots.want(A, Why::Event);
        assert!(slots.start().unwrap().shallow.is_some());
        slots.finish(A);
        slots.answered(A);
        assert!(slots.start().unwrap().shallow.is_some(), "confirming");
        slots.finish(A);
        slots.want(A, Why::Event);
        assert_eq!(slots.start().unwrap().shallow, None);
        slots.finish(A);
        assert!(slots.slots.is_empty());
    }

    #[test]
    fn reads_in_flight_and_hung_disks_are_bounded() {
        let mut slots = Slots::default();
        let disk = |minor| DeviceNumber { major: 8, minor };
        for minor in 0..1000 {
            slots.want(disk(minor), Why::Event);
        }
        let mut started = 0;
        while slots.start().is_some() {
            started += 1;
        }
        assert_eq!(started, READS_MAX);
        let mut asked: Vec<_> = (0..).map(disk).take(READS_MAX).collect();
        while let Some(number) = asked.pop() {
            slots.hang(number);
            while let Some(start) = slots.start() {
                match start.shallow {
                    Some(_) => assert!(slots.finish(start.number).is_some()),
                    None => asked.push(start.number),
                }
            }
        }
        assert!(slots.idle(), "every disk was read, most of them shallow");
        assert!(slots.hung >= HUNG_MAX);
        assert!(slots.hung < HUNG_MAX + READS_MAX);
    }
}
