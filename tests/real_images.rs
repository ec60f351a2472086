//! Promise: an image that `nbdtrack image` makes is one to QEMU, is there whole or not at all, and is never put over another file; and
//! `nbdtrack image check` finds what `qemu-img check` finds.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use support::daemon::binary;
use support::ground::{Need, real};
use support::images::{qemu_img, qemu_io, text};
use support::process::{self, Finished, Running, command};
use support::scene::STEP_LIMIT;
use support::{Doing, Outcome, hold, trouble, until};

const NEEDS: &[Need] = &[Need::Tool("qemu-img"), Need::Tool("qemu-io")];

/// `nbdtrack image` with these words.
fn image(words: &[&str]) -> Outcome<Finished> {
    let program = text(&binary());
    let args: Vec<&str> = ["image"].iter().chain(words).copied().collect();
    process::run(&program, &args, STEP_LIMIT)
}

fn done(words: &[&str]) -> Outcome<String> {
    let done = image(words)?;
    hold!(
        done.status.success(),
        "{words:?}: {}{}",
        done.stdout,
        done.stderr
    );
    Ok(done.stdout)
}

fn refused(words: &[&str], code: i32, with: &str) -> Outcome<()> {
    let done = image(words)?;
    hold!(
        done.status.code() == Some(code) && done.stderr.contains(with),
        "{words:?}: {:?} {}",
        done.status.code(),
        done.stderr
    );
    Ok(())
}

fn json(words: &[&str]) -> Outcome<(Option<i32>, Value)> {
    let all: Vec<&str> = words.iter().copied().chain(["--json"]).collect();
    let said = image(&all)?;
    let value = serde_json::from_str(&said.stdout).doing(format!("{words:?}: {}", said.stderr))?;
    Ok((said.status.code(), value))
}

/// What QEMU's check says: its exit code, errors and leaks.
fn judged(path: &Path) -> Outcome<(Option<i32>, u64, u64)> {
    let args = ["check", "--output=json", "-f", "qcow2", &text(path)];
    let said = process::run("qemu-img", &args, STEP_LIMIT)?;
    let value: Value = serde_json::from_str(&said.stdout).doing(said.stderr)?;
    let count = |name: &str| value[name].as_u64().unwrap_or(0);
    Ok((said.status.code(), count("corruptions"), count("leaks")))
}

#[test]
fn what_is_made_is_an_image_to_qemu() -> Outcome<()> {
    real("what_is_made_is_an_image_to_qemu", NEEDS, |ground| {
        let rows: &[(&str, &[&str])] = &[
            ("3M", &[]),
            ("1G", &["--cluster-size", "512"]),
            ("20G", &["--cluster-size", "2M"]),
            ("1536", &[]),
            ("64T", &[]),
            ("8M", &["--preallocation", "metadata"]),
            (
                "40M",
                &["--preallocation", "metadata", "--cluster-size", "512"],
            ),
            ("8M", &["--preallocation", "falloc"]),
            ("8M", &["--preallocation", "full", "--cluster-size", "4K"]),
        ];
        for (number, (size, options)) in rows.iter().enumerate() {
            let path = ground.file(&format!("{number}.qcow2"));
            let name = text(&path);
            let words: Vec<&str> = ["create", &name, size]
                .iter()
                .chain(*options)
                .copied()
                .collect();
            done(&words)?;
            hold!(
                judged(&path)? == (Some(0), 0, 0),
                "{words:?}: {:?}",
                judged(&path)?
            );
            let (code, found) = json(&["check", &name])?;
            hold!(code == Some(0), "{words:?}: {found}");
            let info: Value = serde_json::from_str(&qemu_img(&["info", "--output=json", &name])?)?;
            let (_, ours) = json(&["info", &name])?;
            hold!(
                info["format"] == "qcow2"
                    && info["virtual-size"] == ours["virtual_size"]
                    && info["cluster-size"] == ours["cluster_size"]
                    && ours["served"] == true,
                "{words:?}: {info} {ours}"
            );
            // QEMU writes to it, and finds nothing to mend.
            qemu_io(
                &text(&path),
                "qcow2",
                &["write -P 7 0 1k", "read -P 7 0 1k", "read -P 0 1k 512"],
            )?;
            hold!(judged(&path)? == (Some(0), 0, 0), "{words:?} written");
            if options.contains(&"full") || options.contains(&"falloc") {
                hold!(
                    ours["taken_bytes"].as_u64() >= Some(8 << 20),
                    "{words:?}: {ours}"
                );
            }
            if options.contains(&"metadata") && *size == "8M" {
                hold!(
                    ours["taken_bytes"].as_u64() < Some(1 << 20),
                    "{words:?}: {ours}"
                );
            }
        }
        let raw = text(&ground.file("disk.raw"));
        done(&[
            "create",
            &raw,
            "5M",
            "--format",
            "raw",
            "--preallocation",
            "falloc",
        ])?;
        let other = text(&ground.file("other.qcow2"));
        done(&["create", &other, "5M"])?;
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2", &raw, &other])?;
        Ok(())
    })
}

