//! Describes interfaces and writes their introspection data. PURE.
//!
//! A node's data names its children and does not describe them: a description of the whole tree
//! at 10,000 exports would be larger than the 32 MiB that a system bus lets a message have, and the bus drops a
//! connection that sends such a one.

use std::fmt::Write as _;

/// A named argument and its signature.
pub type Argument = (&'static str, &'static str);

pub struct Method {
    pub name: &'static str,
    pub takes: &'static [Argument],
    pub gives: &'static [Argument],
}

pub struct Signal {
    pub name: &'static str,
    pub carries: &'static [Argument],
}

/// What an object can be asked and what it tells. The tables are what calls are dispatched and checked by, so
/// what introspection says is what there is.
pub struct Interface {
    pub name: &'static str,
    pub methods: &'static [Method],
    pub signals: &'static [Signal],
    pub properties: &'static [Argument],
    /// Those of the properties that can be set, too.
    pub writable: &'static [&'static str],
}

pub const PEER: Interface = Interface {
    name: "org.freedesktop.DBus.Peer",
    methods: &[
        Method {
            name: "Ping",
            takes: &[],
            gives: &[],
        },
        Method {
            name: "GetMachineId",
            takes: &[],
            gives: &[("machine_uuid", "s")],
        },
    ],
    signals: &[],
    properties: &[],
    writable: &[],
};

pub const INTROSPECTABLE: Interface = Interface {
    name: "org.freedesktop.DBus.Introspectable",
    methods: &[Method {
        name: "Introspect",
        takes: &[],
        gives: &[("xml_data", "s")],
    }],
    signals: &[],
    properties: &[],
    writable: &[],
};

pub const PROPERTIES: Interface = Interface {
    name: "org.freedesktop.DBus.Properties",
    methods: &[
        Method {
            name: "Get",
            takes: &[("interface_name", "s"), ("property_name", "s")],
            gives: &[("value", "v")],
        },
        Method {
            name: "GetAll",
            takes: &[("interface_name", "s")],
            gives: &[("properties", "a{sv}")],
        },
        Method {
            name: "Set",
            takes: &[
                ("interface_name", "s"),
                ("property_name", "s"),
                ("value", "v"),
            ],
            gives: &[],
        },
    ],
    signals: &[Signal {
        name: "PropertiesChanged",
        carries: &[
            ("interface_name", "s"),
            ("changed_properties", "a{sv}"),
            ("invalidated_properties", "as"),
        ],
    }],
    properties: &[],
    writable: &[],
};

pub const OBJECT_MANAGER: Interface = Interface {
    name: "org.freedesktop.DBus.ObjectManager",
    methods: &[Method {
        name: "GetManagedObjects",
        takes: &[],
        gives: &[("objects", "a{oa{sa{sv}}}")],
    }],
    signals: &[
        Signal {
            name: "InterfacesAdded",
            carries: &[("object_path", "o"), ("interfaces", "a{sa{sv}}")],
        },
        Signal {
            name: "InterfacesRemoved",
            carries: &[("object_path", "o"), ("interfaces", "as")],
        },
    ],
    properties: &[],
    writable: &[],
};

/// Writes the introspection data of one node.
pub fn xml<'a>(interfaces: &[&Interface], children: impl Iterator<Item = &'a str>) -> String {
    let mut out = String::from(
        "<!DOCTYPE node PUBLIC \"-//freedesktop//DTD D-BUS Object Introspection 1.0//EN\"\n \
         \"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd\">\n<node>\n",
    );
    for interface in interfaces {
        write_interface(interface, &mut out);
    }
    for child in children {
        line(&mut out, format_args!("  <node name=\"{child}\"/>"));
    }
    out.push_str("</node>\n");
    out
}

fn write_interface(interface: &Interface, out: &mut String) {
    line(
        out,
        format_args!("  <interface name=\"{}\">", interface.name),
    );
    for method in interface.methods {
        line(out, format_args!("    <method name=\"{}\">", method.name));
        for (direction, arguments) in [("in", method.takes), ("out", method.gives)] {
            for (name, signature) in arguments {
                line(
                    out,
                    format_args!(
                        "      <arg name=\"{name}\" type=\"{signature}\" direction=\"{direction}\"/>"
                    ),
                );
            }
        }
        out.push_str("    </method>\n");
    }
    for signal in interface.signals {
        line(out, format_args!("    <signal name=\"{}\">", signal.name));
        for (name, signature) in signal.carries {
            line(
                out,
                format_args!("      <arg name=\"{name}\" type=\"{signature}\"/>"),
            );
        }
        out.push_str("    </signal>\n");
    }
    for (name, signature) in interface.properties {
        let access = if interface.writable.contains(name) {
            "readwrite"
        } else {
            "read"
        };
        line(
            out,
            format_args!(
                "    <property name=\"{name}\" type=\"{signature}\" access=\"{access}\"/>"
            ),
        );
    }
    out.push_str("  </interface>\n");
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // A write to a String cannot fail.
    let _ = writeln!(out, "{text}");
}
