//! What is measured, as OpenMetrics text
//! (<https://github.com/prometheus/OpenMetrics/blob/main/specification/OpenMetrics.md>) and as numbers for a screen.
//!
//! Labels are bounded: `export` for at most [`EXPORTS_MAX`] exports, `state` and `operation` of fixed sets. No peer, no path, no
//! reason is ever a label.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use super::control::Control;
use crate::correlation::{DiskSeq, Event, Notice, State};
use crate::nbd::{BUCKETS_US, Measured, Operation, Stat};

/// Exports that have series of their own, in the order of their names; a scrape of so many is some 5 MB.
pub const EXPORTS_MAX: usize = 2_000;

/// Upper bounds of the buckets of event to serving, in milliseconds.
const SERVING_MS: [u64; 12] = [
    1, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 10_000, 60_000,
];

/// From the first event of a disk to the export that serves it.
#[derive(Debug, Default)]
pub(super) struct ServingTimes {
    /// Disks that are attached and serve nothing yet; bounded by the disks.
    seen: HashMap<DiskSeq, Instant>,
    buckets: [u64; SERVING_MS.len() + 1],
    sum: Duration,
}

impl ServingTimes {
    pub fn on_event(&mut self, event: &Event, known: impl Fn(DiskSeq) -> bool) {
        if let Event::DiskSeen { facts, .. } = event
            && !known(facts.diskseq)
        {
            self.seen.entry(facts.diskseq).or_insert_with(Instant::now);
        }
    }

    pub fn on_notice(&mut self, notice: &Notice, serving: impl Fn() -> Option<DiskSeq>) {
        match notice {
            Notice::Detached { diskseq, .. } => {
                self.seen.remove(diskseq);
            }
            Notice::ExportState {
                new: State::Serving,
                ..
            } => {
                if let Some(began) = serving().and_then(|disk| self.seen.remove(&disk)) {
                    self.observe(began.elapsed());
                }
            }
            _ => {}
        }
    }

    fn observe(&mut self, took: Duration) {
        let bucket = SERVING_MS.partition_point(|bound| u128::from(*bound) < took.as_millis());
        self.buckets[bucket] += 1;
        self.sum += took;
    }
}

impl Control {
    /// Counters of each export, for a screen.
    pub(super) fn measures(&self) -> BTreeMap<String, BTreeMap<&'static str, u64>> {
        let exports = self.door.measured(EXPORTS_MAX).into_iter();
        exports
            .map(|(name, operations)| (name.to_string(), numbers(&operations)))
            .collect()
    }

    /// Everything, for a scrape.
    pub(super) fn metrics(&self) -> String {
        let mut states: BTreeMap<&'static str, u64> =
            State::ALL.iter().map(|state| (state.name(), 0)).collect();
        for name in self.correlation.export_names() {
            if let Some(view) = self.correlation.export(name) {
                *states.entry(view.state.name()).or_default() += 1;
            }
        }
        let exports: Vec<(String, u32, [Measured; 3])> = self
            .door
            .measured(EXPORTS_MAX)
            .into_iter()
            .map(|(name, measured)| {
                let clients = self.door.clients(&name);
                (name.to_string(), clients, measured)
            })
            .collect();
        text(&states, &self.stats(), &exports, &self.serving)
    }
}

fn numbers(operations: &[Measured; 3]) -> BTreeMap<&'static str, u64> {
    let [read, write, other] = operations;
    BTreeMap::from([
        ("reads", read.requests),
        ("writes", write.requests),
        ("others", other.requests),
        ("bytes_read", read.bytes),
        ("bytes_written", write.bytes),
        ("failed", read.failed + write.failed + other.failed),
        ("timed", read.timed + write.timed + other.timed),
        (
            "microseconds",
            read.microseconds + write.microseconds + other.microseconds,
        ),
    ])
}

