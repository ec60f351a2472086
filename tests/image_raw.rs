//! Promise: a plain file takes zeroes, discards and a full or shrunken file system as its client has to hear of them.
#![allow(clippy::unwrap_used, reason = "a test ends where something is missing")]

mod raw_file;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nbdtrack::image::beneath::Roots;
use nbdtrack::image::block::{Block, Claims, OpenError};
use nbdtrack::image::{Durability, Extent, Image, Span, ZeroFlags, raw};
use raw_file::order;

const SIZE: u64 = 4 << 20;

fn opened(dir: &Path) -> Block {
    let path = dir.join("a.raw");
    std::fs::write(&path, vec![0xaa; usize::try_from(SIZE).unwrap()]).unwrap();
    raw_file::open(dir, &path)
}

fn at(offset: u64, len: u32) -> Extent {
    Extent::checked(offset, len, SIZE).unwrap()
}

fn read(image: &Block, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = vec![1; len as usize];
    image.read(at(offset, len), &mut bytes).unwrap();
    bytes
}

#[test]
fn zeroes_are_zeroes_at_any_offset_and_a_hole_only_where_it_may_be() {
    let dir = tempfile::tempdir().unwrap();
    let image = opened(dir.path());
    let blocks = || {
        std::fs::metadata(dir.path().join("a.raw"))
            .unwrap()
            .blocks()
    };
    let whole = blocks();
    let mut model = vec![0xaa; usize::try_from(SIZE).unwrap()];
    // Not fast: a tmpfs has no unwritten blocks to give.
    for (n, (offset, len)) in [(4096, 65536), (100_001, 77), (SIZE - 13, 13), (8191, 4098)]
        .into_iter()
        .enumerate()
    {
        let flags = ZeroFlags {
            no_hole: true,
            fast: false,
            fua: n == 1,
        };
        image.zero(at(offset, len), flags).unwrap();
        model[usize::try_from(offset).unwrap()..][..len as usize].fill(0);
    }
    assert_eq!(read(&image, 0, u32::try_from(SIZE).unwrap()), model);
    assert!(blocks() >= whole, "a hole was made where none may be");

    image
        .zero(at(1 << 20, 1 << 20), ZeroFlags::default())
        .unwrap();
    assert_eq!(read(&image, 1 << 20, 1 << 20), vec![0; 1 << 20]);
    let holed = blocks();
    assert!(holed + 1024 < whole, "no hole: {holed} of {whole}");
    image
        .discard(at(2 << 20, 1 << 20), Durability::ByFlush)
        .unwrap();
    assert!(blocks() + 1024 < holed, "nothing was discarded");
}

const FAST: ZeroFlags = ZeroFlags {
    no_hole: false,
    fast: true,
    fua: false,
};

#[test]
fn zeroes_are_fast_where_the_file_system_makes_holes() {
    let dir = tempfile::tempdir().unwrap();
    let image = opened(dir.path());
    let whole = Span::checked(0, SIZE, SIZE).unwrap();
    assert!(image.zeroes_fast(whole, FAST) && image.can_discard());
    assert_eq!(
        std::fs::metadata(dir.path().join("a.raw")).unwrap().len(),
        SIZE
    );
    image.zero(at(0, 1 << 20), FAST).unwrap();
    assert_eq!(read(&image, 0, 1 << 20), vec![0; 1 << 20]);
    assert_eq!(read(&image, 1 << 20, 512), vec![0xaa; 512]);
}

/// A ramfs makes no holes. Root, as the disk tests.
#[test]
fn zeroes_are_refused_at_once_where_it_makes_none() {
    let dir = tempfile::tempdir().unwrap();
    let mount = |program: &str, args: &[&str]| {
        let mut command = std::process::Command::new(program);
        let status = command.args(args).arg(dir.path()).status().unwrap();
        assert!(status.success(), "{program} {args:?}");
    };
    mount("mount", &["-t", "ramfs", "ramfs"]);
    let image = opened(dir.path());
    let whole = Span::checked(0, SIZE, SIZE).unwrap();
    let promised = image.zeroes_fast(whole, FAST) || image.can_discard();
    let refused = image.zero(at(0, 4096), FAST).map_err(|e| e.raw_os_error());
    let after = read(&image, 0, 4096);
    drop(image);
    mount("umount", &[]);
    assert!(!promised);
    assert_eq!(refused, Err(Some(libc::EOPNOTSUPP)));
    assert_eq!(after, vec![0xaa; 4096]);
}

