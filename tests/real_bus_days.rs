//! Bad days of the bus: it comes late, restarts, has our name given to someone else; and callers that flood it.

use std::time::{Duration, Instant};

use support::Outcome;
use support::bus::{Bus, Client as Caller, Options, ROOT, SERVICE};
use support::client::Client;
use support::daemon::Home;
use support::ground::{Ground, Need, real, tell};
use support::loops::LoopDevice;
use support::scene::{STEP_LIMIT, Scene, Volume};
use support::{hold, trouble};
use zbus::Variant;

const NEEDS: &[Need] = &[Need::Loop, Need::Bus];
const BYTES: u64 = 4 << 20;
/// For a question of one caller beside another's flood, in a build that is not optimised.
const OTHERS_WITHIN: Duration = Duration::from_secs(1);

/// A volume that is attached, and a home whose configuration exports it on the bus of the ground's folder.
fn home(ground: &Ground) -> Outcome<(LoopDevice, Home)> {
    let volume = Volume::make(ground.path(), "vol-a", BYTES)?;
    let device = LoopDevice::add()?;
    device.attach(&volume.image)?;
    let address = format!("unix:path={}", ground.path().join("bus.sock").display());
    let home = Home::new(ground.path(), &address)?;
    home.configure(&[("vol-a", volume.id())])?;
    Ok((device, home))
}

fn serves(home: &Home) -> Outcome<()> {
    support::until(STEP_LIMIT, "the export to serve", || {
        Ok(Client::open(&home.endpoint(), "vol-a").ok().map(drop))
    })
}

/// A caller on the bus, once the daemon is there.
fn joined(bus: &Bus) -> Outcome<Caller> {
    let caller = Caller::connect(bus)?;
    support::until(STEP_LIMIT, "the daemon on the bus", || {
        Ok(caller.stats().ok().map(drop))
    })?;
    Ok(caller)
}

#[test]
fn bus_that_comes_after_the_daemon_is_joined_and_told_everything() -> Outcome<()> {
    real("bus late", NEEDS, |ground| {
        let (_device, home) = home(ground)?;
        let daemon = home.start()?;
        serves(&home)?;
        let log = std::fs::read_to_string(&home.log)?;
        hold!(log.contains("is the bus running?"), "it says what it lacks");
        let bus = Bus::start(ground.path())?;
        let caller = joined(&bus)?;
        let export = caller.export("vol-a")?;
        let state = export.as_ref().and_then(|export| export.get("State"));
        hold!(
            state.is_some_and(|state| state.text() == "Serving"),
            "everything is there: {export:?}"
        );
        daemon.stop()
    })
}

#[test]
fn bus_that_restarts_is_joined_again_while_clients_notice_nothing() -> Outcome<()> {
    real("bus restarts", NEEDS, |ground| {
        let (_device, home) = home(ground)?;
        let bus = Bus::start(ground.path())?;
        let daemon = home.start()?;
        serves(&home)?;
        let mut client = Client::open(&home.endpoint(), "vol-a")?;
        drop(bus);
        hold!(client.write(0, &[9; 512], true)? == Ok(()), "with no bus");
        let _ = std::fs::remove_file(ground.path().join("bus.sock"));
        let bus = Bus::start(ground.path())?;
        let caller = joined(&bus)?;
        hold!(caller.export("vol-a")?.is_some(), "everything is there");
        hold!(client.write(0, &[8; 512], true)? == Ok(()), "and after it");
        daemon.stop()
    })
}

#[test]
fn name_that_is_taken_ends_the_start_with_who_has_it() -> Outcome<()> {
    real("bus name taken", NEEDS, |ground| {
        let (_device, home) = home(ground)?;
        let bus = Bus::start(ground.path())?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let other = runtime.block_on(async {
            let builder = zbus::connection::Builder::address(bus.address.as_str());
            let connection = builder.build().await?;
            connection.request_name(SERVICE).await?;
            Ok::<_, zbus::Error>(connection)
        })?;
        let ended = home.try_start()?;
        let Err((status, said)) = ended else {
            trouble!("it started beside another owner of the name")
        };
        hold!(status.code() == Some(1), "{status}");
        hold!(
            said.contains("is taken by")
                && said.contains(&format!("process {}", std::process::id())),
            "{said}"
        );
        runtime.block_on(other.release_name(SERVICE))?;
        home.start()?.stop()
    })
}

