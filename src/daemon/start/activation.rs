//! Listening sockets that the service manager passes (sd_listen_fds(3)): `LISTEN_FDS` from descriptor 3 on, their names in
//! `LISTEN_FDNAMES`. Any number, TCP and Unix; they take the place of those in the configuration.
//!
//! What is passed and cannot be listened on is refused by number and name: a daemon that served on fewer sockets than it was given
//! would look well and not be reached.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};

use super::sockets::Sockets;

/// More are a mistake of whoever passes them.
const SOCKETS_MAX: usize = 256;

/// Why a passed descriptor cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    #[error("LISTEN_PID, LISTEN_FDS or LISTEN_FDNAMES cannot be read: {0}")]
    Environment(io::Error),
    #[error("{0} sockets were passed, at most {SOCKETS_MAX} can be")]
    TooMany(usize),
    #[error("descriptor {fd} ({name:?}), passed by the service manager, {what}")]
    Unfit {
        fd: RawFd,
        name: String,
        what: &'static str,
    },
    #[error("descriptor {fd} ({name:?}), passed by the service manager: {source}")]
    Kernel {
        fd: RawFd,
        name: String,
        source: io::Error,
    },
}

/// The sockets that were passed to this process; `None` when none were. To be called once, before anything else is opened: it
/// takes the descriptors by their numbers.
///
/// # Errors
/// [`ActivationError`]: one that is no listening stream socket of TCP or Unix.
pub(in crate::daemon) fn passed() -> Result<Option<Sockets>, ActivationError> {
    let passed = sd_notify::listen_fds_with_names().map_err(ActivationError::Environment)?;
    if passed.len() == 0 {
        return Ok(None);
    }
    if passed.len() > SOCKETS_MAX {
        return Err(ActivationError::TooMany(passed.len()));
    }
    let mut sockets = Sockets::default();
    for (fd, name) in passed {
        take(fd, &name, &mut sockets)?;
    }
    Ok(Some(sockets))
}

fn take(fd: RawFd, name: &str, sockets: &mut Sockets) -> Result<(), ActivationError> {
    let kernel = |errno: Errno| ActivationError::Kernel {
        fd,
        name: name.to_owned(),
        source: errno.into(),
    };
    let unfit = |what| ActivationError::Unfit {
        fd,
        name: name.to_owned(),
        what,
    };
    // proc_pid_fd(5): a link for each open descriptor.
    if std::fs::read_link(format!("/proc/self/fd/{fd}")).is_err() {
        return Err(unfit("is not open"));
    }
    // SAFETY: it is open, sd_listen_fds(3) gives it to this process to own, and nothing else here knows its number; the
    // range comes from the environment once.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    fcntl(&socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(kernel)?;
    let kind = match getsockopt(&socket, sockopt::SockType) {
        Err(Errno::ENOTSOCK) => return Err(unfit("is no socket")),
        kind => kind.map_err(kernel)?,
    };
    let listens = getsockopt(&socket, sockopt::AcceptConn).map_err(kernel)?;
    if kind != SockType::Stream || !listens {
        return Err(unfit(
            "is no listening stream socket (ListenStream=, Accept=no)",
        ));
    }
    let address: SockaddrStorage = getsockname(fd).map_err(kernel)?;
    tracing::info!(fd, name, %address, "listening on a socket that was passed");
    match address.family() {
        Some(AddressFamily::Inet | AddressFamily::Inet6) => sockets.tcp.push(socket.into()),
        Some(AddressFamily::Unix) => sockets.unix.push(socket.into()),
        _ => return Err(unfit("is neither TCP nor Unix")),
    }
    Ok(())
}
