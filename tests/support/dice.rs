//! Random choices that can be made again: the seed is printed, and `NBDTRACK_SEED` takes it back.

use std::time::{SystemTime, UNIX_EPOCH};

use super::Outcome;

/// xorshift64*: enough to choose with, and the same everywhere.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        // Seeds that are near each other must not begin alike; and zero would stay zero.
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// One of `0..sides`; `sides` > 0.
    pub fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(high).unwrap_or(0) % sides
    }

    /// True `percent` times in a hundred.
    pub fn happens(&mut self, percent: usize) -> bool {
        self.roll(100) < percent
    }
}

/// A number that a run was given in its environment.
pub fn environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// `NBDTRACK_SEED`, else the clock.
pub fn seed() -> Outcome<u64> {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(environment("NBDTRACK_SEED").unwrap_or(clock.as_secs()))
}
