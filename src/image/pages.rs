//! Pages of the page cache on their way to a socket, without a copy of ours: a pipe that holds references to them (splice(2)).
//!
//! A reference keeps its page, not what is in it: until the peer has taken a reply, a write to the same range shows in it. The protocol lets
//! a read see that, for the two overlap: the read is over when its reply has been received (proto.md "Ordering of messages and writes"). A
//! page that was dropped from the cache, or whose disk is gone, stays what it was. So this is for Unix sockets only, where a peer takes
//! each byte once: over TCP a lost segment would be sent again with other bytes.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

use super::{Extent, NoWait, sys};

/// What a pipe is asked to hold, in bytes: the most for a process without CAP_SYS_RESOURCE (pipe(7), pipe-max-size).
const PIPE_BYTES: i32 = 1 << 20;
/// A pipe counts its bytes in slots of one page; a range that begins inside of one takes one more.
const PAGE_BYTES: u64 = 4 << 10;

/// A pipe with the pages of at most one range in it.
pub struct Pages {
    from: File,
    into: OwnedFd,
    /// The longest range, in bytes.
    range_max: u64,
    held: usize,
}

impl Pages {
    /// # Errors
    /// The kernel's: no descriptors, or too many pages in this user's pipes.
    pub fn new() -> io::Result<Pages> {
        let (from, into) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let bytes = fcntl(&into, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES))?;
        let bytes = u64::try_from(bytes).map_err(io::Error::other)?;
        Ok(Pages {
            from: from.into(),
            into,
            range_max: bytes.saturating_sub(PAGE_BYTES),
            held: 0,
        })
    }

    /// Bytes that were taken and not yet sent.
    pub fn held(&self) -> usize {
        self.held
    }

    /// As [`super::Image::share`].
    pub(super) fn take_cached(&mut self, file: &File, at: Extent) -> io::Result<NoWait> {
        let (offset, len) = (at.offset(), u64::from(at.len()));
        if len > self.range_max {
            return Ok(NoWait::WouldWait);
        }
        let last = offset + len - 1;
        let whole = last / PAGE_BYTES - offset / PAGE_BYTES + 1;
        match sys::cached(file, offset, len) {
            Ok(cached) if cached.pages == whole => {}
            // Not there, or a kernel that does not say (before 6.5): its splice to a socket could wait for the peer, too.
            Ok(_) | Err(_) => return Ok(NoWait::WouldWait),
        }
        match self.take(file, offset, at.len() as usize) {
            Ok(true) => Ok(NoWait::Done),
            // The read that may wait finds out why.
            Ok(false) | Err(_) => self.copy_out().map(|_| NoWait::WouldWait),
        }
    }

    /// References `len` bytes of `file` at `offset`; false when it gave fewer, of which some may be held. Reads what is not in the cache.
    fn take(&mut self, file: &File, offset: u64, len: usize) -> io::Result<bool> {
        let mut at = i64::try_from(offset).map_err(io::Error::other)?;
        let mut left = len;
        while left > 0 {
            let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
            match splice(file, Some(&mut at), &self.into, None, left, flags) {
                Ok(0) | Err(Errno::EAGAIN) => return Ok(false),
                Ok(count) => {
                    left -= count;
                    self.held += count;
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Sends what the socket takes within its send timeout, which has to be set: the kernel goes by the socket's own O_NONBLOCK and not by a
    /// flag of this call (`fs/splice.c`, `splice_to_socket`). `Ok(0)` when nothing is held.
    ///
    /// # Errors
    /// EAGAIN when it took nothing, and the socket's own.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> nix::Result<usize> {
        if self.held == 0 {
            return Ok(0);
        }
        let flags = SpliceFFlags::empty();
        let count = splice(self.from.as_fd(), None, socket, None, self.held, flags)?;
        self.held -= count;
        Ok(count)
    }

    /// A copy of what is left; nothing is held any more.
    ///
    /// # Errors
    /// The kernel's, and a pipe with fewer bytes than were put into it: this value is then of no more use.
    pub fn copy_out(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.held];
        self.from.read_exact(&mut bytes)?;
        self.held = 0;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_is_taken_arrives_in_its_order_sent_or_copied() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..200_000u32).map(|n| n.to_le_bytes()[0]).collect();
        file.write_all(&bytes).unwrap();
        let mut pages = Pages::new().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        assert!(pages.take(&file, 1000, 150_000).unwrap());
        let sent = pages.send(ours.as_fd()).unwrap();
        assert!(sent > 0);
        let mut found = vec![0; sent];
        theirs.read_exact(&mut found).unwrap();
        found.extend(pages.copy_out().unwrap());
        assert!(found == bytes[1000..151_000]);
        assert_eq!(pages.send(ours.as_fd()), Ok(0));
    }

    #[test]
    fn a_file_that_is_too_short_is_told() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 5000]).unwrap();
        let mut pages = Pages::new().unwrap();
        assert!(!pages.take(&file, 0, 6000).unwrap());
        assert_eq!(pages.copy_out().unwrap(), [1; 5000]);
    }
}
