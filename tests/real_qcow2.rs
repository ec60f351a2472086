//! QCOW2 images beside disks: what is served reads, through the daemon and real clients, byte for byte as QEMU reads it; what is not
//! served is refused by name; and no one else writes to an image while it is served.

use std::os::fd::FromRawFd;
use std::path::Path;
use std::process::{Command, Stdio};

use support::bus::Options;
use support::client::{CMD_TRIM, CMD_WRITE_ZEROES, Client};
use support::ground::{Ground, Need, real, tell};
use support::images::{self, qemu_img, scene, text};
use support::process::{self, Running};
use support::scene::{STEP_LIMIT, Scene};
use support::{Outcome, hold, trouble, until};
use zbus::Variant;

const NEEDS: &[Need] = &[
    Need::Bus,
    Need::Tool("nbdcopy"),
    Need::Tool("qemu-img"),
    Need::Tool("qemu-io"),
];
const MIB: u64 = 1 << 20;

fn id(path: &Path) -> String {
    format!("qcow2:{}", path.display())
}

/// Makes an image by `qemu-img create -o`.
fn create(path: &Path, options: &str, bytes: u64) -> Outcome<()> {
    let options = if options.is_empty() {
        "cluster_size=64k"
    } else {
        options
    };
    let size = bytes.to_string();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        options,
        &text(path),
        &size,
    ])
    .map(drop)
}

/// Commands of qemu-io on an image.
fn qemu_io(path: &Path, commands: &[&str]) -> Outcome<()> {
    images::qemu_io(&text(path), "qcow2", commands)
}

/// `qemu-img check` finds no error; a leak is none where it is allowed.
fn check(path: &Path, leaks_allowed: bool) -> Outcome<()> {
    let done = process::run(
        "qemu-img",
        &["check", "-f", "qcow2", &text(path)],
        STEP_LIMIT,
    )?;
    let right = match done.status.code() {
        Some(0) => true,
        Some(3) => leaks_allowed,
        _ => false,
    };
    hold!(right, "{}: {}{}", path.display(), done.stdout, done.stderr);
    Ok(())
}

/// Bytes of the header or the tables are other ones.
fn poke(path: &Path, offset: u64, bytes: &[u8]) -> Outcome<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().write(true).open(path)?;
    Ok(file.write_all_at(bytes, offset)?)
}

/// What makes an image at a path.
type Make = fn(&Path) -> Outcome<()>;

fn full(path: &Path, options: &str) -> Outcome<()> {
    create(path, options, 8 * MIB)?;
    qemu_io(
        path,
        &[
            "write -P 1 0 300k",
            "write -P 2 3M 1M",
            "write -z 64k 64k",
            "write -P 3 8191k 1k",
        ],
    )
}

