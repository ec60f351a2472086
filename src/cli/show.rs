//! `volumes`, `exports`, `status`: what the daemon's objects look like to people and to machines.

use std::collections::BTreeMap;
use std::io::Write;

use serde_json::{Map, Value, json};
use zbus::{OwnedVariant, Variant};

use super::table::{TableStyle, lay_out, printable, size};
use crate::dbus::client::{Objects, Properties};

/// Prints the attached disks.
pub fn volumes(objects: &Objects, as_json: bool) -> std::io::Result<()> {
    if as_json {
        return print_json(&list(&objects.volumes));
    }
    let look = TableStyle::of_stdout();
    let rows: Vec<Vec<String>> = objects
        .volumes
        .values()
        .map(|volume| {
            vec![
                text(volume, "Id"),
                text(volume, "DeviceNode"),
                text(volume, "DiskSeq"),
                bytes(volume, look),
                text(volume, "InUse"),
                names(objects, volume),
            ]
        })
        .collect();
    let header = ["ID", "NODE", "DISKSEQ", "SIZE", "IN USE BY", "EXPORTS"];
    table(&header, &rows, look, "no disks")
}

/// Prints the exports.
pub fn exports(objects: &Objects, as_json: bool) -> std::io::Result<()> {
    if as_json {
        return print_json(&list(&objects.exports));
    }
    let look = TableStyle::of_stdout();
    let rows: Vec<Vec<String>> = objects
        .exports
        .values()
        .map(|export| {
            vec![
                text(export, "Name"),
                text(export, "State"),
                text(export, "VolumeId"),
                text(export, "DeviceNode"),
                text(export, "Generation"),
                bytes(export, look),
                text(export, "Clients"),
                text(export, "Reason"),
            ]
        })
        .collect();
    let header = [
        "NAME", "STATE", "VOLUME", "NODE", "GEN", "SIZE", "CLIENTS", "REASON",
    ];
    table(
        &header,
        &rows,
        look,
        "no exports; 'nbdtrack add NAME --volume PROFILE:ID' makes one",
    )
}

/// Prints the NBD sessions, by export.
pub fn sessions(sessions: &[Properties], as_json: bool) -> std::io::Result<()> {
    if as_json {
        return print_json(&sessions.iter().map(object).collect());
    }
    let columns = ["Id", "Export", "Generation", "Peer", "Age"];
    let mut rows: Vec<Vec<String>> = sessions
        .iter()
        .map(|session| columns.map(|column| text(session, column)).into())
        .collect();
    rows.sort_by(|a, b| a[1..].cmp(&b[1..]));
    let header = ["ID", "EXPORT", "GEN", "PEER", "AGE MS"];
    table(&header, &rows, TableStyle::of_stdout(), "no sessions")
}

/// Prints these columns of what the daemon listed.
pub fn table_of<const N: usize>(
    header: &[&str; N],
    columns: &[&str; N],
    list: &[Properties],
    none: &str,
) -> std::io::Result<()> {
    let rows: Vec<Vec<String>> = list
        .iter()
        .map(|one| columns.map(|column| text(one, column)).into())
        .collect();
    table(header, &rows, TableStyle::of_stdout(), none)
}

/// Prints what a reload changed: a line for each export.
pub fn reload(difference: &Properties, as_json: bool) -> std::io::Result<()> {
    if as_json {
        return print_json(&object(difference));
    }
    let of = |key: &str| difference.get(key).map(|value| to_json(value));
    let mut out = String::new();
    for (key, word) in [
        ("Added", "added"),
        ("Changed", "changed"),
        ("Removed", "removed"),
        ("Refused", "refused"),
    ] {
        for item in of(key)
            .as_ref()
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            let line = match item {
                Value::Array(pair) => pair.iter().filter_map(Value::as_str).collect::<Vec<_>>(),
                one => one.as_str().into_iter().collect(),
            };
            let line: Vec<String> = line.into_iter().map(printable).collect();
            out.push_str(&format!("{word} {}\n", line.join(": ")));
        }
    }
    if out.is_empty() {
        out.push_str("nothing changed\n");
    }
    print(&out)
}

