//! A daemon that is told to stop while it starts or reads its configuration again ends in order and leaves nothing in the way of the next.

use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::time::Instant;

use nix::sys::signal::Signal;
use support::client::{Go, knock};
use support::daemon::Home;
use support::ground::{Ground, Need, real, tell};
use support::loops::LoopDevice;
use support::process::Running;
use support::scene::{STEP_LIMIT, Volume};
use support::{Doing, Outcome, hold, until};

const NEEDS: &[Need] = &[Need::Loop];
const BYTES: u64 = 4 << 20;
/// Moments of one start, or of one reload, at which it is told to stop.
const MOMENTS: u32 = 40;

/// An attached volume, and a home that exports it among many that are not there.
fn home(ground: &Ground) -> Outcome<(LoopDevice, Volume, Home)> {
    let volume = Volume::make(ground.path(), "vol-a", BYTES)?;
    let device = LoopDevice::add()?;
    device.attach(&volume.image)?;
    let home = Home::new(ground.path(), "none")?;
    configure(&home, &volume, 500)?;
    Ok((device, volume, home))
}

fn configure(home: &Home, volume: &Volume, others: u32) -> Outcome<()> {
    let names: Vec<String> = (0..others).map(|n| format!("absent-{n}")).collect();
    let mut exports = vec![("vol-a", volume.id())];
    exports.extend(
        names
            .iter()
            .map(|name| (name.as_str(), format!("serial:{name}"))),
    );
    home.configure(&exports)
}

fn spawn(home: &Home) -> Outcome<Running> {
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&home.log)?;
    let mut command = home.command();
    command.stdout(Stdio::null()).stderr(log);
    Ok(Running(command.spawn().doing("start nbdtrack")?))
}

/// In order; or by the signal, which is before the program's first word: then there was nothing to be put in order.
fn in_order(status: ExitStatus, said: bool) -> bool {
    status.success() || (!said && status.signal() == Some(Signal::SIGTERM as i32))
}

/// The next daemon finds nothing in its way, and serves.
fn next_serves(home: &Home) -> Outcome<()> {
    let daemon = home.start()?;
    let answer = knock(&home.endpoint(), "vol-a")?;
    hold!(matches!(answer, Go::Agreed { .. }), "{answer:?}");
    daemon.stop()
}

#[test]
fn daemon_that_is_told_to_stop_at_any_moment_of_its_start_leaves_nothing_behind() -> Outcome<()> {
    real("stop in a start", NEEDS, |ground| {
        let (_device, _volume, home) = home(ground)?;
        let began = Instant::now();
        let daemon = home.start()?;
        let whole = began.elapsed();
        daemon.stop()?;
        for moment in 0..MOMENTS {
            let logged = std::fs::metadata(&home.log)?.len();
            let mut daemon = spawn(&home)?;
            std::thread::sleep(whole * moment / (MOMENTS - 5));
            daemon.signal(Signal::SIGTERM)?;
            let status = daemon.wait(STEP_LIMIT)?;
            let said = std::fs::metadata(&home.log)?.len() > logged;
            hold!(in_order(status, said), "at moment {moment}: {status}");
            hold!(!home.socket.exists(), "moment {moment} left the socket");
        }
        next_serves(&home)
    })
}

/// Reloads that are in the log.
fn reloads(home: &Home) -> Outcome<usize> {
    let log = std::fs::read_to_string(&home.log)?;
    Ok(log.matches(", unchanged ").count())
}

/// Has a daemon that serves read a configuration with so many other exports, up to the signal.
fn asked_to_reload(home: &Home, volume: &Volume, others: u32) -> Outcome<Running> {
    let daemon = spawn(home)?;
    until(STEP_LIMIT, "the export to serve", || {
        let answer = knock(&home.endpoint(), "vol-a").ok();
        Ok(matches!(answer, Some(Go::Agreed { .. })).then_some(()))
    })?;
    configure(home, volume, others)?;
    daemon.signal(Signal::SIGHUP)?;
    Ok(daemon)
}

#[test]
fn daemon_that_is_told_to_stop_at_any_moment_of_a_reload_ends_in_order() -> Outcome<()> {
    real("stop in a reload", NEEDS, |ground| {
        let (_device, volume, home) = home(ground)?;
        let applied = || {
            until(STEP_LIMIT, "the reload", || {
                Ok((reloads(&home)? > 0).then_some(()))
            })
        };
        let end = |mut daemon: Running, moment: u32| -> Outcome<()> {
            daemon.signal(Signal::SIGTERM)?;
            let status = daemon.wait(STEP_LIMIT)?;
            hold!(status.success(), "at moment {moment}: {status}");
            hold!(!home.socket.exists(), "moment {moment} left the socket");
            Ok(())
        };
        let daemon = asked_to_reload(&home, &volume, 600)?;
        let began = Instant::now();
        applied()?;
        let whole = began.elapsed();
        end(daemon, MOMENTS)?;
        let mut before = 0;
        for moment in 0..MOMENTS {
            std::fs::write(&home.log, "")?;
            let daemon = asked_to_reload(&home, &volume, 500 + moment)?;
            match moment {
                // The last one is applied for certain.
                _ if moment + 1 == MOMENTS => applied()?,
                _ => std::thread::sleep(whole * moment / (MOMENTS - 5)),
            }
            end(daemon, moment)?;
            before += usize::from(reloads(&home)? == 0);
        }
        tell(&format!(
            "a reload takes {whole:?}; {before} of {MOMENTS} stops came before it was applied"
        ));
        hold!(before > 0, "no stop fell into a reload");
        next_serves(&home)
    })
}
