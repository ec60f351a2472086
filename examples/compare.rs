//! `make compare`: the same swap under Debian's nbd-server and under nbdtrack, byte for byte.
//!
//! Each server gets two loop devices of its own. Both volumes are filled through their exports, the clients leave, the
//! devices are detached and attached in swapped order. Then one volume is read and the other written through its
//! export, and the table says whose bytes came and where the written ones went. nbd-server is given paths, as it is
//! meant to be; nothing here is a fault of its code. Exits 0 when nbdtrack put every byte in its place.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use support::bus::{Bus, Client};
use support::client::Endpoint;
use support::daemon::{Daemon, Home, free_port};
use support::ground::Ground;
use support::loops::{LoopDevice, sparse_file};
use support::nbd_server::NbdServer;
use support::pattern::{self, Tally};
use support::process;
use support::{Doing, Outcome, trouble, until};

/// Bytes of each volume.
const SIZE: u64 = 32 << 20;
const NAMES: [&str; 2] = ["vol-a", "vol-b"];
const STEP_LIMIT: Duration = Duration::from_secs(30);
/// The write before the swap, and the one after it.
const BEFORE: u64 = 1;
const AFTER: u64 = 2;
/// One read, two backing files.
const ROWS_OF_A_SIDE: usize = 3;

/// One server with its two volumes.
struct Side {
    title: &'static str,
    endpoint: Endpoint,
    server: Server,
    images: [PathBuf; 2],
    devices: [LoopDevice; 2],
}

enum Server {
    Theirs(NbdServer),
    Ours(Box<Ours>),
}

struct Ours {
    client: Client,
    daemon: Daemon,
    _bus: Bus,
}

/// Starts one server with its volumes in a folder.
type Start = fn(&Path) -> Outcome<Side>;

struct Row {
    server: &'static str,
    what: String,
    expected: String,
    tally: Tally,
}

