//! A sign of life of the data plane: the thread that waits for everything turns, and sessions that wait for a thread get one.

use std::sync::Arc;

use crate::sync::atomic::{AtomicBool, Ordering};

use super::door::Door;

/// Asked for by `Door::pulse`.
#[derive(Debug, Clone, Default)]
pub struct Pulse(Arc<AtomicBool>);

impl Pulse {
    /// Whether the sign has come.
    pub fn came(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    pub(super) fn give(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// What the poller remembers from one pulse to the next.
#[derive(Debug, Default)]
pub(super) struct Pulses {
    waiting: Vec<Pulse>,
    begun: usize,
}

impl Pulses {
    pub(super) fn ask(&mut self, pulse: Pulse) {
        // One that was not answered is answered with the next: at most the one that its asker still holds.
        self.waiting.truncate(1);
        self.waiting.push(pulse);
    }

    /// Gives the signs that are due; withheld while sessions wait and none was begun since the last look.
    pub(super) fn look(&mut self, (begun, backlog): (usize, bool)) {
        let stuck = backlog && begun == self.begun;
        self.begun = begun;
        if !stuck {
            self.waiting.drain(..).for_each(|pulse| pulse.give());
        }
    }
}

impl Door {
    /// Asks the data plane for a sign of life; never waits for it.
    pub fn pulse(&self) -> Pulse {
        let pulse = Pulse::default();
        self.shared().poller.pulse(pulse.clone());
        pulse
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_that_wait_and_are_not_begun_withhold_the_sign() {
        let mut pulses = Pulses::default();
        let ask = |pulses: &mut Pulses, progress| {
            let pulse = Pulse::default();
            pulses.ask(pulse.clone());
            pulses.look(progress);
            pulse
        };
        assert!(ask(&mut pulses, (0, false)).came(), "idle is alive");
        assert!(ask(&mut pulses, (5, true)).came(), "busy is alive");
        let stuck = ask(&mut pulses, (5, true));
        assert!(!stuck.came(), "waiting for nothing is not");
        pulses.look((6, true));
        assert!(stuck.came(), "until it goes on");
    }
}