/// Each row: what it is, how it is made, and with which word it is refused; "" for served.
const MATRIX: &[(&str, Make, &str)] = &[
    ("512 bytes", |p| full(p, "cluster_size=512"), ""),
    ("4 KiB", |p| full(p, "cluster_size=4k"), ""),
    (
        "8 KiB, 4 bit refcounts",
        |p| full(p, "cluster_size=8k,refcount_bits=4"),
        "",
    ),
    ("64 KiB", |p| full(p, "cluster_size=64k"), ""),
    ("1 MiB", |p| full(p, "cluster_size=1M"), ""),
    ("2 MiB", |p| full(p, "cluster_size=2M"), ""),
    ("version 2", |p| full(p, "compat=0.10"), ""),
    ("subclusters", |p| full(p, "extended_l2=on"), ""),
    ("lazy refcounts", |p| full(p, "lazy_refcounts=on"), ""),
    ("1 bit refcounts", |p| full(p, "refcount_bits=1"), ""),
    ("64 bit refcounts", |p| full(p, "refcount_bits=64"), ""),
    (
        "metadata preallocated",
        |p| full(p, "preallocation=metadata"),
        "",
    ),
    ("fallocated", |p| full(p, "preallocation=falloc"), ""),
    ("fully allocated", |p| full(p, "preallocation=full"), ""),
    (
        "odd size",
        |p| {
            create(p, "", 3 * MIB + 1536)?;
            qemu_io(p, &["write -P 9 3145728 1536"])
        },
        "",
    ),
    ("zlib", |p| compressed(p, "zlib"), ""),
    ("zstd", |p| compressed(p, "zstd"), ""),
    (
        "internal snapshots",
        |p| {
            full(p, "")?;
            qemu_img(&["snapshot", "-c", "one", &text(p)])?;
            qemu_io(p, &["write -P 7 100k 100k"])?;
            qemu_img(&["snapshot", "-c", "two", &text(p)])?;
            qemu_io(p, &["write -P 8 4M 10k"])
        },
        "",
    ),
    (
        "a bitmap, read only",
        |p| {
            full(p, "")?;
            bitmap(p)
        },
        "persistent bitmaps",
    ),
    ("backing chain of 1", |p| chain(p, 1), ""),
    ("backing chain of 3", |p| chain(p, 3), ""),
    ("backing chain of 16", |p| chain(p, 16), ""),
    (
        "backing chain of 17",
        |p| chain(p, 17),
        "more than 16 files",
    ),
    ("raw backing file", raw_backing, ""),
    (
        "backing file out of the roots",
        |p| {
            let base = p.with_file_name("..").join("outside.qcow2");
            full(&base, "")?;
            overlay(p, &text(&base))
        },
        "leads out of the file_roots",
    ),
    (
        "backing file elsewhere",
        |p| overlay_unsafe(p, "/etc/passwd", "raw"),
        "not beneath any of the file_roots",
    ),
    (
        "backing file is gone",
        |p| overlay_unsafe(p, "none.qcow2", "qcow2"),
        "there is no such file",
    ),
    (
        "backing file by protocol",
        |p| overlay_unsafe(p, "nbd://localhost/x", "raw"),
        "not named by a path",
    ),
    (
        "backing file without format",
        |p| {
            chain(p, 1)?;
            // The format's extension comes first; an unknown one is passed over.
            poke(p, 112, &[0x11; 4])
        },
        "names no format",
    ),
    (
        "its own backing file",
        |p| overlay_unsafe(p, &text(p), "qcow2"),
        "beneath itself",
    ),
    (
        "a backing file that lies on it",
        |p| {
            let other = p.with_extension("other.qcow2");
            overlay_unsafe(&other, &text(p), "qcow2")?;
            overlay_unsafe(p, &text(&other), "qcow2")
        },
        "beneath itself",
    ),
    (
        "its own external data file",
        |p| {
            // Under a name of the same length, which is then its own.
            let other = text(&p.with_extension("data2"));
            full(p, &format!("data_file={other}"))?;
            let bytes = std::fs::read(p)?;
            let mut at = bytes.windows(other.len());
            let Some(at) = at.position(|found| found == other.as_bytes()) else {
                trouble!("the name is not in the header")
            };
            poke(p, at as u64, text(p).as_bytes())
        },
        "is the image itself",
    ),
    (
        "data file, read only",
        |p| full(p, &data_file(p, "")),
        "external file",
    ),
    (
        "raw data file, read only",
        |p| full(p, &data_file(p, ",data_file_raw=on")),
        "external file",
    ),
    (
        "data file of subclusters, read only",
        |p| full(p, &data_file(p, ",extended_l2=on,cluster_size=16k")),
        "external file",
    ),
    (
        "data file out of the roots",
        |p| {
            let data = p.with_file_name("..").join("outside.data");
            full(p, &format!("data_file={}", text(&data)))
        },
        "its external data file: ",
    ),
    (
        "encrypted",
        |p| {
            let secret = "secret,id=s,data=abc";
            let name = text(p);
            qemu_img(&[
                "create",
                "-q",
                "--object",
                secret,
                "-f",
                "qcow2",
                "-o",
                "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
                &name,
                "1M",
            ])
            .map(drop)
        },
        "encrypted",
    ),
    (
        "dirty",
        |p| {
            full(p, "")?;
            poke(p, 79, &[1])
        },
        "qemu-img check -r all",
    ),
    (
        "corrupt",
        |p| {
            full(p, "")?;
            poke(p, 79, &[2])
        },
        "marked corrupt",
    ),
    (
        "unknown feature",
        |p| {
            full(p, "")?;
            poke(p, 75, &[1])
        },
        "incompatible feature 32",
    ),
    (
        "version 4",
        |p| {
            full(p, "")?;
            poke(p, 7, &[4])
        },
        "version 4",
    ),
    (
        "raw bytes",
        |p| Ok(std::fs::write(p, [7; 4096])?),
        "does not begin as a QCOW2 image",
    ),
    (
        "empty file",
        |p| Ok(std::fs::write(p, [])?),
        "does not begin as a QCOW2 image",
    ),
    (
        "cut off",
        |p| Ok(std::fs::write(p, b"QFI\xfb\0\0\0\x03")?),
        "cut off",
    ),
    (
        "L1 of 2^32 entries",
        |p| {
            full(p, "")?;
            poke(p, 36, &[0xff; 4])
        },
        "the L1 table's length",
    ),
    (
        "L1 past the end",
        |p| {
            full(p, "")?;
            poke(p, 40, &[0, 0, 0x7f])
        },
        "the L1 table at byte",
    ),
    (
        "L2 past the end",
        |p| {
            full(p, "")?;
            let l1 = u64::from_be_bytes(std::fs::read(p)?[40..48].try_into()?);
            poke(p, l1 + 2, &[0x7f])
        },
        "an L2 table at byte",
    ),
    (
        "refcounts past the end",
        |p| {
            full(p, "")?;
            poke(p, 48, &[0, 0, 0x7f])
        },
        "the refcount table at byte",
    ),
    (
        "clusters of 2^63",
        |p| {
            full(p, "")?;
            poke(p, 20, &[0, 0, 0, 63])
        },
        "cluster_bits is 63",
    ),
    (
        "a size of 2^63",
        |p| {
            full(p, "")?;
            poke(p, 24, &[0x80])
        },
        "the virtual size",
    ),
];

