//! The bound: what a server could do if it had nothing to check and no disk. A thread for each connection, one receive,
//! answers out of a mapping, one send. Runs as a process of its own, so that it is measured as the others are.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use socket2::Socket;

use crate::load::{MARK, MARK_EVERY};
use support::Outcome;
use support::client::{
    CMD_DISC, CMD_READ, CMD_WRITE, Endpoint, NBD_MAGIC, OPT_GO, OPT_STRUCTURED_REPLY, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, REP_ACK, REP_INFO, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};
use support::{hold, trouble};

/// One receive; the largest request of a workload fits.
const RECEIVE_BYTES: usize = 4 << 20;
const REQUEST_BYTES: usize = 28;
/// Replies in one sendmsg(2), each of a head and its data; UIO_MAXIOV is 1,024.
const REPLIES_PER_SEND: usize = 512;
/// HAS_FLAGS, SEND_FLUSH, CAN_MULTI_CONN.
const FLAGS: u16 = 1 | 1 << 2 | 1 << 8;

/// The disk: memory that all threads read and write as they are told.
#[derive(Clone, Copy)]
struct Mapping {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: a range of memory that is never unmapped; every access is a copy by the kernel or `ptr::copy`, and what two
// clients write to one place at a time is whatever comes out, as on a disk.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(bytes: usize) -> Outcome<Mapping> {
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        hold!(start != libc::MAP_FAILED, "mmap of {bytes} bytes failed");
        let mapping = Mapping {
            start: start.cast(),
            bytes,
        };
        for at in (0..bytes).step_by(MARK_EVERY) {
            mapping.write(at, &MARK)?;
        }
        Ok(mapping)
    }

    fn at(&self, offset: usize, len: usize) -> Outcome<*mut u8> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.bytes);
        hold!(inside, "{len} bytes at {offset} are outside the mapping");
        // SAFETY: checked to be inside.
        Ok(unsafe { self.start.add(offset) })
    }

    fn write(&self, offset: usize, data: &[u8]) -> Outcome<()> {
        let to = self.at(offset, data.len())?;
        // SAFETY: `at` checked the range; `data` is memory of the caller, outside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        Ok(())
    }
}

/// Serves until it is killed.
pub fn serve(endpoint: &Endpoint, bytes: usize) -> Outcome<()> {
    let mapping = Mapping::new(bytes)?;
    match endpoint {
        Endpoint::Unix(path) => {
            let listener = UnixListener::bind::<&Path>(path)?;
            loop {
                spawn(listener.accept()?.0.into(), mapping);
            }
        }
        Endpoint::Tcp(address) => {
            let listener = TcpListener::bind(address)?;
            loop {
                let (socket, _) = listener.accept()?;
                socket.set_nodelay(true)?;
                spawn(socket.into(), mapping);
            }
        }
    }
}

fn spawn(socket: OwnedFd, mapping: Mapping) {
    // Thread: one for each connection, ends with it.
    std::thread::spawn(move || {
        let socket = Socket::from(socket);
        // What ends a connection ends its thread; there is no one to tell.
        let _ = negotiate(&socket, mapping.bytes as u64)
            .and_then(|structured| answer(&socket, mapping, structured));
    });
}

fn negotiate(mut socket: &Socket, size: u64) -> Outcome<bool> {
    let mut hello = NBD_MAGIC.to_be_bytes().to_vec();
    hello.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    hello.extend_from_slice(&3u16.to_be_bytes());
    socket.write_all(&hello)?;
    let mut flags = [0; 4];
    socket.read_exact(&mut flags)?;
    let mut structured = false;
    loop {
        let mut head = [0; 16];
        socket.read_exact(&mut head)?;
        let option = u32::from_be_bytes([head[8], head[9], head[10], head[11]]);
        let len = u32::from_be_bytes([head[12], head[13], head[14], head[15]]);
        hold!(len <= 4096 + 16, "an option of {len} bytes");
        socket.read_exact(&mut vec![0; len as usize])?;
        let reply = |kind: u32, data: &[u8]| -> Outcome<Vec<u8>> {
            let mut out = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
            out.extend_from_slice(&option.to_be_bytes());
            out.extend_from_slice(&kind.to_be_bytes());
            out.extend_from_slice(&u32::try_from(data.len())?.to_be_bytes());
            out.extend_from_slice(data);
            Ok(out)
        };
        match option {
            OPT_STRUCTURED_REPLY => {
                structured = true;
                socket.write_all(&reply(REP_ACK, &[])?)?;
            }
            OPT_GO => {
                let mut export = vec![0, 0];
                export.extend_from_slice(&size.to_be_bytes());
                export.extend_from_slice(&FLAGS.to_be_bytes());
                let mut out = reply(REP_INFO, &export)?;
                out.extend(reply(REP_ACK, &[])?);
                socket.write_all(&out)?;
                return Ok(structured);
            }
            // NBD_REP_ERR_UNSUP.
            _ => socket.write_all(&reply((1 << 31) + 1, &[])?)?,
        }
    }
}

