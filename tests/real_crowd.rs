//! Many clients, most of them bad: memory is bounded, nothing stays behind, and whoever behaves is served as before. A tenth of the
//! numbers; `make crowd` (NBDTRACK_CROWD=all) takes them whole.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::Socket;
use support::client::{Client, Endpoint, negotiate, request};
use support::daemon::Holdings;
use support::ground::{Ground, Need, real, tell};
use support::loops::sparse_file;
use support::scene::{STEP_LIMIT, Scene};
use support::{Doing, Outcome, hold, trouble, until};

const NEEDS: &[Need] = &[Need::Bus];
const BYTES: u64 = 8 << 20;
/// Data of all clients together that the daemon may hold here.
const IN_FLIGHT_MIB: u64 = 64;
/// Descriptors that may be more: the three of the history's database, which opens with its first entry, two of a pool, and the four of
/// two pipes that are kept for replies without a copy.
const DESCRIPTORS: usize = 9;
/// Between two reads of a stream. Without a pause the streams take every core, and the store is then not heard of within its 5 s
/// (docs/measurements.md, "Crowds").
const PACE: Duration = Duration::from_millis(2);
/// What resident memory may be more, when all are gone, than it was before: the allocator's own, not a buffer for each client.
const LEFT_KIB: u64 = 24 << 10;

fn of(whole: usize) -> usize {
    match std::env::var_os("NBDTRACK_CROWD") {
        Some(all) if all == "all" => whole,
        _ => whole / 10,
    }
}

fn serving(ground: &Ground) -> Outcome<Scene> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    let folder = ground.file("files");
    std::fs::create_dir_all(&folder)?;
    let path = sparse_file(&folder, "a.raw", BYTES)?;
    let server = format!(
        "max_connections = 20000\nfile_roots = [{:?}]\n[limits]\nmax_in_flight_mib = {IN_FLIGHT_MIB}\n\
         max_in_flight_mib_per_connection = 32\nsend_timeout_s = 5\n",
        folder.display().to_string()
    );
    let scene = Scene::told(ground, server, &[("a", format!("file:{}", path.display()))])?;
    scene.client.reach_state("a", "Serving", STEP_LIMIT)?;
    Ok(scene)
}

/// A client that behaves, until it is told to stop: each request answered, and how long the slowest took.
struct Bystander {
    over: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Outcome<(u64, Duration)>>,
}

impl Bystander {
    fn start(endpoint: &Endpoint, pause: Duration) -> Outcome<Bystander> {
        let mut client = Client::open(endpoint, "a")?;
        let over = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let (mut count, mut longest) = (0, Duration::ZERO);
            let mut bytes = [0; 4096];
            while !stop.load(Ordering::Relaxed) {
                let began = Instant::now();
                hold!(
                    client.read(4096 * (count % 1024), &mut bytes)?.is_ok(),
                    "a read failed"
                );
                longest = longest.max(began.elapsed());
                count += 1;
                std::thread::sleep(pause);
            }
            Ok((count, longest))
        });
        Ok(Bystander { over, thread })
    }

    fn finish(self) -> Outcome<(u64, Duration)> {
        self.over.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(outcome) => outcome,
            Err(_) => trouble!("the bystander panicked"),
        }
    }
}

/// The most that was resident since [`forget_peak`], in KiB.
fn peak_kib(scene: &mut Scene) -> Outcome<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", scene.daemon()?.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let word = line.and_then(|rest| rest.split_whitespace().next());
    Ok(word.unwrap_or("0").parse()?)
}

fn forget_peak(scene: &mut Scene) -> Outcome<()> {
    // proc_pid_clear_refs(5): 5 resets the peak.
    let pid = scene.daemon()?.pid();
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5").doing("reset the peak")
}

/// Runs `crowd` beside a bystander, and holds what is left behind against what was there before.
fn beside(
    scene: &mut Scene,
    what: &str,
    peak_most_kib: u64,
    crowd: impl FnOnce(&mut Scene) -> Outcome<()>,
) -> Outcome<()> {
    // The pools and the allocator have been used once.
    Client::open(&scene.endpoint(), "a")?.leave()?;
    let bystander = Bystander::start(&scene.endpoint(), Duration::ZERO)?;
    let before = scene.daemon()?.holdings()?;
    let open = scene.daemon()?.descriptors()?;
    forget_peak(scene)?;
    crowd(scene)?;
    let peak = peak_kib(scene)?;
    let given_back = until(STEP_LIMIT, "all to be given back", || {
        let now = scene.daemon()?.holdings()?;
        let back = now.descriptors <= before.descriptors + DESCRIPTORS
            && now.threads <= before.threads + 8
            && now.resident_kib <= before.resident_kib + LEFT_KIB;
        Ok(back.then_some(()))
    });
    let after: Holdings = scene.daemon()?.holdings()?;
    let (reads, longest) = bystander.finish()?;
    tell(&format!(
        "{what}: descriptors {} -> {}, threads {} -> {}, resident {} -> {} KiB, peak {peak} KiB; a bystander's {reads} reads, \
         the longest {longest:?}",
        before.descriptors,
        after.descriptors,
        before.threads,
        after.threads,
        before.resident_kib,
        after.resident_kib,
    ));
    given_back.doing(scene.daemon()?.descriptors()?.beside(&open))?;
    hold!(
        peak <= before.resident_kib + peak_most_kib,
        "{what}: {peak} KiB were resident, {} before",
        before.resident_kib
    );
    hold!(reads > 100, "the bystander made {reads} reads");
    scene.daemon()?.assert_alive()
}