fn data_file(path: &Path, more: &str) -> String {
    format!("data_file={}{more}", text(&path.with_extension("data")))
}

fn compressed(path: &Path, kind: &str) -> Outcome<()> {
    let raw = path.with_extension("raw");
    let bytes: Vec<u8> = (0..8 * MIB)
        .map(|n| u8::try_from(((n >> 10) * (n >> 3)) & 0x3f).unwrap_or(0))
        .collect();
    std::fs::write(&raw, bytes)?;
    let kind = format!("compression_type={kind}");
    qemu_img(&[
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-o",
        &kind,
        &text(&raw),
        &text(path),
    ])
    .map(drop)
}

fn bitmap(path: &Path) -> Outcome<()> {
    qemu_img(&["bitmap", "--add", &text(path), "b0"]).map(drop)
}

fn overlay(path: &Path, base: &str) -> Outcome<()> {
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        base,
        &text(path),
    ])
    .map(drop)
}

/// Without looking at the backing file.
fn overlay_unsafe(path: &Path, base: &str, format: &str) -> Outcome<()> {
    create(path, "", 8 * MIB)?;
    qemu_img(&[
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-F",
        format,
        "-b",
        base,
        &text(path),
    ])
    .map(drop)
}

/// An image on `depth` others beside it, each with something of its own.
fn chain(path: &Path, depth: usize) -> Outcome<()> {
    let name = |n: usize| match n {
        0 => path.to_owned(),
        n => path.with_extension(format!("{n}.qcow2")),
    };
    full(&name(depth), "cluster_size=4k")?;
    for n in (0..depth).rev() {
        let base = name(n + 1);
        let base = base
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        // Each is larger than what is beneath.
        let size = (8 * MIB + (depth - n) as u64 * 65536).to_string();
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            &base,
            &text(&name(n)),
            &size,
        ])?;
        let at = n * 300;
        qemu_io(
            &name(n),
            &[
                &format!("write -P {} {at}k 50k", n + 20),
                &format!("write -z {}k 7k", at + 100),
            ],
        )?;
    }
    Ok(())
}

fn raw_backing(path: &Path) -> Outcome<()> {
    let base = path.with_extension("base");
    std::fs::write(&base, vec![5; 3 * 1_048_576 + 100])?;
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        &text(&base),
        &text(path),
        "8M",
    ])?;
    qemu_io(path, &["write -P 6 1M 1M"])
}

fn reason(scene: &Scene, name: &str) -> Outcome<String> {
    let export = scene.export(name)?;
    Ok(export
        .get("Reason")
        .map_or(String::new(), |w| w.text().to_owned()))
}

/// Holds what the export gives to be what QEMU reads of the image.
fn reads_as_by_qemu(scene: &Scene, ground: &Ground, name: &str, path: &Path) -> Outcome<()> {
    let [ours, theirs] = ["ours", "theirs"].map(|file| ground.file(file));
    process::succeed(
        "nbdcopy",
        &[scene.endpoint().uri(name), text(&ours)],
        STEP_LIMIT,
    )?;
    qemu_img(&[
        "convert",
        "-U",
        "-f",
        "qcow2",
        "-O",
        "raw",
        &text(path),
        &text(&theirs),
    ])?;
    hold!(
        std::fs::read(&ours)? == std::fs::read(&theirs)?,
        "{name}: other bytes than QEMU reads"
    );
    std::fs::remove_file(ours)?;
    Ok(std::fs::remove_file(theirs)?)
}

#[test]
fn each_kind_of_image_is_served_as_qemu_reads_it_or_refused_by_name() -> Outcome<()> {
    real("qcow2 matrix", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        for (n, (row, make, word)) in MATRIX.iter().enumerate() {
            let path = folder.join(format!("m{n}.qcow2"));
            make(&path)?;
            let before = std::fs::read(&path)?;
            let name = format!("m{n}");
            let options = Options::from([(
                "wait_ms",
                Variant::new(if word.is_empty() { 10_000_u32 } else { 500 }),
            )]);
            let added = scene.client.add_export_with(&name, &id(&path), options);
            if !word.is_empty() {
                hold!(added.is_err(), "{row} is served");
                until(STEP_LIMIT, format_args!("{row}: {word}"), || {
                    Ok(reason(&scene, &name)?.contains(word).then_some(()))
                })?;
                hold!(
                    std::fs::read(&path)? == before,
                    "{row}: it was refused, and it was changed"
                );
                scene.client.remove_export(&name, "hard")?;
                if !row.contains("read only") {
                    continue;
                }
                let options = Options::from([("read_only", Variant::new(true))]);
                scene.client.add_export_with(&name, &id(&path), options)?;
            } else if let Err(refused) = added {
                trouble!("{row}: {refused:?}: {}", reason(&scene, &name)?)
            }
            reads_as_by_qemu(&scene, ground, &name, &path)?;
            scene.client.remove_export(&name, "hard")?;
        }
        scene.stop()
    })
}

