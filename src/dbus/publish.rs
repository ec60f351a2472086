//! Takes what the loop decided and makes it visible on the bus, in order, without ever making the loop wait.
//!
//! Offers go into a queue in which an object stands once, with its newest state; a task takes them out, lets the
//! tree find the difference, and sends that. A slow or absent bus therefore costs at most one state for each object and
//! [`SIGNALS_MAX`] signals.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep, timeout};
use zbus::message::Builder;
use zbus::{Connection, Message, ObjectPath, Variant};

use super::introspect::{OBJECT_MANAGER, PROPERTIES};
use super::manager::MANAGER;
use super::paths;
use super::tree::{Told, Tree};
use super::volume::text;
use super::{Answer, Publication};
use crate::correlation::{DiskSeq, DiskView, ExportName, ExportView, Notice, RequestError};

/// Signals that wait for the bus. A burst of 10,000 disks makes some 30,000; beyond this the oldest is
/// dropped and counted, for the objects say the same.
const SIGNALS_MAX: usize = 64 * 1024;

/// How many publications go out in one write; bounds how long a reader of properties waits behind them.
const BATCH: usize = 256;

/// A bus that takes no byte for so long is broken: the connection is given up and made anew.
const SEND_WITHIN: Duration = Duration::from_secs(30);

type Outcome = Result<Answer, RequestError>;

/// What the publisher, its task and the server share.
///
/// Lock order: `order`, then `tree` or `queue`; the latter two are held for memory work only, never over an await.
#[derive(Debug, Default)]
pub struct Shared {
    /// Held from looking at (or changing) the tree until what follows from it is written to the bus, so that no
    /// answer with older properties arrives after the signal of newer ones.
    pub order: tokio::sync::Mutex<()>,
    /// What was last told.
    tree: Mutex<Tree>,
    /// What is to be told; bounds stand on [`Queue`].
    queue: Mutex<Queue>,
    /// Wakes the publishing task; ends with the publisher, which aborts the task.
    wake: Notify,
    /// The connection while there is one.
    link: Mutex<Option<Connection>>,
    dropped: AtomicU64,
}

/// What is offered and not yet sent. Three lines, merged by their tickets.
#[derive(Debug, Default)]
struct Queue {
    next: u64,
    /// At most one for each object: `exports` and `disks` hold the newest state.
    objects: VecDeque<(u64, Key)>,
    exports: HashMap<ExportName, Option<(ExportView, u32)>>,
    disks: HashMap<DiskSeq, Option<DiskView>>,
    /// At most [`SIGNALS_MAX`]; then the oldest goes.
    signals: VecDeque<(u64, Notice)>,
    /// At most as many as there are calls in flight.
    replies: VecDeque<(u64, oneshot::Sender<Outcome>, Outcome)>,
    /// Taken out and not yet written.
    in_hand: bool,
    /// Signals were dropped since the queue was last empty: said once, not for each.
    overflowing: bool,
}

#[derive(Debug)]
enum Key {
    Export(ExportName),
    Disk(DiskSeq),
}

enum Entry {
    Export(ExportName, Option<(ExportView, u32)>),
    Disk(DiskSeq, Option<DiskView>),
    Signal(Notice),
    Reply(oneshot::Sender<Outcome>, Outcome),
}

/// The loop's way to the bus. Dropping it ends the bus's tasks and gives the name back.
#[derive(Debug)]
pub struct Publisher {
    /// `None` with no bus: replies go at once and all else is forgotten.
    served: Option<Served>,
    /// With no bus the loop's queue would end for want of a sender.
    _commands: Option<tokio::sync::mpsc::Sender<super::Command>>,
}

#[derive(Debug)]
struct Served {
    shared: Arc<Shared>,
    tasks: Vec<tokio::task::AbortHandle>,
}

impl Publisher {
    /// For a daemon without a bus.
    pub(super) fn without_bus(commands: tokio::sync::mpsc::Sender<super::Command>) -> Publisher {
        Publisher {
            served: None,
            _commands: Some(commands),
        }
    }

    pub(super) fn new(shared: Arc<Shared>, tasks: Vec<tokio::task::AbortHandle>) -> Publisher {
        Publisher {
            served: Some(Served { shared, tasks }),
            _commands: None,
        }
    }

