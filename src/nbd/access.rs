//! Who may have an export, beyond what its disk says: addresses, a number of clients, and whose turn it is to write to a disk that
//! several exports offer. Off the path of requests: asked once for each choice.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError};

use crate::correlation::{DiskSeq, ExportName, RefusalKind, Turns};
use crate::sync::{Mutex, RwLock, lock};

use super::command::Terms;
use super::conn::Conn;
use super::door::Door;
use super::handshake::{Agreed, Facts, Refusal};
use super::lease::Lease;
use super::predecessors::Predecessors;
use super::shared::Shared;

/// The rules of all exports; what has none is open to everyone who reaches the socket.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rules {
    /// LIST is refused.
    pub unlisted: bool,
    /// What clients get that name no export; `None` for nothing.
    pub unnamed: Option<ExportName>,
    pub exports: BTreeMap<ExportName, Access>,
}

/// Who may have one export, and how.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Access {
    /// `None` for everyone.
    pub addresses: Option<AllowList>,
    /// At one time; 0 for no limit.
    pub clients_max: u32,
    /// Each write is durable before it is answered.
    pub sync: bool,
    /// Whether clients are told that it turns; `None` for what the disk says.
    pub rotational: Option<bool>,
}

/// Addresses and networks, as nbd-server's `authfile` lists them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AllowList(Vec<(IpAddr, u8)>);

impl AllowList {
    /// Reads one address or `NETWORK/BITS` a line; `#` begins a comment. What is no address matches none, as with the stock
    /// server (`address_matches` in nbd's `nbdsrv.c`), and is returned.
    pub fn parse(text: &str) -> (AllowList, Vec<String>) {
        let mut list = AllowList::default();
        let mut strange = Vec::new();
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            match network(line) {
                Some(network) if list.0.len() < NETWORKS_MAX => list.0.push(network),
                _ => strange.push(line.chars().take(SHOWN_CHARS_MAX).collect()),
            }
        }
        (list, strange)
    }

    /// Whether a client of this address may come; one without, on a Unix socket, is in no list.
    pub fn admits(&self, client: Option<IpAddr>) -> bool {
        let Some(client) = client.map(|client| client.to_canonical()) else {
            return false;
        };
        self.0
            .iter()
            .any(|(network, bits)| begins_alike(*network, client, *bits))
    }
}

fn network(text: &str) -> Option<(IpAddr, u8)> {
    let (address, bits) = match text.split_once('/') {
        Some((address, bits)) => (address, Some(bits)),
        None => (text, None),
    };
    let address: IpAddr = address.trim().parse().ok()?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let bits = match bits {
        Some(bits) => bits.trim().parse().ok().filter(|bits| *bits <= most)?,
        None => most,
    };
    Some((address, bits))
}

fn begins_alike(network: IpAddr, client: IpAddr, bits: u8) -> bool {
    let (network, client, most) = match (network, client) {
        (IpAddr::V4(network), IpAddr::V4(client)) => {
            (network.to_bits().into(), client.to_bits().into(), 32)
        }
        (IpAddr::V6(network), IpAddr::V6(client)) => (network.to_bits(), client.to_bits(), 128),
        _ => return false,
    };
    let differing: u128 = network ^ client;
    differing.checked_shr(most - u32::from(bits)).unwrap_or(0) == 0
}

/// The rules, and the clients that write to disks of several exports.
#[derive(Default)]
pub(super) struct Gatekeeper {
    rules: RwLock<Arc<Rules>>,
    /// By export, until it is served.
    turns: Mutex<BTreeMap<ExportName, Turns>>,
    /// A connection can end under any lock; nothing is taken under this one.
    writers: Mutex<BTreeMap<DiskSeq, Vec<Writer>>>,
}

struct Writer {
    export: ExportName,
    share: bool,
    clients: u32,
}

