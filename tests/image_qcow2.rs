//! Promise: a QCOW2 image reads as QEMU reads it, whatever it is made of, and what is written through us reads so too; `qemu-img
//! check` finds nothing wrong with it afterwards.
#![allow(clippy::unwrap_used, reason = "a test ends where something is missing")]

mod raw_file;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nbdtrack::image::qcow2::Qcow2;
use nbdtrack::image::{Durability, Extent, Image, Span, ZeroFlags};
use raw_file::open_qcow2;

/// One test at a time: a program that another one starts has our descriptors, and their locks, until it is another program.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a tool; what it says when it fails fails the test.
fn tool(program: &str, args: &[&str]) -> String {
    let done = Command::new(program).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    let failed = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{program} {args:?}: {said}{failed}");
    said
}

/// `qemu-img check`: 0 is all right, and so is 3 (leaked clusters) where that is allowed.
fn check(path: &Path, leaks_allowed: bool) {
    let done = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", path.to_str().unwrap()])
        .output()
        .unwrap();
    let said =
        String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    let right = match done.status.code() {
        Some(0) => true,
        Some(3) => leaks_allowed,
        _ => false,
    };
    assert!(right, "{}: {said}", path.display());
}

/// What QEMU reads of an image.
fn by_qemu(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("as-raw");
    tool(
        "qemu-img",
        &[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            path.to_str().unwrap(),
            raw.to_str().unwrap(),
        ],
    );
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

fn by_us(image: &Qcow2) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(image.size()).unwrap()];
    // In pieces that begin and end anywhere.
    let mut at = 0;
    while at < bytes.len() {
        let len = (bytes.len() - at).min(777_777);
        let extent = Extent::checked(at as u64, u32::try_from(len).unwrap(), image.size()).unwrap();
        image.read(extent, &mut bytes[at..at + len]).unwrap();
        at += len;
    }
    bytes
}

/// A piece of data that is another one for each seed.
fn bytes_of(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            u8::try_from(state >> 56).unwrap()
        })
        .collect()
}

/// Holds no hole to have data, and the whole range to be covered.
fn allocation_is_true(image: &Qcow2, bytes: &[u8]) {
    let (mut at, size) = (0, image.size());
    while at < size {
        let span = Span::checked(at, size - at, size).unwrap();
        for found in image.allocation(span, 7).unwrap() {
            let (from, to) = (
                usize::try_from(at).unwrap(),
                usize::try_from(at + found.bytes).unwrap(),
            );
            assert!(found.bytes > 0);
            if found.hole {
                assert!(
                    bytes[from..to].iter().all(|byte| *byte == 0),
                    "a hole at {at} has data"
                );
            }
            at += found.bytes;
        }
    }
    assert_eq!(at, size);
}

struct Made {
    folder: tempfile::TempDir,
    path: PathBuf,
}

/// An image of `bytes` with these options of `qemu-img create -o`, and some data in it by qemu-io.
fn made(options: &str, bytes: u64, filled: bool) -> Made {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    tool(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            name,
            &bytes.to_string(),
        ],
    );
    if filled {
        fill(&path, bytes);
    }
    Made { folder, path }
}

fn fill(path: &Path, bytes: u64) {
    let end = bytes - 4096;
    let commands = [
        "write -P 1 0 64k".to_owned(),
        "write -P 2 100k 3k".to_owned(),
        format!("write -P 3 {end} 4k"),
        "write -z 16k 32k".to_owned(),
        "write -P 4 1M 300k".to_owned(),
        "discard 1088k 64k".to_owned(),
        "write -P 5 513k 512".to_owned(),
    ];
    let mut args = vec!["-f", "qcow2", "-d", "unmap"];
    for command in &commands {
        args.extend(["-c", command.as_str()]);
    }
    args.push(path.to_str().unwrap());
    let said = tool("qemu-io", &args);
    assert!(!said.contains("rror"), "{said}");
}

const MIB: u64 = 1 << 20;

/// Each kind of image that is read and written.
const KINDS: &[&str] = &[
    "cluster_size=512",
    "cluster_size=1024,refcount_bits=1",
    "cluster_size=2048,refcount_bits=2",
    "cluster_size=4096,refcount_bits=8",
    "cluster_size=8k,refcount_bits=4",
    "cluster_size=32k",
    "cluster_size=64k",
    "cluster_size=64k,refcount_bits=64",
    "cluster_size=256k",
    "cluster_size=512k",
    "cluster_size=1M",
    "cluster_size=2M,refcount_bits=32",
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "compat=0.10,cluster_size=2M",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on,cluster_size=128k",
    "extended_l2=on,cluster_size=2M",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=falloc",
    "preallocation=full",
    "preallocation=metadata,extended_l2=on",
];