    /// Takes publications to be made in this order. Never waits.
    pub fn offer(&self, batch: Vec<Publication>) {
        let Some(Served { shared, .. }) = &self.served else {
            for publication in batch {
                if let Publication::Reply(to, outcome) = publication {
                    // A caller that no longer waits needs no answer.
                    let _ = to.send(outcome);
                }
            }
            return;
        };
        let mut dropped = 0;
        let first = {
            let mut queue = lock(&shared.queue);
            let overflowed = queue.overflowing;
            for publication in batch {
                dropped += queue.push(publication);
            }
            queue.overflowing |= dropped > 0;
            queue.overflowing && !overflowed
        };
        shared.dropped.fetch_add(dropped, Ordering::Relaxed);
        if first {
            tracing::warn!(
                waiting = SIGNALS_MAX,
                "the bus is slow: the oldest signals are dropped, properties stay right"
            );
        }
        shared.wake.notify_one();
    }

    /// Waits until all that was offered is on the bus, but no longer than `within`; says whether it is. For the
    /// end of the daemon.
    pub async fn flush(&self, within: Duration) -> bool {
        let Some(Served { shared, .. }) = &self.served else {
            return true;
        };
        let until = Instant::now() + within;
        while !lock(&shared.queue).is_empty() {
            if Instant::now() >= until {
                return false;
            }
            sleep(Duration::from_millis(2)).await;
        }
        true
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Shared {
    pub fn tree(&self) -> MutexGuard<'_, Tree> {
        lock(&self.tree)
    }

    pub fn link(&self) -> MutexGuard<'_, Option<Connection>> {
        lock(&self.link)
    }

    /// How many signals were dropped because the bus was too slow.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Queue {
    /// Returns how many signals had to go.
    fn push(&mut self, publication: Publication) -> u64 {
        let ticket = self.next;
        self.next += 1;
        match publication {
            Publication::Export { view, clients } => {
                self.put_export(ticket, view.name.clone(), Some((view, clients)));
            }
            Publication::ExportGone(name) => self.put_export(ticket, name, None),
            Publication::Disk(view) => self.put_disk(ticket, view.diskseq, Some(view)),
            Publication::DiskGone(diskseq) => self.put_disk(ticket, diskseq, None),
            // Orders to look at a view: the views themselves are publications.
            Publication::Signal(Notice::Export(_) | Notice::Disk(_)) => {}
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

    fn pop(&mut self) -> Option<Entry> {
        let object = self.objects.front().map(|(ticket, _)| *ticket);
        let signal = self.signals.front().map(|(ticket, _)| *ticket);
        let reply = self.replies.front().map(|(ticket, ..)| *ticket);
        let first = [object, signal, reply].into_iter().flatten().min()?;
        if object == Some(first) {
            return self.objects.pop_front().map(|(_, key)| match key {
                Key::Export(name) => {
                    let state = self.exports.remove(&name).flatten();
                    Entry::Export(name, state)
                }
                Key::Disk(diskseq) => Entry::Disk(diskseq, self.disks.remove(&diskseq).flatten()),
            });
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

    fn take(&mut self) -> Vec<Entry> {
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

    fn is_empty(&self) -> bool {
        !self.in_hand
            && self.objects.is_empty()
            && self.signals.is_empty()
            && self.replies.is_empty()
    }
}

/// Publishes what is offered, until aborted.
pub async fn run(shared: Arc<Shared>) {
    loop {
        let order = shared.order.lock().await;
        let batch = lock(&shared.queue).take();
        if batch.is_empty() {
            drop(order);
            shared.wake.notified().await;
            continue;
        }
        let (messages, replies) = tell(&mut shared.tree(), batch);
        send(&shared, &messages).await;
        drop(order);
        lock(&shared.queue).in_hand = false;
        for (to, outcome) in replies {
            // A caller that no longer waits needs no answer.
            let _ = to.send(outcome);
        }
    }
}

async fn send(shared: &Shared, messages: &[Message]) {
    let Some(connection) = shared.link().clone() else {
        return;
    };
    let reason = match timeout(SEND_WITHIN, connection.send_all(messages)).await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("it takes nothing since {} s", SEND_WITHIN.as_secs()),
    };
    // A message may have gone out in part, so nothing can follow it. The server connects anew.
    tracing::warn!(reason, "the bus is lost");
    *shared.link() = None;
    let _ = timeout(Duration::from_secs(1), connection.close()).await;
}

fn tell(
    tree: &mut Tree,
    batch: Vec<Entry>,
) -> (Vec<Message>, Vec<(oneshot::Sender<Outcome>, Outcome)>) {
    let mut messages = Vec::new();
    let mut replies = Vec::new();
    let mut add = |message: zbus::Result<Message>| match message {
        Ok(message) => messages.push(message),
        // All text was made fit for the bus, so only a message over 128 MiB could end here.
        Err(error) => tracing::error!(%error, "a signal could not be built"),
    };
    for entry in batch {
        match entry {
            Entry::Export(name, state) => {
                tree.put_export(&name, state)
                    .iter()
                    .map(message)
                    .for_each(&mut add);
            }
            Entry::Disk(diskseq, state) => {
                tree.put_disk(diskseq, state)
                    .iter()
                    .map(message)
                    .for_each(&mut add);
            }
            Entry::Signal(notice) => signal(tree, &notice).into_iter().for_each(&mut add),
            Entry::Reply(to, outcome) => replies.push((to, outcome)),
        }
    }
    (messages, replies)
}

fn message(told: &Told) -> zbus::Result<Message> {
    match told {
        Told::Added {
            path,
            interface,
            properties,
        } => {
            let properties: BTreeMap<&str, &Variant<'_>> = by_name(properties);
            let interfaces = BTreeMap::from([(*interface, properties)]);
            from(paths::ROOT, OBJECT_MANAGER.name, "InterfacesAdded")?.build(&(path, interfaces))
        }
        Told::Removed { path, interface } => {
            from(paths::ROOT, OBJECT_MANAGER.name, "InterfacesRemoved")?
                .build(&(path, vec![*interface]))
        }
        Told::Changed {
            path,
            interface,
            properties,
        } => {
            let none: [&str; 0] = [];
            from(path.as_str(), PROPERTIES.name, "PropertiesChanged")?.build(&(
                *interface,
                by_name(properties),
                &none[..],
            ))
        }
    }
}

pub fn by_name<'a>(
    properties: &'a [(&'static str, Variant<'static>)],
) -> BTreeMap<&'static str, &'a Variant<'static>> {
    properties
        .iter()
        .map(|(name, value)| (*name, value))
        .collect()
}

fn from<'a>(path: &'a str, interface: &'a str, member: &'a str) -> zbus::Result<Builder<'a>> {
    let path = ObjectPath::try_from(path)?;
    Ok(Message::signal(path, interface, member))
}

