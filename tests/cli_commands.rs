//! The built program against a made-up daemon on a private bus: what it prints and how it exits.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

mod bus;

use std::process::{Command, Output, Stdio};
use std::time::Duration;

use bus::{PrivateBus, block_on};
use nbdtrack::correlation::*;
use nbdtrack::dbus::{Answer, Bus, Call, Publication, Publisher, serve};
use nbdtrack::identity::{Identity, Scheme};
use tokio::sync::mpsc;

async fn nbdtrack(address: &str, arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbdtrack"));
    command
        .args(["--bus", address])
        .args(arguments)
        .stdin(Stdio::null());
    let output: Output = tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

async fn daemon(bus: &PrivateBus) -> Publisher {
    let (commands, mut queue) = mpsc::channel(64);
    let publisher = serve(&Bus::parse(&bus.address).unwrap(), commands)
        .await
        .unwrap();
    tokio::spawn(async move {
        while let Some(command) = queue.recv().await {
            let answer = match command.call {
                Call::Request(Request::AddExport { definition, wait }) => {
                    if definition.name.as_str() == "slow" {
                        Err(RequestError::NotReady(format!(
                            "no disk within {} ms",
                            wait.as_millis()
                        )))
                    } else {
                        assert!(definition.read_only && definition.share);
                        Ok(Answer::Added {
                            name: definition.name,
                            created: true,
                        })
                    }
                }
                Call::Request(Request::RemoveExport {
                    mode: RemoveMode::Soft,
                    ..
                }) => Err(RequestError::NotFound("x: no such export".to_owned())),
                Call::Request(Request::PrepareDetach { hard, within, .. }) => {
                    assert!(hard && within == Duration::from_millis(2500));
                    Err(RequestError::TimedOut(
                        "3 requests are held by /dev/loop7".to_owned(),
                    ))
                }
                Call::Stats => Ok(Answer::Stats([("disks".to_owned(), 1)].into())),
                _ => Ok(Answer::Done),
            };
            let _ = command.reply.send(answer);
        }
    });
    publisher.offer(vec![
        Publication::Disk(DiskView {
            id: "loop:/b".to_owned(),
            twin: false,
            identities: vec![Identity {
                scheme: Scheme::Loop,
                value: "/b".to_owned(),
            }],
            serial: String::new(),
            wwid: String::new(),
            node: DeviceNode("/dev/loop7".to_owned()),
            number: DeviceNumber { major: 7, minor: 7 },
            diskseq: DiskSeq(42),
            size: 4096,
            read_only: false,
            model: String::new(),
            in_use: String::new(),
            exports: vec![ExportName::parse("vm").unwrap()],
        }),
        Publication::Export {
            view: ExportView {
                name: ExportName::parse("vm").unwrap(),
                state: State::Failed,
                reason: "the flush failed".to_owned(),
                volume_id: "loop:/b".to_owned(),
                disk: Some(DiskSeq(42)),
                node: Some(DeviceNode("/dev/loop7".to_owned())),
                generation: Generation(3),
                size: 4096,
                read_only: false,
                hidden: false,
                source: Source::Config,
                mapping: None,
            },
            clients: 2,
        },
    ]);
    assert!(publisher.flush(Duration::from_secs(5)).await);
    publisher
}

#[test]
fn without_a_daemon_every_command_says_so_in_one_line() {
    let bus = PrivateBus::open();
    block_on(async {
        for address in [bus.address.as_str(), "unix:path=/nonexistent/bus"] {
            for arguments in [
                &["status"][..],
                &["volumes"],
                &["exports", "--json"],
                &["add", "a", "--volume", "loop:/b"],
                &["remove", "a"],
                &["prepare-detach", "loop:/b"],
                &["cancel-detach", "loop:/b"],
                &["resolve", "a", "--diskseq", "1"],
                &["rescan"],
                &["reload"],
                &["sessions"],
                &["end-session", "1"],
                &["watch"],
                &["explain", "a"],
                &["metrics"],
                &["history"],
            ] {
                let (code, out, err) = nbdtrack(address, arguments).await;
                assert_eq!(code, 3, "{arguments:?}: {err}");
                assert!(out.is_empty());
                assert_eq!(err.lines().count(), 1, "{err}");
                assert!(
                    err.contains("no daemon on unix:path=") && err.contains("start it with"),
                    "{err}"
                );
            }
        }
    });
}

#[test]
fn wrong_use_is_exit_code_2() {
    block_on(async {
        for arguments in [
            &["add", "a"][..],
            &["fly"],
            &["resolve", "a", "--diskseq", "x"],
            &["remove", "a", "--timeout", "601"],
            &["explain"],
            &["explain", "a", "--disk", "/dev/vdb"],
            &["history", "--csv", "--json"],
            &["history", "--lines", "0"],
            &["--bus", "nonsense", "status"],
        ] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_nbdtrack"));
            let output = command.args(arguments).output().unwrap();
            assert_eq!(output.status.code(), Some(2), "{arguments:?}");
            assert!(!output.stderr.is_empty());
        }
        let (code, _, err) = nbdtrack("none", &["status"]).await;
        assert_eq!(code, 2, "{err}");
    });
}

