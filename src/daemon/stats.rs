//! The numbers of the whole daemon: what each room counts, under one name each.

use super::control::Control;
use super::log;
use crate::nbd::Stat;

impl Control {
    /// All of them, with what they count.
    pub(super) fn stats(&self) -> Vec<Stat> {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let stat = |name, help, value| Stat { name, help, value };
        let seen = self.observer.counters();
        let (kept, lost) = self.trail.history.counts();
        let mut stats: Vec<Stat> = self.door.stats().each().collect();
        if let Some(shared) = &self.shared {
            stats.extend(shared.counters());
        }
        stats.extend([
            stat(
                "log_lines_lost",
                "Lines of the log that nobody took in time.",
                log::lost(),
            ),
            stat(
                "history_records",
                "Records of the history that were written.",
                kept,
            ),
            stat(
                "history_lost",
                "Records of the history that could not be kept.",
                lost,
            ),
            stat(
                "exports",
                "Exports, whatever their state.",
                count(self.correlation.export_names().len()),
            ),
            stat(
                "disks",
                "Disks that are known.",
                count(self.correlation.diskseqs().count()),
            ),
            stat(
                "orphans",
                "Volumes that a hung disk keeps from being served again.",
                count(self.correlation.orphans()),
            ),
            stat(
                "udev_events",
                "Events of whole disks, of the kernel and of udev.",
                seen.events,
            ),
            stat(
                "udev_dropped_foreign",
                "Events that the kernel did not send, passed over.",
                seen.dropped_foreign,
            ),
            stat(
                "udev_malformed",
                "Events of the kernel that could not be read.",
                seen.malformed,
            ),
            stat(
                "udev_overruns",
                "Times that events were lost, for their buffer was full; a survey follows.",
                seen.overruns,
            ),
            stat("udev_surveys", "Surveys of all disks.", seen.surveys),
            stat(
                "udev_reads",
                "Looks at one disk that were begun.",
                seen.reads,
            ),
            stat(
                "udev_late_reads",
                "Looks at one disk that did not end by their deadline.",
                seen.late_reads,
            ),
            stat(
                "udev_failed_reads",
                "Looks at one disk that the kernel refused.",
                seen.failed_reads,
            ),
        ]);
        stats
    }
}