#[test]
fn allocation_is_the_files_own_and_what_was_cut_off_is_never_a_hole() {
    let dir = tempfile::tempdir().unwrap();
    let image = opened(dir.path());
    image.zero(at(1 << 20, 1 << 20), FAST).unwrap();
    let told = |offset, len| -> Vec<(u64, bool)> {
        let span = Span::checked(offset, len, SIZE).unwrap();
        let told = image.allocation(span, 10).unwrap();
        told.iter().map(|a| (a.bytes, a.hole)).collect()
    };
    let mib = 1 << 20;
    assert_eq!(told(0, SIZE), [(mib, false), (mib, true), (2 * mib, false)]);
    let path = dir.path().join("a.raw");
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(mib + 4096).unwrap();
    assert_eq!(
        told(0, SIZE),
        [(mib, false), (4096, true), (3 * mib - 4096, false)]
    );
}

#[test]
fn what_a_truncated_file_no_longer_has_is_an_error_and_never_zeroes() {
    let dir = tempfile::tempdir().unwrap();
    let image = opened(dir.path());
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(dir.path().join("a.raw"))
        .unwrap();
    file.set_len(SIZE / 2).unwrap();
    let mut bytes = [1; 8192];
    for offset in [SIZE / 2 - 4096, SIZE / 2, SIZE - 8192] {
        let refused = image.read(at(offset, 8192), &mut bytes).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EIO), "{offset}");
    }
}

/// Something that a client does to an image.
type Change<'a> = &'a dyn Fn(&Block) -> std::io::Result<()>;

/// A write behind the new end made the file as long as before, and what was lost read as zeroes.
#[test]
fn a_file_that_was_cut_off_is_not_made_long_again() {
    let changes: [Change<'_>; 5] = [
        &|image| image.write(at(SIZE - 4096, 4096), &[7; 4096], Durability::ByFlush),
        &|image| image.write(at(0, 4096), &[7; 4096], Durability::AtReturn),
        &|image| image.zero(at(SIZE - 4096, 4096), ZeroFlags::default()),
        &|image| {
            let no_hole = true;
            image.zero(
                at(SIZE - 4096, 4096),
                ZeroFlags {
                    no_hole,
                    ..ZeroFlags::default()
                },
            )
        },
        &|image| image.discard(at(SIZE - 4096, 4096), Durability::ByFlush),
    ];
    for (n, change) in changes.iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let image = opened(dir.path());
        let path = dir.path().join("a.raw");
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        change(&image).unwrap();
        file.set_len(SIZE / 2).unwrap();
        let refused = change(&image).map_err(|e| e.raw_os_error());
        assert_eq!(refused, Err(Some(libc::EIO)), "{n}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE / 2, "{n}");
        assert!(image.latched() && image.flush().is_err(), "{n}");
    }
}

#[test]
fn the_open_refuses_a_file_that_was_exchanged_since_it_was_announced() {
    let dir = tempfile::tempdir().unwrap();
    let [path, other] = ["a.raw", "b.raw"].map(|name| dir.path().join(name));
    std::fs::write(&path, [1; 512]).unwrap();
    std::fs::write(&other, [2; 512]).unwrap();
    let roots = Roots::new(vec![dir.path().to_owned()]);
    let claims = Claims::default();
    let order = order(&path, &roots);
    std::fs::rename(&other, &path).unwrap();
    let refused = raw::open(&order, &roots, &claims).map(|_| ()).unwrap_err();
    assert!(
        matches!(refused, OpenError::DiskChanged { .. }),
        "{refused}"
    );
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
    let refused = raw::open(&order, &roots, &claims).map(|_| ()).unwrap_err();
    assert!(matches!(refused, OpenError::File(_)), "{refused}");
}
