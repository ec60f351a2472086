//! Payload bytes in flight: what one connection holds, and all of them together (invariant 10). Memory only.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::limits::Limits;
use super::stats::{Counters, add, sub};

/// Payload bytes that one connection holds, of the share of one and of the whole (invariant 10).
pub(super) struct Account {
    used: AtomicU64,
    limit: u64,
    limit_all: u64,
    pub(super) counters: Arc<Counters>,
}

/// Which share is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    Connection,
    All,
}

/// Bytes taken out of an [`Account`] until dropped.
pub(super) struct Charge {
    account: Arc<Account>,
    bytes: u64,
}

impl Account {
    pub(super) fn new(limits: &Limits, counters: Arc<Counters>) -> Arc<Account> {
        Arc::new(Account {
            used: AtomicU64::new(0),
            limit: limits.in_flight_bytes,
            limit_all: limits.in_flight_bytes_all,
            counters,
        })
    }

    /// Takes `bytes`. A request larger than a whole share is let in when nothing else is held,
    /// so that small limits never mean a request that can never be served.
    pub(super) fn charge(self: &Arc<Account>, bytes: usize) -> Result<Charge, Full> {
        let bytes = bytes as u64;
        let fits = |limit: u64| {
            move |used: u64| (used == 0 || used + bytes <= limit).then_some(used + bytes)
        };
        let order = Ordering::Relaxed;
        let all = &self.counters.in_flight_bytes_now;
        if self
            .used
            .fetch_update(order, order, fits(self.limit))
            .is_err()
        {
            add(&self.counters.waits_connection_full, 1);
            return Err(Full::Connection);
        }
        if all
            .fetch_update(order, order, fits(self.limit_all))
            .is_err()
        {
            self.used.fetch_sub(bytes, order);
            add(&self.counters.waits_all_full, 1);
            return Err(Full::All);
        }
        Ok(Charge {
            account: self.clone(),
            bytes,
        })
    }

    /// Takes `bytes` that are held already and bounded otherwise, so that they are counted.
    pub(super) fn charge_held(self: &Arc<Account>, bytes: usize) -> Charge {
        let bytes = bytes as u64;
        add(&self.used, bytes);
        add(&self.counters.in_flight_bytes_now, bytes);
        Charge {
            account: self.clone(),
            bytes,
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        sub(&self.account.used, self.bytes);
        sub(&self.account.counters.in_flight_bytes_now, self.bytes);
    }
}