fn text(
    states: &BTreeMap<&'static str, u64>,
    stats: &[Stat],
    exports: &[(String, u32, [Measured; 3])],
    serving: &ServingTimes,
) -> String {
    let mut out = String::with_capacity(4_096 + exports.len() * 2_048);
    let mut line = |text: std::fmt::Arguments<'_>| {
        // A write to a String cannot fail.
        let _ = out.write_fmt(text);
        out.push('\n');
    };
    // A gauge and no info: node_exporter reads the older text format, which has none.
    line(format_args!(
        "# TYPE nbdtrack_build_info gauge\n# HELP nbdtrack_build_info Version of the daemon.\nnbdtrack_build_info{{version=\"{}\"}} 1",
        env!("CARGO_PKG_VERSION")
    ));
    line(format_args!(
        "# TYPE nbdtrack_exports gauge\n# HELP nbdtrack_exports Exports by state."
    ));
    for (state, count) in states {
        line(format_args!(
            "nbdtrack_exports{{state=\"{state}\"}} {count}"
        ));
    }
    // Counters of the daemon, one family each; those that end in `_now`, and what is counted anew, are gauges.
    for Stat { name, help, value } in stats {
        let (name, suffix) = match *name {
            // By state, above.
            "exports" => continue,
            "disks" | "orphans" | "database_up" | "database_rows" => (*name, ""),
            _ => match name.strip_suffix("_now") {
                Some(gauge) => (gauge, ""),
                None => (*name, "_total"),
            },
        };
        let kind = if suffix.is_empty() {
            "gauge"
        } else {
            "counter"
        };
        line(format_args!(
            "# TYPE nbdtrack_{name} {kind}\n# HELP nbdtrack_{name} {help}\nnbdtrack_{name}{suffix} {value}"
        ));
    }
    line(format_args!(
        "# TYPE nbdtrack_serving_delay_seconds histogram\n# UNIT nbdtrack_serving_delay_seconds seconds\n# HELP \
         nbdtrack_serving_delay_seconds From the first event of a disk to the export that serves it."
    ));
    let mut total = 0;
    for (at, count) in serving.buckets.iter().enumerate() {
        total += count;
        let bound = SERVING_MS.get(at).map(|ms| seconds(*ms * 1_000));
        let bound = bound.as_deref().unwrap_or("+Inf");
        line(format_args!(
            "nbdtrack_serving_delay_seconds_bucket{{le=\"{bound}\"}} {total}"
        ));
    }
    line(format_args!(
        "nbdtrack_serving_delay_seconds_count {total}\nnbdtrack_serving_delay_seconds_sum {:.6}",
        serving.sum.as_secs_f64()
    ));
    let names: Vec<String> = exports.iter().map(|(name, ..)| label(name)).collect();
    line(format_args!(
        "# TYPE nbdtrack_export_clients gauge\n# HELP nbdtrack_export_clients Sessions bound to the export."
    ));
    for (name, (_, clients, _)) in names.iter().zip(exports) {
        line(format_args!(
            "nbdtrack_export_clients{{export=\"{name}\"}} {clients}"
        ));
    }
    type Pick = fn(&Measured) -> u64;
    let families: [(&str, &str, Pick); 3] = [
        ("requests", "Requests that were answered.", |m| m.requests),
        ("bytes", "Payload of reads and writes.", |m| m.bytes),
        (
            "failed_requests",
            "Requests that were answered with an error.",
            |m| m.failed,
        ),
    ];
    for (family, help, pick) in families {
        line(format_args!(
            "# TYPE nbdtrack_export_{family} counter\n# HELP nbdtrack_export_{family} {help}"
        ));
        for (name, (_, _, measured)) in names.iter().zip(exports) {
            for (operation, measured) in Operation::ALL.iter().zip(measured) {
                line(format_args!(
                    "nbdtrack_export_{family}_total{{export=\"{name}\",operation=\"{}\"}} {}",
                    operation.name(),
                    pick(measured)
                ));
            }
        }
    }
    line(format_args!(
        "# TYPE nbdtrack_export_latency_seconds histogram\n# UNIT nbdtrack_export_latency_seconds seconds\n# HELP \
         nbdtrack_export_latency_seconds From a request that was read to its reply; one in 16 of those that memory answers is \
         timed and counts for all."
    ));
    for (name, (_, _, measured)) in names.iter().zip(exports) {
        for (operation, measured) in Operation::ALL.iter().zip(measured) {
            let operation = operation.name();
            let mut total = 0;
            for (at, count) in measured.buckets.iter().enumerate() {
                total += count;
                let bound = BUCKETS_US.get(at).map(|us| seconds(*us));
                let bound = bound.as_deref().unwrap_or("+Inf");
                line(format_args!(
                    "nbdtrack_export_latency_seconds_bucket{{export=\"{name}\",operation=\"{operation}\",le=\"{bound}\"}} {total}"
                ));
            }
            line(format_args!(
                "nbdtrack_export_latency_seconds_count{{export=\"{name}\",operation=\"{operation}\"}} {total}\n\
                 nbdtrack_export_latency_seconds_sum{{export=\"{name}\",operation=\"{operation}\"}} {}",
                seconds(measured.microseconds)
            ));
        }
    }
    out.push_str("# EOF\n");
    out
}

/// Microseconds as seconds, without trailing zeroes but for one.
fn seconds(us: u64) -> String {
    let text = format!("{}.{:06}", us / 1_000_000, us % 1_000_000);
    let short = text.trim_end_matches('0');
    if short.ends_with('.') {
        format!("{short}0")
    } else {
        short.to_owned()
    }
}

/// Escapes a label's value, as "ABNF" of the specification has it.
fn label(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_read_as_openmetrics_writes_them() {
        assert_eq!(seconds(5), "0.000005");
        assert_eq!(seconds(1_000_000), "1.0");
        assert_eq!(seconds(2_500_000), "2.5");
    }

    #[test]
    fn the_text_ends_in_eof_and_a_name_cannot_break_out_of_its_label() {
        let exports = [("a\"} 1\\".to_owned(), 2, [Measured::default(); 3])];
        let stat = |name, value| Stat {
            name,
            help: "Of it.",
            value,
        };
        let stats = [stat("reads", 7), stat("connections_now", 1)];
        let text = text(&BTreeMap::new(), &stats, &exports, &ServingTimes::default());
        assert!(text.ends_with("# EOF\n"));
        assert!(text.contains("nbdtrack_reads_total 7\n"));
        assert!(text.contains("# TYPE nbdtrack_connections gauge\n# HELP nbdtrack_connections Of it.\nnbdtrack_connections 1\n"));
        assert!(
            text.contains("nbdtrack_export_clients{export=\"a\\\"} 1\\\\\"} 2\n"),
            "{text}"
        );
    }

    #[test]
    fn a_disk_that_serves_is_timed_once_and_one_that_left_is_forgotten() {
        let mut times = ServingTimes::default();
        times.seen.insert(DiskSeq(1), Instant::now());
        times.seen.insert(DiskSeq(2), Instant::now());
        let serving = Notice::ExportState {
            export: crate::correlation::ExportName::parse("a").unwrap(),
            old: State::Opening,
            new: State::Serving,
            reason: String::new(),
        };
        times.on_notice(&serving, || Some(DiskSeq(1)));
        times.on_notice(&serving, || Some(DiskSeq(1)));
        assert_eq!(times.buckets.iter().sum::<u64>(), 1);
        let gone = Notice::Detached {
            diskseq: DiskSeq(2),
            id: String::new(),
            node: crate::correlation::DeviceNode("/dev/x".to_owned()),
        };
        times.on_notice(&gone, || None);
        assert!(times.seen.is_empty());
    }
}
