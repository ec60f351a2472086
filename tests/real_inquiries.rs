//! What an operator asks of a daemon that serves real disks: why, and what was.

use std::time::Duration;

use serde_json::Value;
use support::client::{Client, Go, knock};
use support::ground::{Need, real};
use support::loops::{LoopDevice, sparse_file};
use support::mounts::Mounted;
use support::scene::{STEP_LIMIT, Scene, nbdtrack};
use support::{Outcome, hold, until};

const NEEDS: &[Need] = &[Need::Loop, Need::Bus];
const MOUNTS: &[Need] = &[Need::Loop, Need::Bus, Need::Tool("mount")];
const BYTES: u64 = 4 << 20;
const LIMIT: Duration = Duration::from_secs(30);

fn said(scene: &Scene, args: &[&str]) -> Outcome<String> {
    let done = nbdtrack(scene, args)?;
    hold!(done.status.success(), "{args:?}: {}", done.stderr);
    Ok(done.stdout)
}

fn records(scene: &Scene, args: &[&str]) -> Outcome<Vec<Value>> {
    let mut all = vec!["history", "--json"];
    all.extend(args);
    let lines = said(scene, &all)?;
    Ok(lines
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?)
}

fn is(record: &Value, kind: &str, key: &str, value: &str) -> bool {
    record["kind"] == kind && record[key] == value
}

#[test]
fn explain_says_what_was_compared_what_led_there_and_what_to_do() -> Outcome<()> {
    real("explain", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let node = scene.devices[0].node().to_owned();
        let id = scene.volumes[0].id();
        let text = said(&scene, &["explain", "vol-a"])?;
        hold!(text.starts_with("export vol-a is Serving: "), "{text}");
        hold!(text.contains(&format!("matches    {id}")), "{text}");
        let text = said(&scene, &["explain", "--disk", &node])?;
        hold!(text.contains("it serves vol-a"), "{text}");
        // Another disk, and the right one gone.
        let stranger = LoopDevice::add()?;
        let image = sparse_file(ground.path(), "stranger.img", BYTES)?;
        stranger.attach(&image)?;
        scene.detach(0, 0)?;
        scene.client.reach_state("vol-a", "Absent", STEP_LIMIT)?;
        let value: Value = serde_json::from_str(&said(&scene, &["explain", "vol-a", "--json"])?)?;
        hold!(value["state"] == "Absent", "{value}");
        let candidates = value["candidates"].as_array().cloned().unwrap_or_default();
        let seen = candidates
            .iter()
            .find(|one| one["node"] == stranger.node())
            .cloned()
            .unwrap_or_default();
        hold!(seen["verdict"] == "no match", "{value}");
        hold!(
            seen["unmatched"][0] == format!("loop:{}", image.display()),
            "{value}"
        );
        let events = value["events"].as_array().cloned().unwrap_or_default();
        hold!(
            events.iter().any(|e| is(e, "served", "new", "Serving")),
            "{value}"
        );
        hold!(
            events
                .last()
                .is_some_and(|e| is(e, "state", "new", "Absent")),
            "{value}"
        );
        let text = said(&scene, &["explain", "vol-a"])?;
        hold!(text.contains("what to do\n  - attach "), "{text}");
        let text = said(&scene, &["explain", "--disk", &stranger.node()])?;
        hold!(text.contains("no export looks for any identity"), "{text}");
        let missing = nbdtrack(&scene, &["explain", "vol-z"])?;
        hold!(missing.status.code() == Some(1), "{}", missing.stderr);
        hold!(
            missing.stderr.contains("no such export"),
            "{}",
            missing.stderr
        );
        let missing = nbdtrack(&scene, &["explain", "--disk", "/dev/nothing"])?;
        hold!(
            missing.stderr.contains("no attached whole disk"),
            "{}",
            missing.stderr
        );
        scene.stop()
    })
}

