//! Who is connected, for those who look and for the one who ends a session.

use std::sync::Arc;
use std::time::Duration;

use crate::correlation::{ExportName, Generation};
use crate::sync::lock;

use super::conn::Conn;
use super::door::Door;
use super::lease::Lease;

/// One session that is bound to an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionFacts {
    /// Never given twice by one door.
    pub id: u64,
    pub export: ExportName,
    pub generation: Generation,
    /// Address and port of a TCP client; process and user of a Unix one, as they were when it connected.
    pub peer: String,
    /// Since it connected.
    pub age: Duration,
}

impl Door {
    /// The sessions of one export, or of all, in no order.
    pub fn sessions(&self, of: Option<&ExportName>) -> Vec<SessionFacts> {
        let mut found = Vec::new();
        for lease in self.shared().leases(of) {
            let conns: Vec<Arc<Conn>> = lock(&lease.members).conns.values().cloned().collect();
            found.extend(conns.iter().map(|conn| SessionFacts {
                id: conn.token,
                export: lease.export.clone(),
                generation: lease.generation,
                peer: peer(conn),
                age: conn.began.elapsed(),
            }));
        }
        found
    }

    /// Cuts one session off: what it has in flight ends on the disk and is answered to no one. Says whether there was such
    /// a session.
    pub fn end_session(&self, id: u64) -> bool {
        let shared = self.shared();
        let of = |lease: &Arc<Lease>| lock(&lease.members).conns.get(&id).cloned();
        let Some(conn) = shared.leases(None).iter().find_map(of) else {
            return false;
        };
        conn.kill();
        shared.poller.resume_session(id);
        true
    }
}

fn peer(conn: &Conn) -> String {
    match (conn.peer.uid, conn.peer.pid) {
        (Some(uid), Some(pid)) if pid != 0 => format!("process {pid}, user {uid}"),
        // Its process is in another PID namespace.
        (Some(uid), _) => format!("user {uid}"),
        (None, _) => conn.peer.address.clone(),
    }
}