fn main() -> ExitCode {
    let outcome = support::catch_signals()
        .and_then(|()| Ground::take())
        .and_then(|ground| run(&ground));
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            println!("FAILED: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(ground: &Ground) -> Outcome<bool> {
    let mut rows: Vec<Row> = Vec::new();
    let mut failed = Vec::new();
    let sides: [(&str, Start); 2] = [("nbd-server", theirs), ("nbdtrack", ours)];
    for (name, start) in sides {
        println!(
            "  {name}: fills vol-a and vol-b, their devices swap names, then vol-a is read and vol-b written anew"
        );
        let outcome = folder(ground, name).and_then(|folder| start(&folder));
        match outcome.and_then(|side| swap(side, ground)) {
            Ok(of_side) => rows.extend(of_side),
            Err(e) => failed.push(format!("{name}: {e}")),
        }
        if support::interrupted() {
            break;
        }
    }
    print_table(&rows);
    for (server, _) in sides {
        let mut of_server = rows.iter().filter(|row| row.server == server).peekable();
        if of_server.peek().is_none() {
            continue;
        }
        match of_server.find(|row| !row.tally.all_right()) {
            None => println!("{server}: every byte is where it belongs"),
            Some(row) => println!("{server}: WRONG VOLUME: {}: {}", row.what, row.tally),
        }
    }
    if !failed.is_empty() {
        if !support::interrupted() {
            ground.print_logs();
        }
        trouble!("{}", failed.join("; "));
    }
    let ours = rows.iter().filter(|row| row.server == "nbdtrack");
    // An interrupt between the two sides leaves no row of ours, which proves nothing.
    Ok(ours.clone().count() == ROWS_OF_A_SIDE && ours.into_iter().all(|row| row.tally.all_right()))
}

/// Whose bytes were found at each place.
fn print_table(rows: &[Row]) {
    println!(
        "\n{} MiB a volume, in bytes:\n{:11} {:42} {:>10} {:>19} {:>14} {:>6}",
        SIZE >> 20,
        "server",
        "where (what should be there)",
        "right",
        "the other volume's",
        "an old write's",
        "else"
    );
    for row in rows {
        let Tally {
            right,
            misplaced,
            zero,
            foreign,
            missing,
            ..
        } = row.tally;
        println!(
            "{:11} {:42} {right:>10} {:>19} {misplaced:>14} {:>6}",
            row.server,
            format!("{} ({})", row.what, row.expected),
            row.tally.of_others(),
            zero + foreign + missing,
        );
    }
    println!();
}

fn folder(ground: &Ground, name: &str) -> Outcome<PathBuf> {
    let path = ground.file(name);
    std::fs::create_dir(&path)?;
    Ok(path.canonicalize()?)
}

fn volumes(folder: &Path) -> Outcome<([PathBuf; 2], [LoopDevice; 2])> {
    let image = |name: &str| sparse_file(folder, &format!("{name}.img"), SIZE);
    let images = [image(NAMES[0])?, image(NAMES[1])?];
    let devices = [LoopDevice::add()?, LoopDevice::add()?];
    for (device, image) in devices.iter().zip(&images) {
        device.attach(image)?;
    }
    Ok((images, devices))
}

fn theirs(folder: &Path) -> Outcome<Side> {
    let (images, devices) = volumes(folder)?;
    let port = free_port()?;
    let mut text = format!("[generic]\nport = {port}\nlistenaddr = 127.0.0.1\nallowlist = true\n");
    for (name, device) in NAMES.iter().zip(&devices) {
        text.push_str(&format!(
            "[{name}]\nexportname = {}\nflush = true\nfua = true\n",
            device.node()
        ));
    }
    let server = NbdServer::start(folder, &text)?;
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    until(STEP_LIMIT, "nbd-server to listen", || {
        Ok(std::net::TcpStream::connect(address).ok())
    })?;
    Ok(Side {
        title: "nbd-server",
        endpoint: Endpoint::Tcp(address),
        server: Server::Theirs(server),
        images,
        devices,
    })
}

fn ours(folder: &Path) -> Outcome<Side> {
    let (images, devices) = volumes(folder)?;
    let bus = Bus::start(folder)?;
    let home = Home::new(folder, &bus.address)?;
    let exports: Vec<_> = NAMES
        .iter()
        .zip(&images)
        .map(|(name, image)| (*name, format!("loop:{}", image.display())))
        .collect();
    home.configure(&exports)?;
    let daemon = home.start()?;
    let client = Client::connect(&bus)?;
    for name in NAMES {
        client.reach_state(name, "Serving", STEP_LIMIT)?;
    }
    Ok(Side {
        title: "nbdtrack",
        endpoint: home.endpoint(),
        server: Server::Ours(Box::new(Ours {
            client,
            daemon,
            _bus: bus,
        })),
        images,
        devices,
    })
}

fn swap(side: Side, ground: &Ground) -> Outcome<Vec<Row>> {
    let pattern_file = ground.file("pattern");
    let name_of = pattern_file.to_string_lossy().into_owned();
    for name in NAMES {
        pattern::write_file(&pattern_file, name, SIZE, BEFORE)?;
        copy(&["--flush", &name_of, &side.endpoint.uri(name)])?;
    }
    if let Server::Ours(ours) = &side.server {
        for image in &side.images {
            ours.client
                .prepare_detach(&format!("loop:{}", image.display()))
                .doing("PrepareDetach")?;
        }
    }
    for device in &side.devices {
        // nbd-server forks a process per client, and it may take a moment to leave.
        until(STEP_LIMIT, "the device to be let go", || {
            Ok((device.backing_file().is_none()
                || device.detach()? == support::loops::Detached::Now)
                .then_some(()))
        })?;
    }
    let mark = match &side.server {
        Server::Ours(ours) => ours.client.mark(),
        Server::Theirs(_) => 0,
    };
    side.devices[1].attach(&side.images[0])?;
    side.devices[0].attach(&side.images[1])?;
    if let Server::Ours(ours) = &side.server {
        for name in NAMES {
            ours.client.wait_state(mark, name, "Serving", STEP_LIMIT)?;
        }
    }

    let copied = ground.file("copy");
    copy(&[&side.endpoint.uri(NAMES[0]), &copied.to_string_lossy()])?;
    let mut rows = vec![Row {
        server: side.title,
        what: format!("read through export {}", NAMES[0]),
        expected: NAMES[0].to_owned(),
        tally: pattern::examine_whole(&copied, NAMES[0], SIZE, BEFORE)?,
    }];
    std::fs::remove_file(&copied)?;
    pattern::write_file(&pattern_file, NAMES[1], SIZE, AFTER)?;
    copy(&["--flush", &name_of, &side.endpoint.uri(NAMES[1])])?;
    match side.server {
        Server::Theirs(server) => drop(server),
        Server::Ours(ours) => ours.daemon.stop()?,
    }
    for (image, (name, sequence)) in side
        .images
        .iter()
        .zip([(NAMES[0], BEFORE), (NAMES[1], AFTER)])
    {
        rows.push(Row {
            server: side.title,
            what: format!("{name}'s backing file"),
            expected: match sequence {
                AFTER => format!("{name}, new write"),
                _ => name.to_owned(),
            },
            tally: pattern::examine_whole(image, name, SIZE, sequence)?,
        });
    }
    Ok(rows)
}

fn copy(args: &[&str]) -> Outcome<()> {
    process::succeed("nbdcopy", args, Duration::from_secs(120)).map(drop)
}