#[test]
fn one_caller_that_floods_is_bounded_and_others_are_answered() -> Outcome<()> {
    real("bus flood", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let address = scene.bus.address.clone();
        let before = scene.daemon()?.holdings()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let flood =
            runtime.block_on(zbus::connection::Builder::address(address.as_str()).build())?;
        let mut slowest = Duration::ZERO;
        let mut ask = |scene: &Scene| -> Outcome<()> {
            let began = Instant::now();
            scene.client.stats()?;
            scene.export("vol-a")?;
            slowest = slowest.max(began.elapsed());
            Ok(())
        };
        // Kept: a rule is the caller's while its stream is.
        let subscriptions = runtime.block_on(async {
            let mut kept = Vec::new();
            for n in 0..1_000 {
                let rule = zbus::MatchRule::builder()
                    .msg_type(zbus::message::Type::Signal)
                    .sender(SERVICE)
                    .path(format!("/org/nbdtrack1/exports/n{n}"))
                    .build()?;
                let stream = zbus::MessageStream::for_match_rule(rule, &flood, None);
                let stream = tokio::time::timeout(Duration::from_secs(5), stream).await;
                // The bus bounds how many one may have; refusals are fine.
                kept.extend(stream.ok().and_then(Result::ok));
            }
            Ok::<_, zbus::Error>(kept)
        })?;
        // dbus-daemon(1), max_match_rules_per_connection: 512.
        hold!(
            subscriptions.len() > 500,
            "{} subscriptions stand",
            subscriptions.len()
        );
        ask(&scene)?;
        let huge = "x".repeat(1 << 20);
        for round in 0..100u32 {
            runtime.block_on(async {
                for call in 0..100u32 {
                    let member = [
                        "GetStats",
                        "PrepareDetach",
                        "AddExport",
                        "Reload",
                        "ListSessions",
                    ][usize::try_from(call % 5).unwrap_or(0)];
                    let message = zbus::Message::method_call(ROOT, member)
                        .destination(SERVICE)
                        .interface("org.nbdtrack1.Manager")
                        .with_flags(zbus::message::Flags::NO_REPLY_EXPECTED);
                    let options = Options::from([("volume", Variant::from(huge.as_str()))]);
                    let message = match member {
                        "PrepareDetach" if call == 1 => {
                            message.build(&(huge.as_str(), Options::new()))?
                        }
                        "PrepareDetach" => message.build(&("loop:/nowhere", Options::new()))?,
                        "AddExport" if call == 2 => message.build(&("flood", options))?,
                        "AddExport" => {
                            let wait = Variant::from(600_000u32);
                            let volume = Variant::from("loop:/nowhere");
                            let options = Options::from([("volume", volume), ("wait_ms", wait)]);
                            message.build(&("flood", options))?
                        }
                        _ => message.build(&(Options::new(),))?,
                    };
                    flood.send(&message).await?;
                }
                Ok::<_, zbus::Error>(())
            })?;
            if round % 10 == 0 {
                ask(&scene)?;
            }
        }
        ask(&scene)?;
        let after = scene.daemon()?.holdings()?;
        tell(&format!(
            "10,000 calls of one caller with {} subscriptions: another was answered within {slowest:?}; {before:?} before, {after:?} after",
            subscriptions.len()
        ));
        drop(subscriptions);
        hold!(slowest < OTHERS_WITHIN, "others are answered: {slowest:?}");
        hold!(
            after.resident_kib < before.resident_kib + 128 * 1024,
            "memory is bounded: {before:?}, {after:?}"
        );
        hold!(scene.state("vol-a")? == "Serving", "and it still serves");
        scene.stop()
    })
}
