//! Promise: a file system that has no room is told as such, breaks no image, and is written on when there is room again; one that turns
//! read-only fails what cannot be kept, and says so.

use std::path::Path;

use support::Outcome;
use support::client::Client;
use support::ground::{Ground, Need, real};
use support::hold;
use support::images::text;
use support::mounts::Mounted;
use support::process;
use support::scene::{STEP_LIMIT, Scene};

/// Mounts need what loop devices need: root.
const NEEDS: &[Need] = &[
    Need::Bus,
    Need::Loop,
    Need::Tool("qemu-img"),
    Need::Tool("mkfs.ext4"),
];
const MIB: u64 = 1 << 20;
const PIECE: usize = 64 << 10;
// proto.md "Error values"
const EPERM: u32 = 1;
const EIO: u32 = 5;
const ENOSPC: u32 = 28;
// proto.md "Request types"
const WRITE_ZEROES: u16 = 6;

/// A daemon that may serve from there, with a sparse image and a sparse raw file of 64 MiB, both exported.
fn scene(ground: &Ground, place: &Path) -> Outcome<Scene> {
    let roots = format!("file_roots = [{:?}]\n", text(place));
    let image = place.join("disk.qcow2");
    let raw = place.join("disk.raw");
    process::succeed(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", &text(&image), "64M"],
        STEP_LIMIT,
    )?;
    std::fs::File::create_new(&raw)?.set_len(64 * MIB)?;
    let exports = [
        ("image", format!("qcow2:{}", image.display())),
        ("raw", format!("file:{}", raw.display())),
    ];
    let scene = Scene::told(ground, roots, &exports)?;
    for (name, _) in exports {
        scene.client.reach_state(name, "Serving", STEP_LIMIT)?;
    }
    Ok(scene)
}

fn piece(number: usize) -> Vec<u8> {
    vec![u8::try_from(number % 251).unwrap_or(0) + 1; PIECE]
}

/// Writes pieces from `first` on until one is refused; gives its number and the error.
fn write_until_refused(client: &mut Client, first: usize, last: usize) -> Outcome<(usize, u32)> {
    for number in first..last {
        if let Err(error) = client.write((number * PIECE) as u64, &piece(number), false)? {
            return Ok((number, error));
        }
    }
    Ok((last, 0))
}

fn holds(client: &mut Client, pieces: std::ops::Range<usize>) -> Outcome<()> {
    let mut found = vec![0; PIECE];
    for number in pieces {
        let read = client.read((number * PIECE) as u64, &mut found)?;
        hold!(read == Ok(()), "piece {number}: {read:?}");
        hold!(found == piece(number), "piece {number} is another");
    }
    Ok(())
}

fn sound(image: &Path) -> Outcome<()> {
    let args = ["check", "-U", "-f", "qcow2", &text(image)];
    let done = process::run("qemu-img", &args, STEP_LIMIT)?;
    // Leaks are room that is lost, and no harm.
    hold!(
        matches!(done.status.code(), Some(0 | 3)),
        "{}{}",
        done.stdout,
        done.stderr
    );
    Ok(())
}

/// What decides how much room there is.
enum Room<'a> {
    /// A file that goes.
    Filler(&'a Path),
    /// The limit of the subvolume of a mounted btrfs, past which the kernel answers EDQUOT, root too.
    Quota(&'a Path),
}

impl Room<'_> {
    fn less(&self) -> Outcome<()> {
        match self {
            Room::Filler(place) => std::fs::write(place.join("filler"), vec![7; 4 << 20])?,
            Room::Quota(mounted) => limit(mounted, "16M")?,
        }
        Ok(())
    }

    /// Once it is full: a quota is set below what is used, so that not one block more is had.
    fn none(&self) -> Outcome<()> {
        match self {
            Room::Filler(_) => Ok(()),
            Room::Quota(mounted) => limit(mounted, "4M"),
        }
    }

    /// What a flush says when there is none. btrfs writes nothing in place: there is no room for the image's tables either, though they are in
    /// the file already.
    fn flush_when_full(&self, name: &str) -> Result<(), u32> {
        match self {
            Room::Quota(_) if name == "image" => Err(ENOSPC),
            _ => Ok(()),
        }
    }

    fn more(&self) -> Outcome<()> {
        match self {
            Room::Filler(place) => std::fs::remove_file(place.join("filler"))?,
            Room::Quota(mounted) => limit(mounted, "64M")?,
        }
        Ok(())
    }
}

