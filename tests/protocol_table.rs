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

/// Why a reference (`path` or `path::test`) does not hold.
fn dangling(root: &Path, reference: &str) -> Option<String> {
    let (path, test) = match reference.split_once("::") {
        Some((path, test)) => (path, Some(test)),
        None => (reference, None),
    };
    let Ok(text) = std::fs::read_to_string(root.join(path)) else {
        return Some(format!("{path} is not there"));
    };
    let test = test?;
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
fn every_file_and_test_in_the_table_exists() {
    let root = root();
    let wrong: Vec<String> = rows()
        .flat_map(|(_, cells)| quoted(cells[2]).chain(quoted(cells[3])).collect::<Vec<_>>())
        .filter_map(|reference| dangling(&root, reference))
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
            assert!(
                quoted(cells[3]).all(|place| place.starts_with("src/")),
                "{line}"
            );
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
    assert_eq!(dangling(&root, here), None);
    assert_eq!(
        dangling(&root, &format!("{here}::what_is_missing_is_noticed")),
        None
    );
    assert!(dangling(&root, "tests/none.rs").is_some());
    assert!(dangling(&root, &format!("{here}::quoted")).is_some());
    assert_eq!(
        cited("/// x; proto.md \"A b\", \"C\" and \"D\". Extension \"E\"\n// f"),
        ["A b", "C", "D", "E"]
    );
}