impl Gatekeeper {
    pub(super) fn rules(&self) -> Arc<Rules> {
        self.rules
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn turns_of(&self, export: &ExportName) -> Option<Turns> {
        lock(&self.turns).remove(export)
    }

    fn enter(&self, export: &ExportName, turns: Turns) -> Result<(), Refusal> {
        let mut writers = lock(&self.writers);
        let here = writers.entry(turns.diskseq).or_default();
        let stands_in_the_way = |writer: &&Writer| {
            writer.export != *export && writer.clients > 0 && !(writer.share && turns.share)
        };
        if let Some(other) = here.iter().find(stands_in_the_way) {
            return Err(Refusal {
                kind: RefusalKind::Policy,
                reason: format!(
                    "InUse: {} clients of export {} have the volume of export {export}; 'x-share = true' on both lets both write",
                    other.clients, other.export
                ),
            });
        }
        match here.iter_mut().find(|writer| writer.export == *export) {
            Some(writer) => {
                writer.clients += 1;
                writer.share = turns.share;
            }
            None => here.push(Writer {
                export: export.clone(),
                share: turns.share,
                clients: 1,
            }),
        }
        Ok(())
    }

    fn leave(&self, export: &ExportName, turns: Turns) {
        let mut writers = lock(&self.writers);
        let Some(here) = writers.get_mut(&turns.diskseq) else {
            return;
        };
        for writer in here.iter_mut().filter(|writer| writer.export == *export) {
            writer.clients = writer.clients.saturating_sub(1);
        }
        here.retain(|writer| writer.clients > 0);
        if here.is_empty() {
            writers.remove(&turns.diskseq);
        }
    }
}

/// A connection's turn to write to a disk. It ends with the connection, and that with the last request that is inside of an image call: what a dead
/// session wrote last lands before the first write of whoever has the next turn.
pub(super) struct WritersTurn {
    shared: Arc<Shared>,
    export: ExportName,
    turns: Turns,
}

impl WritersTurn {
    fn take(lease: &Lease, turns: Turns) -> Result<WritersTurn, Refusal> {
        lease.shared.gatekeeper.enter(&lease.export, turns)?;
        Ok(WritersTurn {
            shared: lease.shared.clone(),
            export: lease.export.clone(),
            turns,
        })
    }
}

impl Drop for WritersTurn {
    fn drop(&mut self) {
        self.shared.gatekeeper.leave(&self.export, self.turns);
    }
}

impl Door {
    /// Replaces the rules of all exports. They hold for clients that choose from now on; those that are there go on.
    pub fn rule(&self, rules: Rules) {
        let kept = &self.shared().gatekeeper.rules;
        *kept.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
    }

    /// Whose turn it is to write is judged for the next lease of `name`, at each of its clients.
    pub fn take_turns(&self, name: &ExportName, turns: Option<Turns>) {
        let mut kept = lock(&self.shared().gatekeeper.turns);
        match turns {
            Some(turns) => kept.insert(name.clone(), turns),
            None => kept.remove(name),
        };
    }
}

impl Shared {
    /// What new clients of `name` get, or why this one gets nothing.
    pub(super) fn look_up_for(&self, name: &str, conn: &Conn) -> Result<Arc<Lease>, Refusal> {
        let lease = self.look_up(name)?;
        let rules = self.gatekeeper.rules();
        let access = rules.exports.get(&lease.export);
        let admitted = access
            .and_then(|access| access.addresses.as_ref())
            .is_none_or(|list| list.admits(conn.peer.ip));
        if admitted {
            return Ok(lease);
        }
        Err(Refusal {
            kind: RefusalKind::Policy,
            reason: format!(
                "the authfile of export {} does not list this client",
                lease.export
            ),
        })
    }

    /// What a client that names `name` gets for life, and whom it has to wait for first.
    pub(super) fn bind(
        &self,
        name: &str,
        conn: &Arc<Conn>,
    ) -> Result<(Arc<Lease>, Predecessors), Refusal> {
        let lease = self.look_up_for(name, conn)?;
        let predecessors = lease.bind(conn)?;
        Ok((lease, predecessors))
    }
}

impl Lease {
    /// Binds a connection to this lease for life (invariant 1), if the rules let it in.
    fn bind(&self, conn: &Arc<Conn>) -> Result<Predecessors, Refusal> {
        let turn = self.turns.map(|turns| WritersTurn::take(self, turns));
        let turn = turn.transpose()?;
        let keeper = &self.shared.gatekeeper;
        let max = keeper
            .rules()
            .exports
            .get(&self.export)
            .map_or(0, |access| access.clients_max);
        let predecessors = self.attach(conn, max)?;
        conn.is_of(&self.party, turn);
        Ok(predecessors)
    }

