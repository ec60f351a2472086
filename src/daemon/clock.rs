//! What the times of files and rows are worth: the machine's clock beside one that nobody sets. EDGE: reads clocks.

use std::fs;
use std::io;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::correlation::Written;

/// A clock that went on by this much more or less than the time that passed was set.
const CLOCK_SLACK_US: u64 = 2_000_000;

/// What the times of files are compared with: a clock that nobody sets, and how the machine's clock stands to it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    /// Microseconds since 1970, when the daemon began.
    pub started_us: u64,
    /// By a clock that nobody sets.
    pub started: Instant,
    /// How far the machine's clock is ahead of where it would be, had nobody set it.
    ahead_us: i64,
    /// Since when nobody has set it, as it is set now; 0 for since the start.
    steady_us: u64,
}

impl Clock {
    pub(super) fn now() -> Clock {
        Clock {
            started_us: now_us(),
            started: Instant::now(),
            ahead_us: 0,
            steady_us: 0,
        }
    }

    /// Looks whether the machine's clock was set since the last look. What it drifts between two looks is less than the slack.
    pub(super) fn look(&mut self) {
        self.told(now_us(), micros(self.started.elapsed()));
    }

    fn told(&mut self, now_us: u64, ran_us: u64) {
        let expected = self.started_us.saturating_add(ran_us);
        let ahead_us = i64::try_from(i128::from(now_us) - i128::from(expected));
        let ahead_us = ahead_us.unwrap_or(i64::MAX);
        if ahead_us.abs_diff(self.ahead_us) > CLOCK_SLACK_US {
            self.steady_us = now_us;
        }
        self.ahead_us = ahead_us;
    }

    /// Now, by this clock. It is looked at first: times of before and after it was set are not compared with each other.
    pub(super) fn moment(&mut self) -> Moment {
        self.look();
        let us = now_us();
        Moment {
            us,
            booted_us: up().ok().map(|up| us.saturating_sub(micros(up))),
            steady_us: self.steady_us,
            ahead_us: self.ahead_us,
        }
    }
}

/// When a reading was made, in microseconds since 1970; one for all of its files, for there may be ten thousand.
pub(super) struct Moment {
    us: u64,
    /// When the boot began; `None` when that cannot be read.
    booted_us: Option<u64>,
    /// As the clock had them.
    steady_us: u64,
    ahead_us: i64,
}

impl Moment {
    /// What the time of a file or row says as of this moment; `None` for one that could not be read.
    pub(super) fn written(&self, modified_us: Option<u64>) -> Written {
        let Some(modified_us) = modified_us else {
            return Written::Unknown("the file could not be read");
        };
        let Some(booted_us) = self.booted_us else {
            return Written::Unknown("since when this machine runs cannot be read");
        };
        Written::of_file(
            modified_us,
            self.us,
            booted_us,
            self.steady_us,
            self.ahead_us,
        )
    }
}

/// How long this machine has run.
fn up() -> io::Result<Duration> {
    let text = fs::read_to_string("/proc/uptime")?;
    let seconds = text.split(' ').next().and_then(|word| word.parse().ok());
    let seconds: f64 = seconds.ok_or(io::ErrorKind::InvalidData)?;
    Duration::try_from_secs_f64(seconds).map_err(io::Error::other)
}

/// Microseconds since 1970; 0 for a clock before that.
fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    micros(since.unwrap_or_default())
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_is_seen_and_one_that_drifts_is_not() {
        let mut clock = Clock::now();
        let start = clock.started_us;
        let second = 1_000_000;
        // A second in an hour, looked at each minute.
        for minute in 1..=60 {
            let ran = minute * 60 * second;
            clock.told(start + ran + minute * second / 60, ran);
        }
        assert_eq!((clock.steady_us, clock.ahead_us), (0, 1_000_000));
        let ran = 3_661 * second;
        clock.told(start + ran - 100 * second, ran);
        assert_eq!(clock.steady_us, start + ran - 100 * second);
        assert_eq!(clock.ahead_us, -100_000_000);
        let steady = clock.steady_us;
        clock.told(start + ran - 99 * second, ran + second);
        assert_eq!(clock.steady_us, steady);
    }

    /// A row of a shared table was judged by a clock that was looked at with the last survey: in the half minute after it was set an hour
    /// ahead, a disk that came after the row seemed to have been there before it.
    #[test]
    fn a_clock_that_was_set_since_the_last_look_proves_nothing_of_what_came_between() {
        let hour = 3_600_000_000;
        let mut clock = Clock::now();
        let now = now_us();
        // Long after the boot, so that nothing else is in doubt.
        let judged = |clock: &mut Clock| {
            let moment = Moment {
                booted_us: Some(0),
                ..clock.moment()
            };
            moment.written(Some(now))
        };
        assert!(matches!(judged(&mut clock), Written::At(_)));
        let mut set = Clock {
            started_us: clock.started_us - hour,
            ..clock
        };
        let why = "the clock was set since the file was written";
        assert_eq!(judged(&mut set), Written::Unknown(why));
        let later = Moment {
            booted_us: Some(0),
            ..set.moment()
        };
        let written = later.written(Some(set.steady_us));
        assert_eq!(
            written,
            Written::At(set.steady_us - set.ahead_us.unsigned_abs())
        );
    }
}