/// Of the first subvolume, whose number is always that; by way of another one, for past its quota it cannot even be told of a new one.
fn limit(mounted: &Path, bytes: &str) -> Outcome<()> {
    let args = ["qgroup", "limit", bytes, "0/256", &text(mounted)];
    process::succeed("btrfs", &args, STEP_LIMIT)?;
    Ok(())
}

fn is_written_on(ground: &Ground, place: &Path, room: &Room<'_>) -> Outcome<()> {
    let mut scene = scene(ground, place)?;
    for name in ["image", "raw"] {
        let mut client = Client::open(&scene.endpoint(), name)?;
        room.less()?;
        let (full_at, error) = write_until_refused(&mut client, 0, 1024)?;
        hold!(
            full_at > 8 && error == ENOSPC,
            "{name}: piece {full_at} was answered {error}"
        );
        // What was acknowledged is kept, by a flush too where it needs no room, and read.
        room.none()?;
        for _ in 0..2 {
            let flushed = client.flush()?;
            hold!(
                flushed == room.flush_when_full(name),
                "{name}: the flush on a full disk: {flushed:?}"
            );
        }
        holds(&mut client, 0..full_at)?;
        let fua = client.write((full_at * PIECE) as u64, &piece(full_at), true)?;
        hold!(fua == Err(ENOSPC), "{name}: with FUA: {fua:?}");
        if name == "image" {
            sound(&place.join("disk.qcow2"))?;
        }
        room.more()?;
        let (more, error) = write_until_refused(&mut client, full_at, full_at + 32)?;
        hold!(
            more == full_at + 32,
            "{name}: with room again, piece {more} was answered {error}"
        );
        let flushed = client.flush()?;
        hold!(
            flushed == Ok(()),
            "{name}: the flush with room again: {flushed:?}"
        );
        holds(&mut client, 0..more)?;
        let mut kept = more;
        if let Room::Quota(mounted) = room
            && name == "image"
        {
            kept -= 1;
            only_a_table_has_no_room(&mut client, mounted, kept)?;
        }
        client.leave()?;
        // Room for the other.
        if name == "image" {
            scene.stop()?;
            let image = place.join("disk.qcow2");
            sound(&image)?;
            let copy = ground.file("copy.raw");
            process::succeed(
                "qemu-img",
                &["convert", "-O", "raw", &text(&image), &text(&copy)],
                STEP_LIMIT,
            )?;
            let bytes = std::fs::read(&copy)?;
            for number in 0..kept {
                hold!(
                    bytes[number * PIECE..][..PIECE] == piece(number),
                    "QEMU reads piece {number} as another"
                );
            }
            let zeroed = &bytes[kept * PIECE..more * PIECE];
            hold!(
                zeroed.iter().all(|byte| *byte == 0),
                "QEMU reads what was zeroed as something"
            );
            std::fs::remove_file(&image)?;
            scene.start()?;
            scene.client.reach_state("raw", "Serving", STEP_LIMIT)?;
        }
    }
    scene.stop()
}

/// All counts are in the file, and a cluster that becomes zero changes a table of the mapping alone.
fn only_a_table_has_no_room(client: &mut Client, mounted: &Path, number: usize) -> Outcome<()> {
    limit(mounted, "4M")?;
    let at = (number * PIECE) as u64;
    let zeroed = client.span(WRITE_ZEROES, 0, at, u32::try_from(PIECE)?)?;
    hold!(zeroed == Ok(()), "zeroing piece {number}: {zeroed:?}");
    for _ in 0..2 {
        let flushed = client.flush()?;
        hold!(
            flushed == Err(ENOSPC),
            "a flush without room for a table: {flushed:?}"
        );
    }
    limit(mounted, "64M")?;
    let flushed = client.flush()?;
    hold!(flushed == Ok(()), "a flush with room for it: {flushed:?}");
    Ok(())
}

