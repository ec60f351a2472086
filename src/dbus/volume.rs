//! The Volume object: one attached disk. PURE: a view in, properties out.

use zbus::{ObjectPath, Variant};

use super::introspect::Interface;
use super::paths;
use super::tree::Properties;
use crate::correlation::DiskView;

pub const VOLUME: Interface = Interface {
    name: "org.nbdtrack1.Volume",
    methods: &[],
    signals: &[],
    properties: &[
        ("Id", "s"),
        ("Identities", "a(ss)"),
        ("Serial", "s"),
        ("Wwid", "s"),
        ("DeviceNode", "s"),
        ("DeviceNumber", "(uu)"),
        ("DiskSeq", "t"),
        ("Size", "t"),
        ("ReadOnly", "b"),
        ("Model", "s"),
        ("InUse", "s"),
        ("Exports", "ao"),
    ],
    writable: &[],
};

/// Returns all properties, in the order of the table.
pub fn properties(view: &DiskView) -> Properties {
    let identities: Vec<(String, String)> = view
        .identities
        .iter()
        .map(|identity| (identity.scheme.name().to_owned(), text(&identity.value)))
        .collect();
    let exports: Vec<ObjectPath<'static>> = view
        .exports
        .iter()
        .filter_map(|name| ObjectPath::try_from(paths::export(name)).ok())
        .collect();
    vec![
        ("Id", Variant::new(text(&view.id))),
        ("Identities", Variant::new(identities)),
        ("Serial", Variant::new(text(&view.serial))),
        ("Wwid", Variant::new(text(&view.wwid))),
        ("DeviceNode", Variant::new(text(&view.node.0))),
        (
            "DeviceNumber",
            Variant::new((view.number.major, view.number.minor)),
        ),
        ("DiskSeq", Variant::new(view.diskseq.0)),
        ("Size", Variant::new(view.size)),
        ("ReadOnly", Variant::new(view.read_only)),
        ("Model", Variant::new(text(&view.model))),
        ("InUse", Variant::new(text(&view.in_use))),
        ("Exports", Variant::new(exports)),
    ]
}

/// Makes a text fit for the bus: no NUL (D-Bus Specification, "Basic types": strings), which the bus would drop us for.
pub fn text(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
