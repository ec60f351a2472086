//! EDGE: what the service manager is asked and told: which of the services runs, and that it starts and stops.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::unistd::geteuid;

use super::TakeOverError;
use super::call::{must, run, step};
use super::drop_in;
use super::place::{Place, identity};
use super::servers::{SERVICE, Server, first, named, servers};

const OWN_SERVICE: &str = "nbdtrack.service";
/// In the order in which they are stopped and started: a client of the sockets would start the service again, which is passed them.
const OWN_UNITS: [&str; 2] = ["nbdtrack.socket", OWN_SERVICE];
const SCRIPT: &str = "/etc/init.d/nbd-server";
/// How long a server may take until its process is there; it reads its configuration and its disks first. And until it is gone, once it was
/// stopped.
const STARTS_WITHIN: Duration = Duration::from_secs(30);
/// How long ours may take to end in order, as its own unit says (`TimeoutStopSec=`).
pub(super) const DRAINS_WITHIN: Duration = Duration::from_secs(45);

/// What this machine has.
pub(super) struct Machine {
    systemd: bool,
    /// What stops the service; `None` where a unit of its own does, which waits for its processes.
    script: Option<PathBuf>,
    /// The service runs, so it runs afterwards, too; or it ran before an exchange that did not come to its end.
    pub runs: bool,
    /// It ran before the exchange, so it runs after one that is taken back, too. Not one that was started when the exchange came half way, so
    /// that anybody serves.
    ran: bool,
    /// At a boot it does not start.
    disabled: bool,
    own: Own,
}

/// Our own service and its sockets. They have the same port and state, so they are in the way when they run, and when the service is
/// about to be started again (it failed while the stock server had the port). That nobody starts them while the place is taken (the
/// boot, a call over D-Bus, a client of the sockets, a person), their units see to by themselves: they have the stock binary's other
/// path as a condition. So they stay enabled.
struct Own {
    /// Or they ran before an exchange that did not come to its end.
    running: Vec<&'static str>,
    enabled: bool,
}

impl Machine {
    pub(super) fn look(place: &Place) -> Result<Machine, TakeOverError> {
        // sd_booted(3)
        let systemd = Path::new("/run/systemd/system").is_dir();
        let says = |verb: &str, unit: &str, words: &[&str]| {
            systemd
                && run("systemctl", &[verb, unit]).is_ok_and(|(_, said)| {
                    said.lines()
                        .next()
                        .is_some_and(|said| words.contains(&said))
                })
        };
        let remembered = place.remembered();
        let known = |unit: &str| remembered.iter().any(|was| was == unit);
        let running = |unit: &str| {
            known(unit) || says("is-active", unit, &["active", "activating", "reloading"])
        };
        let own = Own {
            running: OWN_UNITS.into_iter().filter(|unit| running(unit)).collect(),
            enabled: says("is-enabled", OWN_SERVICE, &["enabled"]),
        };
        let runs = known(SERVICE)
            || says("is-active", SERVICE, &["active", "reloading"])
            || !servers(place)?.is_empty();
        let ran = match OWN_UNITS.into_iter().any(known) {
            true => known(SERVICE),
            false => runs,
        };
        Ok(Machine {
            script: script(systemd),
            systemd,
            runs,
            ran,
            disabled: says("is-enabled", SERVICE, &["disabled"]),
            own,
        })
    }

    pub(super) fn must_be_root(&self) -> Result<(), TakeOverError> {
        match geteuid().is_root() {
            true => Ok(()),
            false => Err(TakeOverError::NotRoot),
        }
    }

    /// Clients are served before a take-over, by the stock server or by our own service: then they are after it, too.
    pub(super) fn serves(&self) -> bool {
        self.runs || !self.own.running.is_empty()
    }

