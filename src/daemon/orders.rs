//! The way from the loop to the store's task. It is bounded, and nothing that holds whatever the store says is dropped on it.
//!
//! ```text
//!   a caller's order ──── room? ── yes ──> queue ──> keeper
//!                              └── no ───> refused
//!   the middle's own ──── room? ── yes ──> queue
//!                              └── no ───> waiting, one change for each row ── room ──> queue, as one order
//! ```

use tokio::sync::mpsc;

use super::keeper::Order;
use super::last_changes::LastChanges;
use crate::correlation::{Change, INTERNAL, RequestId, Unkept};
use crate::mapping::basis::RowSaid;

/// Orders that may wait for the store. Past it a request is refused, for its caller could not be answered in time.
const ORDERS_MAX: usize = 1_024;

pub(super) struct Orders {
    queue: mpsc::Sender<Order>,
    /// What found no room. While there is any no other change is taken, so nothing overtakes it.
    waiting: LastChanges,
    /// What the row of the shared table said by which the request asks that is being carried out; `None` for callers.
    pub by_row: Option<RowSaid>,
}

impl Orders {
    pub fn new() -> (Orders, mpsc::Receiver<Order>) {
        let (queue, orders) = mpsc::channel(ORDERS_MAX);
        let waiting = LastChanges::default();
        let orders_of = Orders {
            queue,
            waiting,
            by_row: None,
        };
        (orders_of, orders)
    }

    /// What is not a change of rows.
    ///
    /// # Errors
    /// The order, for which there is no room.
    pub fn send(&self, order: Order) -> Result<(), Order> {
        self.queue
            .try_send(order)
            .map_err(mpsc::error::TrySendError::into_inner)
    }

    /// Has changes written. The middle's own hold already, and so does a release, whose disk was given up: they are never refused.
    ///
    /// # Errors
    /// There is no room for a caller's.
    pub fn write(&mut self, request: RequestId, changes: Vec<Change>) -> Result<(), Unkept> {
        let mut unsent = changes;
        if self.waiting.is_empty() {
            let order = Order::Write {
                request,
                changes: unsent,
                by_row: self.by_row.clone(),
            };
            match self.send(order) {
                Err(Order::Write { changes, .. }) => unsent = changes,
                _ => return Ok(()),
            }
        }
        for change in unsent {
            if request == INTERNAL || matches!(change, Change::PutRelease(_)) {
                self.waiting.put(change);
            }
        }
        match request {
            INTERNAL => Ok(()),
            _ => Err(Unkept::Failed(Self::FULL.to_owned())),
        }
    }

    pub const FULL: &str = "too many orders are waiting for the store; try again";

    pub fn some_wait(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Sends what waits, as soon as there is room. Cancel-safe: what was not sent still waits.
    pub async fn catch_up(&mut self) {
        // Without a task there is nothing to wait for: the loop ends then.
        if let Ok(room) = self.queue.reserve().await {
            room.send(Order::Write {
                request: INTERNAL,
                changes: self.waiting.take(),
                by_row: None,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::correlation::{BootId, DiskSeq, ExportName, Release};
    use crate::identity::VolumeId;

    fn conflict_is_over(export: &str) -> Change {
        Change::DeleteConflict {
            export: ExportName::parse(export).unwrap(),
            volume: VolumeId::parse("serial:x").unwrap(),
        }
    }

    fn retire(export: &str) -> Change {
        Change::DeleteExport(ExportName::parse(export).unwrap())
    }

    fn release() -> Change {
        Change::PutRelease(Release {
            volume: VolumeId::parse("serial:x").unwrap(),
            diskseq: DiskSeq(7),
            boot: BootId("boot".to_owned()),
        })
    }

    async fn next(orders: &mut mpsc::Receiver<Order>) -> (RequestId, Vec<Change>) {
        match orders.recv().await {
            Some(Order::Write {
                request, changes, ..
            }) => (request, changes),
            _ => panic!("a write"),
        }
    }

    #[tokio::test]
    async fn the_middles_own_changes_wait_for_room_and_nothing_overtakes_them() {
        let (mut orders, mut keeper) = Orders::new();
        for _ in 0..ORDERS_MAX {
            orders.write(RequestId(1), vec![retire("a")]).unwrap();
        }
        let refused = orders.write(RequestId(2), vec![retire("b"), release()]);
        assert!(refused.is_err(), "a caller is told");
        orders.write(INTERNAL, vec![conflict_is_over("c")]).unwrap();
        let _first = next(&mut keeper).await;
        let refused = orders.write(RequestId(3), vec![retire("d")]);
        assert!(refused.is_err(), "there is room, for those that wait");
        assert!(orders.some_wait());
        orders.catch_up().await;
        assert!(!orders.some_wait());
        for _ in 1..ORDERS_MAX {
            assert_eq!(next(&mut keeper).await.0, RequestId(1));
        }
        let (request, changes) = next(&mut keeper).await;
        assert_eq!(request, INTERNAL);
        assert_eq!(changes, [release(), conflict_is_over("c")]);
        orders.write(RequestId(4), vec![retire("e")]).unwrap();
        assert_eq!(next(&mut keeper).await.0, RequestId(4));
    }
}
