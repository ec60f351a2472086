//! Promise: an image that ends inside of a cluster, whose tables lie upon each other, or whose file is cut off while it is served, is
//! written as QEMU would have it or not at all.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

mod raw_file;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nbdtrack::identity::Format;
use nbdtrack::image::beneath::Roots;
use nbdtrack::image::block::Claims;
use nbdtrack::image::qcow2::{self, Qcow2};
use nbdtrack::image::{Depth, Durability, Extent, Image, Span, ZeroFlags, raw};
use raw_file::{open_qcow2, order_as};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// One test at a time: a program that another one starts has our descriptors, and their locks, until it is another program.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tool(program: &str, args: &[&str]) -> String {
    let done = Command::new(program).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    let failed = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{program} {args:?}: {said}{failed}");
    said
}

/// An image of 4 MiB with these options, and what `qemu-io` wrote into it.
fn made(options: &str, commands: &[&str]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    let create = ["create", "-q", "-f", "qcow2", "-o", options, name, "4M"];
    tool("qemu-img", &create);
    for command in commands {
        tool("qemu-io", &["-f", "qcow2", "-c", command, name]);
    }
    (folder, path)
}

fn by_qemu(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("as-raw");
    let names = [path.to_str().unwrap(), raw.to_str().unwrap()];
    tool("qemu-img", &["check", "-q", "-f", "qcow2", names[0]]);
    let convert = ["convert", "-f", "qcow2", "-O", "raw", names[0], names[1]];
    tool("qemu-img", &convert);
    std::fs::read(&raw).unwrap()
}

/// Beside a writer of ours that does nothing.
fn by_qemu_unlocked(path: &Path) -> Vec<u8> {
    let copy = path.with_extension("copy");
    std::fs::copy(path, &copy).unwrap();
    by_qemu(&copy)
}

fn at(offset: u64, len: u64) -> Extent {
    Extent::checked(offset, u32::try_from(len).unwrap(), 4 * MIB).unwrap()
}

fn write(image: &Qcow2, offset: u64, byte: u8, len: u64) -> std::io::Result<()> {
    let bytes = vec![byte; usize::try_from(len).unwrap()];
    image.write(at(offset, len), &bytes, Durability::ByFlush)
}

/// A big-endian number in the file.
fn number(path: &Path, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    let file = std::fs::File::open(path).unwrap();
    file.read_exact_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

fn poke(path: &Path, offset: u64, number: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&number.to_be_bytes(), offset).unwrap();
}

#[test]
fn a_cluster_that_the_file_has_only_the_first_subclusters_of_is_written() {
    let _turn = turn();
    for second in [32 * KIB, 60 * KIB, 124 * KIB] {
        let (folder, path) = made(
            "extended_l2=on,cluster_size=128k",
            &["write -P 1 0 4k", "write -P 2 16k 4k"],
        );
        let bytes = std::fs::metadata(&path).unwrap().len();
        assert_ne!(bytes % (128 * KIB), 0, "QEMU wrote the whole cluster");
        let image = open_qcow2(folder.path(), &path, true).unwrap();
        write(&image, second, 3, 4 * KIB).unwrap();
        image.flush().unwrap();
        drop(image);
        let found = by_qemu(&path);
        for (n, byte) in (0_u64..).zip(&found) {
            let expected = match n / (4 * KIB) {
                0 => 1,
                4 => 2,
                n if n == second / (4 * KIB) => 3,
                _ => 0,
            };
            assert_eq!(*byte, expected, "byte {n}");
        }
    }
}

/// What is in memory is of the image that was there: written into what is there now, it would tear that.
#[test]
fn a_file_that_was_cut_off_or_copied_over_is_not_written_to_any_more() {
    let _turn = turn();
    let (folder, path) = made("cluster_size=64k", &["write -P 1 0 1M"]);
    let (_other, newer) = made("cluster_size=64k", &["write -P 9 2M 64k"]);
    let newer = std::fs::read(newer).unwrap();
    let image = open_qcow2(folder.path(), &path, true).unwrap();
    write(&image, 3 * MIB, 2, 64 * KIB).unwrap();
    image.flush().unwrap();
    write(&image, 2 * MIB, 3, 64 * KIB).unwrap();
    // As cp(1) does.
    std::fs::write(&path, &newer).unwrap();
    assert!(image.flush().is_err());
    assert!(image.latched());
    drop(image);
    assert!(std::fs::read(&path).unwrap() == newer, "it was written to");
}