/// Prints all on one screen.
pub fn status(
    bus: &str,
    objects: &Objects,
    stats: &BTreeMap<String, u64>,
    as_json: bool,
) -> std::io::Result<()> {
    let mut states: BTreeMap<String, u64> = BTreeMap::new();
    let mut clients: u64 = 0;
    for export in objects.exports.values() {
        *states.entry(text(export, "State")).or_default() += 1;
        clients += text(export, "Clients").parse::<u64>().unwrap_or(0);
    }
    if as_json {
        return print_json(&json!({
            "bus": bus,
            "volumes": objects.volumes.len(),
            "exports": objects.exports.len(),
            "states": states,
            "clients": clients,
            "stats": stats,
        }));
    }
    let look = TableStyle::of_stdout();
    let mut out = format!(
        "daemon   running on bus {bus}\nvolumes  {} attached\nexports  {}",
        objects.volumes.len(),
        objects.exports.len()
    );
    let states: Vec<String> = states
        .iter()
        .map(|(state, count)| format!("{count} {}", look.state(state)))
        .collect();
    if !states.is_empty() {
        out.push_str(&format!(" ({})", states.join(", ")));
    }
    out.push_str(&format!("\nclients  {clients} connected\n"));
    const TROUBLES_SHOWN: usize = 12;
    let troubles: Vec<&Properties> = objects
        .exports
        .values()
        .filter(|export| text(export, "State") != "Serving")
        .collect();
    for export in troubles.iter().take(TROUBLES_SHOWN) {
        out.push_str(&format!(
            "\n{} is {}: {}",
            printable(&text(export, "Name")),
            look.state(&text(export, "State")),
            printable(&text(export, "Reason"))
        ));
    }
    if troubles.len() > TROUBLES_SHOWN {
        let more = troubles.len() - TROUBLES_SHOWN;
        out.push_str(&format!("\nand {more} more; 'nbdtrack exports' lists all"));
    }
    if !troubles.is_empty() {
        out.push('\n');
    }
    print(&out)
}

/// Prints text; a pipe that was closed is an error that the caller takes as the end.
pub fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

pub fn print_json(value: &Value) -> std::io::Result<()> {
    print(&format!("{value:#}\n"))
}

/// Turns a value of the bus into JSON.
pub fn to_json(value: &Variant<'_>) -> Value {
    match value {
        Variant::U8(number) => json!(number),
        Variant::Bool(truth) => json!(truth),
        Variant::I16(number) => json!(number),
        Variant::U16(number) => json!(number),
        Variant::I32(number) => json!(number),
        Variant::U32(number) => json!(number),
        Variant::I64(number) => json!(number),
        Variant::U64(number) => json!(number),
        Variant::F64(number) => json!(number),
        Variant::Str(text) => json!(text.as_str()),
        Variant::ObjectPath(path) => json!(path.as_str()),
        Variant::Signature(signature) => json!(signature.to_string()),
        Variant::Variant(inner) => to_json(inner),
        Variant::Array(items) => items.iter().map(to_json).collect(),
        Variant::Structure(structure) => structure.fields().iter().map(to_json).collect(),
        Variant::Dict(dict) => dict
            .iter()
            .map(|(key, value)| (plain(key), to_json(value)))
            .collect::<Map<String, Value>>()
            .into(),
        Variant::Fd(_) => Value::Null,
    }
}

/// A value as one word.
pub fn plain(value: &Variant<'_>) -> String {
    match to_json(value) {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

/// `DiskSeq` as `disk_seq`.
pub fn snake(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_ascii_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

fn list(objects: &BTreeMap<String, Properties>) -> Value {
    let one = |(path, properties): (&String, &Properties)| {
        let mut of = object(properties);
        of["object"] = json!(path);
        of
    };
    objects.iter().map(one).collect()
}

pub fn object(properties: &Properties) -> Value {
    let one = |(name, value): (&String, &OwnedVariant)| (snake(name), to_json(value));
    properties
        .iter()
        .map(one)
        .collect::<Map<String, Value>>()
        .into()
}

fn table(
    header: &[&str],
    rows: &[Vec<String>],
    look: TableStyle,
    nothing: &str,
) -> std::io::Result<()> {
    if rows.is_empty() && look.terminal {
        return print(&format!("{nothing}\n"));
    }
    print(&lay_out(header, rows, look))
}

fn text(properties: &Properties, name: &str) -> String {
    properties
        .get(name)
        .map(|value: &OwnedVariant| plain(value))
        .unwrap_or_default()
}

/// The size, for people or as a number of bytes.
fn bytes(properties: &Properties, look: TableStyle) -> String {
    let number = text(properties, "Size");
    match number.parse() {
        // Not known: the disk is not there.
        Ok(0) if look.terminal => String::new(),
        Ok(bytes) if look.terminal => size(bytes),
        _ => number,
    }
}

/// The names of a volume's exports.
fn names(objects: &Objects, volume: &Properties) -> String {
    let Some(Value::Array(paths)) = volume.get("Exports").map(|value| to_json(value)) else {
        return String::new();
    };
    let names: Vec<String> = paths
        .iter()
        .filter_map(|path| objects.exports.get(path.as_str()?))
        .map(|export| text(export, "Name"))
        .collect();
    names.join(",")
}
