//! The sockets that clients come to: bound at start, before anything is served.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use socket2::{Domain, Protocol, Socket, Type};

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
    #[error("{}: another program answers on this socket: stop it, or give another path with --socket", .0.display())]
    SocketInUse(PathBuf),
    #[error("{}: is there already and is no socket: remove it, or give another path with --socket", .0.display())]
    NotASocket(PathBuf),
    #[error("{}: cannot listen: {source}", path.display())]
    Unix { path: PathBuf, source: io::Error },
}

#[derive(Debug, Default)]
pub(super) struct Sockets {
    pub tcp: Vec<TcpListener>,
    pub unix: Option<UnixListener>,
}

pub(super) fn bind(
    addresses: &[SocketAddr],
    socket: Option<&Path>,
) -> Result<Sockets, ListenError> {
    let tcp = addresses
        .iter()
        .map(|address| bind_tcp(*address))
        .collect::<Result<_, _>>()?;
    let unix = socket.map(bind_unix).transpose()?;
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
        // Left behind by a daemon that was killed, unless someone answers.
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(ListenError::SocketInUse(path.to_owned()));
        }
        Ok(_) => std::fs::remove_file(path).map_err(unix)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(unix(error)),
    }
    let listener = UnixListener::bind(path).map_err(unix)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE)).map_err(unix)?;
    Ok(listener)
}
