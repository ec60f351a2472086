//! Listening sockets: accept one connection, never wait.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use super::witness::Peer;

pub(super) struct Listener {
    pub(super) token: u64,
    socket: Socket,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    pub(super) fn tcp(token: u64, socket: TcpListener) -> io::Result<Listener> {
        socket.set_nonblocking(true)?;
        let socket = Socket::Tcp(socket);
        Ok(Listener { token, socket })
    }

    pub(super) fn unix(token: u64, socket: UnixListener) -> io::Result<Listener> {
        socket.set_nonblocking(true)?;
        let socket = Socket::Unix(socket);
        Ok(Listener { token, socket })
    }

    /// A connection, in blocking mode and closed on exec (std sets it), and its peer; or `WouldBlock`.
    pub(super) fn accept(&self) -> io::Result<(OwnedFd, Peer)> {
        match &self.socket {
            Socket::Tcp(socket) => {
                let (socket, from) = socket.accept()?;
                Ok((socket.into(), Peer::at(from)))
            }
            Socket::Unix(socket) => {
                let socket = OwnedFd::from(socket.accept()?.0);
                let peer = Peer::of(socket.as_fd());
                Ok((socket, peer))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(socket) => socket.as_fd(),
            Socket::Unix(socket) => socket.as_fd(),
        }
    }
}

/// Prepares an accepted socket: replies leave at once, and what waits for the peer returns after `idle`.
pub(super) fn prepare(socket: &OwnedFd, idle: Duration, tcp: bool) -> io::Result<()> {
    let socket = socket2::SockRef::from(socket);
    socket.set_read_timeout(Some(idle))?;
    // Only for pages: splice(2) to a socket waits as long as this, whatever its flags say; all other sends do not wait.
    socket.set_write_timeout(Some(idle))?;
    if tcp {
        socket.set_tcp_nodelay(true)?;
        // A peer whose machine is gone says nothing for ever: keepalive finds out.
        let alive = socket2::TcpKeepalive::new()
            .with_time(Duration::from_secs(60))
            .with_interval(Duration::from_secs(10));
        socket.set_tcp_keepalive(&alive)?;
    }
    Ok(())
}
