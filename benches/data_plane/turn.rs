//! One turn of one server at one workload: what it did and what it used.

use std::io::{Read, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use socket2::Socket;

use crate::cost;
use crate::load::{Load, MARK, Op, Shape, Tally, thread_cpu};
use crate::servers::{EXPORT, ILL, Server};
use crate::workloads::{Neighbour, What, Workload};
use support::client::{CMD_DISC, CMD_FLUSH, CMD_READ, CMD_TRIM, Go, negotiate, request};
use support::fuse_disk::ALL;
use support::{Outcome, process, until};
use support::{hold, trouble};

/// Before what counts: the page cache of the processor, the threads of the server.
const WARM_UP: Duration = Duration::from_millis(15);
const DISCARD_BYTES: u32 = 256 << 20;
const COPY_LIMIT: Duration = Duration::from_secs(120);
const GIB: f64 = (1u64 << 30) as f64;

/// What one turn showed. What a workload has no figure for is `None`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sample {
    /// In the workload's unit.
    pub figure: f64,
    /// Processor microseconds of the server for each request (or connection).
    pub cpu_us_per_op: Option<f64>,
    /// Processor seconds of the server for each GiB.
    pub cpu_s_per_gib: Option<f64>,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    /// The generator's share of one processor.
    pub own_share: Option<f64>,
    pub peak_kib: u64,
}

/// Runs one turn of about `time`; `source` is what nbdcopy copies to an export.
pub fn take(
    server: &Server,
    workload: &Workload,
    time: Duration,
    source: &Path,
) -> Outcome<Sample> {
    cost::reset_peak(server.pid);
    let mut sample = match workload.what {
        What::Load(shape) => load(server, shape, time)?,
        What::Fresh(shape) => {
            give_back(server)?;
            load(server, shape, time)?
        }
        What::Connect => connect(server, time)?,
        What::Idle(count) => idle(server, count)?,
        What::BesideIdle(shape, count) => {
            let _idle = sit(server, count)?;
            load(server, shape, time)?
        }
        What::Beside(shape, neighbour) => beside(server, shape, neighbour, time)?,
        What::Nbdcopy { to_export } => nbdcopy(server, workload, to_export, source)?,
    };
    sample.peak_kib = cost::peak_kib(server.pid);
    Ok(sample)
}

/// Reads the whole disk once, so that it is in the page cache.
pub fn warm(server: &Server) -> Outcome<()> {
    let shape = Shape {
        op: Op::Read,
        random: false,
        block: 256 << 10,
        depth: 8,
        connections: 1,
        structured: false,
        mark: MARK,
    };
    let mut load = Load::open(&server.endpoint, EXPORT, shape)?;
    let mut bytes = 0;
    while bytes < crate::DISK_BYTES {
        bytes += load.run(Duration::from_millis(100))?.bytes;
    }
    Ok(())
}

/// Discards the whole of the disk, in pieces that every server takes, and flushes: nbdtrack gives no cluster out again before the
/// discard is durable, and nobody starts with what another turn left to be written.
fn give_back(server: &Server) -> Outcome<()> {
    let mut socket = server.endpoint.connect()?;
    let Go::Agreed { size, .. } = negotiate(&socket, EXPORT)? else {
        trouble!("{EXPORT} is not there to be emptied");
    };
    for at in (0..size).step_by(DISCARD_BYTES as usize) {
        let bytes = size.saturating_sub(at).min(DISCARD_BYTES.into());
        let bytes = u32::try_from(bytes).unwrap_or(DISCARD_BYTES);
        socket.write_all(&request(CMD_TRIM, 0, at, at, bytes))?;
        done(&mut socket, "discard")?;
    }
    socket.write_all(&request(CMD_FLUSH, 0, size, 0, 0))?;
    done(&mut socket, "flush")?;
    leave(&socket)
}

