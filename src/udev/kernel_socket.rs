//! The kernel's own device events: a netlink socket in group 1 of `NETLINK_KOBJECT_UEVENT`.
//!
//! A socket of our own, because libudev turns `ENOBUFS`, the only word of an overrun, into "nothing there".

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    self as nixsock, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType,
    setsockopt, sockopt,
};
use tokio::io::unix::AsyncFd;

use super::sys;
use super::uevent::{self, Heard, Hint, MESSAGE_BYTES_MAX, ScsiDoubt};

/// The multicast group that the kernel sends to; 2 is udev's.
const KERNEL_GROUP: u32 = 1;

/// What one receive gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    Hint(Hint),
    Doubt(ScsiDoubt),
    /// An event of something that is no whole disk.
    Other,
    /// The sender is not the kernel.
    Foreign,
    Malformed,
    /// Events were lost.
    Overrun,
    /// Nothing is waiting.
    Nothing,
}

pub struct KernelSocket {
    fd: AsyncFd<OwnedFd>,
    buffer: Box<[u8; MESSAGE_BYTES_MAX]>,
}

impl KernelSocket {
    /// Subscribes.
    ///
    /// # Errors
    /// What the kernel says to the socket or its binding.
    pub fn subscribe(receive_buffer_bytes: usize) -> io::Result<KernelSocket> {
        let fd = nixsock::socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        size_buffer(&fd, receive_buffer_bytes, "kernel");
        nixsock::bind(fd.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
        Ok(KernelSocket {
            fd: sys::register(fd)?,
            buffer: Box::new([0; MESSAGE_BYTES_MAX]),
        })
    }

    /// Waits until something can be received. Cancel-safe: it takes nothing.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub async fn readable(&self) -> io::Result<()> {
        // The readiness is kept: `receive` clears it when the socket says that it is empty.
        self.fd
            .readable()
            .await
            .map(|mut guard| guard.retain_ready())
    }

    /// Takes one message, without waiting.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn receive(&mut self) -> io::Result<Received> {
        let buffer = &mut self.buffer;
        let mut asked = false;
        let taken = self.fd.try_io(tokio::io::Interest::READABLE, |fd| {
            asked = true;
            take(fd, &mut buffer[..])
        });
        // The runtime may not know yet that something came: it looks at its sockets only between its tasks.
        let taken = if asked {
            taken
        } else {
            take(self.fd.get_ref(), &mut buffer[..])
        };
        match taken {
            Ok(TakenMessage {
                from_kernel: false, ..
            }) => Ok(Received::Foreign),
            Ok(TakenMessage { whole: false, .. }) => Ok(Received::Malformed),
            Ok(TakenMessage { bytes, .. }) => Ok(match uevent::parse(&self.buffer[..bytes]) {
                Ok(Heard::Disk(hint)) => Received::Hint(hint),
                Ok(Heard::Doubt(doubt)) => Received::Doubt(doubt),
                Ok(Heard::Other) => Received::Other,
                Err(uevent::Malformed) => Received::Malformed,
            }),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => Ok(Received::Overrun),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(Received::Other),
            Err(e) => Err(e),
        }
    }
}

/// One message that was taken from the socket.
struct TakenMessage {
    bytes: usize,
    /// The kernel sent it.
    from_kernel: bool,
    /// The buffer had room for all of it.
    whole: bool,
}

fn take(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<TakenMessage> {
    let mut slices = [IoSliceMut::new(buffer)];
    let message = nixsock::recvmsg::<NetlinkAddr>(
        socket.as_raw_fd(),
        &mut slices,
        None,
        MsgFlags::MSG_DONTWAIT,
    )?;
    // A netlink sender cannot choose its port id, and only the kernel's is 0 (netlink(7)).
    let from_kernel = message.address.is_some_and(|from| from.pid() == 0);
    let whole = !message.flags.contains(MsgFlags::MSG_TRUNC);
    Ok(TakenMessage {
        bytes: message.bytes,
        from_kernel,
        whole,
    })
}

/// Makes the receive buffer of `socket` as large as asked for, or as large as the right to do so allows.
pub fn size_buffer(socket: &impl AsFd, bytes: usize, group: &'static str) {
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_ok() {
        return;
    }
    // Without CAP_NET_ADMIN the kernel cuts this at net.core.rmem_max.
    let fallback = setsockopt(socket, sockopt::RcvBuf, &bytes);
    let got = nixsock::getsockopt(socket, sockopt::RcvBuf).unwrap_or(0);
    if got < bytes.saturating_mul(2) {
        let error = fallback.err().unwrap_or(Errno::EPERM);
        tracing::warn!(
            group,
            wanted_bytes = bytes.saturating_mul(2),
            got_bytes = got,
            %error,
            "the receive buffer of device events is small: a burst of events can overrun it and will be made up for by a survey"
        );
    }
}
