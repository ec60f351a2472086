//! Clients that no one here wrote judge what the server says of a sparse disk: nbdinfo, nbdcopy, qemu-img, qemu-io, fio and
//! libnbd's Python bindings, on a loop device. A test whose client is not installed is skipped and says so.
//!
//! Whether a client speaks extended headers depends on its version (qemu from 8.2, libnbd from 1.18, neither in
//! Debian 12): the tests hold for either and print which it was.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

mod kernel;
mod nbd_common;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use kernel::{Loop, backing_file, open_disk};
use nbd_common::{MIB, name, until};
use nbdtrack::correlation::Generation;
use nbdtrack::nbd::{Door, Limits};
use support::Outcome;
use support::ground::{Need, PYTHON, real, tell};

const KIB: u64 = 1 << 10;

/// A door that serves a loop device on a sparse file as `vol`.
struct Served {
    door: Door,
    uri: String,
    file: PathBuf,
    dir: tempfile::TempDir,
    // The last field: detached when no one has it open any more.
    _disk: Loop,
}

impl Drop for Served {
    fn drop(&mut self) {
        let (tell, told) = std::sync::mpsc::channel();
        let cut = nbdtrack::correlation::EndHow::Cut {
            within: Duration::from_secs(20),
        };
        let report = Box::new(move |end| tell.send(end).unwrap());
        self.door
            .end_lease(&name("vol"), Generation(1), cut, report);
        let _ = told.recv_timeout(Duration::from_secs(20));
    }
}

fn serve(minor: u32, size: u64) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "disk", size);
    let disk = Loop::make(minor);
    let block = open_disk(&disk.order(disk.attach(&file), &file));
    let socket = dir.path().join("nbd.sock");
    let door = Door::new(Limits::default()).unwrap();
    door.listen_unix(UnixListener::bind(&socket).unwrap())
        .unwrap();
    door.serve(&name("vol"), Generation(1), Arc::new(block), false);
    Served {
        door,
        uri: format!("nbd+unix:///vol?socket={}", socket.display()),
        file,
        dir,
        _disk: disk,
    }
}

impl Served {
    fn path(&self, name: &str) -> (PathBuf, String) {
        let path = self.dir.path().join(name);
        let text = path.to_str().unwrap().to_owned();
        (path, text)
    }
}

/// Runs a client for at most two minutes. It has to succeed; returns what it printed.
fn good(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && !complained.contains("failed"),
        "{program} {args:?}: {said}{complained}"
    );
    said
}

fn run(program: &str, args: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.arg("120").arg(program).args(args).output().unwrap()
}

/// Says for the record which form the client chose.
fn note_headers(served: &Served, who: &str) {
    let stats = served.door.stats();
    tell(&format!(
        "{who}: {} of {} handshakes agreed extended headers",
        stats.handshakes_extended, stats.handshakes_done
    ));
}

/// Data, in the order of the disk: (offset, bytes).
const DATA: [(u64, u64); 3] = [
    (0, 64 * KIB),
    (17 * MIB, 192 * KIB),
    (64 * MIB - 128 * KIB, 128 * KIB),
];
const SIZE: u64 = 64 * MIB;

/// Bytes that say where they belong, never zero.
fn fill(file: &Path) {
    let file = File::options().write(true).open(file).unwrap();
    for (offset, len) in DATA {
        let bytes: Vec<u8> = (offset..offset + len)
            .map(|at| u8::try_from((at >> 9) % 255).unwrap() + 1)
            .collect();
        file.write_all_at(&bytes, offset).unwrap();
    }
    file.sync_all().unwrap();
}

/// What the map of `DATA` is: (offset, bytes, data).
fn expected_map() -> Vec<(u64, u64, bool)> {
    let mut map = Vec::new();
    let mut end = 0;
    for (offset, len) in DATA {
        if offset > end {
            map.push((end, offset - end, false));
        }
        map.push((offset, len, true));
        end = offset + len;
    }
    map
}

fn data_bytes() -> u64 {
    DATA.iter().map(|(_, len)| len).sum()
}

#[test]
fn the_maps_of_nbdinfo_and_qemu_are_those_of_the_file() -> Outcome<()> {
    let needs = [Need::Loop, Need::Tool("nbdinfo"), Need::Tool("qemu-img")];
    real("maps", &needs, |_| {
        let served = serve(240, SIZE);
        fill(&served.file);
        {
            let said = good("nbdinfo", &["--map", "--json", &served.uri]);
            let map: serde_json::Value = serde_json::from_str(&said).unwrap();
            let map: Vec<(u64, u64, bool)> = map
                .as_array()
                .unwrap()
                .iter()
                .map(|extent| {
                    let kind = extent["type"].as_u64().unwrap();
                    assert!(kind == 0 || kind == 3, "{extent}");
                    let number = |key| extent[key].as_u64().unwrap();
                    (number("offset"), number("length"), kind == 0)
                })
                .collect();
            assert_eq!(map, expected_map());
            let info = good("nbdinfo", &[&served.uri]);
            assert!(info.contains("base:allocation"), "{info}");
            note_headers(&served, "nbdinfo");
        }
        {
            let said = good(
                "qemu-img",
                &["map", "--output=json", "-f", "raw", &served.uri],
            );
            let map: serde_json::Value = serde_json::from_str(&said).unwrap();
            let map: Vec<(u64, u64, bool)> = map
                .as_array()
                .unwrap()
                .iter()
                .map(|extent| {
                    let number = |key| extent[key].as_u64().unwrap();
                    let is = |key| extent[key].as_bool().unwrap();
                    assert_eq!(is("zero"), !is("data"), "{extent}");
                    (number("start"), number("length"), is("data"))
                })
                .collect();
            assert_eq!(map, expected_map());
            note_headers(&served, "qemu-img map");
        }
        Ok(())
    })
}