fn answer(mut socket: &Socket, mapping: Mapping, structured: bool) -> Outcome<()> {
    let mut buffer = vec![0; RECEIVE_BYTES];
    let mut end = 0;
    let mut heads: Vec<u8> = Vec::new();
    // Each reply: bytes of its head, and its data.
    let mut replies: Vec<(usize, *mut u8, usize)> = Vec::new();
    loop {
        let count = socket.read(&mut buffer[end..])?;
        if count == 0 {
            return Ok(());
        }
        end += count;
        let mut start = 0;
        while let Some(head) = buffer[start..end].first_chunk::<REQUEST_BYTES>() {
            let kind = u16::from_be_bytes([head[6], head[7]]);
            let number = |from: usize, len: usize| {
                head[from..from + len]
                    .iter()
                    .fold(0, |n: usize, b| n << 8 | usize::from(*b))
            };
            let (offset, len) = (number(16, 8), number(24, 4));
            let cookie = &head[8..16];
            let mut whole = REQUEST_BYTES;
            let mut data = (mapping.start, 0);
            match kind {
                CMD_READ => data = (mapping.at(offset, len)?, len),
                CMD_WRITE => {
                    whole += len;
                    let Some(payload) = buffer[..end].get(start + REQUEST_BYTES..start + whole)
                    else {
                        break;
                    };
                    mapping.write(offset, payload)?;
                }
                CMD_DISC => return Ok(()),
                _ => {}
            }
            let before = heads.len();
            if structured && kind == CMD_READ {
                heads.extend_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
                heads.extend_from_slice(&[0, 1, 0, 1]);
                heads.extend_from_slice(cookie);
                heads.extend_from_slice(&u32::try_from(8 + len)?.to_be_bytes());
                heads.extend_from_slice(&(offset as u64).to_be_bytes());
            } else {
                heads.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
                heads.extend_from_slice(&[0; 4]);
                heads.extend_from_slice(cookie);
            }
            replies.push((heads.len() - before, data.0, data.1));
            start += whole;
            if replies.len() == REPLIES_PER_SEND {
                send(socket, &mut heads, &mut replies)?;
            }
        }
        buffer.copy_within(start..end, 0);
        end -= start;
        send(socket, &mut heads, &mut replies)?;
    }
}

/// Sends all replies and forgets them.
fn send(
    socket: &Socket,
    heads: &mut Vec<u8>,
    replies: &mut Vec<(usize, *mut u8, usize)>,
) -> Outcome<()> {
    let mut slices: Vec<libc::iovec> = Vec::with_capacity(2 * replies.len());
    let mut head = heads.as_mut_ptr();
    for (bytes, data, len) in replies.drain(..) {
        slices.push(libc::iovec {
            iov_base: head.cast(),
            iov_len: bytes,
        });
        if len > 0 {
            slices.push(libc::iovec {
                iov_base: data.cast(),
                iov_len: len,
            });
        }
        // SAFETY: the heads of all replies stand in `heads`, one after the other.
        head = unsafe { head.add(bytes) };
    }
    let mut first = 0;
    while first < slices.len() {
        // SAFETY: all zeroes is a message without address and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = slices[first..].as_mut_ptr();
        message.msg_iovlen = slices.len() - first;
        // SAFETY: the slices describe `heads` and checked parts of the mapping, which live through the call.
        let sent =
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        let Ok(mut sent) = usize::try_from(sent) else {
            trouble!("send: {}", std::io::Error::last_os_error());
        };
        while first < slices.len() && sent >= slices[first].iov_len {
            sent -= slices[first].iov_len;
            first += 1;
        }
        if sent > 0 {
            let slice = &mut slices[first];
            // SAFETY: less than the slice's length.
            slice.iov_base = unsafe { slice.iov_base.cast::<u8>().add(sent) }.cast();
            slice.iov_len -= sent;
        }
    }
    heads.clear();
    Ok(())
}
