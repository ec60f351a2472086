//! How fast one connection may ask, where the operator set a rate, and how often it asks for room. PURE but for the time that it is given.

use std::time::{Duration, Instant};

/// A bucket that holds one second's worth of requests and fills as time goes by.
pub(super) struct Rate {
    /// Time that one request takes of the bucket.
    each: Duration,
    /// Requests up to now are paid for until then: at most a second back.
    paid_until: Instant,
}

impl Rate {
    /// `None` for no limit.
    pub(super) fn new(per_second: u32, now: Instant) -> Option<Rate> {
        let each = Duration::from_secs(1).checked_div(per_second)?;
        Some(Rate {
            each,
            paid_until: now.checked_sub(Duration::from_secs(1)).unwrap_or(now),
        })
    }

    /// Whether one more request may come now, or from when on.
    pub(super) fn ready(&self, now: Instant) -> Result<(), Instant> {
        let paid = self.after_one_more(now);
        if paid > now { Err(paid) } else { Ok(()) }
    }

    /// One request was taken.
    pub(super) fn spend(&mut self, now: Instant) {
        self.paid_until = self.after_one_more(now);
    }

    fn after_one_more(&self, now: Instant) -> Instant {
        let earliest = now.checked_sub(Duration::from_secs(1)).unwrap_or(now);
        self.paid_until.max(earliest) + self.each
    }
}

/// How long a session waits that found no room because all sessions together hold too much. Twice as long each time: a thousand that ask
/// every 2 ms would take a processor from those who can be served.
#[derive(Default)]
pub(super) struct Again(u32);

impl Again {
    const FIRST: Duration = Duration::from_millis(2);
    /// Of times that it was doubled: 64 ms.
    const DOUBLED_MAX: u32 = 5;

    pub(super) fn next(&mut self) -> Duration {
        let wait = Again::FIRST * (1 << self.0);
        self.0 = (self.0 + 1).min(Again::DOUBLED_MAX);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lets_through_its_number_and_a_pause_saves_no_more_than_one_second() {
        let start = Instant::now();
        let mut rate = Rate::new(100, start).unwrap();
        let through = |rate: &mut Rate, now| {
            let ready = (0..1000).take_while(|_| rate.ready(now).map(|()| rate.spend(now)).is_ok());
            ready.count()
        };
        assert_eq!(through(&mut rate, start), 100);
        let later = rate.ready(start).unwrap_err();
        assert_eq!(later - start, Duration::from_millis(10));
        assert_eq!(through(&mut rate, later), 1);
        assert_eq!(through(&mut rate, start + Duration::from_secs(60)), 100);
        assert!(Rate::new(0, start).is_none());
    }

    #[test]
    fn room_is_asked_for_less_and_less_often_and_never_less_than_sixteen_times_a_second() {
        let mut again = Again::default();
        let waits: Vec<u128> = (0..8).map(|_| again.next().as_millis()).collect();
        assert_eq!(waits, [2, 4, 8, 16, 32, 64, 64, 64]);
    }
}