/// Copies out read what is stored and no more, and the copy is as sparse as the disk.
#[test]
fn sparse_copies_move_the_data_only() -> Outcome<()> {
    let needs = [Need::Loop, Need::Tool("nbdcopy"), Need::Tool("qemu-img")];
    real("sparse copies out", &needs, |_| {
        let served = serve(244, SIZE);
        fill(&served.file);
        let original = std::fs::read(&served.file).unwrap();
        let mut read_before = 0;
        let mut check = |who: &str, copy: &Path| {
            assert!(std::fs::read(copy).unwrap() == original, "{who}");
            let stored = std::fs::metadata(copy).unwrap().blocks() * 512;
            assert!(stored <= 2 * data_bytes(), "{who}: {stored} bytes stored");
            let now = served.door.stats().bytes_read;
            let read = now - read_before;
            read_before = now;
            assert!(read <= 2 * data_bytes(), "{who}: {read} bytes read");
            std::fs::remove_file(copy).unwrap();
        };
        for connections in ["--connections=1", "--connections=4"] {
            let (copy, text) = served.path("copy");
            File::create(&copy).unwrap();
            good("nbdcopy", &[connections, &served.uri, &text]);
            check("nbdcopy", &copy);
        }
        let (copy, text) = served.path("copy");
        let convert = ["convert", "-f", "raw", "-O", "raw", &served.uri, &text];
        {
            good("qemu-img", &convert);
            check("qemu-img convert", &copy);
            let same = [
                "compare",
                "-f",
                "raw",
                "-F",
                "raw",
                &served.uri,
                served.file.to_str().unwrap(),
            ];
            assert!(good("qemu-img", &same).contains("identical"));
        }
        note_headers(&served, "the copies");
        Ok(())
    })
}

/// Copies in leave holes as holes, on a disk that was full before.
#[test]
fn sparse_copies_into_the_disk_make_holes() -> Outcome<()> {
    let needs = [Need::Loop, Need::Tool("nbdcopy"), Need::Tool("qemu-img")];
    real("sparse copies in", &needs, |_| {
        let served = serve(248, SIZE);
        let (source, text) = served.path("source");
        File::create(&source).unwrap().set_len(SIZE).unwrap();
        fill(&source);
        let original = std::fs::read(&source).unwrap();
        let dirty = vec![0xd1; usize::try_from(SIZE).unwrap()];
        let nbdcopy = ["nbdcopy", "--flush", &text, &served.uri];
        let convert = [
            "qemu-img",
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "raw",
            &text,
            &served.uri,
        ];
        for (who, command) in [("nbdcopy", &nbdcopy[..]), ("qemu-img", &convert)] {
            std::fs::write(served.path("full").0, &dirty).unwrap();
            good("nbdcopy", &["--flush", &served.path("full").1, &served.uri]);
            assert!(std::fs::metadata(&served.file).unwrap().blocks() * 512 >= SIZE);
            good(command[0], &command[1..]);
            assert!(std::fs::read(&served.file).unwrap() == original, "{who}");
            let stored = std::fs::metadata(&served.file).unwrap().blocks() * 512;
            assert!(stored <= 2 * data_bytes(), "{who}: {stored} bytes stored");
        }
        Ok(())
    })
}

#[test]
fn qemu_zeroes_and_discards_more_than_four_gibibytes() -> Outcome<()> {
    let needs = [Need::Loop, Need::Tool("qemu-io")];
    real("long zeroes", &needs, |_| {
        const GIB: u64 = 1 << 30;
        let served = serve(252, 6 * GIB);
        let file = File::options().write(true).open(&served.file).unwrap();
        for at in [0, GIB, 5 * GIB - 4096, 5 * GIB] {
            file.write_all_at(&[7; 4096], at).unwrap();
        }
        file.sync_all().unwrap();
        let script = [
            "-f",
            "raw",
            "-c",
            "write -n -z -u 0 5G",
            "-c",
            "flush",
            &served.uri,
        ];
        let said = good("qemu-io", &script);
        assert!(said.contains("wrote"), "{said}");
        let script = [
            "-f",
            "raw",
            "-c",
            "read -P 0 1G 4k",
            "-c",
            "read -P 7 5G 4k",
            "-c",
            "discard 4G 2000M",
            "-c",
            "discard 6096M 48M",
            &served.uri,
        ];
        let said = good("qemu-io", &script);
        assert!(!said.contains("Pattern verification failed"), "{said}");
        assert_eq!(std::fs::metadata(&served.file).unwrap().blocks(), 0);
        note_headers(&served, "qemu-io");
        tell(&format!(
            "qemu-io: {} requests to zero 5 GiB, {} to discard 6 GiB",
            served.door.stats().zeroes,
            served.door.stats().trims
        ));
        Ok(())
    })
}