#[test]
fn images_of_every_kind_read_as_qemu_reads_them() {
    let _turn = turn();
    for (n, kind) in KINDS.iter().enumerate() {
        for bytes in [4 * MIB, [4 * MIB + 512, 4 * MIB + 65536 + 1536][n % 2]] {
            let made = made(kind, bytes, true);
            let image = open_qcow2(made.folder.path(), &made.path, false).unwrap();
            let read = by_us(&image);
            assert!(read == by_qemu(&made.path), "{kind}, {bytes} bytes");
            allocation_is_true(&image, &read);
            assert!(
                image
                    .write(
                        Extent::checked(0, 1, bytes).unwrap(),
                        &[1],
                        Durability::ByFlush
                    )
                    .is_err(),
                "a read-only image was written"
            );
        }
    }
}

#[test]
fn compressed_images_read_as_qemu_reads_them() {
    let _turn = turn();
    for kind in [
        "compression_type=zlib",
        "compression_type=zstd",
        "compression_type=zlib,cluster_size=512",
        "compression_type=zstd,cluster_size=2M",
        "compression_type=zstd,cluster_size=4k",
        "compat=0.10",
        "compression_type=zstd,extended_l2=on",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (raw, path) = (folder.path().join("raw"), folder.path().join("a.qcow2"));
        let mut bytes = bytes_of(7, 3 * 1_048_576 + 512);
        for (n, byte) in bytes.iter_mut().enumerate() {
            // Half of it can be compressed.
            if n % 8192 < 4096 {
                *byte = u8::try_from(n >> 12 & 0xff).unwrap();
            }
        }
        bytes[1 << 20..(1 << 20) + 200_000].fill(0);
        std::fs::write(&raw, &bytes).unwrap();
        let names = [raw.to_str().unwrap(), path.to_str().unwrap()];
        tool(
            "qemu-img",
            &[
                "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", kind, names[0], names[1],
            ],
        );
        let image = open_qcow2(folder.path(), &path, false).unwrap();
        assert!(by_us(&image) == bytes, "{kind}");
        drop(image);
        works(folder.path(), &path, bytes, 300, 11);
    }
}

/// Random calls against a flat model, then QEMU's opinion.
fn works(folder: &Path, path: &Path, mut model: Vec<u8>, calls: u64, seed: u64) {
    let size = model.len() as u64;
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut roll = move |below: u64| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % below
    };
    let mut image = open_qcow2(folder, path, true).unwrap();
    for call in 0..calls {
        let span = [600, 5000, 70_000, 300_000][usize::try_from(roll(4)).unwrap()];
        let mut offset = roll(size);
        let mut len = (1 + roll(span)).min(size - offset);
        if roll(2) == 0 {
            offset -= offset % 4096;
            len = len.next_multiple_of(4096).min(size - offset);
        }
        let at = Extent::checked(offset, u32::try_from(len).unwrap(), size).unwrap();
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
        match roll(12) {
            0..=4 => {
                let data = bytes_of(call + seed * 1000, range.len());
                image
                    .write(at, &data, Durability::of_fua(roll(20) == 0))
                    .unwrap();
                model[range].copy_from_slice(&data);
            }
            5 | 6 => {
                let flags = ZeroFlags {
                    no_hole: roll(3) == 0,
                    fast: false,
                    fua: roll(20) == 0,
                };
                image.zero(at, flags).unwrap();
                model[range].fill(0);
            }
            7 => {
                image.discard(at, Durability::ByFlush).unwrap();
                // What is left of it is old bytes or zeroes; the mapping decides by whole clusters.
                let mut now = vec![0; range.len()];
                image.read(at, &mut now).unwrap();
                for (place, new) in model[range].iter_mut().zip(&now) {
                    assert!(*new == 0 || new == place, "a discard made up bytes");
                    *place = *new;
                }
            }
            8 => image.flush().unwrap(),
            9 if roll(10) == 0 => {
                drop(image);
                check(path, false);
                image = open_qcow2(folder, path, true).unwrap();
            }
            _ => {
                let mut now = vec![0xee; range.len()];
                image.read(at, &mut now).unwrap();
                assert!(now == model[range], "call {call}: {offset}+{len}");
            }
        }
    }
    assert!(by_us(&image) == model, "{}", path.display());
    allocation_is_true(&image, &model);
    image.flush().unwrap();
    // As after kill -9: what is in the file is whole but for clusters that are lost.
    let copy = path.with_extension("copy");
    std::fs::copy(path, &copy).unwrap();
    check(&copy, true);
    assert!(by_qemu(&copy) == model, "flushed, and not in the file");
    std::fs::remove_file(copy).unwrap();
    drop(image);
    check(path, false);
    assert!(
        by_qemu(path) == model,
        "QEMU reads something else: {}",
        path.display()
    );
}

#[test]
fn images_that_are_written_through_us_are_what_was_written_and_whole() {
    let _turn = turn();
    for (n, kind) in KINDS.iter().enumerate() {
        let bytes = [4 * MIB, 4 * MIB + 512, 3 * MIB + 65536 + 1536][n % 3];
        let made = made(kind, bytes, n % 2 == 0);
        let model = by_qemu(&made.path);
        works(made.folder.path(), &made.path, model, 250, n as u64 + 1);
    }
}
