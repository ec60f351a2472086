//! The sockets that clients come to: bound at start, before anything is served.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

/// Connections that may wait to be accepted, as nbd-server's clients come in bursts after a failover.
const BACKLOG: i32 = 1_024;

/// Who may connect to the Unix socket: its owner and group.
const SOCKET_MODE: u32 = 0o660;

/// Why the daemon cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error(
        "{address}: {source}; another program listens there (an nbd-server?): stop it, or give another address \
         with --listen"
    )]
    InUse {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("{address}: cannot listen: {source}")]
    Tcp {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("{}: another program has this socket: stop it, or give another path with --socket", .0.display())]
    SocketInUse(PathBuf),
    #[error("{}: is there already and is no socket: remove it, or give another path with --socket", .0.display())]
    NotASocket(PathBuf),
    #[error(
        "descriptor {number} ({name:?}) of the service manager is no listening TCP or Unix stream socket: use ListenStream= in \
         its socket unit"
    )]
    Passed { number: usize, name: String },
    #[error("{}: cannot listen: {source}", path.display())]
    Unix { path: PathBuf, source: io::Error },
}

#[derive(Debug, Default)]
pub(super) struct Sockets {
    pub tcp: Vec<TcpListener>,
    pub unix: Vec<UnixListener>,
}

/// The sockets that a service manager passed (sd_listen_fds(3)); `None` when it passed none. They are in place of the configured ones:
/// who activates by socket says there where to listen.
pub(super) fn passed() -> Result<Option<Sockets>, ListenError> {
    let names: Vec<String> = std::env::var("LISTEN_FDNAMES")
        .map(|names| names.split(':').map(str::to_owned).collect())
        .unwrap_or_default();
    let mut given = listenfd::ListenFd::from_env();
    if given.len() == 0 {
        return Ok(None);
    }
    let mut sockets = Sockets::default();
    for index in 0..given.len() {
        let name = names.get(index).cloned().unwrap_or_default();
        let number = index + 3;
        // An error says that it is of another kind, and leaves it where it is.
        if let Ok(Some(listener)) = given.take_tcp_listener(index)
            && SockRef::from(&listener).is_listener().unwrap_or(false)
        {
            let address = listener.local_addr().ok();
            tracing::info!(name, ?address, "a TCP socket of the service manager");
            sockets.tcp.push(listener);
        } else if let Ok(Some(listener)) = given.take_unix_listener(index)
            && SockRef::from(&listener).is_listener().unwrap_or(false)
        {
            let address = listener.local_addr().ok();
            tracing::info!(name, ?address, "a Unix socket of the service manager");
            sockets.unix.push(listener);
        } else {
            return Err(ListenError::Passed { number, name });
        }
    }
    Ok(Some(sockets))
}

pub(super) fn bind(
    addresses: &[SocketAddr],
    socket: Option<&Path>,
) -> Result<Sockets, ListenError> {
    let tcp = addresses
        .iter()
        .map(|address| bind_tcp(*address))
        .collect::<Result<_, _>>()?;
    let unix = socket.map(bind_unix).transpose()?.into_iter().collect();
    Ok(Sockets { tcp, unix })
}

fn bind_tcp(address: SocketAddr) -> Result<TcpListener, ListenError> {
    let listen = || -> io::Result<TcpListener> {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::STREAM,
            Some(Protocol::TCP),
        )?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            // "[::]" and "0.0.0.0" can then both be listed.
            socket.set_only_v6(true)?;
        }
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    listen().map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse { address, source },
        _ => ListenError::Tcp { address, source },
    })
}

fn bind_unix(path: &Path) -> Result<UnixListener, ListenError> {
    let unix = |source| ListenError::Unix {
        path: path.to_owned(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ListenError::NotASocket(path.to_owned()));
        }
        // Left behind by a daemon that was killed.
        Ok(_) if is_abandoned(path).map_err(unix)? => std::fs::remove_file(path).map_err(unix)?,
        Ok(_) => return Err(ListenError::SocketInUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(unix(error)),
    }
    let listener = UnixListener::bind(path).map_err(unix)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE)).map_err(unix)?;
    Ok(listener)
}

/// Whether no one listens on the socket at `path`: only ECONNREFUSED says so (connect(2)). A full backlog is EAGAIN, as
/// nothing is waited for; a socket of another type is EPROTOTYPE, and someone's.
fn is_abandoned(path: &Path) -> io::Result<bool> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    let answer = socket.connect(&SockAddr::unix(path)?);
    Ok(answer.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn a_socket_that_a_killed_daemon_left_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nbd.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(bind_unix(&path).is_ok());
    }

    /// A path given by mistake, as /run/systemd/notify: it refuses a stream, and was taken for abandoned.
    #[test]
    fn a_socket_that_someone_has_is_never_removed() {
        let folder = tempfile::tempdir().unwrap();
        let datagrams = folder.path().join("notify");
        let _other = UnixDatagram::bind(&datagrams).unwrap();
        let full = folder.path().join("full");
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listener.bind(&SockAddr::unix(&full).unwrap()).unwrap();
        listener.listen(0).unwrap();
        let _waiting = std::os::unix::net::UnixStream::connect(&full).unwrap();
        for path in [datagrams, full] {
            let refused = bind_unix(&path);
            assert!(
                matches!(refused, Err(ListenError::SocketInUse(_))),
                "{path:?}"
            );
            assert!(path.exists());
        }
    }
}
