//! What is offered and not yet sent: objects once with their newest state, signals and replies in order. PURE.

use std::collections::{HashMap, VecDeque};

use tokio::sync::oneshot;

use super::{Answer, JobView, LogState, Publication};
use crate::correlation::{DiskSeq, DiskView, ExportName, ExportView, Notice, RequestError};

/// Signals that wait for the bus. A burst of 10,000 disks makes some 30,000; beyond this the oldest is
/// dropped and counted, for the objects say the same.
pub const SIGNALS_MAX: usize = 64 * 1024;

/// How many publications go out in one write; bounds how long a reader of properties waits behind them.
const BATCH: usize = 256;

pub type Outcome = Result<Answer, RequestError>;

/// What is offered and not yet sent. Three lines, merged by their tickets.
#[derive(Debug, Default)]
pub struct Queue {
    next: u64,
    /// At most one for each object: `exports` and `disks` hold the newest state.
    objects: VecDeque<(u64, Key)>,
    exports: HashMap<ExportName, Option<(ExportView, u32)>>,
    disks: HashMap<DiskSeq, Option<DiskView>>,
    /// Bounded by the calls in flight, and by [`super::CALLS_MAX`] for each of those that a bus was too slow for.
    jobs: HashMap<u64, JobState>,
    log: Option<LogState>,
    /// At most [`SIGNALS_MAX`]; then the oldest goes.
    signals: VecDeque<(u64, Notice)>,
    /// At most as many as there are calls in flight.
    replies: VecDeque<(u64, oneshot::Sender<Outcome>, Outcome)>,
    /// Taken out and not yet written.
    pub in_hand: bool,
    /// Signals were dropped since the queue was last empty: said once, not for each.
    pub overflowing: bool,
}

#[derive(Debug)]
enum Key {
    Export(ExportName),
    Disk(DiskSeq),
    Job(u64),
    Log,
}

/// A job with how it ended, once it has.
pub type JobState = (JobView, Option<Result<(), RequestError>>);

/// One thing to make visible.
pub enum Entry {
    Export(ExportName, Option<(ExportView, u32)>),
    Disk(DiskSeq, Option<DiskView>),
    Job(JobState),
    Log(LogState),
    Signal(Notice),
    Reply(oneshot::Sender<Outcome>, Outcome),
}

impl Queue {
    /// Returns how many signals had to go.
    pub fn push(&mut self, publication: Publication) -> u64 {
        let ticket = self.next;
        self.next += 1;
        match publication {
            Publication::Export { view, clients } => {
                self.put_export(ticket, view.name.clone(), Some((view, clients)));
            }
            Publication::ExportGone(name) => self.put_export(ticket, name, None),
            Publication::Disk(view) => self.put_disk(ticket, view.diskseq, Some(view)),
            Publication::DiskGone(diskseq) => self.put_disk(ticket, diskseq, None),
            Publication::Job(job) => self.put_job(ticket, (job, None)),
            Publication::JobDone { job, result } => self.put_job(ticket, (job, Some(result))),
            Publication::Log(state) => {
                if self.log.replace(state).is_none() {
                    self.objects.push_back((ticket, Key::Log));
                }
            }
            // Orders to look at a view: the views themselves are publications.
            Publication::Signal(Notice::Export(_) | Notice::Disk(_) | Notice::Exports(_)) => {}
            Publication::Signal(notice) => {
                self.signals.push_back((ticket, notice));
                if self.signals.len() > SIGNALS_MAX {
                    self.signals.pop_front();
                    return 1;
                }
            }
            Publication::Reply(to, outcome) => self.replies.push_back((ticket, to, outcome)),
        }
        0
    }

    fn put_export(&mut self, ticket: u64, name: ExportName, state: Option<(ExportView, u32)>) {
        if self.exports.insert(name.clone(), state).is_none() {
            self.objects.push_back((ticket, Key::Export(name)));
        }
    }