#[test]
fn an_overlay_reads_as_what_it_lies_on_and_says_so() -> Outcome<()> {
    real(
        "an_overlay_reads_as_what_it_lies_on_and_says_so",
        NEEDS,
        |ground| {
            let [base, raw, over, top] =
                ["base.qcow2", "base.raw", "over.qcow2", "top.qcow2"].map(|name| ground.file(name));
            let [base_name, raw_name, over_name, top_name] =
                [&base, &raw, &over, &top].map(|p| text(p));
            done(&["create", &base_name, "6M"])?;
            qemu_io(&text(&base), "qcow2", &["write -P 3 1M 2M"])?;
            let on = |name: &'static str| ["--backing", name, "--backing-format", "qcow2"];
            done(&[&["create", &over_name][..], &on("base.qcow2")].concat())?;
            qemu_img(&[
                "compare", "-s", "-f", "qcow2", "-F", "qcow2", &base_name, &over_name,
            ])?;
            // Larger than what is beneath, and on an absolute path.
            done(&[
                "create",
                &top_name,
                "9M",
                "--backing",
                &over_name,
                "--backing-format",
                "qcow2",
            ])?;
            qemu_io(
                &text(&top),
                "qcow2",
                &["read -P 3 1M 2M", "read -P 0 6M 3M", "write -P 4 8M 1M"],
            )?;
            hold!(judged(&top)? == (Some(0), 0, 0), "{:?}", judged(&top)?);
            std::fs::write(&raw, [5; 1000])?;
            let on_raw = text(&ground.file("on-raw.qcow2"));
            done(&[
                "create",
                &on_raw,
                "--backing",
                &raw_name,
                "--backing-format",
                "raw",
            ])?;
            qemu_io(&on_raw, "qcow2", &["read -P 5 0 1000", "read -P 0 1000 24"])?;

            let (code, chain) = json(&["chain", &top_name])?;
            let layers = chain["chain"].as_array().cloned().unwrap_or_default();
            let paths: Vec<&str> = layers
                .iter()
                .filter_map(|layer| layer["path"].as_str())
                .collect();
            hold!(code == Some(0) && chain["broken"].is_null(), "{chain}");
            hold!(paths == [&top_name, &over_name, &base_name], "{paths:?}");
            std::fs::remove_file(&base)?;
            let (code, chain) = json(&["chain", &top_name])?;
            let broken = chain["broken"].as_str().unwrap_or_default();
            hold!(code == Some(1) && broken.contains("base.qcow2"), "{chain}");
            refused(
                &[
                    "create",
                    &text(&ground.file("x.qcow2")),
                    "1M",
                    "--backing",
                    "base.qcow2",
                    "--backing-format",
                    "qcow2",
                ],
                1,
                "base.qcow2: there is no such file",
            )?;
            hold!(!ground.file("x.qcow2").exists(), "made on nothing");
            Ok(())
        },
    )
}

