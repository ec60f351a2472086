//! Files on NFS whose server hangs, beside a disk: the server, the client and the daemon in one guest, for the machine that runs the tests
//! need know nothing of NFS. Runs only by its name (`make test-guest SCENARIO=nfs`).

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::bed::{Bed, STEP};
use crate::machine::Shape;
use crate::scenarios::files::{LIMIT, PIECE, judge, piece, served};
use crate::stage::scenario;
use support::client::Client;
use support::hold;
use support::process;
use support::stream::{Pace, Stream};
use support::{Outcome, until};

/// On one machine type: what differs between them is not in it.
mod q35 {
    use crate::machine::Shape;
    use support::Outcome;

    #[test]
    fn server_that_hangs_holds_up_its_own_files_and_nothing_else() -> Outcome<()> {
        super::server_that_hangs(Shape::Q35)
    }
}

/// Two mounts that share nothing in the client, so that a lock of the one is met by the other on the server alone.
const SERVE: &str = r"set -e
mkdir -p /srv/nfs/small /nfs /other /small /etc/systemd/system/nbdtrack.service.d
mount -t tmpfs -o size=4m small /srv/nfs/small
echo '/srv/nfs 127.0.0.1(rw,sync,no_subtree_check,no_root_squash,fsid=0)' >/etc/exports
echo '/srv/nfs/small 127.0.0.1(rw,sync,no_subtree_check,no_root_squash,fsid=1)' >>/etc/exports
printf '[nfsd]\ngrace-time=10\n' >/etc/nfs.conf.d/bed.conf
systemctl start nfs-server
for place in /nfs /other; do mount -t nfs4 -o vers=4.2,nosharecache 127.0.0.1:/ $place; done
mount -t nfs4 -o vers=4.2,nosharecache 127.0.0.1:/small /small
nbdtrack image create /nfs/disk.qcow2 8M
for image in /nfs/disk.raw /small/thin.raw; do nbdtrack image create --format raw $image 8M; done
printf '[Service]\nReadWritePaths=/nfs /small\n' >/etc/systemd/system/nbdtrack.service.d/nfs.conf
systemctl daemon-reload
";
/// A second daemon, on the other mount.
const SECOND: &str = r#"[server]
listen = ["127.0.0.1:10899"]
file_roots = ["/other"]
[[export]]
name = "second"
path = "/other/disk.raw"
"#;
const EXPORTS: &str = r#"file_roots = ["/nfs", "/small"]
[[export]]
name = "image"
path = "/nfs/disk.qcow2"
format = "qcow2"
[[export]]
name = "raw"
path = "/nfs/disk.raw"
[[export]]
name = "thin"
path = "/small/thin.raw"
"#;
/// Of `thin` more than its server has room for, in pieces.
const TOO_MANY: usize = 96;
const ENOSPC: u32 = 28;
/// The bystander's, as much as an emulated guest carries beside all else.
const PACE: Pace = Pace {
    depth: 2,
    rate: 50,
    region: 1 << 20,
};
/// What may be added to a call by the server that hangs; a guest is emulated.
const PROMPT: Duration = Duration::from_secs(2);
/// Modules that are loaded and services that start, under emulation.
const STARTS: Duration = Duration::from_secs(180);
/// Pieces that are written while the server answers, and while it does not.
const BEFORE: usize = 8;
const WHILE: usize = 4;

