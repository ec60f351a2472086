//! Words the signals: what the tree's difference and the loop's notices look like on the wire. PURE.

use std::collections::BTreeMap;

use zbus::message::Builder;
use zbus::{Message, ObjectPath, Variant};

use super::error::on_the_wire;
use super::introspect::{OBJECT_MANAGER, PROPERTIES};
use super::job::JOB;
use super::manager::MANAGER;
use super::paths;
use super::tree::{Told, Tree};
use super::volume::text;
use crate::correlation::{Difference, ExportName, Notice};

/// Words a difference.
pub fn message(told: &Told) -> zbus::Result<Message> {
    match told {
        Told::Added {
            path,
            interface,
            properties,
        } => {
            let properties: BTreeMap<&str, &Variant<'_>> = by_name(properties);
            let interfaces = BTreeMap::from([(*interface, properties)]);
            from(paths::ROOT, OBJECT_MANAGER.name, "InterfacesAdded")?.build(&(path, interfaces))
        }
        Told::Removed { path, interface } => {
            from(paths::ROOT, OBJECT_MANAGER.name, "InterfacesRemoved")?
                .build(&(path, vec![*interface]))
        }
        Told::Completed { path, result } => {
            let (error, why) = match result {
                Ok(()) => (String::new(), ""),
                Err(error) => on_the_wire(error),
            };
            from(path.as_str(), JOB.name, "Completed")?.build(&(result.is_ok(), error, text(why)))
        }
        Told::Changed {
            path,
            interface,
            properties,
        } => {
            let none: [&str; 0] = [];
            from(path.as_str(), PROPERTIES.name, "PropertiesChanged")?.build(&(
                *interface,
                by_name(properties),
                &none[..],
            ))
        }
    }
}

/// Returns properties as the dictionary that the bus wants.
pub fn by_name<'a>(
    properties: &'a [(&'static str, Variant<'static>)],
) -> BTreeMap<&'static str, &'a Variant<'static>> {
    properties
        .iter()
        .map(|(name, value)| (*name, value))
        .collect()
}

fn from<'a>(path: &'a str, interface: &'a str, member: &'a str) -> zbus::Result<Builder<'a>> {
    let path = ObjectPath::try_from(path)?;
    Ok(Message::signal(path, interface, member))
}

/// Words a notice; `None` for one that is only an order to look at a view.
pub fn signal(tree: &Tree, notice: &Notice) -> Option<zbus::Result<Message>> {
    let manager = |member| from(paths::ROOT, MANAGER.name, member);
    Some(match notice {
        Notice::Export(_) | Notice::Disk(_) | Notice::Exports(_) => return None,
        Notice::Attached { diskseq, id, node } => {
            let path = tree.told_disk_path(*diskseq, id);
            let body = (path, text(id), text(&node.0), diskseq.0);
            manager("VolumeAttached").and_then(|signal| signal.build(&body))
        }
        Notice::Detached { diskseq, id, node } => {
            let path = tree.told_disk_path(*diskseq, id);
            let body = (path, text(id), text(&node.0), diskseq.0);
            manager("VolumeDetached").and_then(|signal| signal.build(&body))
        }
        Notice::Renamed {
            diskseq,
            id,
            old,
            new,
        } => {
            let path = tree.told_disk_path(*diskseq, id);
            let body = (path, text(id), text(&old.0), text(&new.0));
            manager("VolumeRenamed").and_then(|signal| signal.build(&body))
        }
        Notice::Resized {
            diskseq,
            id,
            old,
            new,
        } => {
            let path = tree.told_disk_path(*diskseq, id);
            let body = (path, text(id), *old, *new);
            manager("VolumeResized").and_then(|signal| signal.build(&body))
        }
        Notice::ExportState {
            export,
            old,
            new,
            reason,
        } => {
            let path = tree.export_path(export);
            let body = (path, export.as_str(), old.name(), new.name(), text(reason));
            manager("ExportStateChanged").and_then(|signal| signal.build(&body))
        }
        Notice::IdentityConflict { id, disks } => {
            let volumes: Vec<ObjectPath<'_>> = disks
                .iter()
                .map(|diskseq| tree.told_disk_path(*diskseq, id))
                .collect();
            manager("IdentityConflict").and_then(|signal| signal.build(&(text(id), volumes)))
        }
        Notice::Reloaded(difference) => {
            manager("ConfigReloaded").and_then(|signal| signal.build(&words(difference)))
        }
    })
}

/// What a reload changed, as a dictionary: `Added`, `Changed`, `Removed` (`as`) and `Refused` (`a(ss)`, name and reason).
pub fn words(difference: &Difference) -> BTreeMap<&'static str, Variant<'static>> {
    let names = |names: &[ExportName]| -> Variant<'static> {
        let names: Vec<String> = names.iter().map(|name| text(name.as_str())).collect();
        Variant::new(names)
    };
    let refused: Vec<(String, String)> = difference
        .refused
        .iter()
        .map(|(name, reason)| (text(name.as_str()), text(reason)))
        .collect();
    BTreeMap::from([
        ("Added", names(&difference.added)),
        ("Changed", names(&difference.changed)),
        ("Removed", names(&difference.removed)),
        ("Refused", Variant::new(refused)),
    ])
}
