//! All pairs of a handshake's state and what can come in it, pinned in `pairs.txt`, which is written for people.
//!
//! A difference fails and says how to accept it; whoever accepts it reads the difference first.

use std::fmt::Write;

use super::contexts::tests::query;
use super::tests::{facts, go, start};
use super::*;

const PINNED: &str = include_str!("pairs.txt");

/// Builds a state anew for each pair.
type State = (&'static str, fn() -> ExpectOption);

fn structured() -> ExpectOption {
    ExpectOption {
        headers: Headers::Structured,
        ..start()
    }
}

fn extended() -> ExpectOption {
    ExpectOption {
        headers: Headers::Extended,
        ..start()
    }
}

fn with_contexts(state: ExpectOption) -> ExpectOption {
    ExpectOption {
        contexts_of: Some(("v".to_owned(), ALLOCATION)),
        ..state
    }
}

const ALLOCATION: Selected = Selected {
    allocation: true,
    depth: false,
};

const STATES: &[State] = &[
    ("simple", start),
    ("structured", structured),
    (
        "structured, allocation of v",
        || with_contexts(structured()),
    ),
    ("extended", extended),
    ("extended, allocation of v", || with_contexts(extended())),
];

/// Every option that the protocol has, well formed and not.
fn messages() -> Vec<(&'static str, u32, Vec<u8>)> {
    let allocation: &[&[u8]] = &[b"base:allocation"];
    let depth: &[&[u8]] = &[b"qemu:allocation-depth"];
    let both: &[&[u8]] = &[b"qemu:allocation-depth", b"base:allocation"];
    vec![
        ("EXPORT_NAME v", option::EXPORT_NAME, b"v".to_vec()),
        ("EXPORT_NAME not UTF-8", option::EXPORT_NAME, vec![0xff]),
        ("ABORT", option::ABORT, Vec::new()),
        ("ABORT with data", option::ABORT, vec![1]),
        ("LIST", option::LIST, Vec::new()),
        ("LIST with data", option::LIST, vec![1]),
        ("PEEK_EXPORT (withdrawn)", 4, Vec::new()),
        ("STARTTLS", option::STARTTLS, Vec::new()),
        ("STARTTLS with data", option::STARTTLS, vec![1]),
        ("INFO v", option::INFO, go(b"v", &[])),
        (
            "INFO v, all items",
            option::INFO,
            go(b"v", &[0, 1, 2, 3, 9]),
        ),
        ("INFO cut off", option::INFO, vec![0, 0, 0, 9, b'v']),
        ("GO v", option::GO, go(b"v", &[])),
        ("GO w", option::GO, go(b"w", &[])),
        ("GO cut off", option::GO, vec![0, 0, 0, 9, b'v']),
        ("STRUCTURED_REPLY", option::STRUCTURED_REPLY, Vec::new()),
        (
            "STRUCTURED_REPLY with data",
            option::STRUCTURED_REPLY,
            vec![1],
        ),
        (
            "LIST_META_CONTEXT v: all",
            option::LIST_META_CONTEXT,
            query(b"v", &[]),
        ),
        (
            "LIST_META_CONTEXT v: base:",
            option::LIST_META_CONTEXT,
            query(b"v", &[b"base:"]),
        ),
        (
            "LIST_META_CONTEXT v: qemu:",
            option::LIST_META_CONTEXT,
            query(b"v", &[b"qemu:"]),
        ),
        (
            "LIST_META_CONTEXT v: none that is",
            option::LIST_META_CONTEXT,
            query(b"v", &[b"x-y:z"]),
        ),
        (
            "LIST_META_CONTEXT cut off",
            option::LIST_META_CONTEXT,
            vec![0, 0, 0, 9],
        ),
        (
            "SET_META_CONTEXT v",
            option::SET_META_CONTEXT,
            query(b"v", allocation),
        ),
        (
            "SET_META_CONTEXT v: depth",
            option::SET_META_CONTEXT,
            query(b"v", depth),
        ),
        (
            "SET_META_CONTEXT v: both",
            option::SET_META_CONTEXT,
            query(b"v", both),
        ),
        (
            "SET_META_CONTEXT w",
            option::SET_META_CONTEXT,
            query(b"w", allocation),
        ),
        (
            "SET_META_CONTEXT v: none",
            option::SET_META_CONTEXT,
            query(b"v", &[]),
        ),
        (
            "SET_META_CONTEXT v: base:",
            option::SET_META_CONTEXT,
            query(b"v", &[b"base:"]),
        ),
        (
            "SET_META_CONTEXT cut off",
            option::SET_META_CONTEXT,
            vec![0, 0, 0, 9],
        ),
        ("EXTENDED_HEADERS", option::EXTENDED_HEADERS, Vec::new()),
        (
            "EXTENDED_HEADERS with data",
            option::EXTENDED_HEADERS,
            vec![1],
        ),
        ("an unknown option", 4000, Vec::new()),
    ]
}

fn reply_name(kind: u32) -> &'static str {
    match kind {
        rep::ACK => "ACK",
        rep::SERVER => "SERVER",
        rep::INFO => "INFO",
        rep::META_CONTEXT => "META_CONTEXT",
        rep::ERR_UNSUP => "ERR_UNSUP",
        rep::ERR_POLICY => "ERR_POLICY",
        rep::ERR_INVALID => "ERR_INVALID",
        rep::ERR_UNKNOWN => "ERR_UNKNOWN",
        rep::ERR_SHUTDOWN => "ERR_SHUTDOWN",
        rep::ERR_TOO_BIG => "ERR_TOO_BIG",
        rep::ERR_EXT_HEADER_REQD => "ERR_EXT_HEADER_REQD",
        _ => panic!("a reply that has no name here: {kind:#x}"),
    }
}

