//! What is not as it should be: two disks with one identity, a disk in use, a volume that was given up, a
//! volume that nobody has.

use std::time::Duration;

use support::bus::{Options, Refused};
use support::client::{Go, REP_ERR_POLICY, REP_ERR_UNKNOWN, knock};
use support::ground::{Need, real, tell};
use support::loops::LoopDevice;
use support::mounts::Mounted;
use support::scene::{STEP_LIMIT, Scene, Volume, nbdtrack};
use support::stream::{Held, Pace, Stream};
use support::{Outcome, hold, process, trouble, until};

const NEEDS: &[Need] = &[Need::Loop, Need::Bus, Need::Tool("nbdcopy")];
const BYTES: u64 = 16 << 20;

/// Fails unless the call was refused with this D-Bus error.
fn refused<T: std::fmt::Debug>(answer: Result<T, Refused>, kind: &str) -> Outcome<()> {
    match answer {
        Err(e) if e.is(kind) && !e.text.is_empty() => Ok(()),
        other => trouble!("expected {kind} with a reason, got {other:?}"),
    }
}

fn refused_on_the_wire(scene: &Scene, export: &str, kind: u32) -> Outcome<()> {
    match knock(&scene.endpoint(), export)? {
        Go::Refused { kind: found, text } if found == kind && !text.is_empty() => Ok(()),
        other => trouble!("GO for {export}: expected {kind:#x} with a reason, got {other:?}"),
    }
}

#[test]
fn twin_seals_the_export_and_its_going_unseals_it() -> Outcome<()> {
    real("twin", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let generation = scene.export("vol-a")?.get("Generation").cloned();
        let stream = Stream::start(&scene.endpoint(), "vol-a", "vol-a", Pace::BYSTANDER, 0)?;
        stream.wait_for(300)?;
        let twin = LoopDevice::add()?;
        let mark = scene.client.mark();
        twin.attach(&scene.volumes[0].image)?;
        scene
            .client
            .wait_state(mark, "vol-a", "Ambiguous", STEP_LIMIT)?;
        scene
            .client
            .wait(mark, STEP_LIMIT, "IdentityConflict", |s| {
                s.member == "IdentityConflict"
            })?;
        refused_on_the_wire(&scene, "vol-a", REP_ERR_POLICY)?;
        // The session that was there when its disk was the only claimant goes on.
        stream.wait_for(300)?;
        let mark = scene.client.mark();
        twin.detach_now()?;
        scene
            .client
            .wait_state(mark, "vol-a", "Serving", STEP_LIMIT)?;
        hold!(
            scene.export("vol-a")?.get("Generation").cloned() == generation,
            "the generation is the same"
        );
        stream.wait_for(300)?;
        let report = stream.finish()?;
        hold!(report.broken.is_none(), "{:?}", report.broken);
        scene.stop()?;
        let tally = report.verify(&scene.volumes[0].image, "vol-a", Held::Acknowledged)?;
        hold!(tally.all_right(), "{tally}");
        Ok(())
    })
}

#[test]
fn twins_found_at_start_are_both_refused_until_someone_decides() -> Outcome<()> {
    real("twins at start", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        scene.stop()?;
        let twin = LoopDevice::add()?;
        twin.attach(&scene.volumes[0].image)?;
        scene.start()?;
        scene.client.reach_state("vol-a", "Ambiguous", STEP_LIMIT)?;
        refused_on_the_wire(&scene, "vol-a", REP_ERR_POLICY)?;
        // Not by a restart, either.
        scene.kill()?;
        scene.start()?;
        scene.client.reach_state("vol-a", "Ambiguous", STEP_LIMIT)?;
        let mark = scene.client.mark();
        twin.detach_now()?;
        scene.client.wait(mark, STEP_LIMIT, "VolumeDetached", |s| {
            s.member == "VolumeDetached" && s.text(2) == twin.node()
        })?;
        hold!(
            scene.state("vol-a")? == "Ambiguous",
            "who was first is not known: the survivor waits for a person"
        );
        let mark = scene.client.mark();
        scene
            .client
            .resolve_conflict("vol-a", scene.devices[0].diskseq()?)?;
        scene
            .client
            .wait_state(mark, "vol-a", "Serving", STEP_LIMIT)?;
        Ok(())
    })
}

/// More changes in one turn than orders may wait for the store: each is kept.
#[test]
fn no_export_of_many_that_the_configuration_took_over_is_there_again_without_it() -> Outcome<()> {
    const MANY: usize = 1_500;
    real("many taken over", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let id = scene.volumes[0].id();
        let without = std::fs::read_to_string(&scene.home.config)?;
        let mut with = without.clone();
        for n in 0..MANY {
            let options = Options::from([("read_only", zbus::Variant::from(true))]);
            let name = format!("r{n}");
            scene.client.add_export_with(&name, &id, options)?;
            with.push_str(&format!(
                "\n[[export]]\nname = {name:?}\nvolume = {id:?}\nread_only = true\n"
            ));
        }
        for text in [with, without] {
            std::fs::write(&scene.home.config, text)?;
            let read = nbdtrack(&scene, &["reload"])?;
            hold!(read.status.success(), "{}", read.stderr);
        }
        let exports =
            |scene: &Scene| -> Outcome<usize> { Ok(scene.client.objects("Export")?.len()) };
        until(STEP_LIMIT, "the exports to be gone", || {
            Ok((exports(&scene)? == 1).then_some(()))
        })?;
        // What was ordered is written before the end.
        scene.stop()?;
        scene.start()?;
        scene.client.reach_state("vol-a", "Serving", STEP_LIMIT)?;
        let again = exports(&scene)? - 1;
        hold!(again == 0, "{again} of {MANY} are there again");
        scene.stop()
    })
}

