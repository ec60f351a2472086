//! How long callers waited for the daemon, by method: a histogram for a scrape. PURE.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

/// Upper bounds of the buckets, in microseconds; the last has none.
const BOUNDS_US: [u64; 13] = [
    100, 250, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 250_000, 1_000_000, 5_000_000,
    30_000_000,
];

/// The times of the calls of each method; as many as the interface has.
#[derive(Debug, Default)]
pub struct CallTimes(BTreeMap<&'static str, Times>);

#[derive(Debug, Default)]
struct Times {
    buckets: [u64; BOUNDS_US.len() + 1],
    sum: Duration,
}

impl CallTimes {
    /// A call was answered so long after it had been read and let in.
    pub fn note(&mut self, method: &'static str, time: Duration) {
        let times = self.0.entry(method).or_default();
        let within = |bound: &u64| time <= Duration::from_micros(*bound);
        let at = BOUNDS_US.iter().position(within);
        times.buckets[at.unwrap_or(BOUNDS_US.len())] += 1;
        times.sum += time;
    }

    /// The same as OpenMetrics has it, without its end.
    pub fn text(&self) -> String {
        let mut out = String::from(
            "# TYPE nbdtrack_call_seconds histogram\n# UNIT nbdtrack_call_seconds seconds\n\
             # HELP nbdtrack_call_seconds From a call over D-Bus that was let in to its answer.\n",
        );
        for (method, times) in &self.0 {
            let mut total = 0;
            for (at, count) in times.buckets.iter().enumerate() {
                total += count;
                let bound = BOUNDS_US.get(at).map(|us| *us as f64 / 1e6);
                let bound = bound.map_or("+Inf".to_owned(), |seconds| format!("{seconds:?}"));
                // A write to a String cannot fail; nor can the next.
                let _ = writeln!(
                    out,
                    "nbdtrack_call_seconds_bucket{{method=\"{method}\",le=\"{bound}\"}} {total}"
                );
            }
            let sum = times.sum.as_secs_f64();
            let _ = writeln!(
                out,
                "nbdtrack_call_seconds_count{{method=\"{method}\"}} {total}\n\
                 nbdtrack_call_seconds_sum{{method=\"{method}\"}} {sum:.6}"
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_call_is_in_every_bucket_that_it_is_within() {
        let mut times = CallTimes::default();
        for us in [100, 101, 900, 40_000_000] {
            times.note("Rescan", Duration::from_micros(us));
        }
        let text = times.text();
        for line in [
            "nbdtrack_call_seconds_bucket{method=\"Rescan\",le=\"0.0001\"} 1",
            "nbdtrack_call_seconds_bucket{method=\"Rescan\",le=\"0.00025\"} 2",
            "nbdtrack_call_seconds_bucket{method=\"Rescan\",le=\"0.001\"} 3",
            "nbdtrack_call_seconds_bucket{method=\"Rescan\",le=\"30.0\"} 3",
            "nbdtrack_call_seconds_bucket{method=\"Rescan\",le=\"+Inf\"} 4",
            "nbdtrack_call_seconds_count{method=\"Rescan\"} 4",
            "nbdtrack_call_seconds_sum{method=\"Rescan\"} 40.001101",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}:\n{text}");
        }
    }
}
