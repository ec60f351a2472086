//! A disk that is removed while its clients stream: from the moment the loop is handed the kernel's `remove` until the
//! order to end the lease has returned (the lease is fenced: no request reaches the disk any more), and until each client
//! has seen its connection end. In this process, with the crate's own middle and door, a disk of memory, and one thread for
//! each client.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use nbdtrack::correlation::{Action, Correlation, DiskSeq, Event, Mark};
use nbdtrack::image::pages::Pages;
use nbdtrack::image::{
    Allocation, BlockSizes, Depth, Durability, Extent, Image, NoWait, Span, ZeroFlags,
};
use nbdtrack::nbd::{Door, Limits};
use socket2::Socket;

use crate::middle;
use crate::table::{Aim, Row, ms};
use support::client::{CMD_READ, Go, PATIENCE, negotiate, read_reply, request};
use support::{Doing, Outcome, Trouble, until};
use support::{hold, trouble};

const CLIENTS: [usize; 3] = [1, 10, 100];
const FENCE_AIM_MS: f64 = 1.0;
const READ: usize = 4096;
const EXPORT: &str = "vol-0";

pub fn measure(cuts: usize) -> Outcome<Vec<Row>> {
    let mut rows = Vec::new();
    let mut rig = Rig::new()?;
    for clients in CLIENTS {
        let mut fenced = Vec::new();
        let mut ended = Vec::new();
        for _ in 0..cuts {
            let (fence, end) = rig.cut(clients)?;
            fenced.push(ms(fence));
            ended.push(ms(end));
        }
        let who = if clients == 1 {
            "1 client streams"
        } else {
            &format!("{clients} clients stream")
        };
        rows.push(Row::of(
            format!("remove handed over -> fenced, {who}"),
            "ms",
            fenced,
            Aim::P99(FENCE_AIM_MS),
        ));
        rows.push(Row::of(
            format!("remove handed over -> the last client saw it, {who}"),
            "ms",
            ended,
            Aim::None,
        ));
    }
    Ok(rows)
}

struct Rig {
    correlation: Correlation,
    door: Door,
    began: Instant,
    diskseq: u64,
    /// Ends of leases, from the door's threads; one message for each lease.
    reports: Sender<Event>,
    reported: Receiver<Event>,
}

impl Rig {
    fn new() -> Outcome<Rig> {
        let (reports, reported) = channel();
        let mut rig = Rig {
            correlation: middle::configured(1)?,
            door: Door::new(Limits::default())?,
            began: Instant::now(),
            diskseq: 0,
            reports,
            reported,
        };
        rig.tell(Event::Surveyed {
            mark: Mark(1),
            disks: Vec::new(),
            routine: false,
        });
        Ok(rig)
    }

    /// As the daemon's loop does it.
    fn tell(&mut self, event: Event) {
        let mut next = vec![event];
        while let Some(event) = next.pop() {
            for action in self.correlation.apply(self.began.elapsed(), event) {
                match action {
                    Action::OpenDisk(order) => next.push(middle::opened(order.ticket)),
                    Action::DropOpened { ticket } => next.push(Event::Dropped { ticket }),
                    Action::Serve {
                        export,
                        generation,
                        read_only,
                        ..
                    } => self
                        .door
                        .serve(&export, generation, Arc::new(Blank), read_only),
                    Action::Refuse {
                        export,
                        kind,
                        reason,
                    } => self.door.refuse(&export, kind, &reason),
                    Action::Unseal { export, generation } => self.door.unseal(&export, generation),
                    Action::Grow { export, generation } => self.door.grow(&export, generation),
                    Action::Hide { export, reason } => {
                        self.door.hide(&export, &reason);
                    }
                    Action::HideAndCount {
                        request,
                        export,
                        reason,
                    } => {
                        let clients = self.door.hide(&export, &reason);
                        next.push(Event::Counted { request, clients });
                    }
                    Action::Show { export } => self.door.show(&export),
                    Action::Forget { export } => self.door.forget(&export),
                    Action::EndLease {
                        export,
                        generation,
                        how,
                    } => {
                        let reports = self.reports.clone();
                        let name = export.clone();
                        let report = move |end| {
                            // The rig is gone only when the measurement is over.
                            let _ = reports.send(Event::LeaseEnded {
                                export: name.clone(),
                                generation,
                                end,
                            });
                        };
                        self.door
                            .end_lease(&export, generation, how, Box::new(report));
                    }
                    Action::Persist { request, .. } => next.push(Event::Persisted {
                        request,
                        result: Ok(()),
                    }),
                    Action::Reply { .. }
                    | Action::Survey { .. }
                    | Action::WatchFile { .. }
                    | Action::UnwatchFile { .. }
                    | Action::LookUpPaths
                    | Action::Tell(_)
                    | Action::Log(_) => {}
                }
            }
        }
    }

