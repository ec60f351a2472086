//! udev's device events, which come after its rules ran: a hint that identity is complete, and the one
//! source of `ID_PATH`. Absent udevd, this socket stays silent and nothing else changes.
//!
//! libudev drops what root did not send, and reports a socket overrun as "nothing there": so
//! the socket's drop counter is compared after each wake-up.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::stream::Stream;
use tokio_udev::{AsyncMonitorSocket, Event, MonitorBuilder};

use super::database::ID_PATH_BYTES_MAX;
use super::kernel_socket::size_buffer;
use super::sys;
use crate::correlation::{DeviceNumber, DiskSeq};

/// What udev said.
#[derive(Debug, PartialEq, Eq)]
pub enum Told {
    Hint {
        number: DeviceNumber,
        /// The disk and the slot that udev found it in.
        slot: Option<(DiskSeq, String)>,
    },
    Overrun,
}

pub struct UdevSocket {
    stream: AsyncMonitorSocket,
    /// The same socket, to ask for its drop counter.
    socket: OwnedFd,
    drops: u32,
}

impl UdevSocket {
    /// Subscribes.
    ///
    /// # Errors
    /// What libudev or the kernel says.
    pub fn subscribe(receive_buffer_bytes: usize) -> io::Result<UdevSocket> {
        let builder = MonitorBuilder::new()?.match_subsystem_devtype("block", "disk")?;
        size_buffer(&builder, receive_buffer_bytes, "udev");
        let monitor = builder.listen()?;
        let socket = monitor.as_fd().try_clone_to_owned()?;
        Ok(UdevSocket {
            stream: AsyncMonitorSocket::new(monitor)?,
            drops: sys::dropped_messages(socket.as_fd())?,
            socket,
        })
    }

    /// Waits for the next word. Cancel-safe: what was taken is returned in the same poll.
    ///
    /// # Errors
    /// The socket is broken.
    pub async fn next(&mut self) -> io::Result<Told> {
        poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Told>> {
        loop {
            let polled = Pin::new(&mut self.stream).poll_next(cx);
            let drops = sys::dropped_messages(self.socket.as_fd())?;
            if drops != self.drops {
                // The event of this poll is lost with the others: the survey finds its disk.
                self.drops = drops;
                return Poll::Ready(Ok(Told::Overrun));
            }
            match polled {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(event))) => {
                    if let Some(told) = hint(&event) {
                        return Poll::Ready(Ok(told));
                    }
                }
                Poll::Ready(Some(Err(e))) => return Poll::Ready(Err(e)),
                Poll::Ready(None) => {
                    return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                }
            }
        }
    }
}

fn hint(event: &Event) -> Option<Told> {
    let property = |name: &str| event.property_value(name).and_then(|v| v.to_str());
    let number = DeviceNumber {
        major: property("MAJOR")?.parse().ok()?,
        minor: property("MINOR")?.parse().ok()?,
    };
    let diskseq = property("DISKSEQ").and_then(|v| v.parse().ok());
    let path = property("ID_PATH").filter(|p| !p.is_empty() && p.len() <= ID_PATH_BYTES_MAX);
    Some(Told::Hint {
        number,
        slot: diskseq
            .zip(path)
            .map(|(diskseq, path)| (DiskSeq(diskseq), path.to_owned())),
    })
}
