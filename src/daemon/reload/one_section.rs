//! One section of nbd-server's files as the daemon takes it: the volume that it names, where its path leads now, and whom its authfile lets in.
//! Blocks as files do; what all sections together come to is `sections`'.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use crate::config::Problem;
use crate::config::nbd_server::{Access, Backing, Section};
use crate::correlation::{ConfiguredSection, Definition, NamedPath, Source, Written};
use crate::daemon::found::{problem, refusal};
use crate::identity::{OptIn, VolumeId};
use crate::nbd::{self, AllowList};
use crate::udev;

/// Bytes of an authfile: some 100,000 addresses.
const AUTHFILE_BYTES_MAX: u64 = 2 << 20;

/// What the middle is told of it.
///
/// # Errors
/// Why it is refused, in words that begin with its name.
pub(in crate::daemon) fn configured(
    section: &Section,
    written: Written,
    allow: &BTreeSet<OptIn>,
) -> Result<ConfiguredSection, String> {
    let (volume, path) = match &section.backing {
        Backing::Volume(volume) => {
            if let Some(class) = volume.opt_in().filter(|class| !allow.contains(class)) {
                return Err(format!(
                    "[{}]: x-volume {volume} does not prove which volume it is, and is refused; if it is meant, say [identity] \
                     allow = [\"{}\"] in the file that x-settings names, else take the section out",
                    section.name,
                    class.name()
                ));
            }
            (volume.clone(), None)
        }
        Backing::Device(path) => {
            let path = path
                .to_str()
                .ok_or_else(|| format!("[{}]: exportname is not UTF-8", section.name))?;
            let at = udev::look_up(path);
            let refused = at
                .as_ref()
                .err()
                .and_then(|why| refusal(section, path, why));
            if let Some(message) = refused {
                return Err(message);
            }
            let named = NamedPath {
                path: path.to_owned(),
                trust: section.trust_path,
                written,
                at: at.map_err(|why| why.to_string()),
            };
            (VolumeId::of_path(path), Some(named))
        }
        Backing::File(path, format) => {
            let path = path.to_str();
            let path =
                path.ok_or_else(|| format!("[{}]: exportname is not UTF-8", section.name))?;
            let volume = VolumeId::of_file(path, *format);
            (
                volume.map_err(|error| format!("[{}]: exportname {error}", section.name))?,
                None,
            )
        }
    };
    let definition = Definition {
        name: section.name.clone(),
        volume,
        read_only: section.read_only,
        share: section.share,
        direct: false,
        source: Source::NbdServer,
    };
    Ok(ConfiguredSection { definition, path })
}

/// What the middle was told of it, with where its path leads now, for one that cannot be taken as it is written. A partition at the path is as
/// nothing there: the pin is what is served.
pub(super) fn as_before(known: &ConfiguredSection) -> ConfiguredSection {
    let path = known.path.clone().map(|path| NamedPath {
        at: udev::look_up(&path.path).map_err(|why| why.to_string()),
        ..path
    });
    let definition = known.definition.clone();
    ConfiguredSection { definition, path }
}

/// Whom the door lets in. `missing_allows`: an authfile that cannot be read lets everyone in; else no one.
pub(in crate::daemon) fn access(
    section: &Section,
    missing_allows: bool,
    warnings: &mut Vec<Problem>,
) -> nbd::Access {
    let Access {
        authfile,
        connections_max,
        sync,
        rotational,
    } = &section.access;
    let addresses = authfile.as_deref().and_then(|path| match text(path) {
        Ok(text) => {
            let (list, strange) = AllowList::parse(&text);
            for line in strange {
                let message = format!(
                    "[{}]: authfile {}: \"{line}\" is no address and admits no one",
                    section.name,
                    path.display()
                );
                warnings.push(problem(section, message));
            }
            Some(list)
        }
        Err(error) => {
            let (who, list) = match missing_allows {
                true => ("everyone", None),
                false => ("no one", Some(AllowList::default())),
            };
            let message = format!(
                "[{}]: authfile {}: {error}; {who} is admitted",
                section.name,
                path.display()
            );
            warnings.push(problem(section, message));
            list
        }
    });
    nbd::Access {
        addresses,
        clients_max: *connections_max,
        sync: *sync,
        rotational: *rotational,
    }
}

fn text(path: &Path) -> io::Result<String> {
    use std::os::unix::fs::OpenOptionsExt;
    // A FIFO in the place of a file must not stop the daemon.
    let file: File = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)?;
    let mut bytes = Vec::new();
    file.take(AUTHFILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > AUTHFILE_BYTES_MAX {
        return Err(io::Error::other(format!(
            "more than {AUTHFILE_BYTES_MAX} bytes"
        )));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
