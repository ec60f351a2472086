//! Who is connected from where, and who has not chosen an export yet: the counts by which a new connection is let in. Memory only.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Weak};

use crate::sync::{Mutex, lock};

use super::account::Party;
use super::conn::Conn;
use super::witness::Peer;

/// Where connections come from that are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Origin {
    /// One IPv4 address; of IPv6 the /64, for a single host has all of one (RFC 4291 2.5.1).
    Network(IpAddr),
    /// A user of the Unix socket.
    User(u32),
    /// A process of root's or of the daemon's own user. These may do what they like anyway, and on many machines everything runs as root: so
    /// one program is held apart from the others, and none of them for what they are together.
    Process(i32),
}

impl Origin {
    /// `None` for whom nothing is known of.
    pub(super) fn of(peer: &Peer, own: u32) -> Option<Origin> {
        match (peer.ip, peer.uid) {
            (Some(ip), _) => Some(Origin::Network(network(ip))),
            (None, Some(uid)) if uid != 0 && uid != own => Some(Origin::User(uid)),
            // 0: it is in a PID namespace that this one does not see.
            (None, Some(_)) => peer.pid.filter(|pid| *pid != 0).map(Origin::Process),
            (None, None) => None,
        }
    }

    fn party(self) -> Party {
        match self {
            Origin::Network(_) => Party::default(),
            Origin::User(_) | Origin::Process(_) => Party::local(),
        }
    }

    /// As many connections as it may have, where others may have `max`.
    fn seats(self, max: usize) -> usize {
        match self {
            Origin::Network(_) | Origin::User(_) => max,
            Origin::Process(_) => usize::MAX,
        }
    }
}

/// Connections by where they come from; at most as many entries as there are connections.
#[derive(Default)]
pub(super) struct Origins {
    /// Held for one map operation.
    counts: Mutex<HashMap<Origin, Here>>,
}

/// What there is of one origin.
struct Here {
    seats: usize,
    party: Arc<Party>,
}

/// One connection of an origin, until it is dropped.
pub(super) struct Seat {
    origins: Arc<Origins>,
    from: Origin,
    /// All connections of the origin.
    pub(super) party: Arc<Party>,
}

impl Origins {
    /// A seat, unless the origin has `max` already.
    pub(super) fn seat(self: &Arc<Origins>, from: Origin, max: usize) -> Option<Seat> {
        let mut counts = lock(&self.counts);
        let here = counts.entry(from).or_insert_with(|| Here {
            seats: 0,
            party: Arc::new(from.party()),
        });
        if here.seats >= from.seats(max) {
            return None;
        }
        here.seats += 1;
        Some(Seat {
            origins: Arc::clone(self),
            from,
            party: here.party.clone(),
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut counts = lock(&self.origins.counts);
        if let Some(here) = counts.get_mut(&self.from) {
            here.seats -= 1;
            if here.seats == 0 {
                counts.remove(&self.from);
            }
        }
    }
}

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

    fn from(ip: &str) -> Origin {
        let peer = Peer {
            ip: Some(ip.parse().unwrap()),
            ..Peer::default()
        };
        Origin::of(&peer, 1000).unwrap()
    }

    #[test]
    fn an_address_has_its_seats_back_when_they_are_left() {
        let origins = Arc::<Origins>::default();
        let first = origins.seat(from("192.0.2.1"), 2).unwrap();
        let _second = origins.seat(from("::ffff:192.0.2.1"), 2).unwrap();
        assert!(origins.seat(from("192.0.2.1"), 2).is_none());
        assert!(origins.seat(from("192.0.2.2"), 2).is_some());
        drop(first);
        assert!(origins.seat(from("192.0.2.1"), 2).is_some());
        assert_eq!(lock(&origins.counts).len(), 1);
    }

    #[test]
    fn a_user_is_one_origin_and_of_roots_and_our_own_each_process_is_one_with_any_number_of_seats()
    {
        let origins = Arc::<Origins>::default();
        let of = |uid: u32, pid: i32| {
            let peer = Peer {
                uid: Some(uid),
                pid: Some(pid),
                ..Peer::default()
            };
            Origin::of(&peer, 1000)
        };
        assert_eq!(of(1001, 7), of(1001, 8));
        assert_ne!(of(1001, 7), of(1002, 7));
        let _first = origins.seat(of(1001, 7).unwrap(), 1).unwrap();
        assert!(origins.seat(of(1001, 8).unwrap(), 1).is_none());
        for privileged in [0, 1000] {
            assert_ne!(of(privileged, 7), of(privileged, 8));
            let many = (0..9).map(|_| origins.seat(of(privileged, 7).unwrap(), 1));
            assert_eq!(many.flatten().count(), 9);
            assert_eq!(of(privileged, 0), None, "a process that is not seen");
        }
    }

    #[test]
    fn a_host_has_one_ipv6_network_however_many_addresses() {
        assert_eq!(from("2001:db8::1"), from("2001:db8::ffff:1"));
        assert_ne!(from("2001:db8::1"), from("2001:db8:0:1::1"));
    }
}
