//! A connection's socket: the calls on it, each of which returns at once or within its deadline. Knows no replies.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, Shutdown, recv, recvmsg, send, sendmsg, shutdown};

use crate::sync;

/// Linux's default of wmem_max, in bytes.
const SEND_BYTES: usize = 212_992;
const SENDING: MsgFlags = MsgFlags::MSG_DONTWAIT.union(MsgFlags::MSG_NOSIGNAL);

pub(super) struct Socket(OwnedFd);

impl Socket {
    pub(super) fn new(fd: OwnedFd) -> Socket {
        Socket(fd)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// recv(2). With `wait`, for as long as the socket's receive timeout.
    pub(super) fn receive(&self, into: &mut [u8], wait: bool) -> nix::Result<usize> {
        sync::before_call();
        again(|| recv(self.0.as_raw_fd(), into, receiving(wait)))
    }

    /// recvmsg(2), as [`Socket::receive`]: fills `into`, and `next` with what follows that.
    pub(super) fn receive_both(
        &self,
        into: &mut [u8],
        next: &mut [u8],
        wait: bool,
    ) -> nix::Result<usize> {
        sync::before_call();
        let mut slices = [IoSliceMut::new(into), IoSliceMut::new(next)];
        again(|| {
            let fd = self.0.as_raw_fd();
            recvmsg::<()>(fd, &mut slices, None, receiving(wait)).map(|message| message.bytes)
        })
    }

    /// send(2) of what the peer takes now.
    pub(super) fn send(&self, bytes: &[u8]) -> nix::Result<usize> {
        sync::before_call();
        send(self.0.as_raw_fd(), bytes, SENDING)
    }

    /// sendmsg(2), as [`Socket::send`].
    pub(super) fn send_all(&self, slices: &[IoSlice<'_>]) -> nix::Result<usize> {
        sync::before_call();
        sendmsg::<()>(self.0.as_raw_fd(), slices, &[], SENDING, None)
    }

    /// Waits at most `limit` until the peer takes more, or is gone; false when it did neither, and at a signal.
    pub(super) fn wait_writable(&self, limit: Duration) -> bool {
        let mut fds = [PollFd::new(self.fd(), PollFlags::POLLOUT)];
        sync::before_call();
        let limit = if sync::MAY_WAIT {
            limit
        } else {
            Duration::ZERO
        };
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        poll(&mut fds, limit).is_ok_and(|count| count > 0)
    }

    /// How many bytes have come and were not received, at most as many as `into` holds; `None` unless the peer has ended its side.
    pub(super) fn left_at_end(&self, into: &mut [u8]) -> Option<usize> {
        let ended = PollFlags::from_bits_retain(libc::POLLRDHUP);
        let mut fds = [PollFd::new(self.fd(), ended)];
        sync::before_call();
        if !poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0) {
            return None;
        }
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        Some(recv(self.0.as_raw_fd(), into, peek).unwrap_or(0))
    }

    /// Whether at least `bytes` have come and were not received.
    pub(super) fn holds(&self, bytes: usize) -> bool {
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        sync::before_call();
        recv(self.0.as_raw_fd(), &mut vec![0; bytes], peek).is_ok_and(|there| there == bytes)
    }

    /// Asks for twice the room that a socket has (socket(7): wmem_max, doubled): a reply of the usual size fits. Of pages it costs no memory.
    pub(super) fn make_room(&self) {
        // A wish: with less room it goes on as before.
        let _ = socket2::SockRef::from(&self.0).set_send_buffer_size(SEND_BYTES);
    }

    /// Ends the connection both ways at once; whoever waits on the socket returns.
    pub(super) fn cut(&self) {
        // Fails only when the peer, or an earlier cut, has ended the connection already.
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }

    /// Says that no more will be sent.
    pub(super) fn finish_sending(&self) {
        // Fails only when the peer has ended the connection already: the next receive says so.
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Write);
    }
}

fn receiving(wait: bool) -> MsgFlags {
    if wait && sync::MAY_WAIT {
        MsgFlags::empty()
    } else {
        MsgFlags::MSG_DONTWAIT
    }
}

/// As often as a signal comes between.
fn again(mut call: impl FnMut() -> nix::Result<usize>) -> nix::Result<usize> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}
