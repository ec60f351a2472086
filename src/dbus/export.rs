//! The Export object: one name that clients may ask for. PURE: a view in, properties out.

use zbus::{ObjectPath, Variant};

use super::introspect::Interface;
use super::tree::Properties;
use super::volume::text;
use crate::correlation::ExportView;

pub const EXPORT: Interface = Interface {
    name: "org.nbdtrack1.Export",
    methods: &[],
    signals: &[],
    properties: &[
        ("Name", "s"),
        ("State", "s"),
        ("Reason", "s"),
        ("VolumeId", "s"),
        ("Volume", "o"),
        ("DeviceNode", "s"),
        ("DiskSeq", "t"),
        ("Generation", "t"),
        ("Size", "t"),
        ("ReadOnly", "b"),
        ("Clients", "u"),
        ("VmId", "s"),
        ("DiskUnit", "u"),
        ("Source", "s"),
        ("Hidden", "b"),
    ],
    writable: &[],
};

/// Returns all properties, in the order of the table. `volume` is the path of its disk's object.
pub fn properties(view: &ExportView, clients: u32, volume: &ObjectPath<'static>) -> Properties {
    let disk = view.mapping.as_ref().map(|mapping| &mapping.disk);
    let (vm_id, unit) = disk.map_or(("", 0), |disk| (disk.vm_id(), disk.unit()));
    let node = view.node.as_ref().map_or("", |node| node.0.as_str());
    vec![
        ("Name", Variant::new(text(view.name.as_str()))),
        ("State", Variant::new(view.state.name())),
        ("Reason", Variant::new(text(&view.reason))),
        ("VolumeId", Variant::new(text(&view.volume_id))),
        ("Volume", Variant::new(volume.clone())),
        ("DeviceNode", Variant::new(text(node))),
        ("DiskSeq", Variant::new(view.disk.map_or(0, |disk| disk.0))),
        ("Generation", Variant::new(view.generation.0)),
        ("Size", Variant::new(view.size)),
        ("ReadOnly", Variant::new(view.read_only)),
        ("Clients", Variant::new(clients)),
        ("VmId", Variant::new(text(vm_id))),
        ("DiskUnit", Variant::new(unit)),
        ("Source", Variant::new(view.source.name())),
        ("Hidden", Variant::new(view.hidden)),
    ]
}