/// As a copy that did not end: once the file had grown over them, the lost clusters read as zeroes.
#[test]
fn an_image_that_was_cut_short_is_not_written_and_its_lost_bytes_are_never_zeroes() {
    let _turn = turn();
    let (folder, path) = made("cluster_size=64k", &["write -P 1 0 2M"]);
    let bytes = std::fs::metadata(&path).unwrap().len();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(bytes - MIB).unwrap();
    drop(file);
    let lost = |write: bool| {
        let image = open_qcow2(folder.path(), &path, write).map_err(|e| e.to_string())?;
        if write {
            let _ = self::write(&image, 3 * MIB, 2, 4 * KIB);
        }
        let mut now = vec![0xee; 512];
        let read = image.read(at(2 * MIB - 4 * KIB, 512), &mut now);
        assert!(read.is_err(), "what is lost reads as {:?}", &now[..8]);
        Ok::<(), String>(())
    };
    lost(false).unwrap();
    let said = lost(true).unwrap_err();
    assert!(said.contains("cut off"), "{said}");
    assert_eq!(std::fs::metadata(&path).unwrap().len(), bytes - MIB);
    // What a crash leaves counted behind the end, and nothing refers to, is no reason.
    let (folder, path) = made("cluster_size=64k", &["write -P 1 0 64k"]);
    let block = number(&path, number(&path, 48));
    let end = std::fs::metadata(&path).unwrap().len().div_ceil(64 * KIB);
    poke(&path, block + 2 * end, 0x0001_0001_0000_0000);
    let image = open_qcow2(folder.path(), &path, true).unwrap();
    write(&image, 3 * MIB, 2, 4 * KIB).unwrap();
}

/// Pokes an image, at a place that it looks for.
type Poke<'a> = &'a dyn Fn(&Path);

