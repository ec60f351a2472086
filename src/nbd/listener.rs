//! Listening sockets: accept one connection, never wait.

use std::io;
use std::net::{IpAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

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

    /// A connection, in blocking mode and closed on exec (std sets it), and its peer's address over TCP; or `WouldBlock`.
    pub(super) fn accept(&self) -> io::Result<(OwnedFd, Option<IpAddr>)> {
        match &self.socket {
            Socket::Tcp(socket) => {
                let (socket, peer) = socket.accept()?;
                Ok((socket.into(), Some(peer.ip())))
            }
            Socket::Unix(socket) => Ok((socket.accept()?.0.into(), None)),
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