    /// The units that ran before the exchange.
    pub(super) fn running(&self) -> Vec<&'static str> {
        let service = self.ran.then_some(SERVICE);
        service
            .into_iter()
            .chain(self.own.running.iter().copied())
            .collect()
    }

    pub(super) fn service_lines(&self) -> Vec<String> {
        let mut lines = vec![if self.runs {
            "the service nbd-server is stopped before and started after; its clients have to connect again".to_owned()
        } else if self.serves() {
            format!(
                "the service nbd-server does not run, and {OWN_SERVICE} does: nbd-server is started in its place, and serves what its own \
                 configuration says"
            )
        } else {
            "the service nbd-server does not run, and is not started".to_owned()
        }];
        if self.disabled && self.serves() {
            lines.push("the service nbd-server is not enabled, so it does not start at a boot: 'systemctl enable nbd-server'".to_owned());
        }
        lines
    }

    /// As [`Machine::service_lines`], for the way back.
    pub(super) fn service_lines_back(&self) -> Vec<String> {
        if self.ran || self.own.running.is_empty() {
            return self.service_lines();
        }
        vec![format!(
            "the service nbd-server does not run afterwards: before the take-over that came half way {} ran",
            self.own.running.join(" and ")
        )]
    }

    /// What a take-over means for our own service.
    pub(super) fn own_service_is_kept_away(&self) -> Option<String> {
        let runs = !self.own.running.is_empty();
        let what = if runs { "is stopped, and does" } else { "does" };
        (runs || self.own.enabled).then(|| {
            format!(
                "{OWN_SERVICE} {what} not start while nbd-server is nbdtrack, at a boot and for calls over D-Bus neither: it has the \
                 same port and the same state"
            )
        })
    }

    /// What the end of it means for our own service.
    pub(super) fn own_service_may_start(&self) -> Option<String> {
        if !self.own.running.is_empty() {
            return Some(format!(
                "{} is started again",
                self.own.running.join(" and ")
            ));
        }
        let when = match self.own.enabled {
            true => "it is enabled, so it does with the next boot",
            false => "it is not enabled",
        };
        self.systemd.then(|| {
            format!(
                "{OWN_SERVICE} may start again: {when}; beside the stock server it needs a port of its own"
            )
        })
    }

    fn service(&self, verb: &str) -> Result<(), TakeOverError> {
        if self.systemd {
            // A unit of an init script that was just installed, or whose binary has changed, is known after this.
            must("systemctl", &["daemon-reload"])?;
            must("systemctl", &[verb, SERVICE]).map(drop)
        } else {
            must(SCRIPT, &[verb]).map(drop)
        }
    }

    /// Stops whoever is nbd-server here, and waits for the end. Ours drains its clients first, for which an init script leaves no time.
    pub(super) fn stop(&self, place: &Place) -> Result<(), TakeOverError> {
        if !self.serves() {
            return Ok(());
        }
        let running = servers(place)?;
        let ours = |server: &&Server| place.is_in_place(server.executable);
        if self.script.is_some() {
            let until = Instant::now() + DRAINS_WITHIN;
            for server in running.iter().filter(ours) {
                // One that does not end so the script kills.
                let ended = server.end(until);
                ended.map_err(|error| still(*server, error))?;
            }
        }
        self.service("stop")?;
        // One that was started by the script itself the manager does not know.
        if let Some(script) = &self.script
            && self.systemd
            && !servers(place)?.is_empty()
        {
            must(&script.display().to_string(), &["stop"])?;
        }
        let until = Instant::now() + STARTS_WITHIN;
        for server in running {
            let why = match server.ends(until) {
                Ok(true) => continue,
                Ok(false) => STILL_THERE.to_owned(),
                Err(error) => error.to_string(),
            };
            return Err(still(server, why));
        }
        Ok(())
    }

    /// Stops our own service, or makes it what it was. Once the diversion is there nobody starts it again.
    pub(super) fn own_service(&self, wanted: bool) -> Result<(), TakeOverError> {
        let verb = if wanted { "start" } else { "stop" };
        for unit in &self.own.running {
            must("systemctl", &["--quiet", verb, unit])?;
        }
        Ok(())
    }

    /// Starts the service if it ran before the exchange.
    pub(super) fn start_again(&self, place: &Place) -> Result<(), TakeOverError> {
        match self.ran {
            true => self.start(place),
            false => Ok(()),
        }
    }

    /// Starts the service if it ran, whenever that was, and the process that listens is gone.
    pub(super) fn keep(&self, place: &Place) -> Result<(), TakeOverError> {
        let first = first();
        let listens = |server: &Server| Some(server.process) == first;
        match !self.runs || servers(place)?.iter().any(listens) {
            true => Ok(()),
            false => self.start(place),
        }
    }

    /// Starts the service if clients were served, by whichever it was.
    pub(super) fn start_any(&self, place: &Place) -> Result<(), TakeOverError> {
        match self.serves() {
            true => self.start(place),
            false => Ok(()),
        }
    }

    /// Starts the service, and waits until it has a new process of what is in the place.
    pub(super) fn start(&self, place: &Place) -> Result<(), TakeOverError> {
        let binary = &place.binary;
        let before: Vec<i32> = named(place)?.iter().map(|server| server.process).collect();
        self.service("start")?;
        let wanted = identity(binary).map_err(|error| step(binary.display().to_string(), error))?;
        let came =
            |server: &Server| server.executable == wanted && !before.contains(&server.process);
        let until = Instant::now() + STARTS_WITHIN;
        // An init script returns when its server is there. A unit may be told started before it has executed its program: it is
        // asked again until it runs, or has failed.
        loop {
            if named(place)?.iter().any(came) {
                return Ok(());
            }
            let starting = self.systemd && run("systemctl", &["--quiet", "is-active", SERVICE])?.0;
            if !starting || Instant::now() > until {
                let why = format!(
                    "no process of {} came; its log says why ('journalctl -t nbd-server')",
                    binary.display()
                );
                return Err(step("start nbd-server", why));
            }
        }
    }

    /// Ends what is left of the service where nothing is there any more that would stop it.
    pub(super) fn end(&self, place: &Place) -> Result<(), TakeOverError> {
        let until = Instant::now() + DRAINS_WITHIN;
        for server in servers(place)? {
            match server.end(until) {
                Ok(true) => {}
                Ok(false) => return Err(still(server, STILL_THERE)),
                Err(error) => return Err(still(server, error)),
            }
        }
        Ok(())
    }

    /// Has the unit wait for the drain, where it does not by itself.
    pub(super) fn put_drop_in(&self, place: &Place) -> Result<(), TakeOverError> {
        match &self.script {
            Some(script) if self.systemd && drop_in::put(place, script)? => {
                must("systemctl", &["daemon-reload"]).map(drop)
            }
            _ => Ok(()),
        }
    }

    pub(super) fn take_drop_in_away(&self) -> Result<(), TakeOverError> {
        match drop_in::take_away()? {
            true if self.systemd => must("systemctl", &["daemon-reload"]).map(drop),
            _ => Ok(()),
        }
    }
}

const STILL_THERE: &str = "it is still there; end it and try again";

fn still(server: Server, why: impl ToString) -> TakeOverError {
    let why = format!("process {}: {}", server.process, why.to_string());
    step("stop nbd-server", why)
}

/// The init script that stops the service: systemd makes a unit of it, where the package has none.
fn script(systemd: bool) -> Option<PathBuf> {
    if !systemd {
        return Some(SCRIPT.into());
    }
    let source = ["show", "--property=SourcePath", "--value", SERVICE];
    let (_, said) = run("systemctl", &source).ok()?;
    let source = Path::new(said.trim());
    source.starts_with("/etc/init.d").then(|| source.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_has_as_long_to_drain_as_its_own_unit_gives_it() {
        let unit = include_str!("../../../systemd/nbdtrack.service");
        let line = format!("\nTimeoutStopSec={}\n", DRAINS_WITHIN.as_secs());
        assert!(unit.contains(&line));
    }
}
