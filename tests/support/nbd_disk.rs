//! A disk that forgets (`forgetful`) behind NBD: what QEMU attaches to a guest as a disk with a write cache.
//!
//! Written from proto.md for one client that is no enemy: QEMU. Fixed newstyle, GO, simple replies; READ, WRITE with FUA, FLUSH.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::sys::socket::shutdown;

use super::client::{
    CMD_DISC, CMD_FLUSH, CMD_READ, CMD_WRITE, FLAG_FUA, NBD_MAGIC, OPT_GO, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, REP_ACK, REP_ERR_UNSUP, REP_INFO, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC,
};
use super::dice::Dice;
use super::forgetful::{Cut, Forgetful};
use super::{Doing, Outcome};

// proto.md "Transmission flags": HAS_FLAGS, SEND_FLUSH, SEND_FUA.
const FLAGS: u16 = 1 | 4 | 8;
const OPT_ABORT: u32 = 2;
/// The longest request, and the longest option, in bytes.
const BYTES_MAX: u32 = 32 << 20;
const EIO: u32 = 5;

struct Shared {
    /// Lock: one request at a time; the connection's, and the one's who cuts the power.
    disk: Mutex<Forgetful>,
    bytes: u64,
    end: AtomicBool,
    /// Lock: the connections so far, to end them; QEMU makes one.
    conns: Mutex<Vec<UnixStream>>,
}

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The disk; its connections end when it is dropped.
pub struct NbdDisk {
    shared: Arc<Shared>,
    listener: UnixListener,
    listening: Option<JoinHandle<()>>,
}

impl NbdDisk {
    /// Serves the file at a socket that it makes.
    pub fn serve(socket: &Path, file: &Path) -> Outcome<NbdDisk> {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).doing(socket.display())?;
        let accepting = listener.try_clone()?;
        let shared = Arc::new(Shared {
            bytes: std::fs::metadata(file)?.len(),
            disk: Mutex::new(Forgetful::open(file, true)?),
            end: AtomicBool::new(false),
            conns: Mutex::default(),
        });
        let served = shared.clone();
        // Thread: accepts until the disk is dropped; it joins the connections' own threads.
        let listening = std::thread::spawn(move || accept(&served, &accepting));
        Ok(NbdDisk {
            shared,
            listener,
            listening: Some(listening),
        })
    }

    /// Takes the power away and ends the connections: nothing reaches the file any more.
    pub fn cut(&self, dice: &mut Dice) -> Outcome<Cut> {
        let cut = lock(&self.shared.disk).cut(dice)?;
        self.hang_up();
        Ok(cut)
    }

    fn hang_up(&self) {
        for conn in lock(&self.shared.conns).iter() {
            // Fails when it has ended already.
            let _ = conn.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for NbdDisk {
    fn drop(&mut self) {
        // Whoever waits in accept(2) returns.
        let _ = shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        self.shared.end.store(true, Ordering::SeqCst);
        self.hang_up();
        if let Some(thread) = self.listening.take() {
            let _ = thread.join();
        }
    }
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    let mut threads = Vec::new();
    while let Ok((conn, _)) = listener.accept() {
        let Ok(kept) = conn.try_clone() else { break };
        lock(&shared.conns).push(kept);
        if shared.end.load(Ordering::SeqCst) {
            break;
        }
        let shared = shared.clone();
        threads.push(std::thread::spawn(move || {
            // An error is the end of the connection: QEMU has gone, or the power has.
            let _ = talk(&shared, &conn);
        }));
    }
    for thread in threads {
        let _ = thread.join();
    }
}

fn take<const N: usize>(mut conn: &UnixStream) -> Outcome<[u8; N]> {
    let mut bytes = [0; N];
    conn.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn word(bytes: &[u8]) -> Outcome<u32> {
    Ok(u32::from_be_bytes(bytes.try_into()?))
}

fn talk(shared: &Shared, mut conn: &UnixStream) -> Outcome<()> {
    let mut greeting = NBD_MAGIC.to_be_bytes().to_vec();
    greeting.extend(OPTION_MAGIC.to_be_bytes());
    greeting.extend(3u16.to_be_bytes());
    conn.write_all(&greeting)?;
    take::<4>(conn)?;
    loop {
        let head = take::<16>(conn)?;
        crate::hold!(head[..8] == OPTION_MAGIC.to_be_bytes(), "no option");
        let (option, len) = (word(&head[8..12])?, word(&head[12..])?);
        crate::hold!(len <= BYTES_MAX, "an option of {len} bytes");
        let mut data = vec![0; usize::try_from(len)?];
        conn.read_exact(&mut data)?;
        match option {
            OPT_GO => {
                let mut export = 0u16.to_be_bytes().to_vec();
                export.extend(shared.bytes.to_be_bytes());
                export.extend(FLAGS.to_be_bytes());
                reply(conn, option, REP_INFO, &export)?;
                // NBD_INFO_BLOCK_SIZE: whole sectors.
                let mut sizes = 3u16.to_be_bytes().to_vec();
                for bytes in [512, 4096, BYTES_MAX] {
                    sizes.extend(bytes.to_be_bytes());
                }
                reply(conn, option, REP_INFO, &sizes)?;
                reply(conn, option, REP_ACK, &[])?;
                return transmit(shared, conn);
            }
            OPT_ABORT => return reply(conn, option, REP_ACK, &[]),
            _ => reply(conn, option, REP_ERR_UNSUP, &[])?,
        }
    }
}

fn reply(mut conn: &UnixStream, option: u32, kind: u32, data: &[u8]) -> Outcome<()> {
    let mut message = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    message.extend(option.to_be_bytes());
    message.extend(kind.to_be_bytes());
    message.extend(u32::try_from(data.len())?.to_be_bytes());
    message.extend(data);
    Ok(conn.write_all(&message)?)
}

fn transmit(shared: &Shared, mut conn: &UnixStream) -> Outcome<()> {
    loop {
        let head = take::<28>(conn)?;
        crate::hold!(head[..4] == REQUEST_MAGIC.to_be_bytes(), "no request");
        let flags = u16::from_be_bytes(head[4..6].try_into()?);
        let command = u16::from_be_bytes(head[6..8].try_into()?);
        let offset = u64::from_be_bytes(head[16..24].try_into()?);
        let len = word(&head[24..])?;
        crate::hold!(len <= BYTES_MAX, "a request of {len} bytes");
        let mut data = vec![0; usize::try_from(len)?];
        let mut disk = match command {
            CMD_DISC => return Ok(()),
            CMD_WRITE => {
                conn.read_exact(&mut data)?;
                lock(&shared.disk)
            }
            _ => lock(&shared.disk),
        };
        let done = match command {
            CMD_READ => disk.read(offset, &mut data),
            CMD_WRITE => disk.write(offset, &data, flags & FLAG_FUA != 0),
            CMD_FLUSH => disk.flush(),
            other => crate::trouble!("command {other} was not offered"),
        };
        drop(disk);
        let mut message = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        message.extend(if done.is_ok() { 0 } else { EIO }.to_be_bytes());
        message.extend(&head[8..16]);
        if command == CMD_READ && done.is_ok() {
            message.extend(data);
        }
        conn.write_all(&message)?;
    }
}