    /// What was said of it, whatever the disk says.
    pub(super) fn said_rotational(&self) -> Option<bool> {
        let rules = self.shared.gatekeeper.rules();
        rules.exports.get(&self.export)?.rotational
    }

    /// What a client that comes now may ask for.
    pub(super) fn terms(&self, facts: Facts, agreed: Agreed) -> Terms {
        let rules = self.shared.gatekeeper.rules();
        let access = rules.exports.get(&self.export);
        Terms {
            size: facts.size,
            read_only: facts.read_only,
            trim: facts.can_discard && !facts.read_only,
            headers: agreed.headers,
            contexts: agreed.contexts,
            block_min: facts.blocks.min,
            request_max: facts.blocks.max,
            sync: access.is_some_and(|access| access.sync),
        }
    }
}

/// Each is compared with each client.
const NETWORKS_MAX: usize = 10_000;
const SHOWN_CHARS_MAX: usize = 60;

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ExportName {
        ExportName::parse(text).unwrap()
    }

    #[test]
    fn a_list_admits_its_addresses_and_networks_and_no_one_else() {
        let text = "# the cluster\n10.0.0.7\n 192.168.16.0/20 # hosts\n\nfd00::/8\nnot-an-address\n10.0.0.0/33\n";
        let (list, strange) = AllowList::parse(text);
        assert_eq!(strange, ["not-an-address", "10.0.0.0/33"]);
        for (client, admitted) in [
            ("10.0.0.7", true),
            ("10.0.0.8", false),
            ("192.168.31.255", true),
            ("192.168.32.0", false),
            ("::ffff:10.0.0.7", true),
            ("fdff::1", true),
            ("fe00::1", false),
        ] {
            let client: IpAddr = client.parse().unwrap();
            assert_eq!(list.admits(Some(client)), admitted, "{client}");
        }
        assert!(!list.admits(None));
        let (all, _) = AllowList::parse("0.0.0.0/0");
        assert!(all.admits("203.0.113.9".parse().ok()));
        assert!(!all.admits("2001:db8::1".parse().ok()));
        assert!(!AllowList::parse("").0.admits("127.0.0.1".parse().ok()));
    }

    #[test]
    fn a_disk_belongs_to_the_export_whose_client_came_first_until_the_last_has_left() {
        let keeper = Gatekeeper::default();
        let alone = Turns {
            diskseq: DiskSeq(7),
            share: false,
        };
        let (old, new) = (name("old"), name("new"));
        keeper.enter(&old, alone).unwrap();
        keeper.enter(&old, alone).unwrap();
        let refusal = keeper.enter(&new, alone).unwrap_err();
        assert!(
            refusal.reason.contains("InUse: 2 clients of export old"),
            "{}",
            refusal.reason
        );
        let shared = Turns {
            share: true,
            ..alone
        };
        // It would share, the other would not.
        assert!(keeper.enter(&new, shared).is_err());
        let elsewhere = Turns {
            diskseq: DiskSeq(8),
            ..alone
        };
        keeper.enter(&new, elsewhere).unwrap();
        keeper.leave(&old, alone);
        assert!(keeper.enter(&new, alone).is_err());
        keeper.leave(&old, alone);
        keeper.enter(&new, shared).unwrap();
        keeper.enter(&old, shared).unwrap();
        assert!(keeper.enter(&name("third"), alone).is_err());
        for (export, turns) in [(&new, shared), (&old, shared), (&new, elsewhere)] {
            keeper.leave(export, turns);
        }
        assert!(lock(&keeper.writers).is_empty());
    }
}