    /// A disk comes, `count` clients stream, the disk goes: how long until fenced, and until the last client knew.
    fn cut(&mut self, count: usize) -> Outcome<(Duration, Duration)> {
        self.diskseq += 1;
        let facts = middle::disk(0, self.diskseq)?;
        let number = facts.number;
        let mark = Mark(2 * self.diskseq);
        self.tell(Event::DiskSeen { mark, facts });
        let running = Arc::new(AtomicUsize::new(0));
        let mut clients = Vec::new();
        for _ in 0..count {
            let (mine, theirs) = UnixStream::pair()?;
            self.door.admit(theirs)?;
            let running = running.clone();
            // Thread: streams until its connection ends, which the cut below does; its socket has a time limit.
            clients.push(std::thread::spawn(move || stream(mine, &running)));
        }
        until(PATIENCE, "every client to stream", || {
            if clients.iter().any(std::thread::JoinHandle::is_finished) {
                trouble!("a client ended before the disk went");
            }
            Ok((running.load(Ordering::Relaxed) == count).then_some(()))
        })?;
        // A moment of streaming, so that requests are in flight everywhere.
        std::thread::sleep(Duration::from_millis(2));
        let handed = Instant::now();
        self.tell(Event::DiskGone {
            mark: Mark(2 * self.diskseq + 1),
            number,
            diskseq: Some(DiskSeq(self.diskseq)),
        });
        let fenced = handed.elapsed();
        let mut last = handed;
        for client in clients {
            match client.join() {
                Ok(ended) => last = last.max(ended?),
                Err(_) => trouble!("a client panicked"),
            }
        }
        let report = self
            .reported
            .recv_timeout(PATIENCE)
            .doing("wait for the lease to end")?;
        self.tell(report);
        Ok((fenced, last - handed))
    }
}

/// Reads on and on; gives the time at which the connection was found to be over.
fn stream(mine: UnixStream, running: &AtomicUsize) -> Outcome<Instant> {
    let socket = Socket::from(OwnedFd::from(mine));
    socket.set_read_timeout(Some(PATIENCE))?;
    match negotiate(&socket, EXPORT)? {
        Go::Agreed { .. } => {}
        Go::Refused { text, .. } => return Err(Trouble(format!("GO was refused: {text}"))),
    }
    let mut data = [0u8; READ];
    let ask = request(CMD_READ, 0, 7, 0, u32::try_from(READ)?);
    let mut first = true;
    loop {
        let outcome = (&socket)
            .write_all(&ask)
            .and_then(|()| read_reply(&socket))
            .and_then(|(_, error)| match error {
                0 => (&socket).read_exact(&mut data),
                _ => Err(io::ErrorKind::ConnectionAborted.into()),
            });
        let now = Instant::now();
        match outcome {
            Ok(()) if first => {
                running.fetch_add(1, Ordering::Relaxed);
                first = false;
            }
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                hold!(false, "the connection did not end");
            }
            Err(_) => return Ok(now),
        }
    }
}

/// A disk that is all zeroes and forgets what is written.
struct Blank;

impl Image for Blank {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read_only(&self) -> bool {
        false
    }
    fn block_sizes(&self) -> BlockSizes {
        BlockSizes {
            min: 512,
            preferred: 4096,
            max: 32 << 20,
        }
    }
    fn read(&self, _at: Extent, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }
    fn read_nowait(&self, at: Extent, buf: &mut [u8]) -> io::Result<NoWait> {
        self.read(at, buf).map(|()| NoWait::Done)
    }
    fn write(&self, _at: Extent, _buf: &[u8], _durable: Durability) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn zero(&self, _at: Extent, _flags: ZeroFlags) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _at: Extent, _durable: Durability) -> io::Result<()> {
        Ok(())
    }
    fn cache(&self, _at: Extent) -> io::Result<()> {
        Ok(())
    }
    fn reads_from_memory(&self) -> bool {
        true
    }
    fn writes_to_memory(&self, _: Extent) -> bool {
        true
    }
    fn can_discard(&self) -> bool {
        true
    }
    fn grow(&self) -> io::Result<u64> {
        Ok(self.size())
    }
    fn share(&self, _: Extent, _: &mut Pages) -> io::Result<NoWait> {
        Ok(NoWait::WouldWait)
    }
    fn zeroes_fast(&self, _: Span, _: ZeroFlags) -> bool {
        false
    }
    fn allocation(&self, at: Span, _: usize) -> io::Result<Vec<Allocation>> {
        Ok(Allocation::all(at))
    }
    fn depths(&self, at: Span, _: usize) -> io::Result<Vec<Depth>> {
        Ok(Depth::own(at))
    }
    fn rotational(&self) -> bool {
        false
    }
    fn file_system(&self) -> Option<u64> {
        None
    }
    fn keeps_changes(&self) -> bool {
        false
    }
    fn latch(&self) {}
    fn latched(&self) -> bool {
        false
    }
}
