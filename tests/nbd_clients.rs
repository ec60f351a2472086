//! The clients that people have, against the door: nbdcopy, nbdinfo, qemu-io, qemu-img, nbd-client -l and libnbd's
//! Python bindings. A client that is not installed is named and skipped.
#![allow(clippy::unwrap_used, reason = "a test ends where something is missing")]

mod nbd_common;

use std::io::Write;
use std::net::TcpListener;
use std::process::{Command, Output};

use nbd_common::*;
use nbdtrack::correlation::RefusalKind;

fn pattern(bytes: u64) -> Vec<u8> {
    (0..bytes / 8)
        .flat_map(|n| (n ^ 0x5eed).to_be_bytes())
        .collect()
}

/// Runs a client for at most a minute; `None` when it isn't installed.
fn run(program: &str, args: &[&str]) -> Option<Output> {
    let output = Command::new("timeout")
        .arg("60")
        .arg(program)
        .args(args)
        .output()
        .unwrap();
    if output.status.code() == Some(127) {
        eprintln!("skipped: {program} is not installed");
        return None;
    }
    Some(output)
}

/// As `run`; it has to succeed. Returns what it printed.
fn good(program: &str, args: &[&str]) -> Option<String> {
    let output = run(program, args)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {args:?}: {said}{complained}"
    );
    Some(said)
}

fn uri(server: &Server) -> String {
    format!("nbd+unix:///vol?socket={}", server.path.display())
}

#[test]
fn nbdcopy_copies_in_and_out_unchanged() {
    let server = Server::with(Default::default(), Memory::new(16 * MIB));
    let data = pattern(16 * MIB);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&data).unwrap();
    let path = file.path().to_str().unwrap();
    for connections in ["--connections=1", "--connections=4"] {
        server.image.bytes.write().unwrap().fill(0);
        if good("nbdcopy", &[connections, "--flush", path, &uri(&server)]).is_none() {
            return;
        }
        assert!(*server.image.bytes.read().unwrap() == data);
    }
    let back = tempfile::NamedTempFile::new().unwrap();
    good("nbdcopy", &[&uri(&server), back.path().to_str().unwrap()]);
    assert!(std::fs::read(back.path()).unwrap() == data);
}

#[test]
fn nbdinfo_shows_the_export_and_lists_all_names() {
    let server = Server::new();
    server.door.refuse(
        &name("absent"),
        RefusalKind::NotAvailable,
        "its disk is not attached",
    );
    let Some(said) = good("nbdinfo", &["--json", &uri(&server)]) else {
        return;
    };
    for wanted in [
        "\"export-size\": 1048576",
        "\"can_multi_conn\": true",
        "\"structured\": true",
        ": 33554432",
    ] {
        assert!(said.contains(wanted), "{wanted} in {said}");
    }
    let list = format!("nbd+unix:///?socket={}", server.path.display());
    // It asks INFO of each name and lists what can be had; the handshake must survive the refusal.
    let output = run("nbdinfo", &["--list", "--json", &list]).unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("vol") && said.contains("absent"), "{said}");
    let absent = format!("nbd+unix:///absent?socket={}", server.path.display());
    let output = run("nbdinfo", &[&absent]).unwrap();
    assert!(!output.status.success());
    // libnbd keeps the reason for its debug output.
    assert!(String::from_utf8_lossy(&output.stderr).contains("absent"));
}

#[test]
fn qemu_reads_writes_zeroes_discards_and_converts() {
    let server = Server::with(Default::default(), Memory::new(8 * MIB));
    let uri = uri(&server);
    let script = [
        "-f",
        "raw",
        "-c",
        "write -P 0xab 4096 64k",
        "-c",
        "read -P 0xab 4096 64k",
        "-c",
        "write -z 4096 4096",
        "-c",
        "read -P 0 4096 4096",
        "-c",
        "discard 8192 4096",
        "-c",
        "write -f -P 1 0 512",
        "-c",
        "flush",
        "-c",
        "read -P 1 0 512",
        &uri,
    ];
    let Some(said) = good("qemu-io", &script) else {
        return;
    };
    assert!(!said.contains("failed"), "{said}");
    *server.image.bytes.write().unwrap() = pattern(8 * MIB);
    let copy = tempfile::NamedTempFile::new().unwrap();
    good(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "raw",
            &uri,
            copy.path().to_str().unwrap(),
        ],
    );
    assert!(std::fs::read(copy.path()).unwrap() == pattern(8 * MIB));
    assert!(good("qemu-img", &["info", &uri]).unwrap().contains("8 MiB"));
}

#[test]
fn nbd_client_lists_over_tcp() {
    let server = Server::new();
    server
        .door
        .refuse(&name("absent"), RefusalKind::Policy, "ambiguous");
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port().to_string();
    server.door.listen_tcp(socket).unwrap();
    let Some(output) = run("nbd-client", &["-l", "127.0.0.1", &port]) else {
        return;
    };
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("vol") && said.contains("absent"), "{said}");
    good("nbdinfo", &[&format!("nbd://127.0.0.1:{port}/vol")]);
}

#[test]
fn libnbd_in_python_does_everything_it_knows() {
    let server = Server::with(Default::default(), Memory::new(8 * MIB));
    let script = r"
import sys
try:
    import nbd
except ImportError:
    sys.exit(127)
def error(call, *args):
    try:
        call(*args)
    except nbd.Error as e:
        return e.errno
    raise SystemExit('no error')
h = nbd.NBD()
h.set_strict_mode(0)
h.connect_uri(sys.argv[1])
assert h.get_size() == 8 << 20 and h.can_multi_conn() and h.can_df() and not h.is_read_only()
h.pwrite(b'x' * 70000, 5, nbd.CMD_FLAG_FUA)
assert h.pread(70000, 5) == b'x' * 70000
assert h.pread(512, 5, nbd.CMD_FLAG_DF) == b'x' * 512
h.zero(1000, 5, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(1001, 5) == bytes(1000) + b'x'
h.trim(4096, 8192); h.cache(4096, 0); h.flush()
assert error(h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO) == 'ENOTSUP'
assert error(h.pread, 512, 8 << 20) == 'EINVAL'
assert error(h.pwrite, b'x' * 512, 8 << 20) == 'ENOSPC'
assert error(h.zero, 512, 8 << 20) == 'ENOSPC'
assert error(h.trim, 512, 8 << 20) == 'EINVAL'
bufs = [nbd.Buffer(4096) for _ in range(64)]
cookies = [h.aio_pread(b, 4096 * n) for n, b in enumerate(bufs)]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
h.shutdown()
o = nbd.NBD()
o.set_opt_mode(True)
o.connect_uri(sys.argv[1])
names = []
o.opt_list(lambda name, text: names.append(name))
assert names == ['vol'], names
o.set_export_name('none'); assert error(o.opt_go) == 'ENOENT'
o.set_export_name('vol'); o.opt_info(); o.opt_go()
assert o.pread(1, 0) == bytes(1)
o.shutdown()
";
    good("/usr/bin/python3", &["-c", script, &uri(&server)]);
    until("all gone", || server.door.clients(&name("vol")) == 0);
}