#[test]
fn what_cannot_be_made_is_refused_by_name_and_nothing_is_written_over() -> Outcome<()> {
    let name = "what_cannot_be_made_is_refused_by_name_and_nothing_is_written_over";
    real(name, NEEDS, |ground| {
        let there = ground.file("there.qcow2");
        std::fs::write(&there, b"someone's")?;
        let link = ground.file("link.qcow2");
        std::os::unix::fs::symlink(ground.file("nowhere"), &link)?;
        refused(&["create", &text(&there), "1M"], 1, "exists already")?;
        refused(&["create", &text(&link), "1M"], 1, "exists already")?;
        hold!(std::fs::read(&there)? == b"someone's", "written over");
        let new = text(&ground.file("new.qcow2"));
        let base = text(&ground.file("base.qcow2"));
        done(&["create", &base, "1M"])?;
        let rows: &[(&[&str], i32, &str)] = &[
            (&["create", &new], 2, "SIZE"),
            (&["create", &new, "0"], 1, "size: "),
            (&["create", &new, "1000"], 1, "size: "),
            (&["create", &new, "1x"], 2, "SIZE"),
            (
                &["create", &new, "1M", "--cluster-size", "3000"],
                1,
                "cluster_size: ",
            ),
            (
                &["create", &new, "1M", "--cluster-size", "4M"],
                1,
                "cluster_size: ",
            ),
            (&["create", &new, "1M", "--format", "vmdk"], 2, "vmdk"),
            (
                &["create", &new, "1M", "--preallocation", "most"],
                2,
                "most",
            ),
            (&["create", &text(&ground.file("new")), "1M"], 2, "--format"),
            (
                &["create", &text(&ground.file("no/new.qcow2")), "1M"],
                1,
                "No such file",
            ),
            (
                &[
                    "create",
                    &new,
                    "1M",
                    "--format",
                    "raw",
                    "--cluster-size",
                    "4K",
                ],
                1,
                "cluster_size: raw files have none",
            ),
            (
                &[
                    "create",
                    &new,
                    "1M",
                    "--format",
                    "raw",
                    "--preallocation",
                    "metadata",
                ],
                1,
                "preallocation metadata: raw files have none",
            ),
            (
                &[
                    "create",
                    &new,
                    "--backing",
                    &base,
                    "--backing-format",
                    "qcow2",
                    "--preallocation",
                    "full",
                ],
                1,
                "preallocation: not with a backing file",
            ),
            (&["create", &new, "--backing", &base], 2, "--backing-format"),
            (
                &[
                    "create",
                    &new,
                    "--backing",
                    "nbd://h/x",
                    "--backing-format",
                    "raw",
                ],
                1,
                "not named by a path",
            ),
        ];
        for (words, code, with) in rows {
            refused(words, *code, with)?;
        }
        let mut names: Vec<String> = std::fs::read_dir(ground.path())?
            .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
            .collect();
        names.sort();
        hold!(
            names == ["base.qcow2", "link.qcow2", "there.qcow2"],
            "left behind: {names:?}"
        );
        Ok(())
    })
}

#[test]
fn a_making_that_is_killed_leaves_nothing() -> Outcome<()> {
    real("a_making_that_is_killed_leaves_nothing", NEEDS, |ground| {
        let path = ground.file("large.raw");
        let mut program = command(binary());
        program.args([
            "image",
            "create",
            "--format",
            "raw",
            "--preallocation",
            "full",
        ]);
        program.arg(&path).arg("64G");
        let mut making = Running(program.spawn()?);
        let io = format!("/proc/{}/io", making.pid());
        until(STEP_LIMIT, "the making to write", || {
            let said = std::fs::read_to_string(&io)?;
            let written = said.lines().find_map(|line| line.strip_prefix("wchar: "));
            let written: u64 = written.unwrap_or("0").parse()?;
            hold!(!path.exists(), "it has its name while it is being written");
            Ok((written > 8 << 20).then_some(()))
        })?;
        making.signal(Signal::SIGKILL)?;
        making.wait(STEP_LIMIT)?;
        let left = std::fs::read_dir(ground.path())?.count();
        hold!(left == 0, "{left} files are left");
        Ok(())
    })
}

