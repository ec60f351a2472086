//! Holds what a reader should find in each file of `src/`: a first line that says what it is for, a size that fits in the
//! head, no unfinished place, no sleeping, and names that say something.

use std::path::Path;

mod sources;

use sources::sources;

/// Lines of a file without its tests. About 400 is where to look for the seam; this is where to cut.
const LINES_MAX: usize = 450;

/// Names that say nothing of what a type is.
const EMPTY_NAMES: &[&str] = &["Manager", "Helper", "Helpers", "Util", "Utils", "Handler"];

/// Text that has no place in what is shipped.
const FORBIDDEN: &[(&str, &str)] = &[
    ("todo!", "is unfinished"),
    ("unimplemented!", "is unfinished"),
    ("To be written", "is unfinished"),
    ("thread::sleep", "waits for a time instead of an event"),
    ("TODO", "is unfinished"),
    ("FIXME", "is unfinished"),
];

/// Where the program waits for a time, and why there is no event to wait for. Anywhere else a wait has an event, with a deadline.
const PAUSES: &[(&str, &str)] = &[
    (
        "daemon/backup/steps.rs",
        "a store that failed, and a file that another closes, are tried again",
    ),
    (
        "daemon/refusals.rs",
        "refusals of one kind are counted for a minute",
    ),
    ("dbus/server.rs", "a bus that is away is tried again"),
    (
        "mapping/database.rs",
        "a transaction that the server gave up is begun anew",
    ),
    (
        "mapping/history.rs",
        "what happens within a moment is written in one transaction",
    ),
    (
        "udev/reads.rs",
        "a disk that was exchanged while it was read, or that is in doubt, is read again",
    ),
];

#[test]
fn every_file_says_what_it_is_for_and_fits_in_the_head() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        wrong.extend(judge(&path, &text));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn judge_finds_what_it_is_for() {
    let found = |path: &str, text: &str| judge(Path::new(path), text).len();
    assert_eq!(found("nbd/wire.rs", "//! Says what.\nstruct Lease;\n"), 0);
    assert_eq!(found("nbd/wire.rs", "struct Lease;\n"), 1);
    assert_eq!(
        found("nbd/wire.rs", "//! W.\npub struct LeaseManager {\n"),
        1
    );
    assert_eq!(found("nbd/wire.rs", "//! W.\nenum ErrorHandler<T> {\n"), 1);
    assert_eq!(found("dbus/mod.rs", "//! W.\npub struct Manager {\n"), 0);
    assert_eq!(found("nbd/util.rs", "//! W.\n"), 1);
    assert_eq!(found("nbd/wire.rs", "//! W.\nfn f() { todo!() }\n"), 1);
    let pause = "//! W.\nasync fn f() { tokio::time::sleep(A).await; }\n";
    assert_eq!(found("nbd/wire.rs", pause), 1);
    assert_eq!(found("dbus/server.rs", pause), 0);
    assert_eq!(
        found("dbus/server.rs", "//! W.\nfn f() { sleep_until(a) }\n"),
        1
    );
    assert_eq!(
        found("nbd/wire.rs", &format!("//! W.\n{}", "\n".repeat(450))),
        1
    );
    let tests = format!(
        "//! W.\n#[cfg(test)]\nmod tests {{\n{}}}\n",
        "\n".repeat(450)
    );
    assert_eq!(found("nbd/wire.rs", &tests), 0);
}

fn judge(path: &Path, text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let shown = path.display();
    if !text.starts_with("//! ") {
        wrong.push(format!(
            "{shown}: does not open with `//! ` and what it is for"
        ));
    }
    let shipped = without_tests(text);
    let lines = shipped.lines().count();
    let all_tests = path.file_stem().is_some_and(|s| s == "tests");
    if lines > LINES_MAX && !all_tests {
        wrong.push(format!(
            "{shown}: {lines} lines without tests, at most {LINES_MAX}"
        ));
    }
    let paused = PAUSES.iter().any(|(file, _)| path == Path::new(file));
    if pauses(shipped) != paused && !all_tests {
        wrong.push(match paused {
            true => format!("{shown}: stands among the pauses and has none"),
            false => format!("{shown}: `sleep(` waits for a time instead of an event"),
        });
    }
    for (word, why) in FORBIDDEN {
        if shipped.contains(word) && !all_tests {
            wrong.push(format!("{shown}: `{word}` {why}"));
        }
    }
    let stem = path
        .file_stem()
        .map_or(String::new(), |s| s.to_string_lossy().into_owned());
    if ["util", "utils", "helper", "helpers", "common", "misc"].contains(&stem.as_str()) {
        wrong.push(format!("{shown}: the file's name says nothing"));
    }
    for name in type_names(shipped) {
        // The D-Bus interface is called Manager by the convention of that world.
        let interface = name == "Manager" && path.starts_with("dbus");
        if !interface && EMPTY_NAMES.iter().any(|empty| name.ends_with(empty)) {
            wrong.push(format!("{shown}: the name {name} says nothing"));
        }
    }
    wrong
}

/// A call of tokio's `sleep`, by whatever path.
fn pauses(text: &str) -> bool {
    text.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .any(|line| {
            let mut calls = line.match_indices("sleep(");
            let named = |at: usize| line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            calls.any(|(at, _)| !named(at))
        })
}

fn type_names(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        words.find(|word| ["struct", "enum", "trait", "type"].contains(word))?;
        let name = words.next()?;
        let end = name
            .find(|c: char| !c.is_alphanumeric())
            .unwrap_or(name.len());
        name[..end].chars().next().filter(|c| c.is_uppercase())?;
        Some(&name[..end])
    })
}

/// The text up to `#[cfg(test)] mod … {`.
fn without_tests(text: &str) -> &str {
    let end = text.find("#[cfg(test)]\nmod ").unwrap_or(text.len());
    &text[..end]
}