#[test]
fn what_clients_write_is_what_qemu_reads_and_its_check_finds_nothing() -> Outcome<()> {
    real("qcow2 written", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        let uri = |name: &str| scene.endpoint().uri(name);
        for (n, (row, make, word)) in MATRIX.iter().enumerate() {
            if !word.is_empty() || row.contains("of 16") {
                continue;
            }
            let path = folder.join(format!("w{n}.qcow2"));
            make(&path)?;
            let name = format!("w{n}");
            let model = ground.file("model");
            qemu_img(&[
                "convert",
                "-f",
                "qcow2",
                "-O",
                "raw",
                &text(&path),
                &text(&model),
            ])?;
            scene.client.add_export(&name, &id(&path))?;
            let commands = [
                "write -P 0x31 10k 200k",
                "write -P 0x32 1M 777",
                "write -z 1100k 300k",
                "write -P 0x33 3000k 70k",
                "write -z 2M 100",
                "write -P 0x34 0 512",
                "flush",
                "write -P 0x35 1500k 1M",
            ];
            let mut args = vec!["-f", "raw"];
            commands
                .iter()
                .for_each(|command| args.extend(["-c", *command]));
            for target in [uri(&name), text(&model)] {
                let said = process::succeed(
                    "qemu-io",
                    &[&args[..], &[target.as_str()]].concat(),
                    STEP_LIMIT,
                )?;
                hold!(
                    !said.contains("failed") && !said.contains("rror"),
                    "{row}: {said}"
                );
            }
            // A client that does not flush: what it wrote is in the image when the image is closed.
            scene.client.remove_export(&name, "soft")?;
            until(STEP_LIMIT, "the export to go", || {
                Ok(scene.client.export(&name)?.is_none().then_some(()))
            })?;
            check(&path, false)?;
            let same = process::run(
                "qemu-img",
                &[
                    "compare",
                    "-f",
                    "raw",
                    "-F",
                    "qcow2",
                    &text(&model),
                    &text(&path),
                ],
                STEP_LIMIT,
            )?;
            hold!(
                same.status.success(),
                "{row}: {}{}",
                same.stdout,
                same.stderr
            );
        }
        scene.stop()
    })
}

/// `qemu-nbd` on a file, until it is dropped; it has the file open when this returns.
fn qemu_nbd(ground: &Ground, path: &Path, format: &str, read_only: bool) -> Outcome<Running> {
    let options: &[&str] = if read_only { &["-r"] } else { &[] };
    qemu_nbd_with(ground, path, format, options)
}

fn qemu_nbd_with(ground: &Ground, path: &Path, format: &str, options: &[&str]) -> Outcome<Running> {
    let socket = ground.file("qemu-nbd.sock");
    let _ = std::fs::remove_file(&socket);
    let mut command = process::command("qemu-nbd");
    command
        .args(["-f", format, "-t", "-k"])
        .arg(&socket)
        .arg(path)
        .args(options)
        .stderr(Stdio::null());
    let running = Running(command.spawn()?);
    until(STEP_LIMIT, "qemu-nbd to listen", || {
        Ok(socket.exists().then_some(()))
    })?;
    Ok(running)
}

/// What an export says of `qemu:allocation-depth`: bytes and depth, neighbours that are alike as one.
fn depths(uri: &str) -> Outcome<Vec<(u64, u64)>> {
    let map = ["--map=qemu:allocation-depth", "--json", uri];
    let said = process::succeed("nbdinfo", &map, STEP_LIMIT)?;
    let said: Vec<serde_json::Value> = serde_json::from_str(&said)?;
    let mut found: Vec<(u64, u64)> = Vec::new();
    for stretch in &said {
        let [bytes, depth] = ["length", "type"].map(|key| stretch[key].as_u64().unwrap_or(99));
        match found.last_mut() {
            Some(last) if last.1 == depth => last.0 += bytes,
            _ => found.push((bytes, depth)),
        }
    }
    Ok(found)
}

#[test]
fn the_layer_that_holds_each_cluster_is_told_as_qemu_tells_it() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("qemu-nbd"), Need::Tool("nbdinfo")]].concat();
    real("allocation depth", &needs, |ground| {
        let (mut scene, folder) = scene(ground)?;
        type Make = fn(&Path) -> Outcome<()>;
        let kinds: [(&str, Make); 5] = [
            ("qcow2", |p| create(p, "", 8 * MIB)),
            ("qcow2", |p| {
                full(p, "extended_l2=on,cluster_size=64k")?;
                qemu_io(p, &["discard 1M 1M", "write -z -u 3M 1M"])
            }),
            // Each layer is shorter than the one above it.
            ("qcow2", |p| chain(p, 3)),
            ("qcow2", raw_backing),
            ("raw", |p| {
                std::fs::write(p, vec![7; 1 << 20])?;
                let file = std::fs::File::options().write(true).open(p)?;
                Ok(file.set_len(4 << 20)?)
            }),
        ];
        let mut depths_seen = std::collections::BTreeSet::new();
        for (n, (format, make)) in kinds.iter().enumerate() {
            let path = folder.join(format!("d{n}.{format}"));
            make(&path)?;
            let name = format!("d{n}");
            let scheme = if *format == "raw" { "file" } else { "qcow2" };
            let volume = format!("{scheme}:{}", path.display());
            let only = Options::from([("read_only", Variant::from(true))]);
            scene.client.add_export_with(&name, &volume, only)?;
            let ours = depths(&scene.endpoint().uri(&name))?;
            let theirs = {
                let _qemu = qemu_nbd_with(ground, &path, format, &["-r", "-A"])?;
                let socket = ground.file("qemu-nbd.sock");
                depths(&format!("nbd+unix:///?socket={}", socket.display()))?
            };
            hold!(ours == theirs, "{name}: {ours:?}, and QEMU says {theirs:?}");
            depths_seen.extend(ours.iter().map(|(_, depth)| *depth));
        }
        hold!(
            depths_seen == (0..=4).collect(),
            "only {depths_seen:?} were seen"
        );
        scene.stop()
    })
}