/// What is done to an image: bytes at places that the header leads to.
type Damage = fn(&std::fs::File, &Places) -> Outcome<()>;

struct Places {
    block: u64,
    l1: u64,
    l2: u64,
}

fn number(file: &std::fs::File, at: u64) -> Outcome<u64> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at)?;
    Ok(u64::from_be_bytes(bytes))
}

fn places(file: &std::fs::File) -> Outcome<Places> {
    let l1 = number(file, 40)?;
    Ok(Places {
        block: number(file, number(file, 48)?)?,
        l1,
        l2: number(file, l1)? & 0x00ff_ffff_ffff_fe00,
    })
}

const DAMAGES: &[(&str, Damage)] = &[
    ("none", |_, _| Ok(())),
    ("three are counted too high", |file, at| {
        for cluster in [6, 7, 9] {
            file.write_all_at(&[0, 2], at.block + cluster * 2)?;
        }
        Ok(())
    }),
    ("two are not counted", |file, at| {
        Ok(file.write_all_at(&[0; 4], at.block + 7 * 2)?)
    }),
    ("the L1 entry has lost its flag", |file, at| {
        Ok(file.write_all_at(&[0], at.l1)?)
    }),
    ("entries have lost their flags", |file, at| {
        for entry in [0, 1, 5] {
            file.write_all_at(&[0], at.l2 + entry * 8)?;
        }
        Ok(())
    }),
    ("two entries lead to one cluster", |file, at| {
        let one = number(file, at.l2)?;
        Ok(file.write_all_at(&one.to_be_bytes(), at.l2 + 8)?)
    }),
    ("an entry leads far behind the end", |file, at| {
        Ok(file.write_all_at(&(1_u64 << 63 | 1 << 40).to_be_bytes(), at.l2)?)
    }),
    ("an entry leads between clusters", |file, at| {
        let one = number(file, at.l2)? + 512;
        Ok(file.write_all_at(&one.to_be_bytes(), at.l2)?)
    }),
    ("the L1 entry is gone", |file, at| {
        Ok(file.write_all_at(&[0; 8], at.l1)?)
    }),
];

#[test]
fn check_finds_what_qemu_finds() -> Outcome<()> {
    real("check_finds_what_qemu_finds", NEEDS, |ground| {
        let sound = ground.file("sound.qcow2");
        done(&["create", &text(&sound), "64M"])?;
        qemu_io(
            &text(&sound),
            "qcow2",
            &[
                "write -P 1 0 700k",
                "write -P 2 20M 300k",
                "write -z 1M 64k",
            ],
        )?;
        for (what, damage) in DAMAGES {
            let path = ground.file("damaged.qcow2");
            std::fs::copy(&sound, &path)?;
            let file = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)?;
            damage(&file, &places(&file)?)?;
            let (theirs, ours) = (judged(&path)?, json(&["check", &text(&path)])?);
            let (code, found) = ours;
            let counts = (found["errors"].as_u64(), found["leaks"].as_u64());
            hold!(
                counts == (Some(theirs.1), Some(theirs.2)),
                "{what}: QEMU {theirs:?}, here {found}"
            );
            let wanted = match theirs {
                (_, 0, 0) => 0,
                (_, 0, _) => 7,
                _ => 6,
            };
            hold!(code == Some(wanted), "{what}: exit code {code:?}");
            hold!(
                (*what == "none") == (wanted == 0),
                "{what}: nothing is wrong with it"
            );
        }
        Ok(())
    })
}

