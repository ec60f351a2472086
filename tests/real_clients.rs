//! Every named client talks to the server and gets its bytes: nbdcopy, nbdinfo, qemu-io, qemu-img, nbd-client and
//! the libnbd Python bindings, over a Unix socket and over TCP.

use std::net::SocketAddr;
use std::time::Duration;

use support::client::Endpoint;
use support::daemon::free_port;
use support::ground::{Ground, Need, PYTHON, real};
use support::scene::Scene;
use support::{Outcome, hold, pattern, process};

const BYTES: u64 = 16 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// A scene with vol-a, whose daemon also listens on TCP.
fn scene(ground: &Ground) -> Outcome<(Scene, u16)> {
    let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
    scene.stop()?;
    let port = free_port()?;
    scene.home.listen = vec![format!("127.0.0.1:{port}")];
    scene.start()?;
    scene.client.reach_state("vol-a", "Serving", LIMIT)?;
    Ok((scene, port))
}

fn endpoints(scene: &Scene, port: u16) -> [Endpoint; 2] {
    let tcp = SocketAddr::from(([127, 0, 0, 1], port));
    [scene.endpoint(), Endpoint::Tcp(tcp)]
}

fn examine(scene: &mut Scene, sequence: u64) -> Outcome<()> {
    scene.stop()?;
    let tally = scene.volumes[0].examine(sequence)?;
    hold!(tally.all_right(), "{tally}");
    Ok(())
}

#[test]
fn nbdcopy_writes_and_reads_every_byte() -> Outcome<()> {
    let needs = [Need::Loop, Need::Bus, Need::Tool("nbdcopy")];
    real("nbdcopy", &needs, |ground| {
        let (mut scene, port) = scene(ground)?;
        let file = ground.file("pattern");
        for (sequence, endpoint) in (1u64..).zip(endpoints(&scene, port)) {
            let uri = endpoint.uri("vol-a");
            pattern::write_file(&file, "vol-a", BYTES, sequence)?;
            let path = file.to_string_lossy();
            process::succeed("nbdcopy", &["--flush", &path, &uri], LIMIT)?;
            let back = ground.file("back");
            process::succeed("nbdcopy", &[uri.as_str(), &back.to_string_lossy()], LIMIT)?;
            let tally = pattern::examine_whole(&back, "vol-a", BYTES, sequence)?;
            hold!(tally.all_right(), "{endpoint}: {tally}");
        }
        examine(&mut scene, 2)
    })
}

#[test]
fn nbdinfo_shows_the_export_and_the_list() -> Outcome<()> {
    let needs = [Need::Loop, Need::Bus, Need::Tool("nbdinfo")];
    real("nbdinfo", &needs, |ground| {
        let (mut scene, port) = scene(ground)?;
        for endpoint in endpoints(&scene, port) {
            let uri = endpoint.uri("vol-a");
            let size = process::succeed("nbdinfo", &["--size", &uri], LIMIT)?;
            hold!(size.trim() == BYTES.to_string(), "{endpoint}: size {size}");
            let json = process::succeed("nbdinfo", &["--json", &uri], LIMIT)?;
            let shown: serde_json::Value = serde_json::from_str(&json)?;
            let export = &shown["exports"][0];
            hold!(shown["protocol"] == "newstyle-fixed", "{json}");
            hold!(shown["structured"] == true, "{json}");
            for able in ["can_flush", "can_fua", "can_zero", "can_df"] {
                hold!(export[able] == true, "{able} in {json}");
            }
            hold!(export["is_read_only"] == false, "{json}");
            let list =
                process::succeed("nbdinfo", &["--list", "--json", &endpoint.uri("")], LIMIT)?;
            hold!(list.contains("\"vol-a\""), "{list}");
        }
        scene.stop()
    })
}

#[test]
fn qemu_io_writes_reads_zeroes_and_discards() -> Outcome<()> {
    let needs = [Need::Loop, Need::Bus, Need::Tool("qemu-io")];
    real("qemu-io", &needs, |ground| {
        let (mut scene, port) = scene(ground)?;
        for endpoint in endpoints(&scene, port) {
            let uri = endpoint.uri("vol-a");
            let mut args = vec!["-f", "raw"];
            for command in [
                "write -P 0x5a 0 1M",
                "read -P 0x5a 0 1M",
                "write -f -P 0x33 1049088 4096",
                "read -P 0x33 1049088 4096",
                "write -z 65536 65536",
                "read -P 0 65536 65536",
                "write -z -u 131072 65536",
                "read -P 0 131072 65536",
                "discard 262144 65536",
                "read -P 0x5a 0 65536",
                "aio_write -P 0x11 4M 1M",
                "aio_write -P 0x22 6M 1M",
                "aio_flush",
                "flush",
                "read -P 0x11 4M 1M",
                "read -P 0x22 6M 1M",
            ] {
                args.extend(["-c", command]);
            }
            args.push(&uri);
            let out = process::succeed("qemu-io", &args, LIMIT)?;
            hold!(
                !out.contains("failed") && !out.contains("Pattern verification"),
                "{endpoint}: {out}"
            );
        }
        scene.stop()
    })
}