#[test]
fn fio_verifies_what_it_wrote_over_several_connections() -> Outcome<()> {
    let needs = [Need::Loop, Need::Tool("fio")];
    real("fio", &needs, |_| {
        let served = serve(256, SIZE);
        let uri = format!("--uri={}", served.uri);
        let job = [
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randwrite",
            "--bs=512-64k",
            "--size=16M",
            "--iodepth=16",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_state_save=0",
            "--verify_fatal=1",
            "--output-format=json",
        ];
        let output = run("fio", &job);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let complained = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}{complained}");
        let stats = served.door.stats();
        let moved = (stats.bytes_written, stats.bytes_read);
        assert!(moved.0 >= 8 * MIB && moved.1 >= 8 * MIB, "{moved:?}");
        Ok(())
    })
}

#[test]
fn libnbd_in_python_holds_the_extents_and_the_forms() -> Outcome<()> {
    let needs = [Need::Loop, Need::PythonNbd];
    real("libnbd in Python", &needs, |_| {
        let served = serve(260, SIZE);
        fill(&served.file);
        let script = r"
import sys
try:
    import nbd
except ImportError:
    sys.exit(127)
MIB = 1 << 20
h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.add_meta_context('x-none:such')
h.connect_uri(sys.argv[1])
assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
assert not h.can_meta_context('x-none:such')
extended = getattr(h, 'get_extended_headers_negotiated', lambda: False)()
print('libnbd', h.get_version(), 'extended' if extended else 'structured')
def status(offset, length, flags=0):
    got = []
    def f(context, at, entries, err):
        assert (context, at, err.value) == ('base:allocation', offset, 0)
        got.append(entries)
    h.block_status(length, offset, f, flags)
    assert len(got) == 1
    return list(zip(got[0][0::2], got[0][1::2]))
K = 1024
assert status(0, 64 * MIB) == [(64 * K, 0), (17 * MIB - 64 * K, 3), (192 * K, 0),
    (47 * MIB - 320 * K, 3), (128 * K, 0)], status(0, 64 * MIB)
assert status(0, 64 * MIB, nbd.CMD_FLAG_REQ_ONE) == [(64 * K, 0)]
assert status(17 * MIB + 512, 1024) == [(1024, 0)]
assert status(20 * MIB, 1) in ([(1, 0)], [(1, 3)])
if hasattr(h, 'block_status_64'):
    got = []
    h.block_status_64(64 * MIB, 0, lambda c, o, e, err: got.append(e))
    assert [s for _, s in got[0]] == [0, 3, 0, 3, 0], got
    got = []
    if extended:
        assert h.can_block_status_payload()
        h.block_status_filter(MIB, 0, ['base:allocation'], lambda c, o, e, err: got.append((c, e)))
        assert got[0][0] == 'base:allocation'
b = nbd.NBD()
b.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
b.add_meta_context('qemu:allocation-depth')
b.connect_uri(sys.argv[1])
both = {}
b.block_status(64 * MIB, 0, lambda c, o, e, err: both.__setitem__(c, e))
assert both['qemu:allocation-depth'] == [64 * MIB, 1], both
assert both['base:allocation'][:2] == [64 * K, 0], both
b.shutdown()
chunks = []
h.pread_structured(4096, 64 * K - 2048, lambda b, o, s, err: chunks.append((o, s, len(b))), nbd.CMD_FLAG_DF)
assert chunks == [(64 * K - 2048, nbd.READ_DATA, 4096)], chunks
# An acknowledged write that is in no file yet is told as data.
h.pwrite(b'x' * 4096, 30 * MIB)
assert status(30 * MIB, 4096) == [(4096, 0)]
h.zero(4096, 30 * MIB)
assert status(30 * MIB, 4096) == [(4096, 3)]
h.zero(64 * MIB, 0, nbd.CMD_FLAG_FAST_ZERO)
assert status(0, 64 * MIB) == [(64 * MIB, 3)]
h.set_strict_mode(0)
try:
    h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
    raise SystemExit('what keeps the range cannot promise to be fast')
except nbd.Error as e:
    assert e.errno == 'ENOTSUP', e
h.shutdown()
o = nbd.NBD()
o.set_opt_mode(True)
o.connect_uri(sys.argv[1])
listed = []
o.opt_list_meta_context(lambda name: listed.append(name))
assert listed == ['base:allocation', 'qemu:allocation-depth'], listed
o.set_export_name('nowhere')
try:
    o.opt_list_meta_context(lambda name: None)
    raise SystemExit('no error')
except nbd.Error as e:
    pass
o.opt_abort()
";
        let said = good(PYTHON, &["-c", script, &served.uri]);
        tell(said.trim());
        until("all gone", || served.door.clients(&name("vol")) == 0);
        Ok(())
    })
}