#[test]
fn thousands_of_connections_that_are_left_alone_cost_little_and_go() -> Outcome<()> {
    real("idle connections", NEEDS, |ground| {
        let mut scene = serving(ground)?;
        let count = of(10_000);
        // The door's aim is 5 KiB for each that is idle; the rest is the allocator's.
        let most = 8 * u64::try_from(count)? + LEFT_KIB;
        beside(
            &mut scene,
            &format!("{count} idle connections"),
            most,
            |scene| {
                let endpoint = scene.endpoint();
                let clients: Vec<Client> = (0..count)
                    .map(|_| Client::open(&endpoint, "a"))
                    .collect::<Outcome<_>>()?;
                let held = scene.daemon()?.holdings()?;
                hold!(
                    held.descriptors > count,
                    "only {} descriptors",
                    held.descriptors
                );
                hold!(
                    held.threads < 300,
                    "{} threads for idle connections",
                    held.threads
                );
                drop(clients);
                Ok(())
            },
        )?;
        scene.stop()
    })
}

#[test]
fn slow_readers_fill_their_share_and_no_more_and_are_given_up() -> Outcome<()> {
    real("slow readers", NEEDS, |ground| {
        let mut scene = serving(ground)?;
        let count = of(1_000);
        let most = (IN_FLIGHT_MIB << 10) + 64 * u64::try_from(count)? + LEFT_KIB;
        beside(
            &mut scene,
            &format!("{count} slow readers"),
            most,
            |scene| {
                let endpoint = scene.endpoint();
                let mut readers = Vec::new();
                for n in 0..count {
                    let socket = endpoint.connect()?;
                    negotiate(&socket, "a")?;
                    // Copied into a buffer, or sent as pages of which the rest is copied.
                    let bytes = if n % 2 == 0 { 1 << 20 } else { 900 << 10 };
                    for cookie in 0..8 {
                        (&socket).write_all(&request(0, 0, cookie, 0, bytes))?;
                    }
                    readers.push(socket);
                }
                // Those that find the memory of all taken wait for a turn, and are given up after it: some 64 MiB every five seconds.
                until(STEP_LIMIT * 10, "the slow readers to be given up", || {
                    let stats = scene
                        .client
                        .stats()
                        .map_err(|e| support::Trouble(format!("{e:?}")))?;
                    let gone = stats.get("sends_timed_out").map_or(0, |w| w.number());
                    Ok((gone >= u64::try_from(count)?).then_some(()))
                })?;
                drop(readers);
                Ok(())
            },
        )?;
        scene.stop()
    })
}

#[test]
fn clients_that_reset_in_the_middle_of_a_transfer_leave_nothing() -> Outcome<()> {
    real("resets", NEEDS, |ground| {
        let mut scene = serving(ground)?;
        let count = of(200);
        beside(
            &mut scene,
            &format!("{count} resets"),
            (2 * IN_FLIGHT_MIB) << 10,
            |scene| {
                let endpoint = scene.endpoint();
                let mut middle: Vec<Socket> = Vec::new();
                for n in 0..count {
                    let socket = endpoint.connect()?;
                    negotiate(&socket, "a")?;
                    if n % 2 == 0 {
                        // Half of a write's payload.
                        (&socket).write_all(&request(1, 0, 1, 0, 1 << 20))?;
                        (&socket).write_all(&vec![7; 512 << 10])?;
                    } else {
                        // A part of a read's reply: what is not read when a Unix socket closes resets its peer.
                        (&socket).write_all(&request(0, 0, 1, 0, 4 << 20))?;
                        (&socket).read_exact(&mut vec![0; 64 << 10])?;
                    }
                    middle.push(socket);
                }
                drop(middle);
                Ok(())
            },
        )?;
        scene.stop()
    })
}

#[test]
fn streams_go_on_while_exports_come_and_go() -> Outcome<()> {
    real("exports come and go", NEEDS, |ground| {
        let mut scene = serving(ground)?;
        let (clients, exports) = (of(100), of(1_000));
        let folder = ground.file("files");
        let name = format!("{clients} streams beside {exports} exports");
        beside(
            &mut scene,
            &name,
            (IN_FLIGHT_MIB << 10) + 4 * LEFT_KIB,
            |scene| {
                let streams: Vec<Bystander> = (0..clients)
                    .map(|_| Bystander::start(&scene.endpoint(), PACE))
                    .collect::<Outcome<_>>()?;
                for n in 0..exports {
                    let path = sparse_file(&folder, &format!("comes-{n}.raw"), 1 << 20)?;
                    let name = format!("comes-{n}");
                    scene
                        .client
                        .add_export(&name, &format!("file:{}", path.display()))?;
                    scene.client.remove_export(&name, "soft")?;
                    std::fs::remove_file(&path)?;
                }
                for stream in streams {
                    let (reads, _) = stream.finish()?;
                    hold!(reads > 0, "a stream stood still");
                }
                Ok(())
            },
        )?;
        scene.stop()
    })
}