#[test]
fn a_full_tmpfs_answers_enospc_and_is_written_on_when_there_is_room() -> Outcome<()> {
    real("full tmpfs", NEEDS, |ground| {
        let small = Mounted::new(
            ground.file("small"),
            &["-t", "tmpfs", "-o", "size=16m", "tmpfs"],
        )?;
        is_written_on(ground, &small.0, &Room::Filler(&small.0))
    })
}

#[test]
fn a_full_ext4_answers_enospc_and_is_written_on_when_there_is_room() -> Outcome<()> {
    real("full ext4", NEEDS, |ground| {
        let medium = ground.file("medium");
        std::fs::File::create_new(&medium)?.set_len(24 * MIB)?;
        process::succeed("mkfs.ext4", &["-q", "-m", "0", &text(&medium)], STEP_LIMIT)?;
        let small = Mounted::new(ground.file("small"), &["-o", "loop", &text(&medium)])?;
        is_written_on(ground, &small.0, &Room::Filler(&small.0))
    })
}

#[test]
fn a_disk_quota_answers_enospc_and_is_written_on_when_it_is_raised() -> Outcome<()> {
    let needs = [
        NEEDS,
        &[Need::FileSystem("btrfs"), Need::Tool("mkfs.btrfs")],
    ]
    .concat();
    real("disk quota", &needs, |ground| {
        let medium = ground.file("medium");
        std::fs::File::create_new(&medium)?.set_len(256 * MIB)?;
        process::succeed("mkfs.btrfs", &["-q", &text(&medium)], STEP_LIMIT)?;
        let small = Mounted::new(ground.file("small"), &["-o", "loop", &text(&medium)])?;
        let name = text(&small.0);
        let place = small.0.join("vm7");
        process::succeed("btrfs", &["quota", "enable", &name], STEP_LIMIT)?;
        process::succeed("btrfs", &["subvolume", "create", &text(&place)], STEP_LIMIT)?;
        is_written_on(ground, &place, &Room::Quota(&small.0))
    })
}

#[test]
fn a_file_system_that_turned_read_only_fails_writes_and_is_read_on() -> Outcome<()> {
    real("read-only file system", NEEDS, |ground| {
        let medium = ground.file("medium");
        std::fs::File::create_new(&medium)?.set_len(48 * MIB)?;
        process::succeed("mkfs.ext4", &["-q", "-m", "0", &text(&medium)], STEP_LIMIT)?;
        let small = Mounted::new(ground.file("small"), &["-o", "loop", &text(&medium)])?;
        let mut scene = scene(ground, &small.0)?;
        let endpoint = scene.endpoint();
        let mut clients = Vec::new();
        for name in ["image", "raw"] {
            let mut client = Client::open(&endpoint, name)?;
            write_until_refused(&mut client, 0, 8)?;
            hold!(client.flush()? == Ok(()), "{name}: the flush before it");
            clients.push((name, client));
        }
        // As after an error of its medium: files that are open for writing stay so, and nothing is written any more.
        process::succeed(
            "mount",
            &["-o", "remount,abort", &text(&small.0)],
            STEP_LIMIT,
        )?;
        for (name, client) in &mut clients {
            let written = client.write(0, &piece(3), true)?;
            hold!(
                matches!(written, Err(EIO | EPERM)),
                "{name}: a FUA write was answered {written:?}"
            );
            // Something that was to be durable is not: no later flush says that all is (invariant 9).
            let flushed = client.flush()?;
            hold!(
                matches!(flushed, Err(EIO)),
                "{name}: a flush was answered {flushed:?}"
            );
            holds(client, 1..8)?;
        }
        scene.daemon()?.assert_alive()?;
        drop(clients);
        // Opened on what is read-only it is served for reading, and says so.
        scene.kill()?;
        scene.start()?;
        for name in ["image", "raw"] {
            let export = scene.client.reach_state(name, "Serving", STEP_LIMIT)?;
            let read_only = export.get("ReadOnly").cloned();
            hold!(
                read_only == Some(support::bus::Word::Flag(true)),
                "{name}: {read_only:?}"
            );
            let mut client = Client::open(&endpoint, name)?;
            holds(&mut client, 1..8)?;
            let written = client.write(0, &piece(3), false)?;
            hold!(
                written == Err(EPERM),
                "{name}: a write was answered {written:?}"
            );
            client.leave()?;
        }
        scene.stop()
    })
}
