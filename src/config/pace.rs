//! EDGE: long work in small pieces. A thread that reads ten thousand files keeps a processor until the kernel's next tick, some
//! milliseconds, and whoever is woken beside it waits so long at each step of an answer. So it offers the processor now and then.

use std::cell::Cell;

/// A piece is some tenths of a millisecond of files to be looked at.
const STEPS: u32 = 32;

/// Counts steps of one thread's work, and pauses between pieces.
#[derive(Debug, Default)]
pub struct Pace {
    steps: Cell<u32>,
    pauses: Cell<u64>,
}

impl Pace {
    /// One file or section more: after each [`STEPS`] whoever waits for the processor has it first.
    pub fn step(&self) {
        self.steps.set(self.steps.get() + 1);
        if self.steps.get() == STEPS {
            self.steps.set(0);
            self.pauses.set(self.pauses.get() + 1);
            std::thread::yield_now();
        }
    }

    /// How often the processor was offered.
    pub fn pauses(&self) -> u64 {
        self.pauses.get()
    }

    /// As many steps as have the processor offered once.
    pub fn piece() -> u64 {
        u64::from(STEPS)
    }
}
