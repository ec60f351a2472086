//! The names on the bus are a promise: a snapshot holds them, and the reference in docs/dbus.md is what the XML files say.
//! After a change that is meant: `BLESS=1 cargo test --test dbus_names`, and read the difference before it is committed.

#![allow(clippy::unwrap_used, clippy::panic)] // A test ends where something is missing.

mod bus;

use std::fmt::Write as _;

const INTERFACES: [&str; 4] = [
    "org.nbdtrack1.Manager",
    "org.nbdtrack1.Export",
    "org.nbdtrack1.Volume",
    "org.nbdtrack1.Job",
];

/// What precedes the reference in docs/dbus.md.
const MARK: &str = "<!-- From here on written by tests/dbus_names.rs out of dbus/*.xml; BLESS=1 writes it anew. -->\n";

fn path(place: &str) -> String {
    format!("{}/{place}", env!("CARGO_MANIFEST_DIR"))
}

fn read(place: &str) -> String {
    std::fs::read_to_string(path(place)).unwrap()
}

/// Compares, or writes when that is asked for.
fn pinned(place: &str, found: &str, kept: &str) {
    if found == kept {
        return;
    }
    if std::env::var_os("BLESS").is_some() {
        return std::fs::write(path(place), found).unwrap();
    }
    let differs = found
        .lines()
        .zip(kept.lines().chain(std::iter::repeat("")))
        .find(|(new, old)| new != old);
    panic!("{place} differs, first at {differs:?}; if that is meant: BLESS=1");
}

/// One thing that the XML describes.
struct Item {
    kind: String,
    name: String,
    signature: String,
    direction: String,
    says: String,
}

fn items(interface: &str) -> Vec<Item> {
    let xml = read(&format!("dbus/{interface}.xml"));
    let tags: Vec<&str> = xml.split('<').collect();
    let attribute = |tag: &str, name: &str| {
        let at = tag
            .find(&format!(" {name}=\""))
            .map(|at| at + name.len() + 3);
        let text = at.and_then(|at| Some(&tag[at..at + tag[at..].find('"')?]));
        text.unwrap_or("")
            .replace("&#x27;", "'")
            .replace("&gt;", ">")
            .replace("&lt;", "<")
    };
    let of = |pair: &[&str]| {
        let kind = pair[0].split([' ', '>', '/']).next().unwrap().to_owned();
        let wanted = ["interface", "method", "signal", "property", "arg"];
        wanted.contains(&kind.as_str()).then(|| Item {
            name: attribute(pair[0], "name"),
            signature: attribute(pair[0], "type"),
            direction: attribute(pair[0], "direction"),
            says: attribute(pair[1], "value"),
            kind,
        })
    };
    tags.windows(2)
        .filter_map(of)
        .filter(|item| !item.name.is_empty())
        .collect()
}

#[test]
fn no_name_or_signature_on_the_bus_changes_unseen() {
    let mut found = String::from(
        "What callers are promised, by name and signature. Written by tests/dbus_names.rs.\n\
         A line that goes or changes breaks a caller; lines may come.\n",
    );
    for interface in INTERFACES {
        let file = read(&format!("dbus/{interface}.xml"));
        writeln!(found, "\n{interface}").unwrap();
        for member in bus::members(&file, interface) {
            writeln!(found, "  {member}").unwrap();
        }
    }
    pinned(
        "tests/dbus_names.txt",
        &found,
        &read("tests/dbus_names.txt"),
    );
}

#[test]
fn the_reference_says_what_the_xml_files_say() {
    let mut reference = String::new();
    for interface in INTERFACES {
        for item in items(interface) {
            assert!(
                item.says.ends_with('.'),
                "{interface} {}: no sentence",
                item.name
            );
            let Item {
                kind,
                name,
                signature,
                direction,
                says,
            } = item;
            match kind.as_str() {
                "interface" => writeln!(reference, "\n## `{name}`\n\n{says}\n"),
                "method" | "signal" => writeln!(reference, "- **{name}** ({kind}): {says}"),
                "property" => writeln!(reference, "- **{name}** (property, `{signature}`): {says}"),
                _ => {
                    let way = if direction.is_empty() { "" } else { ", " };
                    writeln!(
                        reference,
                        "  - `{name}` (`{signature}`{way}{direction}): {says}"
                    )
                }
            }
            .unwrap();
        }
    }
    let kept = read("docs/dbus.md");
    let (words, _) = kept.split_once(MARK).expect("the mark is there");
    pinned("docs/dbus.md", &format!("{words}{MARK}{reference}"), &kept);
}
