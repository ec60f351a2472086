//! The names on the bus are a promise: a snapshot holds them, and the reference in docs/dbus.md is what the XML files say.
//! After a change that is meant: `BLESS=1 cargo test --test dbus_names`, and read the difference before it is committed.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

mod bus;

use std::fmt::Write as _;

const INTERFACES: [&str; 4] = [
    "org.nbdtrack1.Manager",
    "org.nbdtrack1.Export",
    "org.nbdtrack1.Volume",
    "org.nbdtrack1.Job",
];

/// Around the table of who may do what in docs/dbus.md.
const TABLE: [&str; 2] = [
    "<!-- This table is written by tests/dbus_names.rs out of dbus/org.nbdtrack1.conf; BLESS=1 writes it anew. -->\n",
    "<!-- The end of the table. -->\n",
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

/// How the text of a dictionary of options ends.
const UNKNOWN: &str = "An unknown key is refused by name.";

/// What stands above the reference.
const REFERENCE: &str = "
Each option of a method's dictionary has a line of its own, with its signature. An option that a method does not know is refused by
name, before anything happens.
";

/// `volume (s): what it is. path (s), format (s): …`, taken apart to one line for each, with the names as code.
fn options(says: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for sentence in says.split_inclusive(". ") {
        match (head(sentence), found.last_mut()) {
            (Some(option), _) => found.push(option),
            (None, Some(option)) => option.push_str(sentence),
            (None, None) => assert_eq!(sentence, "None yet.", "{says}"),
        }
    }
    found
        .iter()
        .map(|option| option.trim_end().to_owned())
        .collect()
}

/// A sentence that begins with options, with these as code.
fn head(sentence: &str) -> Option<String> {
    let (names, rest) = sentence.split_once(": ")?;
    let mut shown = Vec::new();
    for name in names.split(", ") {
        let (name, signature) = name.strip_suffix(')')?.split_once(" (")?;
        let of = |text: &str, letter: fn(&u8) -> bool| text.bytes().all(|byte| letter(&byte));
        let is_name = of(name, |byte| byte.is_ascii_lowercase() || *byte == b'_');
        if !is_name || !of(signature, u8::is_ascii_lowercase) {
            return None;
        }
        shown.push(format!("`{name}` (`{signature}`)"));
    }
    Some(format!("{}: {rest}", shown.join(", ")))
}

/// The table of who may do what: what the group may call stands in the policy that ships, each method by its name.
fn who_may() -> String {
    let policy = read("dbus/org.nbdtrack1.conf");
    let of_group = policy
        .split_once("<policy group=\"nbdtrack\">")
        .and_then(|(_, rest)| rest.split_once("</policy>"))
        .expect("the group has its part")
        .0;
    let mut reads: Vec<String> = Vec::new();
    for rule in of_group
        .lines()
        .filter(|line| line.contains("send_destination"))
    {
        let attribute = |name: &str| {
            let (_, rest) = rule.split_once(&format!(" {name}=\""))?;
            Some(rest.split('"').next()?.to_owned())
        };
        match (
            attribute("send_interface").as_deref(),
            attribute("send_member"),
        ) {
            (Some(_), Some(member)) => reads.push(member),
            (Some("org.freedesktop.DBus.Peer"), None) => {
                reads.extend(["Ping", "GetMachineId"].map(str::to_owned));
            }
            other => panic!("a rule that the table cannot tell of: {other:?}"),
        }
    }
    let changes: Vec<String> = items(INTERFACES[0])
        .into_iter()
        .filter(|item| item.kind == "method" && !reads.contains(&item.name))
        .map(|item| item.name)
        .collect();
    let listed = |names: &[String]| {
        let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
        names.join(", ")
    };
    format!(
        "| | root | a user allowed by name | the group `nbdtrack` | others |\n|---|---|---|---|---|\n\
         | read: {} | yes | yes | yes | no |\n| hear signals | yes | yes | yes | no |\n\
         | change: {}, and `Set` of `LogLevel` | yes | yes | no | no |\n| own the name | yes | no | no | no |\n",
        listed(&reads),
        listed(&changes)
    )
}

#[test]
fn options_are_told_a_line_each_and_what_is_no_option_stays_with_its_own() {
    let says = "mode (s): safe; soft (default). Then more: of it. at (t), to (ao): when. ";
    assert_eq!(
        options(says),
        [
            "`mode` (`s`): safe; soft (default). Then more: of it.",
            "`at` (`t`), `to` (`ao`): when."
        ]
    );
    assert!(options("None yet.").is_empty());
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
    let mut options_told = 0;
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
                _ if says.ends_with(UNKNOWN) => {
                    assert_eq!((direction.as_str(), signature.as_str()), ("in", "a{sv}"));
                    let options = options(says.strip_suffix(UNKNOWN).unwrap().trim_end());
                    let none = if options.is_empty() { " none yet." } else { "" };
                    write!(reference, "  - `{name}` (`{signature}`, in):{none}").unwrap();
                    options_told += options.len();
                    for option in options {
                        write!(reference, "\n    - {option}").unwrap();
                    }
                    writeln!(reference)
                }
                _ => {
                    assert!(
                        direction != "in" || signature != "a{sv}",
                        "{interface} {name}: does not say what becomes of an unknown key"
                    );
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
    assert!(options_told > 30, "{options_told} options are told of");
    let kept = read("docs/dbus.md");
    let (words, _) = kept.split_once(MARK).expect("the mark is there");
    let (before, rest) = words.split_once(TABLE[0]).expect("the table is there");
    let (_, after) = rest.split_once(TABLE[1]).expect("the table has an end");
    let [begin, end] = TABLE;
    let found = format!(
        "{before}{begin}{}{end}{after}{MARK}{REFERENCE}{reference}",
        who_may()
    );
    pinned("docs/dbus.md", &found, &kept);
}
