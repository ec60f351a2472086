//! What this room does that has no safe wrapper.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use tokio::io::unix::AsyncFd;

/// Puts a socket into the runtime's poll set.
///
/// # Errors
/// What `epoll_ctl` says.
pub fn register(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor for as long as it lives, and the AsyncFd owns it.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

/// Reads how many messages the kernel could not put into this socket's receive buffer
/// (`SO_MEMINFO`, socket(7); `sock_diag.h` has the layout).
///
/// # Errors
/// What `getsockopt` says.
pub fn dropped_messages(socket: BorrowedFd<'_>) -> io::Result<u32> {
    const FIELDS: usize = 9; // SK_MEMINFO_VARS
    const DROPS: usize = 8; // SK_MEMINFO_DROPS
    let mut fields = [0_u32; FIELDS];
    let mut len =
        libc::socklen_t::try_from(size_of_val(&fields)).expect("36 bytes fit into a socklen_t");
    // SAFETY: `fields` and `len` live through the call, and `len` is the size of `fields`, beyond which
    // the kernel does not write.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            fields.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fields[DROPS])
}