    fn put_disk(&mut self, ticket: u64, diskseq: DiskSeq, state: Option<DiskView>) {
        if self.disks.insert(diskseq, state).is_none() {
            self.objects.push_back((ticket, Key::Disk(diskseq)));
        }
    }

    fn put_job(&mut self, ticket: u64, state: JobState) {
        let id = state.0.id;
        if self.jobs.insert(id, state).is_none() {
            self.objects.push_back((ticket, Key::Job(id)));
        }
    }

    fn pop(&mut self) -> Option<Entry> {
        let object = self.objects.front().map(|(ticket, _)| *ticket);
        let signal = self.signals.front().map(|(ticket, _)| *ticket);
        let reply = self.replies.front().map(|(ticket, ..)| *ticket);
        let first = [object, signal, reply].into_iter().flatten().min()?;
        if object == Some(first) {
            let (_, key) = self.objects.pop_front()?;
            return match key {
                Key::Export(name) => {
                    let state = self.exports.remove(&name).flatten();
                    Some(Entry::Export(name, state))
                }
                Key::Disk(diskseq) => {
                    let state = self.disks.remove(&diskseq).flatten();
                    Some(Entry::Disk(diskseq, state))
                }
                Key::Job(id) => self.jobs.remove(&id).map(Entry::Job),
                Key::Log => self.log.take().map(Entry::Log),
            };
        }
        if signal == Some(first) {
            return self
                .signals
                .pop_front()
                .map(|(_, notice)| Entry::Signal(notice));
        }
        let reply = self.replies.pop_front();
        reply.map(|(_, to, outcome)| Entry::Reply(to, outcome))
    }

    /// Takes out at most [`BATCH`].
    pub fn take(&mut self) -> Vec<Entry> {
        let mut batch = Vec::new();
        while batch.len() < BATCH {
            match self.pop() {
                Some(entry) => batch.push(entry),
                None => break,
            }
        }
        self.in_hand = !batch.is_empty();
        self.overflowing &= self.in_hand;
        batch
    }

    /// Says whether all that was offered is written, too.
    pub fn is_empty(&self) -> bool {
        !self.in_hand
            && self.objects.is_empty()
            && self.signals.is_empty()
            && self.replies.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{export, name};
    use super::*;

    fn state_signal(number: u64) -> Publication {
        Publication::Signal(Notice::Resized {
            diskseq: DiskSeq(1),
            id: "loop:x".to_owned(),
            old: number,
            new: number,
        })
    }

    #[test]
    fn an_object_waits_once_with_its_newest_state_before_what_came_after_it() {
        let mut queue = Queue::default();
        for clients in 0..10 {
            queue.push(Publication::Export {
                view: export("a", None),
                clients,
            });
        }
        queue.push(state_signal(1));
        queue.push(Publication::Export {
            view: export("a", None),
            clients: 99,
        });
        let batch = queue.take();
        assert!(matches!(&batch[0], Entry::Export(n, Some((_, 99))) if *n == name("a")));
        assert!(matches!(&batch[1], Entry::Signal(_)));
        assert_eq!(batch.len(), 2);
    }

    #[test]
    fn too_many_signals_drop_the_oldest_and_are_counted() {
        let mut queue = Queue::default();
        let over = 10;
        let dropped: u64 = (0..(SIGNALS_MAX + over) as u64)
            .map(|n| queue.push(state_signal(n)))
            .sum();
        assert_eq!(dropped, over as u64);
        assert_eq!(queue.signals.len(), SIGNALS_MAX);
        assert!(matches!(
            queue.signals[0].1,
            Notice::Resized { old: 10, .. }
        ));
    }

    #[test]
    fn a_reply_never_overtakes_what_was_offered_before_it() {
        let mut queue = Queue::default();
        let (to, _from) = oneshot::channel();
        queue.push(state_signal(1));
        queue.push(Publication::Reply(to, Ok(Answer::Done)));
        queue.push(state_signal(2));
        let batch = queue.take();
        assert!(matches!(
            batch[..],
            [Entry::Signal(_), Entry::Reply(..), Entry::Signal(_)]
        ));
    }
}