#[test]
fn qemu_img_describes_converts_and_compares() -> Outcome<()> {
    let needs = [Need::Loop, Need::Bus, Need::Tool("qemu-img")];
    real("qemu-img", &needs, |ground| {
        let (mut scene, port) = scene(ground)?;
        let file = ground.file("pattern");
        let path = file.to_string_lossy().into_owned();
        for (sequence, endpoint) in (1u64..).zip(endpoints(&scene, port)) {
            let uri = endpoint.uri("vol-a");
            let info = process::succeed("qemu-img", &["info", "--output=json", &uri], LIMIT)?;
            let shown: serde_json::Value = serde_json::from_str(&info)?;
            hold!(shown["virtual-size"] == BYTES, "{info}");
            pattern::write_file(&file, "vol-a", BYTES, sequence)?;
            let convert = ["convert", "-n", "-f", "raw", "-O", "raw", &path, &uri];
            process::succeed("qemu-img", &convert, LIMIT)?;
            let compare = ["compare", "-f", "raw", "-F", "raw", &path, &uri];
            process::succeed("qemu-img", &compare, LIMIT)?;
        }
        examine(&mut scene, 2)
    })
}

#[test]
fn nbd_client_lists_the_exports() -> Outcome<()> {
    let needs = [Need::Loop, Need::Bus, Need::Tool("nbd-client")];
    real("nbd-client", &needs, |ground| {
        let (mut scene, port) = scene(ground)?;
        let port = port.to_string();
        let args = ["-l", "127.0.0.1", port.as_str()];
        let out = process::succeed("/usr/sbin/nbd-client", &args, LIMIT)?;
        hold!(out.lines().any(|line| line == "vol-a"), "{out}");
        scene.stop()
    })
}

/// What a careful libnbd user does, and some of what a careless one does.
const LIBNBD: &str = r#"
import sys, errno, nbd
uri, size = sys.argv[1], int(sys.argv[2])
h = nbd.NBD()
h.connect_uri(uri)
assert h.get_size() == size, h.get_size()
assert h.get_structured_replies_negotiated()
data = bytes(range(256)) * 256
h.pwrite(data, 0, nbd.CMD_FLAG_FUA)
assert h.pread(len(data), 0) == data
assert h.pread(1000, 1) == data[1:1001], "an unaligned read"
h.pwrite(b"x" * 10, 3)
assert h.pread(16, 0) == data[:3] + b"x" * 10 + data[13:16], "an unaligned write"
h.zero(4096, 8192)
assert h.pread(4096, 8192) == bytes(4096)
h.zero(4096, 16384, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(4096, 16384) == bytes(4096)
if h.can_cache():
    h.cache(65536, 0)
if h.can_trim():
    h.trim(65536, 1 << 20)
h.flush()
# Many in flight, answered once each.
left = []
for i in range(64):
    buf = nbd.Buffer(65536)
    left.append((h.aio_pread(buf, 0 if i % 2 else 65536), buf))
while left:
    h.poll(-1)
    left = [(c, b) for c, b in left if not h.aio_command_completed(c)]
# The server itself refuses what libnbd would not even send.
h.set_strict_mode(0)
for what, expected in (
    (lambda: h.pread(512, size), (errno.EINVAL,)),
    (lambda: h.pread(512, size - 1), (errno.EINVAL,)),
    (lambda: h.pread(512, 2**63 - 512), (errno.EINVAL,)),
    (lambda: h.pwrite(b"y" * 512, size), (errno.ENOSPC, errno.EINVAL)),
    (lambda: h.zero(512, size), (errno.ENOSPC, errno.EINVAL)),
    (lambda: h.trim(512, size), (errno.ENOSPC, errno.EINVAL)),
):
    try:
        what()
    except nbd.Error as e:
        assert e.errnum in expected, (e.errnum, e)
    else:
        assert False, "a request past the end was answered"
assert h.pread(3, 0) == data[:3], "and the connection lives"
h.shutdown()
print("held")
"#;

#[test]
fn libnbd_for_python_agrees_on_every_command() -> Outcome<()> {
    let needs = [Need::Loop, Need::Bus, Need::PythonNbd];
    real("libnbd", &needs, |ground| {
        let (mut scene, port) = scene(ground)?;
        for endpoint in endpoints(&scene, port) {
            let args = ["-c", LIBNBD, &endpoint.uri("vol-a"), &BYTES.to_string()];
            let out = process::succeed(PYTHON, &args, LIMIT)?;
            hold!(out.trim() == "held", "{endpoint}: {out}");
        }
        scene.stop()
    })
}