#[test]
fn history_tells_of_disks_switches_clients_and_callers_over_a_restart() -> Outcome<()> {
    real("history", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let id = scene.volumes[0].id();
        let client = Client::open(&scene.endpoint(), "vol-a")?;
        client.leave()?;
        hold!(
            matches!(knock(&scene.endpoint(), "vol-z")?, Go::Refused { .. }),
            "there is no vol-z"
        );
        scene.detach(0, 0)?;
        scene.attach(0, 0)?;
        let refused = nbdtrack(&scene, &["remove", "vol-z"])?;
        hold!(!refused.status.success(), "there is no vol-z");
        scene.stop()?;
        scene.start()?;
        scene.client.reach_state("vol-a", "Serving", STEP_LIMIT)?;
        let all = records(&scene, &["--since", "1h"])?;
        let uid = nix::unistd::getuid().as_raw();
        type Check<'a> = (&'a str, &'a dyn Fn(&Value) -> bool);
        let checks: [Check<'_>; 8] = [
            ("first binding", &|r| is(r, "served", "export", "vol-a")),
            ("switch", &|r| is(r, "switched", "export", "vol-a")),
            ("detach of the disk", &|r| is(r, "detached", "volume", &id)),
            ("client came", &|r| {
                is(r, "client", "new", "came") && r["export"] == "vol-a" && r["uid"] == uid
            }),
            ("client left", &|r| is(r, "client", "new", "left")),
            ("client refused", &|r| {
                is(r, "client", "new", "refused") && r["export"] == "vol-z"
            }),
            ("call", &|r| {
                is(r, "call", "new", "PrepareDetach") && r["detail"] == "done" && r["uid"] == uid
            }),
            ("refused call", &|r| {
                is(r, "call", "new", "RemoveExport")
                    && r["detail"]
                        .as_str()
                        .is_some_and(|d| d.starts_with("refused: "))
            }),
        ];
        for (what, check) in checks {
            hold!(all.iter().any(check), "{what} is missing of {all:#?}");
        }
        let started = all.iter().filter(|r| r["kind"] == "started").count();
        hold!(started == 2, "{started} starts");
        let ids: Vec<u64> = all.iter().filter_map(|r| r["id"].as_u64()).collect();
        hold!(ids.is_sorted(), "in order");
        let of_a = records(&scene, &["vol-a"])?;
        hold!(
            !of_a.is_empty() && of_a.iter().all(|r| r["export"] == "vol-a"),
            "{of_a:?}"
        );
        let csv = said(&scene, &["history", "vol-a", "--csv"])?;
        hold!(csv.starts_with("id,time,kind,export,"), "{csv}");
        hold!(csv.lines().count() == of_a.len() + 1, "{csv}");
        let two = records(&scene, &["-n", "2"])?;
        hold!(two.len() == 2, "{two:?}");
        scene.stop()
    })
}

/// The state's disk fills up while the daemon serves: serving goes on, the loss is counted, and told once there is room.
#[test]
fn a_full_disk_stops_the_trail_and_nothing_else() -> Outcome<()> {
    real("full disk", MOUNTS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        scene.stop()?;
        let state = scene.home.state.clone();
        let small = ["-t", "tmpfs", "-o", "size=512k", "tmpfs"];
        let mounted = Mounted::new(state.clone(), &small)?;
        scene.start()?;
        scene.client.reach_state("vol-a", "Serving", STEP_LIMIT)?;
        let filler = state.join("filler");
        let mut bytes = vec![0u8; 600 << 10];
        // All that is left, to the last page.
        while !bytes.is_empty() {
            use std::io::Write;
            let mut file = std::fs::OpenOptions::new()
                .append(true)
                .create(true)
                .open(&filler)?;
            if file.write_all(&bytes).is_err() {
                bytes.truncate(bytes.len() / 2);
            }
        }
        let number = |scene: &Scene, name: &str| -> Outcome<u64> {
            Ok(scene.client.stats()?.get(name).map_or(0, |w| w.number()))
        };
        until(LIMIT, "a record to be lost", || {
            // Also a client that comes while it is full is served.
            let client = Client::open(&scene.endpoint(), "vol-a")?;
            client.leave()?;
            Ok((number(&scene, "history_lost")? > 0).then_some(()))
        })?;
        hold!(scene.state("vol-a")? == "Serving", "it serves on");
        let mut refused = 0;
        for n in 0..20 {
            let name = format!("full-{n}-{}", "x".repeat(3_000));
            let options = support::bus::Options::from([("wait_ms", zbus::Variant::from(0u32))]);
            match scene
                .client
                .add_export_with(&name, "loop:/nowhere", options)
            {
                Err(error) if error.is("Failed") => refused += 1,
                _ => {}
            }
        }
        hold!(refused > 0, "what cannot be stored is refused");
        std::fs::remove_file(&filler)?;
        // The store, too, has to recover without a restart.
        let volume = scene.volumes[0].id();
        let options = support::bus::Options::from([("read_only", zbus::Variant::from(true))]);
        let added = scene.client.add_export_with("vol-b", &volume, options);
        hold!(added.is_ok(), "with room again: {added:?}");
        let lost = number(&scene, "history_lost")?;
        until(LIMIT, "the trail to go on", || {
            let client = Client::open(&scene.endpoint(), "vol-a")?;
            client.leave()?;
            // Refused until the file is tried again.
            let told = records(&scene, &["--since", "1h"]).unwrap_or_default();
            Ok(told.iter().any(|r| r["kind"] == "lost").then_some(()))
        })?;
        hold!(lost > 0, "the loss was counted");
        scene.stop()?;
        drop(mounted);
        Ok(())
    })
}