/// An image with two bitmaps: where their directory lies, the table of the first, and its first piece.
fn with_bitmaps(path: &Path) -> Outcome<[u64; 3]> {
    let name = text(path);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=512",
        &name,
        "64M",
    ])?;
    for bitmap in ["one", "another"] {
        qemu_img(&["bitmap", "--add", "-g", "512", &name, bitmap])?;
    }
    qemu_io(
        &text(path),
        "qcow2",
        &["write -P 1 0 300k", "write -P 2 9M 10k"],
    )?;
    let file = std::fs::File::open(path)?;
    let mut bytes = [0; 512];
    file.read_exact_at(&mut bytes, 0)?;
    let magic = 0x2385_2875_u32.to_be_bytes();
    let Some(at) = bytes.windows(4).position(|four| four == magic) else {
        trouble!("no bitmaps in {name}")
    };
    let directory = number(&file, at as u64 + 8 + 16)?;
    let table = number(&file, directory)?;
    let first = number(&file, table)?;
    hold!(first > 511, "its first piece is {first:#x}");
    Ok([directory, table, first])
}

#[test]
fn bitmaps_are_checked_as_qemu_checks_them() -> Outcome<()> {
    real("bitmaps_are_checked_as_qemu_checks_them", NEEDS, |ground| {
        let sound = ground.file("sound.qcow2");
        let [directory, table, first] = with_bitmaps(&sound)?;
        // Their room, a piece twice in one table, a piece behind the end, a reserved bit, a row that cannot be, none of them at all.
        let rows: &[(&str, &[(u64, u64)])] = &[
            ("none", &[]),
            ("a piece twice", &[(table + 8, first)]),
            ("a piece gone", &[(table, 0)]),
            ("far behind the end", &[(table, 1 << 40)]),
            ("between clusters", &[(table, first + 1)]),
            ("a reserved bit", &[(table, first | 4)]),
            ("all ones, and a place", &[(table, first | 1)]),
            ("not in step with the data", &[(88, 0)]),
            ("a table between clusters", &[(directory, table + 8)]),
        ];
        for (what, pokes) in rows {
            let path = ground.file("damaged.qcow2");
            std::fs::copy(&sound, &path)?;
            let file = std::fs::OpenOptions::new().write(true).open(&path)?;
            for (at, number) in *pokes {
                file.write_all_at(&number.to_be_bytes(), *at)?;
            }
            let theirs = judged(&path);
            let (code, found) = json(&["check", &text(&path)])?;
            let counts = (found["errors"].as_u64(), found["leaks"].as_u64());
            let right = match theirs {
                Ok((_, errors, leaks)) => counts == (Some(errors), Some(leaks)),
                // It does not even open it.
                Err(_) => counts.0 > Some(0),
            };
            hold!(right, "{what}: here {found}");
            hold!(
                (*what == "none") == (code == Some(0)),
                "{what}: exit code {code:?}"
            );
        }
        Ok(())
    })
}

