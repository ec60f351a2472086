//! `explain`: why an export is where it is, or what a disk is to the daemon, for people and for machines.

use serde_json::Value;

use super::history::{Line, time};
use super::show::{print, print_json, to_json};
use super::table::{TableStyle, printable};
use crate::dbus::client::Properties;

/// Prints an explanation as the daemon gave it.
pub fn explain(explanation: &Properties, as_json: bool) -> std::io::Result<()> {
    let value: Value = explanation
        .iter()
        .map(|(key, value)| (key.clone(), to_json(value)))
        .collect::<serde_json::Map<_, _>>()
        .into();
    if as_json {
        return print_json(&value);
    }
    print(&page(&value, TableStyle::of_stdout()))
}

fn page(value: &Value, look: TableStyle) -> String {
    let mut out = format!(
        "{} is {}: {}\n",
        printable(word(value, "subject")),
        look.state(word(value, "state")),
        printable(word(value, "why"))
    );
    let is_disk = word(value, "subject").starts_with("disk ");
    let (looks_for, others) = if is_disk {
        ("presents", "exports that look for it")
    } else {
        ("looks for", "disks")
    };
    for identity in words(value, "identities") {
        out.push_str(&format!("  {looks_for:9}  {}\n", printable(&identity)));
    }
    let candidates = list(value, "candidates");
    if !candidates.is_empty() {
        out.push_str(&format!("\n{others}\n"));
    }
    for candidate in candidates {
        out.push_str(&shown(candidate, is_disk));
    }
    match value.get("more").and_then(Value::as_u64) {
        Some(more) if more > 0 => {
            out.push_str(&format!("  and {more} more that do not match\n"));
        }
        _ => {}
    }
    let events = list(value, "events");
    if !events.is_empty() {
        out.push_str("\nwhat led here\n");
    }
    for event in events {
        let line = Line::of(event);
        out.push_str(&format!(
            "  {}  {:9} {}\n",
            time(line.at_us),
            line.kind,
            line.sentence()
        ));
    }
    match word(value, "events_missing") {
        "" => {}
        reason => out.push_str(&format!(
            "\nwhat led here is not known: {}\n",
            printable(reason)
        )),
    }
    let advice = words(value, "advice");
    if !advice.is_empty() {
        out.push_str("\nwhat to do\n");
    }
    for line in advice {
        out.push_str(&format!("  - {}\n", printable(&line)));
    }
    out
}

fn shown(candidate: &Value, is_disk: bool) -> String {
    let whose = if is_disk {
        printable(word(candidate, "export"))
    } else {
        format!(
            "{} (diskseq {})",
            printable(word(candidate, "node")),
            candidate
                .get("diskseq")
                .and_then(Value::as_u64)
                .unwrap_or(0)
        )
    };
    let mut out = format!("  {whose}: {}\n", word(candidate, "verdict"));
    let unmatched = if is_disk { "looks for" } else { "presents" };
    for (title, key) in [
        ("matches", "matched"),
        (unmatched, "unmatched"),
        ("but", "obstacles"),
    ] {
        for item in words(candidate, key) {
            out.push_str(&format!("    {title:9}  {}\n", printable(&item)));
        }
    }
    out
}

fn word<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value
        .get(key)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

fn words(value: &Value, key: &str) -> Vec<String> {
    list(value, key)
        .iter()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_person_reads_what_was_compared_what_led_there_and_what_to_do() {
        let value = json!({
            "subject": "export vm", "state": "Absent", "why": "no attached disk presents it",
            "identities": ["loop:/b"], "more": 92,
            "candidates": [{"node": "/dev/loop3", "diskseq": 3, "verdict": "no match", "matched": [],
                "unmatched": ["loop:/other"], "obstacles": ["it is held by md0"]}],
            "events": [{"id": 1, "at_us": 1_700_000_000_000_000_u64, "kind": "state", "export": "vm", "old": "Serving",
                "new": "Absent", "detail": "gone"}],
            "events_missing": "", "advice": ["attach it"],
        });
        let look = TableStyle {
            terminal: false,
            colour: false,
        };
        assert_eq!(
            page(&value, look),
            "export vm is Absent: no attached disk presents it\n  looks for  loop:/b\n\ndisks\n  \
             /dev/loop3 (diskseq 3): no match\n    presents   loop:/other\n    but        it is held by md0\n  \
             and 92 more that do not match\n\nwhat led here\n  2023-11-14T22:13:20.000Z  state     vm: Serving -> Absent, \
             gone\n\nwhat to do\n  - attach it\n"
        );
    }

    #[test]
    fn text_from_outside_never_moves_the_cursor() {
        let value = json!({"subject": "export a\u{1b}[2J", "state": "Absent", "why": "x\ry"});
        let look = TableStyle {
            terminal: true,
            colour: false,
        };
        let text = page(&value, look);
        assert!(!text.contains('\u{1b}') && !text.contains('\r'), "{text:?}");
    }
}