/// Takes one simple reply, which has to tell success.
fn done(socket: &mut impl Read, what: &str) -> Outcome<()> {
    let mut reply = [0; 16];
    socket.read_exact(&mut reply)?;
    hold!(
        reply[4..8] == [0; 4],
        "a {what} that empties the disk failed"
    );
    Ok(())
}

fn load(server: &Server, shape: Shape, time: Duration) -> Outcome<Sample> {
    let mut load = Load::open(&server.endpoint, EXPORT, shape)?;
    load.run(WARM_UP)?;
    let before = cost::cpu(server.pid)?;
    let tally = load.run(time)?;
    let cpu = cost::cpu(server.pid)?.saturating_sub(before);
    Ok(sample(&tally, cpu, !shape.random))
}

fn sample(tally: &Tally, cpu: Duration, in_bytes: bool) -> Sample {
    let seconds = tally.time.as_secs_f64();
    let requests = tally.requests as f64;
    let gib = tally.bytes as f64 / GIB;
    Sample {
        figure: if in_bytes {
            gib / seconds
        } else {
            requests / seconds / 1e3
        },
        cpu_us_per_op: Some(cpu.as_secs_f64() * 1e6 / requests),
        cpu_s_per_gib: Some(cpu.as_secs_f64() / gib),
        p50_us: Some(tally.latencies.percentile(50)),
        p99_us: Some(tally.latencies.percentile(99)),
        own_share: Some(tally.own_cpu.as_secs_f64() / seconds),
        peak_kib: 0,
    }
}

fn connect(server: &Server, time: Duration) -> Outcome<Sample> {
    let before = cost::cpu(server.pid)?;
    let own = thread_cpu()?;
    let began = Instant::now();
    let mut latencies = crate::histogram::Histogram::default();
    let mut count = 0;
    while began.elapsed() < time {
        let one = Instant::now();
        let socket = join(server)?;
        leave(&socket)?;
        latencies.add(one.elapsed());
        count += 1;
    }
    let seconds = began.elapsed().as_secs_f64();
    let cpu = cost::cpu(server.pid)?.saturating_sub(before);
    Ok(Sample {
        figure: f64::from(count) / seconds,
        cpu_us_per_op: Some(cpu.as_secs_f64() * 1e6 / f64::from(count)),
        p50_us: Some(latencies.percentile(50)),
        p99_us: Some(latencies.percentile(99)),
        own_share: Some(thread_cpu()?.saturating_sub(own).as_secs_f64() / seconds),
        ..Sample::default()
    })
}

fn idle(server: &Server, count: usize) -> Outcome<Sample> {
    let before = cost::resident_kib(server.pid);
    let _idle = sit(server, count)?;
    // A server that parks what is idle may do so after a moment.
    std::thread::sleep(Duration::from_millis(300));
    let after = cost::resident_kib(server.pid);
    Ok(Sample {
        figure: after.saturating_sub(before) as f64 / count as f64,
        ..Sample::default()
    })
}

/// Connections that have chosen the export and say nothing.
fn sit(server: &Server, count: usize) -> Outcome<Vec<Socket>> {
    (0..count).map(|_| join(server)).collect()
}

fn join(server: &Server) -> Outcome<Socket> {
    join_export(server, EXPORT)
}

fn join_export(server: &Server, name: &str) -> Outcome<Socket> {
    let socket = server.endpoint.connect()?;
    match negotiate(&socket, name)? {
        Go::Agreed { .. } => Ok(socket),
        Go::Refused { text, .. } => trouble!("{name}: {text}"),
    }
}

fn leave(mut socket: &Socket) -> Outcome<()> {
    socket.write_all(&request(CMD_DISC, 0, 0, 0, 0))?;
    Ok(())
}