#[test]
fn lists_are_plain_in_a_pipe_and_json_when_asked() {
    let bus = PrivateBus::open();
    block_on(async {
        let _publisher = daemon(&bus).await;
        let (code, out, _) = nbdtrack(&bus.address, &["exports"]).await;
        assert_eq!(code, 0);
        assert_eq!(
            out,
            "vm\tFailed\tloop:/b\t/dev/loop7\t3\t4096\t2\tthe flush failed\n"
        );
        let (_, out, _) = nbdtrack(&bus.address, &["volumes"]).await;
        assert_eq!(out, "loop:/b\t/dev/loop7\t42\t4096\t-\tvm\n");
        let (_, out, _) = nbdtrack(&bus.address, &["exports", "--json"]).await;
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(json[0]["disk_seq"], 42);
        assert_eq!(json[0]["volume"], "/org/nbdtrack1/volumes/loop__2fb");
        let (_, out, _) = nbdtrack(&bus.address, &["volumes", "--json"]).await;
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(json[0]["identities"][0][0], "loop");
        let (_, out, _) = nbdtrack(&bus.address, &["status", "--json"]).await;
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(json["states"]["Failed"], 1);
        assert_eq!(json["stats"]["disks"], 1);
        let (_, out, _) = nbdtrack(&bus.address, &["status"]).await;
        assert!(out.contains("vm is Failed: the flush failed"), "{out}");
    });
}

#[test]
fn calls_carry_their_options_and_exit_codes_tell_how_they_ended() {
    let bus = PrivateBus::open();
    block_on(async {
        let _publisher = daemon(&bus).await;
        let add = ["add", "a", "--volume", "loop:/b", "--read-only", "--share"];
        let (code, out, _) = nbdtrack(&bus.address, &add).await;
        assert_eq!((code, out.as_str()), (0, "a: serving\n"));
        let slow = [
            "add", "slow", "--volume", "loop:/b", "--wait", "0.25", "--json",
        ];
        let (code, _, err) = nbdtrack(&bus.address, &slow).await;
        let json: serde_json::Value = serde_json::from_str(&err).unwrap();
        assert_eq!((code, json["error"].as_str()), (4, Some("NotReady")));
        assert!(err.contains("no disk within 250 ms"), "{err}");
        let (code, _, err) = nbdtrack(&bus.address, &["remove", "x"]).await;
        assert_eq!(code, 1);
        assert!(err.starts_with("nbdtrack: x: no such export; "), "{err}");
        let detach = ["prepare-detach", "loop:/b", "--hard", "--timeout", "2.5"];
        let (code, out, err) = nbdtrack(&bus.address, &detach).await;
        assert_eq!((code, out.as_str()), (4, ""));
        assert!(
            err.contains("held by /dev/loop7") && !err.contains('\r'),
            "{err}"
        );
        let (code, out, _) = nbdtrack(&bus.address, &["cancel-detach", "loop:/b"]).await;
        assert_eq!((code, out.as_str()), (0, "loop:/b: served again\n"));
        let (code, _, err) = nbdtrack(&bus.address, &["add", "a", "--volume", "martian:1"]).await;
        assert_eq!(code, 1, "{err}");
        let (code, _, _) = nbdtrack(&bus.address, &["resolve", "vm", "--diskseq", "42"]).await;
        assert_eq!(code, 0);
        let (code, out, _) = nbdtrack(&bus.address, &["rescan"]).await;
        assert_eq!((code, out.as_str()), (0, "rescanned\n"));
    });
}