fn signal(tree: &Tree, notice: &Notice) -> Option<zbus::Result<Message>> {
    let manager = |member| from(paths::ROOT, MANAGER.name, member);
    Some(match notice {
        Notice::Export(_) | Notice::Disk(_) => return None,
        Notice::Attached { diskseq, id, node } => {
            let path = tree.told_disk_path(*diskseq, id);
            let body = (path, text(id), text(&node.0), diskseq.0);
            manager("VolumeAttached").and_then(|signal| signal.build(&body))
        }
        Notice::Detached { diskseq, id, node } => {
            let path = tree.told_disk_path(*diskseq, id);
            let body = (path, text(id), text(&node.0), diskseq.0);
            manager("VolumeDetached").and_then(|signal| signal.build(&body))
        }
        Notice::Renamed {
            diskseq,
            id,
            old,
            new,
        } => {
            let path = tree.told_disk_path(*diskseq, id);
            let body = (path, text(id), text(&old.0), text(&new.0));
            manager("VolumeRenamed").and_then(|signal| signal.build(&body))
        }
        Notice::Resized {
            diskseq,
            id,
            old,
            new,
        } => {
            let path = tree.told_disk_path(*diskseq, id);
            let body = (path, text(id), *old, *new);
            manager("VolumeResized").and_then(|signal| signal.build(&body))
        }
        Notice::ExportState {
            export,
            old,
            new,
            reason,
        } => {
            let path = tree.export_path(export);
            let body = (path, export.as_str(), *old, *new, text(reason));
            manager("ExportStateChanged").and_then(|signal| signal.build(&body))
        }
        Notice::IdentityConflict { id, disks } => {
            let volumes: Vec<ObjectPath<'_>> = disks
                .iter()
                .map(|diskseq| tree.told_disk_path(*diskseq, id))
                .collect();
            manager("IdentityConflict").and_then(|signal| signal.build(&(text(id), volumes)))
        }
    })
}

/// A thread that panicked while it held one of these locks left the value whole: each change is one insert or remove.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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

    #[tokio::test]
    async fn with_no_bus_replies_go_at_once() {
        let (commands, mut queue) = tokio::sync::mpsc::channel(1);
        let publisher = Publisher::without_bus(commands);
        let (to, from) = oneshot::channel();
        publisher.offer(vec![
            state_signal(1),
            Publication::Reply(to, Ok(Answer::Done)),
        ]);
        assert_eq!(from.await.unwrap(), Ok(Answer::Done));
        assert!(publisher.flush(Duration::ZERO).await);
        assert!(matches!(
            queue.try_recv(),
            Err(tokio::sync::mpsc::error::TryRecvError::Empty)
        ));
    }
}
