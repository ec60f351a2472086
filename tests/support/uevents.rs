//! The kernel's own events, heard on a netlink socket of our own and timed at arrival: what the daemon is measured
//! against.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::{Outcome, SLICE, until};

/// One kernel event of a block device.
#[derive(Debug, Clone)]
pub struct Uevent {
    pub fields: BTreeMap<String, String>,
    pub at: Instant,
}

impl Uevent {
    pub fn field(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", String::as_str)
    }
}

/// Gathers kernel block events from its making until it is dropped.
pub struct Uevents {
    /// Lock: the listener appends, readers look.
    heard: Arc<Mutex<Vec<Uevent>>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// libudev's group 1 is the kernel's.
const KERNEL_GROUP: u32 = 1;

impl Uevents {
    pub fn listen() -> Outcome<Uevents> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
        // Refused without CAP_NET_ADMIN: then the default has to do.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20));
        setsockopt(
            &socket,
            sockopt::ReceiveTimeout,
            &TimeVal::new(0, i64::from(SLICE.subsec_micros())),
        )?;
        let heard = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (ears, ending) = (heard.clone(), stop.clone());
        // Thread: reads the socket until `stop`; wakes once per slice to look; joined on drop.
        let thread = std::thread::spawn(move || gather(&socket, &ears, &ending));
        Ok(Uevents {
            heard,
            stop,
            thread: Some(thread),
        })
    }

    /// How many events have been heard.
    pub fn count(&self) -> usize {
        self.heard
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// The first event of this device (`loop240`) with this diskseq.
    pub fn find(&self, device: &str, diskseq: u64) -> Option<Uevent> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let seq = diskseq.to_string();
        let mut events = heard.iter();
        events
            .find(|e| e.field("DEVNAME") == device && e.field("DISKSEQ") == seq)
            .cloned()
    }

    /// Waits for that event.
    pub fn wait(&self, device: &str, diskseq: u64) -> Outcome<Uevent> {
        until(
            Duration::from_secs(5),
            format_args!("the kernel's event of {device} with diskseq {diskseq}"),
            || Ok(self.find(device, diskseq)),
        )
    }
}

impl Drop for Uevents {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn gather(socket: &OwnedFd, heard: &Mutex<Vec<Uevent>>, stop: &AtomicBool) {
    let mut buffer = vec![0u8; 64 << 10];
    while !stop.load(Ordering::Relaxed) {
        // EAGAIN is the slice's end, ENOBUFS an overrun; neither ends the listening.
        let Ok(n) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) else {
            continue;
        };
        let at = Instant::now();
        let fields: BTreeMap<String, String> = buffer[..n]
            .split(|&b| b == 0)
            .filter_map(|line| {
                let (key, value) = std::str::from_utf8(line).ok()?.split_once('=')?;
                Some((key.to_owned(), value.to_owned()))
            })
            .collect();
        if fields.get("SUBSYSTEM").is_some_and(|s| s == "block") {
            heard
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(Uevent { fields, at });
        }
    }
}
