//! EDGE: a drop-in of the service's unit, there for as long as nbdtrack has the place. The stock server has nothing to drain, so its init script
//! gives it a second to end and then kills it; the unit that systemd makes of the script stops it by nothing else.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::TakeOverError;
use super::call::step;
use super::machine::DRAINS_WITHIN;
use super::place::Place;
use crate::cli::nbd_server::PID_FILE;

const FOLDER: &str = "/etc/systemd/system/nbd-server.service.d";
const NAME: &str = "nbdtrack.conf";

fn text(place: &Place, script: &Path) -> String {
    let (binary, script) = (place.binary.display(), script.display());
    let seconds = DRAINS_WITHIN.as_secs();
    format!(
        "# Written by 'nbdtrack take-over', taken away by 'nbdtrack give-back': a stop lets nbdtrack drain its clients before the init script\n\
         # kills what is left after a second.\n\
         [Service]\n\
         ExecStop=\n\
         ExecStop=-/sbin/start-stop-daemon --stop --quiet --oknodo --exec {binary} --pidfile {PID_FILE} --retry TERM/{seconds}\n\
         ExecStop={script} stop\n"
    )
}

/// Writes the drop-in of a unit that is made of an init script, if it is not there; systemd knows it after a `daemon-reload`.
pub(super) fn put(place: &Place, script: &Path) -> Result<bool, TakeOverError> {
    let path = Path::new(FOLDER).join(NAME);
    let text = text(place, script);
    if fs::read_to_string(&path).is_ok_and(|there| there == text) {
        return Ok(false);
    }
    let write = || -> io::Result<()> {
        fs::create_dir_all(FOLDER)?;
        // What does not end in .conf systemd does not read.
        let new: PathBuf = path.with_extension("new");
        let mut to = File::create(&new)?;
        to.write_all(text.as_bytes())?;
        to.sync_all()?;
        fs::rename(&new, &path)
    };
    let written = write().map_err(|error| step(path.display().to_string(), error));
    written.map(|()| true)
}

/// Takes it away, if it is there, and its folder if nothing else is in it.
pub(super) fn take_away() -> Result<bool, TakeOverError> {
    let path = Path::new(FOLDER).join(NAME);
    match fs::remove_file(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        removed => removed.map_err(|error| step(path.display().to_string(), error))?,
    }
    // The folder may hold an operator's own drop-ins, and then it stays.
    let _kept = fs::remove_dir(FOLDER);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_waits_for_the_drain_before_the_script_kills() {
        let place = Place {
            binary: "/bin/nbd-server".into(),
            stock: "/bin/nbd-server.stock".into(),
            taken: true,
            packaged: true,
        };
        let text = text(&place, Path::new("/etc/init.d/nbd-server"));
        let stops: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("ExecStop="))
            .collect();
        let waits = "-/sbin/start-stop-daemon --stop --quiet --oknodo --exec /bin/nbd-server \
                     --pidfile /var/run/nbd-server.pid --retry TERM/45";
        assert_eq!(stops, ["", waits, "/etc/init.d/nbd-server stop"]);
    }
}
