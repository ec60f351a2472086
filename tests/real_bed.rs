//! The test bed itself: patterns that find a wrong byte, loop devices that come and go with the kernel's events, a
//! private bus, and a stream that keeps its promises straight.

#![allow(clippy::panic, reason = "a test ends where something is missing")]

use std::time::Duration;

use support::bus::{Bus, Client};
use support::client::Endpoint;
use support::ground::{Need, real};
use support::loops::{Detached, LoopDevice, sparse_file};
use support::pattern::{self, SECTOR};
use support::process::{self, Running};
use support::stream::{Held, Pace, Stream};
use support::uevents::Uevents;
use support::{Outcome, hold, trouble, until};

#[test]
fn pattern_names_the_first_wrong_byte_and_its_owner() -> Outcome<()> {
    real("pattern", &[], |ground| {
        let path = ground.file("a");
        pattern::write_file(&path, "vol-a", 1 << 20, 7)?;
        hold!(
            pattern::examine_whole(&path, "vol-a", 1 << 20, 7)?.all_right(),
            "a fresh pattern is right"
        );
        let mut bytes = std::fs::read(&path)?;
        pattern::stamp(&mut bytes[4096..4096 + SECTOR], "vol-b", 4096, 7);
        bytes[8192 + 100] ^= 1;
        bytes[16384..16384 + SECTOR].fill(0);
        std::fs::write(&path, &bytes)?;
        let tally = pattern::examine_whole(&path, "vol-a", 1 << 20, 7)?;
        hold!(tally.others.get("vol-b") == Some(&512), "{tally}");
        hold!(tally.foreign == 512 && tally.zero == 512, "{tally}");
        let first = tally.first_wrong.clone();
        hold!(
            first
                .as_ref()
                .is_some_and(|w| w.offset == 4096 && w.whose.starts_with("vol-b")),
            "{tally}"
        );
        std::fs::write(&path, &bytes[..8192])?;
        let tally = pattern::examine_whole(&path, "vol-a", 1 << 20, 7)?;
        hold!(tally.missing == (1 << 20) - 8192, "{tally}");
        Ok(())
    })
}

#[test]
fn swapped_loop_devices_send_a_change_with_a_new_diskseq() -> Outcome<()> {
    real("loop devices", &[Need::Loop], |ground| {
        let a = sparse_file(ground.path(), "a.img", 1 << 20)?;
        let b = sparse_file(ground.path(), "b.img", 1 << 20)?;
        let (one, two) = (LoopDevice::add()?, LoopDevice::add()?);
        hold!(one.name() != two.name(), "two devices, two names");
        let events = Uevents::listen()?;
        one.attach(&a)?;
        two.attach(&b)?;
        let before = one.diskseq()?;
        events.wait(&one.name(), before)?;
        one.detach_now()?;
        two.detach_now()?;
        one.attach(&b)?;
        two.attach(&a)?;
        hold!(one.backing_file() == Some(b), "b is under the first name");
        hold!(one.diskseq()? > before, "the diskseq grows");
        events.wait(&one.name(), one.diskseq()?)?;
        let name = one.name();
        // Held open by someone: the driver defers.
        let holder = std::fs::File::open(one.node())?;
        hold!(one.detach()? == Detached::Deferred, "a held device stays");
        drop(holder);
        hold!(one.backing_file().is_none(), "and goes at the last close");
        drop(one);
        hold!(
            !std::path::Path::new(&format!("/sys/block/{name}")).exists(),
            "{name} is removed"
        );
        Ok(())
    })
}

#[test]
fn private_bus_answers() -> Outcome<()> {
    real(
        "private bus",
        &[Need::Bus, Need::Tool("busctl")],
        |ground| {
            let bus = Bus::start(ground.path())?;
            let address = format!("--address={}", bus.address);
            let out = process::succeed(
                "busctl",
                &[address.as_str(), "--no-pager", "list"],
                Duration::from_secs(10),
            )?;
            hold!(out.contains("org.freedesktop.DBus"), "{out}");
            Ok(())
        },
    )
}

#[test]
fn client_hears_signals_after_its_mark_and_names_errors() -> Outcome<()> {
    let needs = [Need::Bus, Need::Tool("dbus-send")];
    real("bus client", &needs, |ground| {
        let bus = Bus::start(ground.path())?;
        let client = Client::connect(&bus)?;
        match client.rescan() {
            Err(e) if e.name == "org.freedesktop.DBus.Error.ServiceUnknown" => {}
            other => trouble!("no service, but: {other:?}"),
        }
        let address = format!("--bus={}", bus.address);
        let send = |state: &str| {
            let args = [
                address.as_str(),
                "--type=signal",
                "/org/nbdtrack1",
                "org.nbdtrack1.Manager.ExportStateChanged",
                "objpath:/org/nbdtrack1/exports/a",
                "string:vol-a",
                "string:Opening",
                &format!("string:{state}"),
                "string:",
            ];
            process::succeed("dbus-send", &args, Duration::from_secs(10))
        };
        let limit = Duration::from_secs(5);
        let mark = client.mark();
        send("Serving")?;
        let signal = client.wait_state(mark, "vol-a", "Serving", limit)?;
        hold!(signal.text(0) == "/org/nbdtrack1/exports/a", "{signal:?}");
        // One before the mark does not count.
        let mark = client.mark();
        let short = Duration::from_millis(100);
        hold!(
            client.wait_state(mark, "vol-a", "Serving", short).is_err(),
            "an old signal was taken for a new one"
        );
        Ok(())
    })
}

#[test]
fn stream_keeps_its_promises_against_another_server() -> Outcome<()> {
    real("stream", &[Need::Tool("nbdkit")], |ground| {
        let image = sparse_file(ground.path(), "c.img", 32 << 20)?;
        let socket = ground.file("kit.sock");
        let mut kit = process::command("nbdkit");
        kit.arg("-f").arg("-U").arg(&socket).arg("file").arg(&image);
        kit.stderr(std::fs::File::create(ground.file("kit.log"))?);
        let _kit = Running(kit.spawn()?);
        until(Duration::from_secs(10), "nbdkit", || {
            Ok(socket.exists().then_some(()))
        })?;
        let stream = Stream::start(&Endpoint::Unix(socket), "", "vol-c", Pace::FLAT_OUT, 0)?;
        stream.wait_for(5000)?;
        let report = stream.finish()?;
        hold!(report.broken.is_none(), "{:?}", report.broken);
        hold!(report.wrong_read.is_none(), "{:?}", report.wrong_read);
        hold!(report.flushes > 10 && report.reads > 10, "{report:?}");
        let tally = report.verify(&image, "vol-c", Held::Acknowledged)?;
        hold!(tally.all_right(), "{tally}");
        // And it can fail: one sector of an older write.
        let mut bytes = std::fs::read(&image)?;
        pattern::stamp(&mut bytes[..SECTOR], "vol-c", 0, 0);
        std::fs::write(&image, bytes)?;
        let tally = report.verify(&image, "vol-c", Held::Flushed)?;
        hold!(tally.misplaced == 512, "{tally}");
        Ok(())
    })
}

#[test]
fn tool_that_hangs_is_killed_at_its_deadline() -> Outcome<()> {
    let began = std::time::Instant::now();
    let done = process::run("sleep", &["60"], Duration::from_millis(200));
    hold!(done.is_err(), "a hanging tool is an error");
    hold!(
        began.elapsed() < Duration::from_secs(10),
        "and is not waited for"
    );
    Ok(())
}