/// The replies in `out` in words, but for what EXPORT_NAME sends, which has no frame.
fn said(mut out: &[u8], framed: bool) -> String {
    if !framed {
        return format!("{} bytes", out.len());
    }
    let mut words: Vec<String> = Vec::new();
    while !out.is_empty() {
        let kind = wire::be32(out, 12);
        let (data, rest) = out[20..].split_at(wire::be32(out, 16) as usize);
        words.push(match kind {
            rep::INFO => format!("INFO {}", wire::be16(data, 0)),
            rep::META_CONTEXT => format!("META_CONTEXT {}", wire::be32(data, 0)),
            other => reply_name(other).to_owned(),
        });
        out = rest;
    }
    words.join(", ")
}

fn selected(contexts: Selected) -> String {
    let words = [
        (contexts.allocation, "allocation"),
        (contexts.depth, "depth"),
    ];
    let words: Vec<&str> = words
        .iter()
        .filter(|(on, _)| *on)
        .map(|(_, word)| *word)
        .collect();
    words.join(" and ")
}

fn state_name(state: &ExpectOption) -> String {
    let headers = match state.headers {
        Headers::Simple => "simple",
        Headers::Structured => "structured",
        Headers::Extended => "extended",
    };
    match &state.contexts_of {
        Some((name, contexts)) => format!("{headers}, {} of {name}", selected(*contexts)),
        None => headers.to_owned(),
    }
}

fn end(next: Next, out: &[u8], framed: bool) -> String {
    match next {
        Next::ExpectOption(state) => format!("{}; to: {}", said(out, framed), state_name(&state)),
        Next::Transmission(agreed) => {
            let mut contexts = selected(agreed.contexts);
            if !contexts.is_empty() {
                contexts.insert_str(0, " with ");
            }
            format!(
                "{}; TRANSMISSION {:?}{contexts}",
                said(out, framed),
                agreed.headers
            )
        }
        Next::Closed(reason) => {
            let said = if out.is_empty() {
                "-".to_owned()
            } else {
                said(out, framed)
            };
            format!("{said}; CLOSED {reason:?}")
        }
        Next::Choose(_) | Next::List(_) | Next::Contexts(_) => panic!("asked the edge twice"),
    }
}

fn refusal() -> Refusal {
    Refusal {
        kind: RefusalKind::NotAvailable,
        reason: "no disk".to_owned(),
    }
}