/// The next cluster that was given out was the one that the entry named: two clusters of the guest lay in one place, and both were written.
/// Only an image whose counts said so much was refused.
#[test]
fn an_entry_that_leads_behind_the_end_of_the_file_is_refused_for_writing_and_left_as_it_is() {
    let _turn = turn();
    const OWN: u64 = 1 << 63;
    const COMPRESSED: u64 = 1 << 62;
    const CLUSTER: u64 = 64 * KIB;
    // Bits 62 to 54 of a compressed entry are how many sectors there are behind the first.
    const SECTORS: u32 = 62 - (16 - 8);
    let end = |path: &Path| std::fs::metadata(path).unwrap().len().div_ceil(CLUSTER) * CLUSTER;
    let l2 = |path: &Path| number(path, number(path, 40)) & !OWN;
    let snapshot = |path: &Path| {
        let name = path.to_str().unwrap();
        tool("qemu-img", &["snapshot", "-c", "before", name]);
        // The active table is another one from here on.
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 2 0 64k", name]);
        number(path, number(path, number(path, 64))) & !OWN
    };
    let lies: [(&str, Poke<'_>); 5] = [
        ("the next one", &|path| {
            poke(path, l2(path) + 8 * 5, end(path) | OWN);
        }),
        ("one further on", &|path| {
            poke(path, l2(path) + 8 * 5, (end(path) + 7 * CLUSTER) | OWN);
        }),
        ("not its own", &|path| {
            poke(path, l2(path) + 8 * 5, end(path))
        }),
        ("the end of a compressed one", &|path| {
            let entry = COMPRESSED | 3 << SECTORS | (end(path) - 512);
            poke(path, l2(path) + 8 * 5, entry);
        }),
        ("a snapshot's", &|path| {
            let table = snapshot(path);
            poke(path, table + 8 * 5, end(path));
        }),
    ];
    for (what, lie) in lies {
        let (folder, path) = made("cluster_size=64k", &["write -P 1 0 64k"]);
        lie(&path);
        let before = std::fs::read(&path).unwrap();
        let served = open_qcow2(folder.path(), &path, true);
        if let Ok(image) = &served {
            // What was wrong with it: the sixth cluster reads as what was written to the ninth.
            write(image, 9 * CLUSTER, 9, CLUSTER).unwrap();
            let mut now = vec![0; 512];
            let read = image.read(at(5 * CLUSTER, 512), &mut now);
            panic!("{what}: served, and reads {read:?} {:?}", &now[..4]);
        }
        let said = served.map(drop).unwrap_err().to_string();
        assert!(said.contains("cut off"), "{what}: {said}");
        assert!(std::fs::read(&path).unwrap() == before, "{what}: changed");
        open_qcow2(folder.path(), &path, false).unwrap();
    }
}

/// Whoever cuts an export off has to know of it: what is in memory is lost with the process.
#[test]
fn an_image_says_whether_it_keeps_a_mapping_in_memory() {
    let _turn = turn();
    let (folder, path) = made("cluster_size=64k", &["write -P 1 0 64k"]);
    let reader = open_qcow2(folder.path(), &path, false).unwrap();
    assert!(!reader.keeps_changes());
    drop(reader);
    let image = open_qcow2(folder.path(), &path, true).unwrap();
    write(&image, 0, 2, 4 * KIB).unwrap();
    assert!(!image.keeps_changes(), "in place");
    write(&image, MIB, 2, 4 * KIB).unwrap();
    assert!(image.keeps_changes());
    image.flush().unwrap();
    assert!(!image.keeps_changes());
    write(&image, 2 * MIB, 2, 4 * KIB).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(64 * KIB).unwrap();
    assert!(image.flush().is_err());
    assert!(image.keeps_changes(), "what cannot be written any more");
}

/// An entry that maps a cluster of the guest to a table: what the guest writes there would be the table.
#[test]
fn a_cluster_that_is_a_table_is_neither_written_nor_given_up() {
    let _turn = turn();
    for which in ["header", "L1", "L2", "refcount table", "refcount block"] {
        let (folder, path) = made("cluster_size=64k", &["write -P 1 0 256k"]);
        let (l1, refs) = (number(&path, 40), number(&path, 48));
        let l2 = number(&path, l1) & !(1 << 63);
        let place = match which {
            "header" => 0,
            "L1" => l1,
            "L2" => l2,
            "refcount table" => refs,
            _ => number(&path, refs),
        };
        // Entry 0 says that the guest's first cluster lies there; compressed, for no other can lie in the first one.
        poke(
            &path,
            l2,
            if place == 0 {
                1 << 62 | 512
            } else {
                place | 1 << 63
            },
        );
        let before = std::fs::read(&path).unwrap();
        let image = open_qcow2(folder.path(), &path, true).unwrap();
        assert!(write(&image, 0, 7, 64 * KIB).is_err(), "{which}: written");
        assert!(write(&image, 5, 7, 5).is_err(), "{which}: written in part");
        let _ = image.discard(at(0, 64 * KIB), Durability::ByFlush);
        let _ = image.zero(at(0, 64 * KIB), ZeroFlags::default());
        image.flush().unwrap();
        image.flush().unwrap();
        drop(image);
        assert!(std::fs::read(&path).unwrap() == before, "{which}: changed");
    }
}

/// The clusters of the refcount table that had become too small were given to the guest, and what was then written to them was
/// taken for a write into a table: EIO, until the image was opened anew.
#[test]
fn an_image_whose_refcount_table_has_moved_is_written_on() {
    let _turn = turn();
    // A table of one cluster counts the clusters of 2 MiB.
    let (folder, path) = made("cluster_size=512,refcount_bits=64", &[]);
    let image = open_qcow2(folder.path(), &path, true).unwrap();
    let piece = 64 * KIB;
    for round in 1..=3 {
        for offset in (0..4 * MIB).step_by(64 << 10) {
            if offset % MIB == 0 {
                image.flush().unwrap();
            }
            write(&image, offset, round, piece).unwrap();
            if round < 3 && offset % (3 * piece) == 0 {
                image
                    .discard(at(offset, piece), Durability::ByFlush)
                    .unwrap();
            }
        }
    }
    image.flush().unwrap();
    drop(image);
    assert!(by_qemu(&path).iter().all(|byte| *byte == 3));
}

/// Pokes an image.
type Lie = fn(&Path);

#[test]
fn tables_that_lie_upon_each_other_are_refused_for_writing_and_left_as_they_are() {
    let _turn = turn();
    // Clusters of 512 bytes: an L2 table maps 32 KiB, a refcount block counts 128 KiB.
    let commands = ["write -P 1 0 300k"];
    let lies: [(&str, Lie); 5] = [
        ("two L2 tables are one", |path| {
            let l1 = number(path, 40);
            poke(path, l1 + 8, number(path, l1));
        }),
        ("an L2 table is a refcount block", |path| {
            let (l1, refs) = (number(path, 40), number(path, 48));
            poke(path, l1 + 8, number(path, refs) | 1 << 63);
        }),
        ("two refcount blocks are one", |path| {
            let refs = number(path, 48);
            poke(path, refs + 8, number(path, refs));
        }),
        ("a refcount block is in the L1 table", |path| {
            let (l1, refs) = (number(path, 40), number(path, 48));
            poke(path, refs + 8, l1);
        }),
        ("the refcount table is the L1 table", |path| {
            poke(path, 48, number(path, 40));
        }),
    ];
    for (what, lie) in lies {
        let (folder, path) = made("cluster_size=512", &commands);
        lie(&path);
        let before = std::fs::read(&path).unwrap();
        let refused = open_qcow2(folder.path(), &path, true);
        assert!(refused.is_err(), "{what}: served");
        assert!(std::fs::read(&path).unwrap() == before, "{what}: changed");
    }
    let (folder, path) = made("cluster_size=512", &commands);
    assert!(open_qcow2(folder.path(), &path, true).is_ok());
}

/// Two entries of which each says that the cluster is its own: a write through the one would be read through the other.
#[test]
fn two_clusters_in_one_place_are_refused_for_writing_and_left_as_they_are() {
    let _turn = turn();
    const OWN: u64 = 1 << 63;
    // Clusters of 512 bytes: an L2 table maps 32 KiB.
    fn l2(path: &Path, table: u64) -> u64 {
        number(path, number(path, 40) + 8 * table) & !OWN
    }
    let (folder, plain) = made("cluster_size=512", &["write -P 1 0 300k"]);
    let snapshot = plain.with_extension("snapshot");
    std::fs::copy(&plain, &snapshot).unwrap();
    let name = snapshot.to_str().unwrap();
    tool("qemu-img", &["snapshot", "-c", "before", name]);
    let lies: [(&str, &Path, Lie); 7] = [
        ("in one table", &plain, |path| {
            poke(path, l2(path, 0) + 8, number(path, l2(path, 0)));
        }),
        ("in two tables", &plain, |path| {
            poke(path, l2(path, 8), number(path, l2(path, 0)));
        }),
        ("neither says that it is its own", &plain, |path| {
            let host = number(path, l2(path, 0)) & !OWN;
            poke(path, l2(path, 0), host);
            poke(path, l2(path, 8), host);
        }),
        ("only one says that it is its own", &plain, |path| {
            poke(path, l2(path, 8), number(path, l2(path, 0)) & !OWN);
        }),
        ("one is compressed", &plain, |path| {
            let host = number(path, l2(path, 0)) & !OWN;
            poke(path, l2(path, 8), 1 << 62 | host);
        }),
        ("one is a snapshot's", &snapshot, |path| {
            let entry = number(path, l2(path, 0)) | OWN;
            poke(path, l2(path, 0), entry);
        }),
        ("a snapshot has the table, too", &snapshot, |path| {
            let l1 = number(path, 40);
            poke(path, l1, number(path, l1) | OWN);
        }),
    ];
    for (what, from, lie) in lies {
        let path = folder.path().join("lies.qcow2");
        std::fs::copy(from, &path).unwrap();
        assert!(open_qcow2(folder.path(), &path, true).is_ok());
        lie(&path);
        let before = std::fs::read(&path).unwrap();
        let refused = open_qcow2(folder.path(), &path, true);
        let said = refused.map(drop).unwrap_err().to_string();
        assert!(said.contains("both lie at byte"), "{what}: {said}");
        let read = open_qcow2(folder.path(), &path, false).unwrap();
        read.read(at(0, 512), &mut [0; 512]).unwrap();
        assert!(std::fs::read(&path).unwrap() == before, "{what}: changed");
    }
}

/// What is counted as often as it is referred to, or more often, is no reason.
#[test]
fn clusters_that_are_shared_by_their_counts_are_written() {
    let _turn = turn();
    let (folder, path) = made("cluster_size=64k", &["write -P 1 0 1M"]);
    let name = path.to_str().unwrap();
    tool("qemu-img", &["snapshot", "-c", "before", name]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 2 0 64k", name]);
    let packed = path.with_extension("packed");
    let convert = ["convert", "-c", "-O", "qcow2", name];
    tool(
        "qemu-img",
        &[&convert[..], &[packed.to_str().unwrap()]].concat(),
    );
    // Lost in a crash: counted twice, referred to once.
    let (lost_folder, lost) = made("cluster_size=64k", &["write -P 1 0 64k"]);
    let host = number(&lost, number(&lost, number(&lost, 40)) & !(1 << 63)) & !(1 << 63);
    let count = number(&lost, number(&lost, 48)) + 2 * (host >> 16);
    let before = number(&lost, count);
    poke(&lost, count, before + (1 << 48));
    for (folder, path) in [(&folder, &path), (&folder, &packed), (&lost_folder, &lost)] {
        let image = open_qcow2(folder.path(), path, true).unwrap();
        write(&image, 0, 7, 4 * KIB).unwrap();
        image.flush().unwrap();
    }
}

/// The writer's locks of an image that could not be made ready for writing stayed with those who read it: QEMU's readers were kept out.
#[test]
fn a_second_export_that_is_refused_to_write_leaves_the_first_one_a_reader() {
    let _turn = turn();
    let (folder, path) = made("cluster_size=64k", &["write -P 1 0 64k"]);
    let name = path.to_str().unwrap();
    tool("qemu-img", &["bitmap", "--add", name, "b"]);
    let roots = Roots::new(vec![folder.path().to_owned()]);
    let claims = Claims::default();
    let mut order = order_as(&path, &roots, Format::Qcow2);
    order.write = false;
    let reader = qcow2::open(&order, &roots, &claims).unwrap();
    let theirs = ["-r", "-f", "qcow2", "-c", "read -P 1 0 64k", name];
    tool("qemu-io", &theirs);
    order.write = true;
    for _ in 0..2 {
        let refused = qcow2::open(&order, &roots, &claims);
        let said = refused.map(drop).unwrap_err().to_string();
        assert!(said.contains("persistent bitmaps"), "{said}");
        tool("qemu-io", &theirs);
    }
    // Once it can be written, it is held as a writer holds it.
    order.write = false;
    drop(reader);
    tool("qemu-img", &["bitmap", "--remove", name, "b"]);
    let _reader = qcow2::open(&order, &roots, &claims).unwrap();
    order.write = true;
    let _writer = qcow2::open(&order, &roots, &claims).unwrap();
    let done = Command::new("qemu-io").args(theirs).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && said.contains("lock"), "{said}");
}

/// The same bytes under any of their names, and as the disk that they hold as well as the bytes that they are.
#[test]
fn a_file_has_one_writer_in_a_process_whatever_its_name_and_its_format() {
    let _turn = turn();
    let (folder, path) = made("cluster_size=64k", &["write -P 1 0 64k"]);
    let link = folder.path().join("link.qcow2");
    std::fs::hard_link(&path, &link).unwrap();
    let roots = Roots::new(vec![folder.path().to_owned()]);
    let claims = Claims::default();
    let order = |path: &Path, format, write| {
        let mut order = order_as(path, &roots, format);
        order.write = write;
        order
    };
    let open = |path: &Path| qcow2::open(&order(path, Format::Qcow2, true), &roots, &claims);
    let one = open(&path).unwrap();
    // By its other name it is the one that is open: not a second idea of where its clusters are.
    let other = open(&link).unwrap();
    write(&one, MIB, 7, 64 * KIB).unwrap();
    let mut now = vec![0; 512];
    other.read(at(MIB, 512), &mut now).unwrap();
    assert_eq!(now, [7; 512]);
    write(&other, 2 * MIB, 8, 64 * KIB).unwrap();
    write(&one, 3 * MIB, 9, 64 * KIB).unwrap();
    for write in [true, false] {
        let raw = raw::open(&order(&link, Format::Raw, write), &roots, &claims);
        let said = raw.map(drop).unwrap_err().to_string();
        assert!(said.contains("in use"), "{said}");
    }
    drop((one, other));
    let _raw = raw::open(&order(&link, Format::Raw, true), &roots, &claims).unwrap();
    assert!(open(&path).is_err(), "the image of bytes that others write");
    let found = by_qemu_unlocked(&path);
    let at = |offset: u64| found[usize::try_from(offset).unwrap()];
    assert_eq!([at(0), at(MIB), at(2 * MIB), at(3 * MIB)], [1, 7, 8, 9]);
}

/// One question for a petabyte without data was millions of looks, and nothing ended it before.
#[test]
fn a_question_for_a_petabyte_ends_before_its_end() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    let create = ["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1P"];
    tool("qemu-img", &create);
    let image = open_qcow2(folder.path(), &path, false).unwrap();
    let span = Span::checked(0, image.size(), image.size()).unwrap();
    let found = image.allocation(span, 16).unwrap();
    assert!(found.len() == 1 && found[0].hole, "{found:?}");
    // A look covers all that one table of 64 KiB would be of.
    assert_eq!(found[0].bytes, 4096 * (512 << 20));
    let bytes = found[0].bytes;
    assert_eq!(image.depths(span, 16).unwrap(), [Depth { bytes, layer: 0 }]);
}