#[test]
fn neither_qemu_nor_another_daemon_and_we_are_two_writers() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("qemu-nbd")]].concat();
    real("qemu's locks", &needs, |ground| {
        let (mut scene, folder) = scene(ground)?;
        for (format, scheme) in [("qcow2", "qcow2"), ("raw", "file")] {
            let path = folder.join(format!("locked.{format}"));
            qemu_img(&["create", "-q", "-f", format, &text(&path), "4M"])?;
            let volume = format!("{scheme}:{}", path.display());
            let name = text(&path);
            let writes = |read_only: &[&str]| {
                let args = [
                    &["-f", format, "-c", "write 0 512"],
                    read_only,
                    &[name.as_str()],
                ]
                .concat();
                process::run("qemu-io", &args, STEP_LIMIT)
            };
            // Ours first.
            scene.client.add_export(format, &volume)?;
            let said = writes(&[])?;
            hold!(
                !said.status.success() && said.stderr.contains("lock"),
                "{format}: QEMU writes beside us: {said:?}"
            );
            let said = process::run(
                "qemu-img",
                &["resize", "-f", format, &text(&path), "8M"],
                STEP_LIMIT,
            )?;
            hold!(
                !said.status.success() && said.stderr.contains("lock"),
                "{format}: QEMU resizes it: {said:?}"
            );
            scene.client.remove_export(format, "hard")?;
            until(STEP_LIMIT, "our lock to go", || {
                Ok(writes(&[])?.status.success().then_some(()))
            })?;

            // A reader of ours keeps QEMU from writing, too.
            let options = Options::from([("read_only", Variant::new(true))]);
            scene.client.add_export_with(format, &volume, options)?;
            let said = writes(&[])?;
            hold!(
                !said.status.success() && said.stderr.contains("lock"),
                "{format}: QEMU writes under our reader: {said:?}"
            );
            let args = ["-f", format, "-r", "-c", "read 0 512", &text(&path)];
            process::succeed("qemu-io", &args, STEP_LIMIT)?;
            scene.client.remove_export(format, "hard")?;
            until(STEP_LIMIT, "our lock to go", || {
                Ok(writes(&[])?.status.success().then_some(()))
            })?;

            // QEMU's first.
            let theirs = qemu_nbd(ground, &path, format, false)?;
            for read_only in [false, true] {
                let options = Options::from([
                    ("read_only", Variant::new(read_only)),
                    ("wait_ms", Variant::new(500_u32)),
                ]);
                let added = scene.client.add_export_with(format, &volume, options);
                hold!(added.is_err(), "{format}: served beside QEMU's writer");
                let told = reason(&scene, format)?;
                hold!(told.contains("writes to it"), "{format}: {told:?}");
                if !read_only {
                    scene.client.remove_export(format, "hard")?;
                }
            }
            drop(theirs);
            scene.client.reach_state(format, "Serving", STEP_LIMIT)?;
            scene.client.remove_export(format, "hard")?;
        }
        // Nor is the file that its data are in: ours first, and QEMU's first.
        let path = folder.join("split.qcow2");
        full(&path, &data_file(&path, ""))?;
        let data = path.with_extension("data");
        let only = || {
            Options::from([
                ("read_only", Variant::new(true)),
                ("wait_ms", Variant::new(500_u32)),
            ])
        };
        scene.client.add_export_with("split", &id(&path), only())?;
        let said = process::run(
            "qemu-io",
            &["-f", "raw", "-c", "write 0 512", &text(&data)],
            STEP_LIMIT,
        )?;
        hold!(
            !said.status.success() && said.stderr.contains("lock"),
            "QEMU writes to an image's data: {said:?}"
        );
        scene.client.remove_export("split", "hard")?;
        let theirs = qemu_nbd(ground, &data, "raw", false)?;
        let added = scene.client.add_export_with("split", &id(&path), only());
        hold!(added.is_err(), "served beside a writer of its data");
        let told = reason(&scene, "split")?;
        hold!(
            told.contains("its external data file") && told.contains("writes to it"),
            "{told:?}"
        );
        drop(theirs);
        scene.client.remove_export("split", "hard")?;
        // What lies beneath an image is not written by anyone else, either.
        let path = folder.join("over.qcow2");
        chain(&path, 1)?;
        scene.client.add_export("over", &id(&path))?;
        let said = process::run(
            "qemu-io",
            &[
                "-f",
                "qcow2",
                "-c",
                "write 0 512",
                &text(&path.with_extension("1.qcow2")),
            ],
            STEP_LIMIT,
        )?;
        hold!(
            !said.status.success() && said.stderr.contains("lock"),
            "QEMU writes beneath us: {said:?}"
        );
        scene.stop()
    })
}