#[test]
fn images_of_every_kind_are_checked_as_sound() -> Outcome<()> {
    real(
        "images_of_every_kind_are_checked_as_sound",
        NEEDS,
        |ground| {
            for options in [
                "cluster_size=512",
                "compat=0.10",
                "extended_l2=on",
                "refcount_bits=1",
                "refcount_bits=64",
                "preallocation=metadata",
                "compression_type=zstd",
            ] {
                let path = ground.file("made.qcow2");
                let name = text(&path);
                qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, &name, "16M"])?;
                qemu_io(
                    &text(&path),
                    "qcow2",
                    &["write -P 1 0 300k", "write -z 1M 64k"],
                )?;
                let never = [
                    "cluster_size=512",
                    "refcount_bits=1",
                    "preallocation=metadata",
                ];
                if !never.contains(&options) {
                    // QEMU packs whole clusters that had no place, several into one of the file.
                    qemu_io(&text(&path), "qcow2", &["write -c -P 5 2M 64k"])?;
                }
                if !options.starts_with("refcount_bits=1") {
                    qemu_img(&["snapshot", "-c", "first", &name])?;
                    qemu_io(
                        &text(&path),
                        "qcow2",
                        &["write -P 2 100k 300k", "discard 2M 64k"],
                    )?;
                    qemu_img(&["snapshot", "-c", "second snapshot", &name])?;
                    qemu_io(&text(&path), "qcow2", &["write -P 3 8M 1M"])?;
                }
                let theirs = judged(&path)?;
                let (code, found) = json(&["check", &name])?;
                hold!(theirs == (Some(0), 0, 0), "{options}: {theirs:?}");
                hold!(code == Some(0), "{options}: {found}");
                std::fs::remove_file(&path)?;
            }
            // One that is being written to is not judged.
            let path: PathBuf = ground.file("busy.qcow2");
            done(&["create", &text(&path), "1M"])?;
            let mut program = command("qemu-nbd");
            program
                .args(["-f", "qcow2", "-t", "-k"])
                .arg(ground.file("s"))
                .arg(&path);
            let mut writer = Running(program.spawn()?);
            until(STEP_LIMIT, "qemu-nbd to have it", || {
                Ok(ground.file("s").exists().then_some(()))
            })?;
            refused(&["check", &text(&path)], 1, "in use")?;
            writer.signal(Signal::SIGTERM)?;
            writer.wait(STEP_LIMIT)?;
            Ok(())
        },
    )
}

/// The check gets a small part of the time until it has lasted longer than what shows no progress: so it does on the fastest machine, too.
#[test]
fn check_shows_how_far_it_is_on_a_terminal() -> Outcome<()> {
    let needs = [Need::Tool("python3")];
    real("progress on a terminal", &needs, |ground| {
        let path = ground.file("many.qcow2");
        let many = ["--cluster-size", "512", "--preallocation", "metadata"];
        done(&[&["create", &text(&path), "256M"], &many[..]].concat())?;
        let pid = ground.file("pid");
        let line = format!("echo $$ >{}; exec \"$@\"", text(&pid));
        // What it shows goes through a terminal of Python's, for script(1) stops itself with what it runs.
        let through =
            "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))";
        let mut terminal = command("python3");
        terminal.args(["-c", through, "sh", "-c", &line, "sh"]);
        terminal.args([&text(&binary()), "image", "check", &text(&path)]);
        terminal.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut terminal = Running(terminal.spawn().doing("start python3")?);
        let pid = until(STEP_LIMIT, "the check to begin", || {
            let text = std::fs::read_to_string(&pid).unwrap_or_default();
            Ok(text.trim().parse().ok())
        })?;
        let pid = nix::unistd::Pid::from_raw(pid);
        let began = std::time::Instant::now();
        while began.elapsed() < Duration::from_millis(1_300) {
            for (signal, time) in [(Signal::SIGSTOP, 20_000), (Signal::SIGCONT, 500)] {
                nix::sys::signal::kill(pid, signal).doing("the check was over too soon")?;
                std::thread::sleep(Duration::from_micros(time));
            }
        }
        let mut shown = String::new();
        let mut output = terminal.0.stdout.take().expect("it is a pipe");
        output.read_to_string(&mut shown)?;
        hold!(
            terminal.wait(STEP_LIMIT)?.success(),
            "it is sound: {shown:?}"
        );
        let mut parts = shown.split('\r');
        let share = |part: &str| part.strip_suffix(" %")?.trim().parse::<f64>().ok();
        hold!(
            parts.any(|part| share(part).is_some_and(|share| (0.0..=100.0).contains(&share))),
            "{shown:?}"
        );
        hold!(
            shown.contains("\r       \r0 errors, 0 leaked clusters"),
            "the line is taken away before what was found: {shown:?}"
        );
        Ok(())
    })
}
