//! The sockets that clients come to: bound at start, before anything is served.

use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Connections that may wait to be accepted, as nbd-server's clients come in bursts after a failover.
const BACKLOG: i32 = 1_024;

/// How long who has the port may take to greet: servers do before they are asked anything.
const GREETS_WITHIN: Duration = Duration::from_secs(1);
/// proto.md, "Handshake phase": the first eight bytes that any server of the protocol says.
const GREETING: &[u8; 8] = b"NBDMAGIC";

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
    /// Not a port that is about to be free, as that of a daemon which a hung disk keeps from ending: that one greets nobody any more.
    #[error(
        "{0}: another NBD server listens and answers there: give an address of its own ('listen' in nbdtrack.toml, or --listen), or, where \
         that is Debian's nbd-server, its place ('nbdtrack take-over --dry-run')"
    )]
    Answered(SocketAddr),
    #[error("{address}: cannot listen: {source}")]
    Tcp {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("{}: another program has this socket: stop it, or give another path with --socket", .0.display())]
    SocketInUse(PathBuf),
    #[error("{}: is there already and is no socket: remove it, or give another path with --socket", .0.display())]
    NotASocket(PathBuf),
    #[error("{}: cannot listen: {source}", path.display())]
    Unix { path: PathBuf, source: io::Error },
}

#[derive(Debug, Default)]
pub(in crate::daemon) struct Sockets {
    pub tcp: Vec<TcpListener>,
    pub unix: Vec<UnixListener>,
}

pub(in crate::daemon) fn bind(
    addresses: &[SocketAddr],
    socket: Option<&Path>,
) -> Result<Sockets, ListenError> {
    let tcp = addresses
        .iter()
        .map(|address| bind_tcp(*address))
        .collect::<Result<_, _>>()?;
    let unix = socket
        .map(bind_unix)
        .into_iter()
        .collect::<Result<_, _>>()?;
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
        match socket.bind(&address.into()) {
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
                bind_before_it_is_up(&socket, address)?;
            }
            bound => bound?,
        }
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    listen().map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse if is_answered(address) => ListenError::Answered(address),
        io::ErrorKind::AddrInUse => ListenError::InUse { address, source },
        _ => ListenError::Tcp { address, source },
    })
}

/// Whether an NBD server greets who comes to the address. Takes two seconds at most, of a start that has failed.
fn is_answered(address: SocketAddr) -> bool {
    let host = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    let greeting = || -> io::Result<[u8; GREETING.len()]> {
        let address = SocketAddr::new(host, address.port());
        let mut server = TcpStream::connect_timeout(&address, GREETS_WITHIN)?;
        server.set_read_timeout(Some(GREETS_WITHIN))?;
        let mut said = [0; GREETING.len()];
        server.read_exact(&mut said)?;
        Ok(said)
    };
    greeting().is_ok_and(|said| said == *GREETING)
}

/// Binds to an address that this machine does not have (yet): at a boot the network may come up later, and an address that follows its
/// server may be elsewhere. Nothing is opened that was not asked for: only who sends to that very address reaches the socket, and only when the
/// machine has it; the kernel asks for no right (ip(7), IP_FREEBIND). What is lost is that a mistyped address fails the start, so it is told.
fn bind_before_it_is_up(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    match address {
        SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
    }
    socket.bind(&address.into())?;
    tracing::warn!(name: "listens_before_address", %address, "this machine does not have the address; clients come in once it does");
    Ok(())
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
    use std::io::Write;
    use std::os::unix::net::UnixDatagram;

    /// At a boot the daemon can be there before the network; the start failed, five times, and then for good.
    #[test]
    fn an_address_that_is_not_up_yet_is_listened_on() {
        // Of documentation (RFC 5737, RFC 3849): no machine has them.
        for text in ["203.0.113.7:0", "[2001:db8::7]:0"] {
            let address: SocketAddr = text.parse().unwrap();
            let listener = bind_tcp(address).unwrap();
            assert_eq!(listener.local_addr().unwrap().ip(), address.ip());
        }
    }

    /// Where Debian's nbd-server has the port a start every two seconds brought nothing but lines in the log.
    #[test]
    fn a_server_that_answers_is_told_from_a_port_that_may_be_free_soon() {
        // The first accepts nobody any more, as one whose process cannot end.
        for (greeting, answers) in [
            (None, false),
            (Some(b"SSH-2.0-"), false),
            (Some(GREETING), true),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let everywhere = SocketAddr::from(([0, 0, 0, 0], address.port()));
            let server = greeting.map(|greeting| {
                let listener = listener.try_clone().unwrap();
                std::thread::spawn(move || {
                    for client in listener.incoming().take(2) {
                        client.unwrap().write_all(greeting).unwrap();
                    }
                })
            });
            for address in [address, everywhere] {
                match bind_tcp(address) {
                    Err(ListenError::Answered(of)) => assert!(answers && of == address),
                    Err(ListenError::InUse { .. }) => assert!(!answers),
                    other => panic!("{other:?}"),
                }
            }
            if let Some(server) = server {
                server.join().unwrap();
            }
        }
    }

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