/// Takes the locks of `path` away from the process that has it open, as a server of a network file system does that has forgotten them: by a
/// descriptor of the same open file (pidfd_getfd(2)), which only root may take.
fn lose_locks(pid: u32, path: &Path) -> Outcome<usize> {
    let mut lost = 0;
    // SAFETY: a system call with numbers only; what it returns is checked.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    hold!(process >= 0, "{}", std::io::Error::last_os_error());
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        if !std::fs::read_link(entry.path()).is_ok_and(|target| target == path) {
            continue;
        }
        let number: i32 = entry.file_name().to_string_lossy().parse()?;
        // SAFETY: as above.
        let same = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process, number, 0) };
        hold!(same >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: it was returned just now, and nothing else has it.
        let file = unsafe { std::fs::File::from_raw_fd(i32::try_from(same)?) };
        let all = libc::flock {
            l_type: i16::try_from(libc::F_UNLCK)?,
            l_whence: 0,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&all))?;
        lost += 1;
    }
    // SAFETY: it was returned above, and nothing else has it.
    drop(unsafe { std::fs::File::from_raw_fd(i32::try_from(process)?) });
    Ok(lost)
}

#[test]
fn a_file_whose_locks_were_lost_is_not_served_beside_another_writer() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Loop, Need::Tool("qemu-nbd")]].concat();
    real("lost locks", &needs, |ground| {
        let (mut scene, folder) = scene(ground)?;
        for (format, scheme) in [("qcow2", "qcow2"), ("raw", "file")] {
            let path = folder.join(format!("lost.{format}"));
            qemu_img(&["create", "-q", "-f", format, &text(&path), "4M"])?;
            let volume = format!("{scheme}:{}", path.display());
            scene.client.add_export(format, &volume)?;
            let mut client = Client::open(&scene.endpoint(), format)?;
            hold!(client.write(0, &[1; 4096], true)? == Ok(()), "{format}");
            let pid = scene.daemon()?.pid();
            hold!(lose_locks(pid, &path)? > 0, "{format} has no locks");
            // Nobody is there: nothing is lost yet but the locks.
            scene.client.rescan()?;
            hold!(client.write(0, &[2; 4096], true)? == Ok(()), "{format}");
            let qemu = qemu_nbd(ground, &path, format, false)?;
            scene.client.rescan()?;
            until(STEP_LIMIT, "the export to end", || {
                Ok((scene.state(format)? != "Serving").then_some(()))
            })?;
            let told = reason(&scene, format)?;
            hold!(told.contains("writes to it"), "{format}: {told}");
            let answer = client.write(0, &[3; 4096], true);
            hold!(!matches!(answer, Ok(Ok(()))), "{format}: {answer:?}");
            drop(qemu);
            until(STEP_LIMIT, "it to be served again", || {
                scene.client.rescan()?;
                Ok((scene.state(format)? == "Serving").then_some(()))
            })?;
        }
        scene.stop()
    })
}

#[test]
fn two_exports_of_an_image_show_each_other_what_they_write() -> Outcome<()> {
    real("qcow2 shared", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        let path = folder.join("shared.qcow2");
        create(&path, "", 4 * MIB)?;
        let options = || Options::from([("share", Variant::new(true))]);
        // The first only reads: the second makes the image writable under it.
        let first = Options::from([
            ("share", Variant::new(true)),
            ("read_only", Variant::new(true)),
        ]);
        scene.client.add_export_with("reader", &id(&path), first)?;
        let mut reader = Client::open(&scene.endpoint(), "reader")?;
        scene.client.add_export_with("one", &id(&path), options())?;
        scene.client.add_export_with("two", &id(&path), options())?;
        let mut one = Client::open(&scene.endpoint(), "one")?;
        let mut two = Client::open(&scene.endpoint(), "two")?;
        for n in 0..64_u8 {
            let at = u64::from(n) * 40_000;
            let (writer, other) = if n % 2 == 0 {
                (&mut one, &mut two)
            } else {
                (&mut two, &mut one)
            };
            hold!(
                writer.write(at, &[n + 1; 1000], n % 8 == 0)?.is_ok(),
                "cannot write"
            );
            for client in [other, &mut reader] {
                let mut bytes = [0; 1000];
                hold!(client.read(at, &mut bytes)?.is_ok(), "cannot read");
                hold!(
                    bytes == [n + 1; 1000],
                    "{n}: another export shows something else"
                );
            }
        }
        hold!(
            reader.write(0, &[1; 512], false)? == Err(1),
            "the reader wrote"
        );
        for client in [one, two, reader] {
            client.leave()?;
        }
        scene.stop()?;
        check(&path, false)
    })
}

