//! Takes what the loop decided and makes it visible on the bus, in order, without ever making the loop wait.
//!
//! Offers go into a queue in which an object stands once, with its newest state; a task takes them out, lets the
//! tree find the difference, and sends that. A slow or absent bus therefore costs at most one state for each object and
//! [`SIGNALS_MAX`] signals.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;
use zbus::{Connection, Message};

use super::Publication;
use super::queue::{Entry, Outcome, Queue, SIGNALS_MAX};
use super::signals::{message, signal};
use super::tree::Tree;

/// A bus that takes no byte for so long is broken: the connection is given up and made anew.
const SEND_WITHIN: Duration = Duration::from_secs(30);

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
    /// Tells whoever flushes that the publishing task has written what it had in hand; at most one waits, until its deadline.
    written: Notify,
    /// The connection while there is one.
    link: Mutex<Option<Connection>>,
    dropped: AtomicU64,
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

    /// False with no bus, when nobody sees objects.
    pub fn is_served(&self) -> bool {
        self.served.is_some()
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

    /// Whether a bus is there, or none is wanted.
    pub fn is_linked(&self) -> bool {
        self.served
            .as_ref()
            .is_none_or(|served| served.shared.link().is_some())
    }

    /// Waits until all that was offered is on the bus, but no longer than `within`; says whether it is. For the
    /// end of the daemon.
    pub async fn flush(&self, within: Duration) -> bool {
        let Some(Served { shared, .. }) = &self.served else {
            return true;
        };
        let empty = async {
            loop {
                // Before the look: what is written between the look and the wait is told to it, too.
                let written = shared.written.notified();
                if lock(&shared.queue).is_empty() {
                    return;
                }
                written.await;
            }
        };
        timeout(within, empty).await.is_ok()
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
        shared.written.notify_waiters();
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
        Err(_) => format!("it has taken nothing for {} s", SEND_WITHIN.as_secs()),
    };
    // A message may have gone out in part, so nothing can follow it. The server connects anew.
    tracing::warn!(name: "bus_lost", reason, "the bus is lost");
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
            Entry::Job((job, result)) => {
                tree.put_job(job, result)
                    .iter()
                    .map(message)
                    .for_each(&mut add);
            }
            Entry::Log(state) => {
                tree.put_log(state).iter().map(message).for_each(&mut add);
            }
            Entry::Signal(notice) => signal(tree, &notice).into_iter().for_each(&mut add),
            Entry::Reply(to, outcome) => replies.push((to, outcome)),
        }
    }
    (messages, replies)
}

/// A thread that panicked while it held one of these locks left the value whole: each change is one insert or remove.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dbus::Answer;

    #[tokio::test]
    async fn with_no_bus_replies_go_at_once() {
        let (commands, mut queue) = tokio::sync::mpsc::channel(1);
        let publisher = Publisher::without_bus(commands);
        let (to, from) = oneshot::channel();
        publisher.offer(vec![
            Publication::DiskGone(crate::correlation::DiskSeq(1)),
            Publication::Reply(to, Ok(Answer::Done)),
        ]);
        assert_eq!(from.await.unwrap(), Ok(Answer::Done));
        assert!(publisher.flush(Duration::ZERO).await);
        assert!(matches!(
            queue.try_recv(),
            Err(tokio::sync::mpsc::error::TryRecvError::Empty)
        ));
    }

    #[tokio::test]
    async fn a_flush_ends_when_what_was_offered_is_written_and_not_before() {
        let shared = Arc::new(Shared::default());
        let publisher = Publisher::new(shared.clone(), Vec::new());
        // More than one batch.
        let gone = |n| Publication::DiskGone(crate::correlation::DiskSeq(n));
        publisher.offer((1..1_000).map(gone).collect());
        assert!(!publisher.flush(Duration::ZERO).await, "nobody writes it");
        // It waits before anything is written.
        let (flushed, ()) = tokio::join!(publisher.flush(Duration::from_secs(30)), async {
            tokio::spawn(run(shared.clone()));
        });
        assert!(flushed && lock(&shared.queue).is_empty());
    }
}