#[test]
fn watch_prints_a_line_for_each_signal_and_ends_with_the_daemon() {
    let bus = PrivateBus::open();
    block_on(async {
        let publisher = daemon(&bus).await;
        let address = bus.address.clone();
        let watching = tokio::spawn(async move { nbdtrack(&address, &["watch", "--json"]).await });
        // Told again and again, for a busy machine may take its time to start the program.
        for _ in 0..30 {
            publisher.offer(vec![Publication::Signal(Notice::ExportState {
                export: ExportName::parse("vm").unwrap(),
                old: State::Failed,
                new: State::Serving,
                reason: String::new(),
            })]);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(publisher.flush(Duration::from_secs(5)).await);
        drop(publisher);
        let (code, out, err) = watching.await.unwrap();
        assert_eq!(code, 3, "{err}");
        let json: serde_json::Value = serde_json::from_str(out.lines().next().unwrap()).unwrap();
        assert_eq!(json["signal"], "ExportStateChanged");
        assert_eq!(
            (json["old"].as_str(), json["new"].as_str()),
            (Some("Failed"), Some("Serving"))
        );
    });
}

#[test]
fn completion_tells_live_exports_and_volumes_and_is_silent_without_a_daemon() {
    let bus = PrivateBus::open();
    block_on(async {
        let complete = |address: String, words: &'static [&'static str]| async move {
            let done = tokio::task::spawn_blocking(move || {
                let mut command = Command::new(env!("CARGO_BIN_EXE_nbdtrack"));
                command.env("COMPLETE", "bash").env("_CLAP_IFS", "\n");
                command.env("_CLAP_COMPLETE_INDEX", (words.len() + 2).to_string());
                command
                    .args(["--", "nbdtrack", "--bus", &address])
                    .args(words);
                command.output().unwrap()
            });
            let done = done.await.unwrap();
            (
                String::from_utf8(done.stdout).unwrap(),
                String::from_utf8(done.stderr).unwrap(),
            )
        };
        let publisher = daemon(&bus).await;
        let (out, _) = complete(bus.address.clone(), &["remove", ""]).await;
        assert!(out.lines().any(|line| line == "vm"), "{out}");
        let (out, _) = complete(bus.address.clone(), &["prepare-detach", ""]).await;
        assert!(out.lines().any(|line| line == "loop:/b"), "{out}");
        drop(publisher);
        let (out, err) = complete("unix:path=/nonexistent/bus".to_owned(), &["remove", ""]).await;
        assert!(err.is_empty() && !out.contains("vm"), "{out}{err}");
    });
}

#[test]
fn a_pipe_that_closes_early_is_no_failure() {
    let bus = PrivateBus::open();
    block_on(async {
        let publisher = daemon(&bus).await;
        let line = format!(
            "{} --bus {} exports --json | head -c 1; exit ${{PIPESTATUS[0]}}",
            env!("CARGO_BIN_EXE_nbdtrack"),
            bus.address
        );
        let output = tokio::task::spawn_blocking(move || {
            Command::new("bash").args(["-c", &line]).output().unwrap()
        });
        let output = output.await.unwrap();
        assert_eq!(
            output.status.code(),
            Some(0),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        drop(publisher);
    });
}