/// One line for each way that the edge can answer.
fn lines(make: fn() -> ExpectOption, label: &str, code: u32, data: &[u8], text: &mut String) {
    let framed = code != option::EXPORT_NAME;
    let mut line = |verdict: &str, next: Next, out: &[u8]| {
        let label = format!("{label}{verdict}");
        writeln!(text, "  {label:<40} {}", end(next, out, framed)).unwrap();
    };
    let on_option = |out: &mut Vec<u8>| make().on_option(code, data, false, out);
    let mut out = Vec::new();
    match on_option(&mut out) {
        Next::Choose(choose) => {
            let next = choose.answer(Ok(facts()), &mut out);
            line(" [is there]", next, &out);
            let mut out = Vec::new();
            let Next::Choose(choose) = on_option(&mut out) else {
                panic!("another way the second time")
            };
            let next = choose.answer(Err(refusal()), &mut out);
            line(" [is not]", next, &out);
        }
        Next::Contexts(contexts) => {
            let next = contexts.answer(Ok(()), &mut out);
            line(" [is there]", next, &out);
            let mut out = Vec::new();
            let Next::Contexts(contexts) = on_option(&mut out) else {
                panic!("another way the second time")
            };
            let next = contexts.answer(Err(refusal()), &mut out);
            line(" [is not]", next, &out);
        }
        Next::List(list) => {
            let next = list.answer(Some(["v", "w"].into_iter()), &mut out);
            line(" [two names]", next, &out);
        }
        next => line("", next, &out),
    }
}

fn table() -> String {
    let mut text = String::from(
        "What each state of the handshake answers to each message, and where it goes. Written by the test in pairs.rs.\n\
         Where an export is named there is a line for one that is there and one for one that is not. INFO n and\n\
         META_CONTEXT n: the number in it. \"-\": nothing is said.\n",
    );
    writeln!(text, "\nflags").unwrap();
    for flags in [0, 1, 2, 3, 4, 7, 1 << 31] {
        let next = match ExpectFlags.on_flags(flags) {
            Ok(state) => format!("to: {} (no_zeroes {})", state_name(&state), state.no_zeroes),
            Err(reason) => format!("CLOSED {reason:?}"),
        };
        writeln!(text, "  {flags:<40} {next}").unwrap();
    }
    for (name, make) in STATES {
        writeln!(text, "\n{name}").unwrap();
        for (label, code, data) in messages() {
            lines(*make, label, code, &data, &mut text);
        }
        for (label, code) in [
            ("EXPORT_NAME, too much data", option::EXPORT_NAME),
            ("SET_META_CONTEXT, too much data", option::SET_META_CONTEXT),
            ("GO, too much data", option::GO),
        ] {
            let mut out = Vec::new();
            let next = make().on_oversized(code, &mut out);
            writeln!(text, "  {label:<40} {}", end(next, &out, true)).unwrap();
        }
    }
    writeln!(text, "\nany, while the server stops").unwrap();
    for (label, code, data) in messages() {
        let mut out = Vec::new();
        let next = with_contexts(structured()).on_option(code, &data, true, &mut out);
        writeln!(text, "  {label:<40} {}", end(next, &out, true)).unwrap();
    }
    text
}

#[test]
fn every_state_answers_every_message_as_pinned() {
    let found = table();
    if found == PINNED {
        return;
    }
    let place = concat!(env!("CARGO_MANIFEST_DIR"), "/src/nbd/handshake/pairs.txt");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(place, &found).expect("the source tree can be written");
        return;
    }
    let differs: Vec<String> = found
        .lines()
        .zip(PINNED.lines().chain(std::iter::repeat("")))
        .filter(|(new, old)| new != old)
        .take(10)
        .map(|(new, old)| format!("- {old}\n+ {new}"))
        .collect();
    panic!(
        "the handshake differs from {place}:\n{}\nif that is meant: BLESS=1 cargo test --lib pairs, and read the \
         difference before it is committed",
        differs.join("\n")
    );
}
