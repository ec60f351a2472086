//! Payload bytes in flight: what one connection holds, and all of them together (invariant 10). Memory only.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::limits::Limits;
use super::stats::{Counters, add, sub};

/// Payload bytes that connections hold together: those of one network address, of one user, or of one export.
#[derive(Debug)]
pub(super) struct Party {
    held: AtomicU64,
    /// Of the bytes that are free, it may hold so many times as much.
    free_times: u64,
}

impl Default for Party {
    fn default() -> Party {
        Party {
            held: AtomicU64::new(0),
            free_times: 3,
        }
    }
}

impl Party {
    /// Of a user, or one process, of the Unix socket: leaves only half as much. One process may serve many disks; with this, what two of its
    /// exports hold for good still leaves room for its third.
    pub(super) fn local() -> Party {
        Party {
            free_times: 7,
            ..Party::default()
        }
    }

    /// Whether it leaves enough of what is then `free`, with `bytes` that it has taken last.
    fn is_fair(&self, bytes: u64, free: u64) -> bool {
        let held = self.held.load(Ordering::Relaxed);
        held == bytes || held <= free.saturating_mul(self.free_times)
    }
}

/// Payload bytes that one connection holds, of the share of one and of the whole (invariant 10).
///
/// Of the whole a party that holds something already leaves a part of what it holds free (a third, or a seventh), so that neither one address, nor one
/// user, nor the clients of one export stop all others: who holds nothing finds room.
pub(super) struct Account {
    used: AtomicU64,
    limit: u64,
    limit_all: u64,
    /// Of its network address, or of its user or process; none where the kernel tells nothing.
    origin: Option<Arc<Party>>,
    /// Once it has one.
    export: OnceLock<Arc<Party>>,
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
    /// Whether the export's clients hold them, too.
    of_export: bool,
    /// Whether they are counted in the whole.
    of_all: bool,
}

impl Account {
    pub(super) fn new(
        limits: &Limits,
        counters: Arc<Counters>,
        origin: Option<Arc<Party>>,
    ) -> Arc<Account> {
        Arc::new(Account {
            used: AtomicU64::new(0),
            limit: limits.in_flight_bytes,
            limit_all: limits.in_flight_bytes_all,
            origin,
            export: OnceLock::new(),
            counters,
        })
    }

    /// From now on it is one of the clients of an export.
    pub(super) fn is_of(&self, export: &Arc<Party>) {
        // A connection has one export for life (invariant 1).
        let _ = self.export.set(export.clone());
    }

    /// Takes `bytes`. A request larger than a whole share is let in when nothing else is held,
    /// so that small limits never mean a request that can never be served.
    pub(super) fn charge(self: &Arc<Account>, bytes: usize) -> Result<Charge, Full> {
        let bytes = bytes as u64;
        let order = Ordering::Relaxed;
        let fits = |used: u64| (used == 0 || used + bytes <= self.limit).then_some(used + bytes);
        if self.used.fetch_update(order, order, fits).is_err() {
            add(&self.counters.waits_connection_full, 1);
            return Err(Full::Connection);
        }
        let mut charge = self.of_parties(bytes);
        // First taken, then judged: of two that come at once the second sees the first.
        let fits = |all: u64| {
            let after = all + bytes;
            let free = self.limit_all.checked_sub(after)?;
            let mut parties = charge.parties();
            parties
                .all(|party| party.is_fair(bytes, free))
                .then_some(after)
        };
        let alone = |all: u64| fits(all).or_else(|| (all == 0).then_some(bytes));
        let all = &self.counters.in_flight_bytes_now;
        if all.fetch_update(order, order, alone).is_ok() {
            charge.of_all = true;
            return Ok(charge);
        }
        add(&self.counters.waits_all_full, 1);
        Err(Full::All)
    }

    /// Takes `bytes` that are held already and bounded otherwise, so that they are counted.
    pub(super) fn charge_held(self: &Arc<Account>, bytes: usize) -> Charge {
        let bytes = bytes as u64;
        add(&self.used, bytes);
        add(&self.counters.in_flight_bytes_now, bytes);
        let mut charge = self.of_parties(bytes);
        charge.of_all = true;
        charge
    }

    fn of_parties(self: &Arc<Account>, bytes: u64) -> Charge {
        let charge = Charge {
            of_export: self.export.get().is_some(),
            of_all: false,
            account: self.clone(),
            bytes,
        };
        charge.parties().for_each(|party| add(&party.held, bytes));
        charge
    }
}

impl Charge {
    fn parties(&self) -> impl Iterator<Item = &Party> {
        let export = self.account.export.get().filter(|_| self.of_export);
        let both = self.account.origin.iter().chain(export);
        both.map(|party| &**party)
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.parties()
            .for_each(|party| sub(&party.held, self.bytes));
        sub(&self.account.used, self.bytes);
        if self.of_all {
            sub(&self.account.counters.in_flight_bytes_now, self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn a_party_leaves_room_for_who_holds_nothing() {
        let counters = Arc::<Counters>::default();
        let limits = Limits {
            in_flight_bytes_all: 8 << 20,
            ..Limits::default()
        };
        let [address, busy, idle] = [(), (), ()].map(|()| Arc::<Party>::default());
        let account = |address: Option<&Arc<Party>>, export: &Arc<Party>| {
            let account = Account::new(&limits, counters.clone(), address.cloned());
            account.is_of(export);
            account
        };
        let fill = |account: &dyn Fn() -> Arc<Account>| -> Vec<Charge> {
            std::iter::from_fn(|| account().charge(MIB).ok()).collect()
        };
        // However many connections: of one export, then of one address and many exports.
        let held = fill(&|| account(None, &busy));
        assert_eq!(held.len(), 6);
        assert!(account(None, &busy).charge(MIB).is_err());
        let other = account(None, &idle).charge(2 * MIB).unwrap();
        assert!(account(None, &Arc::default()).charge(MIB).is_err(), "full");
        drop((held, other));
        let held = fill(&|| account(Some(&address), &Arc::default()));
        assert_eq!(held.len(), 6);
        account(None, &idle).charge(MIB).unwrap();
        drop(held);
        assert_eq!(counters.snapshot().in_flight_bytes_now, 0);
        for party in [&address, &busy, &idle] {
            assert_eq!(party.held.load(Ordering::Relaxed), 0);
        }
        // More than there is, but nothing else is held.
        account(None, &Arc::default()).charge(9 * MIB).unwrap();
        // A process of the Unix socket, with many exports: one more of its own, while two hold what they may.
        let local = Arc::new(Party::local());
        let _stuck = fill(&|| account(Some(&local), &busy));
        account(Some(&local), &idle).charge(MIB).unwrap();
        let all = fill(&|| account(Some(&local), &Arc::default()));
        assert_eq!(all.len(), 1);
        account(None, &idle).charge(MIB).unwrap();
    }
}
