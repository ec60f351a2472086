//! Holds the arrows between the rooms: reads every path that begins at `crate::` in `src/`, and compares it with the table in
//! `src/lib.rs`. Code under `#[cfg(test)] mod … {` is not read: tests may look anywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

mod sources;

use sources::sources;

/// Each room and the rooms that it may use, as the map of the house has them.
fn arrows() -> BTreeMap<&'static str, Vec<&'static str>> {
    table(include_str!("../src/lib.rs"))
}

/// Reads the rows of three cells: the room's name, what lives there, and names of rooms.
fn table(map: &str) -> BTreeMap<&str, Vec<&str>> {
    let rows = map.lines().filter_map(|line| line.strip_prefix("//! | "));
    rows.filter_map(|row| {
        let cells: Vec<&str> = row.trim_end_matches('|').split(" | ").collect();
        let &[room, _, may] = cells.as_slice() else {
            return None;
        };
        // Every other part of a split at `…` is a name; the cell of a room's own has one.
        Some((names(room).next()?, names(may).collect()))
    })
    .collect()
}

fn names(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// Files that only decide, by the beginning of their path in `src/`.
const PURE: &[&str] = &[
    "identity",
    "correlation",
    "claim/list",
    "claim/spec",
    "config/document",
    "config/limits",
    "config/nbd_server",
    "config/place",
    "config/server",
    "config/table",
    "files/known",
    "image/qcow2/entry",
    "image/qcow2/extensions",
    "image/qcow2/header",
    "image/qcow2/inflate",
    "image/qcow2/layout",
    "mapping/reconcile",
    "mounts",
    "dbus/error",
    "dbus/introspect",
    "dbus/paths",
    "nbd/command",
    "nbd/handshake",
    "nbd/wire",
    "udev/slots",
    "udev/uevent",
];

/// What a file that only decides cannot name: files, sockets, threads, clocks, channels, a runtime.
const IMPURE: &[&str] = &[
    "std::fs",
    // Of `std::net` only what does something: an address is a value.
    "TcpListener",
    "TcpStream",
    "UdpSocket",
    "ToSocketAddrs",
    "std::os",
    "std::thread",
    "std::process",
    "std::env",
    "std::sync::mpsc",
    "Instant::now",
    "SystemTime",
    "tokio",
    "zbus",
    "nix::",
    "libc::",
    "socket2",
    "sqlx",
    "crossbeam",
    "tracing",
    "async fn",
];

#[test]
fn arrows_between_the_rooms_go_one_way_and_each_is_used() {
    let arrows = arrows();
    let mut wrong = Vec::new();
    let mut unused: BTreeSet<(&str, &str)> = arrows
        .iter()
        .flat_map(|(room, may)| may.iter().map(|used| (*room, *used)))
        .collect();
    for (path, text) in shipped() {
        let room = room_of(&path);
        // The map itself uses no room.
        let may = match arrows.get(room.as_str()) {
            Some(may) => may.as_slice(),
            None if room == "lib" => &[],
            None => {
                let shown = path.display();
                wrong.push(format!(
                    "{shown}: the room {room} is not in src/lib.rs's table"
                ));
                continue;
            }
        };
        for used in rooms_used(&text, depth_of(&path)) {
            unused.retain(|arrow| *arrow != (room.as_str(), used.as_str()));
            if used != room && !may.contains(&used.as_str()) {
                wrong.push(format!("{}: {room} may not use {used}", path.display()));
            }
        }
    }
    wrong.extend(
        unused
            .iter()
            .map(|(room, used)| format!("src/lib.rs: {room} uses no {used}")),
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_decides_names_no_clock_file_thread_or_socket() {
    let mut wrong = Vec::new();
    for (path, text) in shipped() {
        let shown = path.to_string_lossy().into_owned();
        if !PURE.iter().any(|start| shown.starts_with(start)) {
            continue;
        }
        let code = code_of(&text);
        for word in IMPURE.iter().filter(|word| code.contains(**word)) {
            wrong.push(format!("{shown}: names {word}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_table_has_no_circle() {
    let arrows = arrows();
    for room in arrows.keys() {
        let mut reached: BTreeSet<&str> = BTreeSet::new();
        let mut next = vec![*room];
        while let Some(at) = next.pop() {
            for used in arrows.get(at).into_iter().flatten() {
                assert!(used != room, "{room} reaches itself over {at}");
                if reached.insert(used) {
                    next.push(used);
                }
            }
        }
    }
}

#[test]
fn the_map_is_read_row_by_row() {
    let map = "//! | room | what lives there | may use |\n//! |---|---|---|\n\
               //! | [`a`] | EDGE: `x` | `b`, `c` |\n//! | `b` | PURE | – |\nfn f() {}\n";
    let wanted = BTreeMap::from([("a", vec!["b", "c"]), ("b", vec![])]);
    assert_eq!(table(map), wanted);
    assert!(arrows().len() > 10, "{:?}", arrows());
}

#[test]
fn reader_finds_every_way_to_write_a_path() {
    let text = "
        use crate::identity::VolumeId;
        use crate::{image::{Extent, NoWait}, nbd, config::Config as C};
        fn f() { crate::mapping::open(super::super::udev::survey()) } // crate::cli
        /* crate::daemon */ const S: &str = \"a\";
        #[cfg(test)]
        mod tests { use crate::dbus; }
    ";
    let used = rooms_used(text, 2);
    let wanted = ["config", "identity", "image", "mapping", "nbd", "udev"];
    assert!(used.iter().eq(wanted.iter()), "{used:?}");
    assert!(!rooms_used(text, 3).contains("udev"));
}

/// The source files but those that are for tests only.
fn shipped() -> Vec<(PathBuf, String)> {
    let mut found = sources();
    let for_tests: BTreeSet<PathBuf> = found
        .iter()
        .flat_map(|(path, text)| test_files(path, text))
        .collect();
    found.retain(|(path, _)| !for_tests.contains(path));
    found
}

/// The files that `text` takes in for tests only: `#[cfg(test)] mod name;`.
fn test_files(path: &Path, text: &str) -> Vec<PathBuf> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let folder = path.parent().unwrap_or(Path::new(""));
    lines
        .windows(2)
        .filter(|pair| pair[0] == "#[cfg(test)]")
        .filter_map(|pair| pair[1].strip_prefix("mod ")?.strip_suffix(';'))
        .map(|name| folder.join(format!("{name}.rs")))
        .collect()
}

fn room_of(path: &Path) -> String {
    let first = path.components().next().expect("a path has a beginning");
    let name = first.as_os_str().to_string_lossy();
    name.strip_suffix(".rs").unwrap_or(&name).to_owned()
}

/// How many `super::` lead from this file's module to the crate.
fn depth_of(path: &Path) -> usize {
    let parts = path.components().count();
    match path.file_stem().map(|s| s.to_string_lossy()) {
        Some(stem) if stem == "mod" => parts - 1,
        Some(stem) if parts == 1 && (stem == "lib" || stem == "main") => 0,
        _ => parts,
    }
}

/// The text without comments and without what stands below `#[cfg(test)] mod … {`.
fn code_of(text: &str) -> String {
    let mut code = String::new();
    let mut lines = text.lines().peekable();
    let mut in_comment = false;
    while let Some(line) = lines.next() {
        let next_is_module = lines
            .peek()
            .is_some_and(|next| next.contains("mod ") && next.contains('{'));
        if line.trim() == "#[cfg(test)]" && next_is_module {
            break;
        }
        let mut rest = line;
        loop {
            if in_comment {
                let Some(end) = rest.find("*/") else { break };
                rest = &rest[end + 2..];
                in_comment = false;
            }
            let line_comment = rest.find("//").unwrap_or(rest.len());
            match rest.find("/*").filter(|at| *at < line_comment) {
                Some(start) => {
                    code.push_str(&rest[..start]);
                    rest = &rest[start + 2..];
                    in_comment = true;
                }
                None => {
                    code.push_str(&rest[..line_comment]);
                    break;
                }
            }
        }
        code.push('\n');
    }
    code
}

/// The rooms that the code names, by `crate::`, `nbdtrack::` or enough `super::`.
fn rooms_used(text: &str, depth: usize) -> BTreeSet<String> {
    let code = code_of(text);
    let mut starts = vec!["crate::".to_owned(), "nbdtrack::".to_owned()];
    if depth > 0 {
        starts.push("super::".repeat(depth));
    }
    let mut used = BTreeSet::new();
    for start in starts {
        for (at, _) in code.match_indices(&start) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$' || c == ':') {
                continue;
            }
            used.extend(heads(&code[at + start.len()..]));
        }
    }
    used.retain(|name| name.chars().next().is_some_and(char::is_lowercase));
    used.remove("super");
    used
}

/// The first names of a path, or of each path in a group.
fn heads(path: &str) -> Vec<String> {
    let Some(group) = path.strip_prefix('{') else {
        return vec![name_at(path)];
    };
    let mut names = Vec::new();
    let mut depth = 1;
    let mut fresh = true;
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => fresh = true,
            c if fresh && !c.is_whitespace() => {
                names.push(name_at(&group[at..]));
                fresh = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    names
}

fn name_at(text: &str) -> String {
    text.chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect()
}
