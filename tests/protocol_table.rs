//! Holds `docs/protocol.md`: the files and tests that it names exist, each row names both, and each section of proto.md that
//! the code cites has its place in it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

mod sources;

use sources::sources;

const TABLE: &str = include_str!("../docs/protocol.md");

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// What stands between backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Why a reference to what is done (`path`, or `path::item` of what is shipped) does not hold.
fn undone(root: &Path, reference: &str) -> Option<String> {
    let (path, item) = match reference.split_once("::") {
        Some((path, item)) => (path, Some(item)),
        None => (reference, None),
    };
    let Ok(text) = std::fs::read_to_string(root.join(path)) else {
        return Some(format!("{path} is not there"));
    };
    let item = item?;
    let shipped = text.split("mod tests {").next().unwrap_or_default();
    let defines = |line: &str| {
        let words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
        let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
        let kinds = ["fn", "struct", "enum", "trait", "const"];
        words
            .windows(2)
            .any(|pair| kinds.contains(&pair[0]) && pair[1] == item)
    };
    let mut code = shipped
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    (!code.any(defines)).then(|| format!("{path} has no {item}"))
}

/// Why a reference to a test (`path::test`) does not hold.
fn unheld(root: &Path, reference: &str) -> Option<String> {
    let Some((path, test)) = reference.split_once("::") else {
        return Some(format!("{reference} is no test"));
    };
    let Ok(text) = std::fs::read_to_string(root.join(path)) else {
        return Some(format!("{path} is not there"));
    };
    // The line before the function, whatever else is between.
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() == "#[test]" {
            let named = lines.find(|line| line.contains("fn "))?;
            if named.contains(&format!("fn {test}(")) {
                return None;
            }
        }
    }
    Some(format!("{path} has no test {test}"))
}

/// The rows of the tables that say who holds what.
fn rows() -> impl Iterator<Item = (&'static str, Vec<&'static str>)> {
    TABLE.lines().filter_map(|line| {
        let cells: Vec<&str> = line.strip_prefix('|')?.split('|').map(str::trim).collect();
        let is_row = cells.len() == 5 && cells[3].contains("::");
        is_row.then_some((line, cells))
    })
}

/// The sections that the table has a place for: quoted in its headings and in lines about the extension.
fn sections() -> BTreeSet<&'static str> {
    TABLE
        .lines()
        .filter(|line| line.starts_with("### ") || line.starts_with("Extension"))
        .flat_map(|line| line.split('"').skip(1).step_by(2))
        .collect()
}

/// The sections that the text cites, as `proto.md "…"`, with others after it.
fn cited(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    // A citation may go on in the next line of a comment.
    let joined = text
        .lines()
        .map(|line| line.trim_start().trim_start_matches(['/', '!', ' ']))
        .collect::<Vec<_>>()
        .join(" ");
    for mark in ["proto.md \"", "xtension \""] {
        for (at, _) in joined.match_indices(mark) {
            let mut rest = &joined[at + mark.len()..];
            while let Some((section, after)) = rest.split_once('"') {
                found.push(section.to_owned());
                let next = [", \"", " and \"", ", extension \""]
                    .iter()
                    .find_map(|link| after.strip_prefix(link));
                let Some(next) = next else { break };
                rest = next;
            }
        }
    }
    found
}

#[test]
fn every_file_item_and_test_in_the_table_exists() {
    let root = root();
    let wrong: Vec<String> = rows()
        .flat_map(|(_, cells)| {
            let undone = quoted(cells[2]).filter_map(|place| undone(&root, place));
            let unheld = quoted(cells[3]).filter_map(|test| unheld(&root, test));
            undone.chain(unheld).collect::<Vec<_>>()
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Below this the table was not read as a table.
    assert!(rows().count() >= 60, "{} rows", rows().count());
}

#[test]
fn every_row_says_where_it_is_done_and_by_which_test_it_is_held() {
    for line in TABLE.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        // The table of clients has its own columns.
        if line.contains("::") {
            assert_eq!(cells.len(), 6, "{line}");
            // A file of the protocol's own room has many duties: which item has this one?
            let names = |place: &str| match place.strip_prefix("src/") {
                Some(place) => place.contains("::") || !place.starts_with("nbd/"),
                None => false,
            };
            assert!(quoted(cells[3]).all(names), "{line}");
            assert!(quoted(cells[3]).count() > 0, "{line}");
            assert!(quoted(cells[4]).all(|test| test.contains("::")), "{line}");
        } else {
            assert!(
                !line.contains("MUST") && !line.contains("SHOULD"),
                "held by nothing: {line}"
            );
        }
    }
}

#[test]
fn every_section_that_the_code_cites_has_its_place() {
    let sections = sections();
    let mut wrong = Vec::new();
    let mut count = 0;
    for (path, text) in sources() {
        for section in cited(&text) {
            count += 1;
            if !sections.contains(section.as_str()) {
                wrong.push(format!("{}: \"{section}\"", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count >= 40, "{count} citations");
}

#[test]
fn what_is_missing_is_noticed() {
    let root = root();
    let here = "tests/protocol_table.rs";
    let noticed = format!("{here}::what_is_missing_is_noticed");
    assert_eq!(unheld(&root, &noticed), None);
    assert!(unheld(&root, here).is_some());
    assert!(unheld(&root, &format!("{here}::quoted")).is_some());
    assert_eq!(undone(&root, "src/nbd/lease.rs"), None);
    assert_eq!(undone(&root, "src/nbd/lease.rs::wire_error"), None);
    assert_eq!(undone(&root, "src/nbd/lease.rs::Lease"), None);
    for missing in [
        "src/nbd/none.rs",
        "src/nbd/lease.rs::wire",
        "src/nbd/lease.rs::tests",
    ] {
        assert!(undone(&root, missing).is_some(), "{missing}");
    }
    assert_eq!(
        cited("/// x; proto.md \"A b\", \"C\" and \"D\". Extension \"E\"\n// f"),
        ["A b", "C", "D", "E"]
    );
}