/// An image that is nothing but its tables: the header with these clusters and entries of L1, one refcount block, and L1 behind it, `bytes` long.
fn bare(path: &Path, cluster_bits: u32, l1_entries: u32, bytes: u64) -> Outcome<std::fs::File> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create_new(path)?;
    file.set_len(bytes)?;
    let cluster = 1_u64 << cluster_bits;
    let size = u64::from(l1_entries) << (2 * cluster_bits - 3);
    let mut header = [0; 104];
    let mut put = |at: usize, field: &[u8]| header[at..at + field.len()].copy_from_slice(field);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &cluster_bits.to_be_bytes());
    put(24, &size.to_be_bytes());
    put(36, &l1_entries.to_be_bytes());
    put(40, &(3 * cluster).to_be_bytes());
    put(48, &cluster.to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    file.write_all_at(&header, 0)?;
    file.write_all_at(&(2 * cluster).to_be_bytes(), cluster)?;
    Ok(file)
}

/// The most memory that the process ever had, in KiB (proc(5), `VmHWM`).
fn peak_kib(pid: u32) -> Outcome<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let word = line.and_then(|rest| rest.split_whitespace().next());
    Ok(word.unwrap_or_default().parse()?)
}

/// A file of a few KiB on the disk can say that it has gigabytes of tables.
#[test]
fn an_image_that_claims_as_much_as_it_can_is_opened_or_refused_in_bounded_memory_and_seconds()
-> Outcome<()> {
    use std::os::unix::fs::FileExt;
    /// Of the whole daemon: L1 of 32 MiB is in memory twice while it is read, and once more as a list of places.
    const PEAK_KIB_MAX: u64 = 192 << 10;
    const WITHIN: std::time::Duration = std::time::Duration::from_secs(20);
    real("qcow2 of claims", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        // L1 as long as it may be, each entry the same table, which is the cluster behind it.
        let longest = folder.join("longest.qcow2");
        let (l1, end) = (32 * MIB, 3 * 512 + 32 * MIB + 512);
        let file = bare(&longest, 9, 4 << 20, end)?;
        let entry = (end - 512).to_be_bytes();
        let entries: Vec<u8> = entry
            .into_iter()
            .cycle()
            .take(usize::try_from(l1)?)
            .collect();
        file.write_all_at(&entries, 3 * 512)?;
        // 60 GiB of tables, each in a place of its own and all of them holes: what lies behind the end of the file would be
        // looked for in all of them.
        let largest = folder.join("largest.qcow2");
        let (cluster, tables) = (2 * MIB, 30_000_u64);
        let clusters = 4 + tables;
        let file = bare(&largest, 21, u32::try_from(tables)?, clusters * cluster)?;
        let entries: Vec<u8> = (4..clusters)
            .flat_map(|at| (at * cluster).to_be_bytes())
            .collect();
        file.write_all_at(&entries, 3 * cluster)?;
        for (name, path, word) in [
            ("longest", &longest, "both lie at byte"),
            ("largest", &largest, "more than are looked through"),
        ] {
            let begun = std::time::Instant::now();
            let options = Options::from([("wait_ms", Variant::new(100_u32))]);
            let added = scene.client.add_export_with(name, &id(path), options);
            hold!(added.is_err(), "{name} is served");
            until(WITHIN, format_args!("{name}: {word}"), || {
                Ok(reason(&scene, name)?.contains(word).then_some(()))
            })?;
            let refused = begun.elapsed();
            scene.client.remove_export(name, "hard")?;
            let begun = std::time::Instant::now();
            let only = Options::from([("read_only", Variant::new(true))]);
            scene.client.add_export_with(name, &id(path), only)?;
            let mut client = Client::open(&scene.endpoint(), name)?;
            let mut bytes = [1; 4096];
            let read = client.read(client.size - 4096, &mut bytes)?;
            let opened = begun.elapsed();
            hold!(read == Ok(()) && bytes == [0; 4096], "{name}: {read:?}");
            hold!(opened < WITHIN, "{name}: read in {opened:?}");
            client.leave()?;
            scene.client.remove_export(name, "hard")?;
            let peak = peak_kib(scene.daemon()?.pid())?;
            tell(&format!(
                "qcow2 of claims, {name}: refused for writing in {refused:?}, read in {opened:?}, {} MiB at most",
                peak >> 10
            ));
            hold!(peak < PEAK_KIB_MAX, "{name}: {peak} KiB");
        }
        scene.stop()
    })
}

/// Bytes that the file system has given to a file.
fn taken(path: &Path) -> Outcome<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