fn server_that_hangs(shape: Shape) -> Outcome<()> {
    scenario("NFS", shape, |bed| {
        let a = bed.add("vol-a")?;
        let agent = &bed.machine.agent;
        agent.put("/root/serve.sh", SERVE)?;
        let serves = agent.begin("sh /root/serve.sh", &[])?;
        let ran = agent.finish(serves, "the server and its mounts", STARTS)?;
        hold!(ran.code == 0, "{}{}", ran.stdout, ran.stderr);
        bed.tables = EXPORTS.to_owned();
        bed.serve_all()?;
        let mut far = Vec::new();
        for name in ["image", "raw"] {
            served(bed, name)?;
            let mut client = Client::open(&bed.endpoint(), name)?;
            for number in 0..BEFORE {
                write(&mut client, name, number)?;
            }
            far.push((name, client));
        }
        second_writer_is_refused(bed)?;
        flush_hears_of_room_that_ran_out(bed)?;

        let bystander = Stream::start(&bed.endpoint(), "vol-a", "vol-a", PACE, 1)?;
        bystander.wait_for(50)?;
        let usual = call(bed)?;
        // Not one packet reaches the server or comes from it.
        bed.machine.agent.run("ip link set lo down")?;
        let hung: Vec<_> = far.into_iter().map(write_on).collect();
        bystander.wait_for(150)?;
        let meanwhile = call(bed)?;
        hold!(
            hung.iter().all(|write| !write.is_finished()),
            "a write to a server that hangs is told to be durable"
        );
        bed.machine.agent.run("ip link set lo up")?;
        for write in hung {
            until(STEP, "the write to end", || {
                Ok(write.is_finished().then_some(()))
            })?;
            hold!(
                write.join().is_ok_and(|done| done.is_ok()),
                "a write that hung has failed"
            );
        }
        let report = bystander.finish()?;
        hold!(report.broken.is_none(), "{:?}", report.broken);
        hold!(
            report.longest_stall <= PROMPT && meanwhile <= usual + PROMPT,
            "the disk stood still for {:?}, a call took {meanwhile:?} and {usual:?} before",
            report.longest_stall
        );
        bed.row.notes.push(format!(
            "while the server hung: a call {} ms ({} before), the disk's longest stall {} ms over {} writes",
            meanwhile.as_millis(),
            usual.as_millis(),
            report.longest_stall.as_millis(),
            report.writes
        ));
        bed.account(a, &report)?;
        take_out(bed)?;
        judge(&bed.folder, BEFORE + WHILE, BEFORE + WHILE)
    })
}

fn write(client: &mut Client, name: &str, number: usize) -> Outcome<()> {
    let written = client.write((number * PIECE) as u64, &piece(number), true)?;
    hold!(written == Ok(()), "{name}: piece {number}: {written:?}");
    Ok(())
}

/// Goes on with the pieces of a file, by a thread that ends with them.
fn write_on((name, mut client): (&'static str, Client)) -> JoinHandle<Outcome<()>> {
    std::thread::spawn(move || {
        for number in BEFORE..BEFORE + WHILE {
            write(&mut client, name, number)?;
        }
        client.leave()
    })
}

/// How long a call over the bus takes, with the start of who calls.
fn call(bed: &Bed) -> Outcome<Duration> {
    let began = Instant::now();
    bed.machine.agent.run("nbdtrack exports")?;
    Ok(began.elapsed())
}

fn second_writer_is_refused(bed: &Bed) -> Outcome<()> {
    let agent = &bed.machine.agent;
    agent.put("/root/second/nbdtrack.toml", SECOND)?;
    agent.run(
        "cd /root/second; nbdtrack serve --bus none --config . --state state --socket socket >log 2>&1 & echo $! >/root/second/pid",
    )?;
    bed.guest_until(
        "the second writer to be refused",
        "grep 'another program (QEMU, or another nbdtrack)' /root/second/log",
    )?;
    agent
        .run("kill $(cat /root/second/pid); ! grep 'Serving' /root/second/log")
        .map(drop)
}

/// The server says that it has no room when it is given the data, of writes that were acknowledged. The kernel tells that to the next writer,
/// and held it for told: the flush after that succeeded.
fn flush_hears_of_room_that_ran_out(bed: &Bed) -> Outcome<()> {
    served(bed, "thin")?;
    let mut client = Client::open(&bed.endpoint(), "thin")?;
    let mut last = Ok(());
    for number in 0..TOO_MANY {
        last = client.write((number * PIECE) as u64, &piece(number), false)?;
        if last.is_err() {
            break;
        }
    }
    if last.is_ok() {
        bed.machine.agent.run("sync")?;
        last = client.write(0, &piece(0), false)?;
    }
    hold!(
        last == Err(ENOSPC),
        "a write after the server had no room: {last:?}"
    );
    for _ in 0..2 {
        let flushed = client.flush()?;
        hold!(
            flushed.is_err(),
            "a flush after acknowledged writes were lost"
        );
    }
    client.leave()
}

/// What the server has, brought to the host once nobody writes to it.
fn take_out(bed: &mut Bed) -> Outcome<()> {
    bed.stop_daemon()?;
    bed.machine.agent.run("umount /small /nfs /other")?;
    for name in ["disk.qcow2", "disk.raw"] {
        let packed = bed.folder.join(format!("{name}.packed"));
        let command = format!("gzip -1c /srv/nfs/{name} | base64 -w0");
        std::fs::write(&packed, bed.machine.agent.run(&command)?)?;
        let (packed, out) = (packed.display(), bed.folder.join(name));
        let unpack = format!("base64 -d {packed} | gzip -d >{}", out.display());
        process::succeed("sh", &["-c", &unpack], LIMIT)?;
    }
    Ok(())
}
