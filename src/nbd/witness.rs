//! Tells who came, who left and who was turned away, for the audit trail. Off the path of requests: once for each
//! connection and choice.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::PoisonError;

use nix::sys::socket::{getsockopt, sockopt};

use crate::sync::RwLock;

/// What a client did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    Came,
    Left,
    /// It chose an export that is not to be had.
    Refused,
}

impl Seen {
    pub fn name(self) -> &'static str {
        match self {
            Seen::Came => "came",
            Seen::Left => "left",
            Seen::Refused => "refused",
        }
    }
}

/// One client at one export.
#[derive(Debug, Clone, Copy)]
pub struct Client<'a> {
    /// As the client wrote it, at most one option's bytes.
    pub export: &'a str,
    pub seen: Seen,
    /// Why it was refused.
    pub reason: &'a str,
    pub peer: &'a Peer,
}

/// Who is at the other end of a socket.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Peer {
    /// `127.0.0.1:40312`, or `pid 812` for a Unix socket; empty when the kernel does not tell.
    pub address: String,
    /// Of a Unix socket.
    pub uid: Option<u32>,
    /// Of a Unix socket; 0 for a process that this one's PID namespace does not show.
    pub pid: Option<i32>,
    /// Of a TCP socket.
    pub ip: Option<IpAddr>,
}

impl Peer {
    /// Of a TCP socket.
    pub(super) fn at(address: SocketAddr) -> Peer {
        Peer {
            address: address.to_string(),
            ip: Some(address.ip()),
            ..Peer::default()
        }
    }

    /// Of a Unix socket: asks the kernel.
    pub(super) fn of(socket: BorrowedFd<'_>) -> Peer {
        // unix(7): the credentials of whoever called connect.
        match getsockopt(&socket.as_fd(), sockopt::PeerCredentials) {
            Ok(credentials) => Peer {
                address: format!("pid {}", credentials.pid()),
                uid: Some(credentials.uid()),
                pid: Some(credentials.pid()),
                ip: None,
            },
            Err(_) => Peer::default(),
        }
    }
}

/// Who is told of clients; it must not block, it runs in session threads.
pub type ClientWitness = Box<dyn Fn(Client<'_>) + Send + Sync>;

/// Where the one who is told is kept. Written once at start.
#[derive(Default)]
pub(super) struct Witness(RwLock<Option<ClientWitness>>);

impl Witness {
    pub(super) fn set(&self, witness: ClientWitness) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(witness);
    }

    pub(super) fn tell(&self, client: Client<'_>) {
        if let Some(witness) = &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            witness(client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unix_peer_is_known_by_process_and_user_and_a_tcp_peer_by_address() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let peer = Peer::of(ours.as_fd());
        assert_eq!(peer.address, format!("pid {}", std::process::id()));
        assert_eq!(peer.uid, Some(nix::unistd::getuid().as_raw()));
        assert_eq!(peer.pid, i32::try_from(std::process::id()).ok());
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_accepted, from) = listener.accept().unwrap();
        let peer = Peer::at(from);
        assert_eq!(peer.address, client.local_addr().unwrap().to_string());
        assert_eq!(peer.uid, None);
    }
}