#[test]
fn what_is_given_up_is_unallocated_and_its_room_goes_back_to_the_file_system() -> Outcome<()> {
    real("qcow2 trimmed", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        for (n, options) in ["", "cluster_size=8k", "extended_l2=on,cluster_size=128k"]
            .into_iter()
            .enumerate()
        {
            for (command, what) in [(CMD_TRIM, "trim"), (CMD_WRITE_ZEROES, "zero")] {
                let path = folder.join(format!("{what}{n}.qcow2"));
                create(&path, options, 8 * MIB)?;
                scene.client.add_export(what, &id(&path))?;
                let mut client = Client::open(&scene.endpoint(), what)?;
                for piece in 0..8 {
                    let said = client.write(piece * MIB, &[1; 1 << 20], false)?;
                    hold!(said == Ok(()), "{what}: {said:?}");
                }
                hold!(client.flush()? == Ok(()), "{what}: a flush");
                let before = taken(&path)?;
                hold!(
                    before >= 8 * MIB,
                    "{what}, {options}: {before} bytes are taken"
                );
                let said = client.span(command, 0, MIB, 6 << 20)?;
                // The second one gives back what nothing refers to since the first.
                hold!(
                    said == Ok(()) && client.flush()? == Ok(()),
                    "{what}: {said:?}"
                );
                hold!(client.flush()? == Ok(()), "{what}: a flush");
                let after = taken(&path)?;
                hold!(
                    after <= before - 6 * MIB + 64 * 1024,
                    "{what}, {options}: {before} bytes were taken, and now {after}"
                );
                let map = ["map", "-U", "--output=json", "-f", "qcow2", &text(&path)];
                let map: Vec<serde_json::Value> = serde_json::from_str(&qemu_img(&map)?)?;
                let data = map.iter().filter(|run| run["data"] == true);
                let data: u64 = data.filter_map(|run| run["length"].as_u64()).sum();
                hold!(
                    data == 2 * MIB,
                    "{what}, {options}: {data} bytes of data: {map:?}"
                );
                client.leave()?;
                scene.client.remove_export(what, "soft")?;
                check(&path, false)?;
            }
        }
        scene.stop()
    })
}

#[test]
fn an_image_is_not_served_past_the_page_cache() -> Outcome<()> {
    real("qcow2 direct", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        let path = folder.join("direct.qcow2");
        create(&path, "", MIB)?;
        let before = std::fs::read(&path)?;
        let options = Options::from([
            ("direct", Variant::new(true)),
            ("wait_ms", Variant::new(500_u32)),
        ]);
        let added = scene.client.add_export_with("d", &id(&path), options);
        let mut told = added.map_or_else(|refused| format!("{refused:?}"), |_| String::new());
        hold!(!told.is_empty(), "it is served");
        if scene.client.export("d")?.is_some() {
            told += &reason(&scene, "d")?;
        }
        hold!(told.contains("not there for QCOW2 images"), "{told:?}");
        hold!(std::fs::read(&path)? == before, "it was changed");
        scene.stop()
    })
}

#[test]
fn a_name_that_ends_as_an_images_does_has_to_be_spoken_of() -> Outcome<()> {
    real("qcow2 formats", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        let path = folder.join("a.qcow2");
        full(&path, "")?;
        let name = text(&path);
        let add = |format: Option<&'static str>| {
            let mut options = Options::from([("path", Variant::from(name.as_str()))]);
            if let Some(format) = format {
                options.insert("format", Variant::from(format));
            }
            scene.client.call("AddExport", &("a", options)).map(drop)
        };
        let refused = add(None).map_or_else(|refused| format!("{refused:?}"), |()| String::new());
        hold!(
            refused.contains("qcow2") && refused.contains("raw"),
            "{refused:?}"
        );
        let size = |scene: &Scene| -> Outcome<u64> {
            Ok(scene.export("a")?.get("Size").map_or(0, |w| w.number()))
        };
        add(Some("qcow2"))?;
        hold!(size(&scene)? == 8 * MIB, "{} bytes", size(&scene)?);
        scene.client.remove_export("a", "hard")?;
        add(Some("raw"))?;
        hold!(
            size(&scene)? == std::fs::metadata(&path)?.len(),
            "{} bytes",
            size(&scene)?
        );
        scene.client.remove_export("a", "hard")?;

        // The same by the command line, and in a file.
        let run = |args: &[&str]| -> Outcome<process::Finished> {
            let mut command = Command::new(support::daemon::binary());
            command.args(["--bus", &scene.bus.address]).args(args);
            process::run_command("nbdtrack", command, STEP_LIMIT)
        };
        let said = run(&["add", "b", "--path", &name])?;
        hold!(!said.status.success(), "{said:?}");
        let said = run(&[
            "add",
            "b",
            "--path",
            &name,
            "--format",
            "qcow2",
            "--read-only",
        ])?;
        hold!(said.status.success(), "{said:?}");
        reads_as_by_qemu(&scene, ground, "b", &path)?;
        scene.stop()?;
        let more = format!(
            "\n[[export]]\nname = \"c\"\npath = {name:?}\nformat = \"qcow2\"\nread_only = true\n"
        );
        let config = std::fs::read_to_string(&scene.home.config)? + &more;
        std::fs::write(&scene.home.config, config)?;
        scene.start()?;
        for export in ["b", "c"] {
            scene.client.reach_state(export, "Serving", STEP_LIMIT)?;
            reads_as_by_qemu(&scene, ground, export, &path)?;
        }
        scene.stop()
    })
}
