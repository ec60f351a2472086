//! What callers ask of the loop over D-Bus: a change goes to the middle, a question is answered at once, a survey is ordered.

use std::collections::BTreeMap;

use super::control::{Asker, Control};
use crate::correlation::{Event, Request, RequestError, RequestId};
use crate::dbus::{Answer, Call, Command, Filter, Publication};

impl Control {
    pub(super) fn on_command(&mut self, command: Command) {
        let Command { call, reply, .. } = command;
        match call {
            Call::Request(_) | Call::Rescan if self.stopping => {
                self.answer(
                    reply,
                    Err(RequestError::NotReady("the daemon is stopping".to_owned())),
                );
            }
            Call::Request(Request::AddExport { definition, .. })
                if let Err(reason) = self.rules.permit(&definition.volume) =>
            {
                self.answer(reply, Err(RequestError::InvalidArgument(reason)));
            }
            Call::Request(what) => {
                self.last_request = RequestId(self.last_request.0 + 1);
                self.asked.insert(self.last_request, reply);
                self.apply(Event::Asked {
                    request: self.last_request,
                    what,
                });
            }
            Call::ResolveVolume(filter) => {
                self.answer(reply, Ok(Answer::Volumes(self.resolve(&filter))))
            }
            Call::Rescan => self.rescan(reply),
            Call::Stats => self.answer(reply, Ok(Answer::Stats(self.stats()))),
        }
    }

    fn answer(&self, asker: Asker, answer: Result<Answer, RequestError>) {
        self.publisher
            .offer(vec![Publication::Reply(asker, answer)]);
    }

    fn resolve(&self, filter: &Filter) -> Vec<crate::correlation::DiskSeq> {
        let of_volume = filter
            .volume
            .as_ref()
            .map(|volume| self.correlation.disks_of(volume));
        self.correlation
            .diskseqs()
            .filter(|diskseq| {
                of_volume
                    .as_ref()
                    .is_none_or(|disks| disks.contains(diskseq))
            })
            .filter(|diskseq| {
                self.correlation.disk(*diskseq).is_some_and(|disk| {
                    filter
                        .serial
                        .as_ref()
                        .is_none_or(|serial| disk.serial == *serial)
                        && filter.wwid.as_ref().is_none_or(|wwid| disk.wwid == *wwid)
                        && filter.node.as_ref().is_none_or(|node| disk.node.0 == *node)
                        && filter.diskseq.is_none_or(|wanted| wanted == *diskseq)
                })
            })
            .collect()
    }

    fn stats(&self) -> BTreeMap<String, u64> {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let seen = self.observer.counters();
        let served = serde_json::to_value(self.door.stats()).unwrap_or_default();
        let mut stats: BTreeMap<String, u64> = serde_json::from_value(served).unwrap_or_default();
        stats.extend(
            [
                ("exports", count(self.correlation.export_names().count())),
                ("disks", count(self.correlation.diskseqs().count())),
                ("orphans", count(self.correlation.orphans())),
                ("udev_events", seen.events),
                ("udev_dropped_foreign", seen.dropped_foreign),
                ("udev_malformed", seen.malformed),
                ("udev_overruns", seen.overruns),
                ("udev_surveys", seen.surveys),
                ("udev_reads", seen.reads),
                ("udev_late_reads", seen.late_reads),
                ("udev_failed_reads", seen.failed_reads),
            ]
            .map(|(name, value)| (name.to_owned(), value)),
        );
        stats
    }
}