/// Halves of the time without and with the neighbour.
fn beside(server: &Server, shape: Shape, neighbour: Neighbour, time: Duration) -> Outcome<Sample> {
    let mut load = Load::open(&server.endpoint, EXPORT, shape)?;
    load.run(WARM_UP)?;
    let alone = load.run(time / 2)?.latencies.percentile(99);
    let done = AtomicBool::new(false);
    let with = std::thread::scope(|scope| {
        let begun = match neighbour {
            Neighbour::SlowReader => slow_reader(server).map(Some),
            Neighbour::HungDisk => return beside_hung_disk(server, &mut load, time / 2),
            Neighbour::HugeRequests => {
                // Thread: the neighbour, until `done`.
                scope.spawn(|| huge_requests(server, &done));
                Ok(None)
            }
        };
        let with = begun.and_then(|_held| {
            load.run(WARM_UP)?;
            load.run(time / 2)
        });
        done.store(true, Ordering::Relaxed);
        with
    })?;
    let with = with.latencies.percentile(99);
    Ok(Sample {
        figure: with / alone,
        p50_us: Some(alone),
        p99_us: Some(with),
        ..Sample::default()
    })
}

/// Asks for 64 times 256 KiB and takes nothing.
fn slow_reader(server: &Server) -> Outcome<Socket> {
    let mut socket = join(server)?;
    for cookie in 0..64 {
        socket.write_all(&request(CMD_READ, 0, cookie, 0, 256 << 10))?;
    }
    Ok(socket)
}

/// The load while 64 reads of the export `ill` wait for its disk.
fn beside_hung_disk(server: &Server, load: &mut Load, time: Duration) -> Outcome<Tally> {
    /// Of each turn: no read finds what an earlier one has brought, or the kernel's read-ahead (at most 8 MiB).
    const STRIDE: u64 = 16 << 20;
    const READS: usize = 64;
    let mut socket = join_export(server, ILL)?;
    let ill = server.disk.ill()?;
    let _healer = ill.healer();
    let from = server.hung.fetch_add(1, Ordering::Relaxed) * STRIDE % crate::DISK_BYTES;
    let held = ill.held();
    ill.hang(ALL);
    for cookie in 0..READS as u64 {
        let at = from + cookie * STRIDE / READS as u64;
        socket.write_all(&request(CMD_READ, 0, cookie, at, 4096))?;
    }
    until(COPY_LIMIT, "the disk to hang", || {
        Ok((ill.held() > held).then_some(()))
    })?;
    load.run(WARM_UP)?;
    let tally = load.run(time);
    ill.heal();
    // All answered: the next turn finds the server as this one did.
    let mut replies = vec![0; (16 + 4096) * READS];
    socket.read_exact(&mut replies)?;
    tally
}

fn huge_requests(server: &Server, done: &AtomicBool) -> Outcome<()> {
    let shape = Shape {
        op: Op::Read,
        random: false,
        block: 32 << 20,
        depth: 1,
        connections: 1,
        structured: false,
        mark: MARK,
    };
    let mut load = Load::open(&server.endpoint, EXPORT, shape)?;
    while !done.load(Ordering::Relaxed) {
        load.run(Duration::ZERO)?;
    }
    Ok(())
}

fn nbdcopy(
    server: &Server,
    workload: &Workload,
    to_export: bool,
    source: &Path,
) -> Outcome<Sample> {
    let uri = server.endpoint.uri(EXPORT);
    let source = source.to_string_lossy();
    let args = if to_export {
        [&*source, &*uri]
    } else {
        [&*uri, "null:"]
    };
    let before = cost::cpu(server.pid)?;
    let began = Instant::now();
    process::succeed("nbdcopy", &args, COPY_LIMIT)?;
    let seconds = began.elapsed().as_secs_f64();
    let cpu = cost::cpu(server.pid)?.saturating_sub(before).as_secs_f64();
    let gib = crate::DISK_BYTES as f64 / GIB;
    let sparse = workload.stage.sparse;
    Ok(Sample {
        figure: if sparse { 1.0 / seconds } else { gib / seconds },
        cpu_us_per_op: sparse.then_some(cpu * 1e6),
        cpu_s_per_gib: (!sparse).then_some(cpu / gib),
        ..Sample::default()
    })
}