#[test]
fn disk_that_someone_claims_is_not_served() -> Outcome<()> {
    const BUSY: &[Need] = &[
        Need::Loop,
        Need::Bus,
        Need::Tool("mkfs.ext4"),
        Need::Tool("mount"),
    ];
    real("busy disk", BUSY, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let busy = Volume::make(ground.path(), "busy", 32 << 20)?;
        let limit = Duration::from_secs(60);
        process::succeed("mkfs.ext4", &["-q", &busy.image.to_string_lossy()], limit)?;
        let device = LoopDevice::add()?;
        device.attach(&busy.image)?;
        let mounted = Mounted::new(ground.file("mount"), &[&device.node()])?;
        let options = Options::from([("wait_ms", zbus::Variant::from(2000u32))]);
        let answer = scene.client.add_export_with("busy", &busy.id(), options);
        let text = match answer {
            Err(e) if e.is("DeviceBusy") || e.is("NotReady") => e.text,
            other => trouble!("expected DeviceBusy, got {other:?}"),
        };
        tell(&format!("busy disk: {text}"));
        let found = scene.client.reach_state("busy", "Failed", STEP_LIMIT)?;
        hold!(
            found
                .get("Reason")
                .is_some_and(|w| w.text().contains("mount")),
            "the reason names the mount: {found:?}"
        );
        refused_on_the_wire(&scene, "busy", REP_ERR_UNKNOWN)?;
        drop(mounted);
        scene.client.rescan()?;
        scene.client.reach_state("busy", "Serving", STEP_LIMIT)?;
        // And while we serve, no one else gets it.
        let again = process::run(
            "mount",
            &[device.node().as_str(), &ground.path().to_string_lossy()],
            limit,
        )?;
        hold!(!again.status.success(), "a served disk cannot be mounted");
        scene.stop()
    })
}

#[test]
fn released_volume_stays_released_until_its_disk_leaves_or_the_caller_takes_it_back() -> Outcome<()>
{
    real("released", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let id = scene.volumes[0].id();
        scene.client.prepare_detach(&id)?;
        hold!(scene.state("vol-a")? == "Released", "it is Released");
        refused_on_the_wire(&scene, "vol-a", REP_ERR_UNKNOWN)?;
        scene.client.rescan()?;
        scene.devices[0].poke()?;
        hold!(scene.state("vol-a")? == "Released", "after a rescan");
        scene.kill()?;
        scene.start()?;
        scene.client.reach_state("vol-a", "Released", STEP_LIMIT)?;
        let mark = scene.client.mark();
        scene.client.cancel_detach(&id)?;
        if scene.state("vol-a")? != "Serving" {
            scene
                .client
                .wait_state(mark, "vol-a", "Serving", STEP_LIMIT)?;
        }
        scene.detach(0, 0)?;
        scene.attach(0, 0)
    })
}

#[test]
fn unknown_volumes_and_names_are_refused_by_their_error() -> Outcome<()> {
    real("refusals", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let id = scene.volumes[0].id();
        let client = &scene.client;
        refused(client.prepare_detach("loop:/nowhere/at/all"), "NotFound")?;
        refused(client.remove_export("nobody", "soft"), "NotFound")?;
        refused(client.add_export("", &id), "InvalidArgument")?;
        refused(client.add_export("x", "nonsense"), "InvalidArgument")?;
        refused(
            client.add_export("x", &"y".repeat(1 << 20)),
            "InvalidArgument",
        )?;
        refused(client.add_export(&"n".repeat(4097), &id), "InvalidArgument")?;
        refused(client.add_export("second-writer", &id), "InUse")?;
        let unknown = Options::from([("no_such_key", zbus::Variant::from(1u32))]);
        refused(client.add_export_with("x", &id, unknown), "InvalidArgument")?;
        let wrong_type = client.call("AddExport", &(1u32, 2u32));
        hold!(wrong_type.is_err(), "wrong types are refused");
        let huge = client.call("Rescan", &("z".repeat(1 << 20),));
        hold!(huge.is_err(), "an argument too many is refused");
        refused_on_the_wire(&scene, "nobody", REP_ERR_UNKNOWN)?;
        hold!(scene.state("vol-a")? == "Serving", "and it still serves");
        scene.daemon()?.assert_alive()?;
        scene.stop()
    })
}
