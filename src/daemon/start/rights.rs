//! `user` and `group` of nbd-server's configuration: the rights that the process gives up before it has a second thread; the
//! one that has read them has ended then.
//!
//! The stock server binds, becomes that user and opens each path once for each client. This one goes on opening: a disk that comes back
//! has another node, whose owner is whoever udev's rules say; the bus lets only root own the name, and asks at each connection to a
//! bus that was restarted; and the store is root's, so that `nbdtrack.service` finds it after a `give-back`. So the user stays root, and
//! what makes root more than the owner of its files goes for ever.

use std::path::Path;

use nix::unistd::{Gid, Group, User, getgid, setgid, setgroups};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs,
};

use super::configure::read_first;
use crate::config::nbd_server::{Generic, Judged, Named, judge};
use crate::config::{self, Problem};
use crate::daemon::{Error, Options};

/// CAP_DAC_OVERRIDE: nodes of disks, files of exports and files of the configuration that belong to whomever. CAP_NET_ADMIN: a buffer for
/// the kernel's events that is larger than net.core.rmem_max. The manual names both.
const KEPT: CapabilitySet = CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::NET_ADMIN);

/// Below it a port is bound only with CAP_NET_BIND_SERVICE (ip(7), ip_unprivileged_port_start).
const UNPRIVILEGED_PORT: u16 = 1024;

/// What was done, for the log, which does not run yet then.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Reduced {
    kept: Option<CapabilitySet>,
    group: Option<Gid>,
    /// What this process has no right to give up.
    unable: Vec<String>,
}

impl Reduced {
    pub(in crate::daemon) fn tell(&self) {
        for what in &self.unable {
            tracing::warn!(name: "rights_kept", "{what}");
        }
        if let Some(kept) = self.kept {
            tracing::info!(name: "rights_reduced", group = ?self.group, "rights given up but for {kept:?}");
        }
    }
}

/// The users and groups of a configuration that are not there: the stock server does not start with one.
pub fn refused_for_their_names(judged: &Judged) -> Vec<Problem> {
    let generic = judged.generic.as_ref();
    generic.map_or_else(Vec::new, |generic| {
        let user = user(generic.user.as_ref()).err();
        user.into_iter()
            .chain(group(generic.group.as_ref()).err())
            .collect()
    })
}

/// Takes the group and gives up the rights that the configuration says; nothing where it is not nbd-server's, or says nothing. To be called
/// by the first thread, while it is the only one.
///
/// # Errors
/// A user or group that is not there, or a kernel that refuses.
pub(in crate::daemon) fn reduce(options: &Options) -> Result<Reduced, Error> {
    let mut reduced = Reduced::default();
    let Some(generic) = read(options)? else {
        return Ok(reduced);
    };
    let one = |problem| Error::Config(vec![problem]);
    let user = user(generic.user.as_ref()).map_err(one)?;
    let group = group(generic.group.as_ref()).map_err(one)?;
    let kernel = |source: std::io::Error| Error::Kernel {
        what: "the rights that user and group of the configuration give up cannot be given up",
        source,
    };
    // Root is a user, too, and is meant by whoever names it.
    let others = user.filter(|user| !user.uid.is_root());
    let has = capabilities(None).map_err(|e| kernel(e.into()))?.permitted;
    reduced
        .take_group(
            group.map(|group| group.gid),
            others.is_some(),
            has.contains(CapabilitySet::SETGID),
        )
        .map_err(|e| kernel(e.into()))?;
    if others.is_some() {
        let mut kept = KEPT;
        if binds_privileged(&generic, options) {
            kept |= CapabilitySet::NET_BIND_SERVICE;
        }
        reduced
            .keep(has & kept, has.contains(CapabilitySet::SETPCAP))
            .map_err(|e| kernel(e.into()))?;
    }
    Ok(reduced)
}

/// What the configuration says of it, in a thread that has ended then.
fn read(options: &Options) -> Result<Option<Generic>, Error> {
    let Some(main) = options.config.clone() else {
        return Ok(None);
    };
    let options = options.clone();
    read_first(&main.clone(), move || generic(&main, &options))
}

impl Reduced {
    /// The stock server's order: the group, and no other group where there is a user.
    fn take_group(&mut self, group: Option<Gid>, alone: bool, may: bool) -> nix::Result<()> {
        let other = group.filter(|group| *group != getgid());
        if !may {
            if other.is_some() {
                self.unable.push("group: the process has no right to take another one, and keeps those that its service gave it".to_owned());
            }
            return Ok(());
        }
        if alone {
            setgroups(&[])?;
        }
        if let Some(group) = other {
            setgid(group)?;
        }
        self.group = group;
        Ok(())
    }

    fn keep(&mut self, kept: CapabilitySet, may_bound: bool) -> rustix::io::Result<()> {
        for bit in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << bit);
            // EINVAL past the last one that this kernel knows.
            let Ok(there) = capability_is_in_bounding_set(one) else {
                break;
            };
            if there && !kept.contains(one) && may_bound {
                remove_capability_from_bounding_set(one)?;
            }
        }
        if !may_bound {
            self.unable.push("user: the process has no right to bound its capabilities; it gives up those that it has, and gains none".to_owned());
        }
        clear_ambient_capability_set()?;
        set_capabilities(
            None,
            CapabilitySets {
                effective: kept,
                permitted: kept,
                inheritable: CapabilitySet::empty(),
            },
        )?;
        // It runs no other program.
        set_no_new_privs(true)?;
        self.kept = Some(kept);
        Ok(())
    }
}

/// `[generic]` of the main file; `None` for what is not nbd-server's, or cannot be read: whoever reads it all says why.
fn generic(main: &Path, options: &Options) -> Option<Generic> {
    let line = options.command_line.as_ref();
    if line.is_none() && !config::is_ini(main) {
        return None;
    }
    let file = config::read_ini_main(main, line);
    let mut generic = judge(&[file], &Default::default()).generic?;
    if let Some(line) = line {
        let _told_later = line.listens(main, &mut generic);
    }
    Some(generic)
}

/// Whether a port that will be bound needs a right of its own.
fn binds_privileged(generic: &Generic, options: &Options) -> bool {
    let low = |port: &str| {
        port.parse::<u16>()
            .is_ok_and(|port| port < UNPRIVILEGED_PORT)
    };
    match &options.listen {
        Some(listen) => listen
            .iter()
            .any(|address| address.rsplit(':').next().is_some_and(low)),
        None => {
            (generic.unix.is_none() || generic.dual) && generic.port.as_deref().is_some_and(low)
        }
    }
}

fn user(named: Option<&Named>) -> Result<Option<User>, Problem> {
    let find = |named: &Named| found(named, "user", User::from_name(&named.name));
    named.map(find).transpose()
}

fn group(named: Option<&Named>) -> Result<Option<Group>, Problem> {
    let find = |named: &Named| found(named, "group", Group::from_name(&named.name));
    named.map(find).transpose()
}

fn found<T>(named: &Named, what: &str, looked_up: nix::Result<Option<T>>) -> Result<T, Problem> {
    let why = match looked_up {
        Ok(Some(found)) => return Ok(found),
        Ok(None) => format!("there is no such {what}"),
        Err(error) => format!("the {what} cannot be looked up: {error}"),
    };
    Err(named.problem(format!("[generic]: {what} {:?}: {why}", named.name)))
}
