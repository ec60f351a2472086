//! A sign of life of the data plane: the thread that waits for everything turns, and sessions that wait for a thread get one.

use std::sync::Arc;
use std::time::Duration;

use crate::sync::atomic::{AtomicBool, Ordering};

use super::crew::CrewProgress;
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

/// How soon a sign that could not be given is looked at again; far below any manager's limit.
const AGAIN: Duration = Duration::from_millis(20);

/// What the poller remembers from the question to the sign.
#[derive(Debug, Default)]
pub(super) struct Pulses {
    waiting: Vec<Pulse>,
    /// How many sessions a thread had begun when the first of them was asked for.
    begun: usize,
}

impl Pulses {
    pub(super) fn ask(&mut self, pulse: Pulse, begun: usize) {
        if self.waiting.is_empty() {
            self.begun = begun;
        }
        // One that was not answered is answered with the next: at most the one that its asker still holds.
        self.waiting.truncate(1);
        self.waiting.push(pulse);
    }

    /// Gives the signs that are due; withheld while sessions wait for a thread and none has got one since the question.
    pub(super) fn look(&mut self, sessions: CrewProgress) {
        if !sessions.backlog || sessions.begun != self.begun {
            self.waiting.drain(..).for_each(|pulse| pulse.give());
        }
    }

    /// When to look again: a moment's backlog may end without any other event, and who asked does not ask twice.
    pub(super) fn again(&self) -> Option<Duration> {
        (!self.waiting.is_empty()).then_some(AGAIN)
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
        let with = |begun, backlog| CrewProgress { begun, backlog };
        let ask = |pulses: &mut Pulses, progress: CrewProgress| {
            let pulse = Pulse::default();
            pulses.ask(pulse.clone(), progress.begun);
            pulses.look(progress);
            pulse
        };
        assert!(ask(&mut pulses, with(0, false)).came(), "idle is alive");
        assert_eq!(pulses.again(), None);
        let stuck = ask(&mut pulses, with(5, true));
        assert!(!stuck.came(), "waiting for nothing is not");
        pulses.look(with(5, true));
        assert!(!stuck.came());
        assert_eq!(pulses.again(), Some(AGAIN));
        pulses.look(with(6, true));
        assert!(stuck.came(), "until it goes on");
        let stuck = ask(&mut pulses, with(6, true));
        pulses.look(with(6, false));
        assert!(stuck.came(), "or nothing waits any more");
    }
}
