//! Latencies in buckets: constant memory, a few instructions for each.

use std::time::Duration;

/// Buckets for each power of two: the width of one is at most 1/32 of its value.
const STEPS: usize = 32;
const STEP_BITS: u32 = STEPS.ilog2();
/// Nanoseconds up to 2^36, about a minute.
const BUCKETS: usize = STEPS * (36 - STEP_BITS as usize + 1);

#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram {
            counts: vec![0; BUCKETS],
            total: 0,
        }
    }
}

impl Histogram {
    pub fn add(&mut self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(ns).min(BUCKETS - 1)] += 1;
        self.total += 1;
    }

    /// The value that `percent` of all are at or below, in microseconds; 0 when there are none.
    pub fn percentile(&self, percent: u64) -> f64 {
        let rank = (self.total * percent).div_ceil(100).max(1);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return lower(bucket + 1) as f64 / 1e3;
            }
        }
        0.0
    }
}

/// Values below [`STEPS`] have a bucket each; above, the leading bit and the [`STEP_BITS`] after it choose one.
fn bucket(ns: u64) -> usize {
    let shift = (u64::BITS - ns.leading_zeros()).saturating_sub(STEP_BITS + 1);
    let step = usize::try_from(ns >> shift).unwrap_or(usize::MAX);
    shift as usize * STEPS + step
}

/// The smallest value of a bucket.
fn lower(bucket: usize) -> u64 {
    let shift = (bucket / STEPS).saturating_sub(1);
    ((bucket - shift * STEPS) as u64) << shift
}
