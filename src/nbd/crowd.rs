//! Who is connected from where, and who has not chosen an export yet: the counts by which a new connection is let in. Memory only.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Weak};

use crate::sync::{Mutex, lock};

use super::account::Party;
use super::conn::Conn;

/// Connections by their peer's network address; at most as many entries as there are connections.
#[derive(Default)]
pub(super) struct Addresses {
    /// Held for one map operation.
    counts: Mutex<HashMap<IpAddr, Here>>,
}

/// What there is of one address.
#[derive(Default)]
struct Here {
    seats: usize,
    party: Arc<Party>,
}

/// One connection of an address, until it is dropped.
pub(super) struct Seat {
    addresses: Arc<Addresses>,
    from: IpAddr,
    /// All connections of the address.
    pub(super) party: Arc<Party>,
}

impl Addresses {
    /// A seat, unless the address has `max` already. A Unix socket's peers have no address and are not counted.
    pub(super) fn seat(self: &Arc<Addresses>, peer: IpAddr, max: usize) -> Option<Seat> {
        let from = network(peer);
        let mut counts = lock(&self.counts);
        let here = counts.entry(from).or_default();
        if here.seats >= max {
            return None;
        }
        here.seats += 1;
        Some(Seat {
            addresses: Arc::clone(self),
            from,
            party: here.party.clone(),
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut counts = lock(&self.addresses.counts);
        if let Some(here) = counts.get_mut(&self.from) {
            here.seats -= 1;
            if here.seats == 0 {
                counts.remove(&self.from);
            }
        }
    }
}

/// One IPv4 address; of IPv6 the /64, for a single host has all of one (RFC 4291 2.5.1).
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => {
            let prefix = address.to_bits() & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from_bits(prefix))
        }
        v4 => v4,
    }
}

/// Connections in the handshake, the oldest first: tokens only grow.
#[derive(Default)]
pub(super) struct Handshakes(Mutex<BTreeMap<u64, Weak<Conn>>>);

impl Handshakes {
    /// Takes one in; gives the oldest that has to make room for it. Silent connections so keep no one out.
    pub(super) fn enter(&self, conn: &Arc<Conn>, max: usize) -> Option<Arc<Conn>> {
        let mut conns = lock(&self.0);
        conns.insert(conn.token, Arc::downgrade(conn));
        if conns.len() <= max {
            return None;
        }
        conns.pop_first()?.1.upgrade()
    }

    pub(super) fn leave(&self, token: u64) {
        lock(&self.0).remove(&token);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_its_seats_back_when_they_are_left() {
        let addresses = Arc::<Addresses>::default();
        let peer: IpAddr = "192.0.2.1".parse().unwrap();
        let mapped: IpAddr = "::ffff:192.0.2.1".parse().unwrap();
        let first = addresses.seat(peer, 2).unwrap();
        let _second = addresses.seat(mapped, 2).unwrap();
        assert!(addresses.seat(peer, 2).is_none());
        assert!(addresses.seat("192.0.2.2".parse().unwrap(), 2).is_some());
        drop(first);
        assert!(addresses.seat(peer, 2).is_some());
        assert_eq!(lock(&addresses.counts).len(), 1);
    }

    #[test]
    fn a_host_has_one_ipv6_network_however_many_addresses() {
        let addresses = Arc::<Addresses>::default();
        let _one = addresses.seat("2001:db8::1".parse().unwrap(), 1).unwrap();
        assert!(
            addresses
                .seat("2001:db8::ffff:1".parse().unwrap(), 1)
                .is_none()
        );
        assert!(
            addresses
                .seat("2001:db8:0:1::1".parse().unwrap(), 1)
                .is_some()
        );
    }
}
