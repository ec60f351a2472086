//! All pairs of binding and cue, pinned in `transitions.txt`, which is written for people.
//!
//! A difference fails and says how to accept it; whoever accepts it reads the difference first.

use std::fmt::Write;
use std::time::Duration;

use super::binding::{Binding, Context, Cue, Failure, Held, Order, Want};
use super::facts::DiskSeq;
use super::messages::{EndHow, Generation, Ticket};

const PINNED: &str = include_str!("transitions.txt");
const A: DiskSeq = DiskSeq(1);
const B: DiskSeq = DiskSeq(2);

fn text(of: &str) -> String {
    of.to_owned()
}

/// Every shape of binding; the disk is A.
fn bindings() -> Vec<Binding> {
    let held = Held {
        diskseq: A,
        generation: Generation(4),
        size: 100,
        read_only: false,
    };
    let failed = |failure| Binding::Failed {
        diskseq: Some(A),
        failure,
        reason: text("old"),
    };
    vec![
        Binding::Absent {
            reason: text("old"),
        },
        Binding::Opening {
            diskseq: A,
            ticket: Some(Ticket(7)),
        },
        Binding::Opening {
            diskseq: A,
            ticket: None,
        },
        Binding::Serving(held),
        Binding::Draining {
            held,
            cut: false,
            reason: text("old"),
        },
        Binding::Draining {
            held,
            cut: true,
            reason: text("old"),
        },
        Binding::Released {
            diskseq: A,
            reason: text("old"),
        },
        Binding::Ambiguous {
            held: Some(held),
            reason: text("old"),
        },
        Binding::Ambiguous {
            held: None,
            reason: text("old"),
        },
        failed(Failure::Open),
        failed(Failure::Busy),
        failed(Failure::Orphan),
        Binding::Failed {
            diskseq: None,
            failure: Failure::Orphan,
            reason: text("old"),
        },
    ]
}

fn wants() -> Vec<Want> {
    vec![
        Want::Nothing {
            reason: text("new"),
        },
        Want::Disk(A),
        Want::Disk(B),
        Want::Released {
            diskseq: A,
            reason: text("new"),
        },
        Want::Ambiguous {
            keep: Some(A),
            reason: text("new"),
        },
        Want::Ambiguous {
            keep: Some(B),
            reason: text("new"),
        },
        Want::Ambiguous {
            keep: None,
            reason: text("new"),
        },
        Want::Blocked {
            failure: Failure::Orphan,
            reason: text("new"),
        },
    ]
}

fn cues() -> Vec<Cue> {
    let mut cues: Vec<Cue> = wants().into_iter().map(Cue::Want).collect();
    cues.push(Cue::Opened {
        size: 100,
        read_only: false,
    });
    cues.push(Cue::OpenRefused {
        failure: Failure::Open,
        reason: text("new"),
    });
    cues.push(Cue::OpenRefused {
        failure: Failure::Busy,
        reason: text("new"),
    });
    cues.push(Cue::OpenExpired {
        reason: text("new"),
    });
    cues.extend(wants().into_iter().map(Cue::RetryDue));
    cues.extend(wants().into_iter().map(Cue::Closed));
    cues.push(Cue::TimedOut {
        reason: text("new"),
    });
    cues
}

/// What differs in the context, by name: a free ticket and time, no ticket, no time.
fn contexts() -> [(&'static str, Context); 3] {
    let drain = EndHow::Drain {
        within: Duration::from_secs(30),
    };
    let cut = EndHow::Cut {
        within: Duration::from_secs(5),
    };
    let context = Context {
        ticket: Some(Ticket(8)),
        generation: Generation(5),
        ending: drain,
    };
    [
        ("", context),
        (
            " [an open of the disk is outstanding]",
            Context {
                ticket: None,
                ..context
            },
        ),
        (
            " [to be cut]",
            Context {
                ending: cut,
                ..context
            },
        ),
    ]
}

#[test]
fn every_binding_answers_every_cue_as_pinned() {
    let mut found = String::from(
        "Where each state goes on each cue, and what it orders. Written by the test in transitions.rs.\n\
         Disks are A and B, the state is on A. Ticket 7 is the open that is outstanding, 8 a fresh one; the lease\n\
         that exists has generation 4, the next 5. \"-\" is: nothing changes and nothing is ordered. A line with a\n\
         condition in [] stands only where the condition makes a difference.\n",
    );
    for binding in bindings() {
        writeln!(found, "\n{}", show_binding(&binding)).expect("a string takes all");
        for cue in cues() {
            let mut plain = None;
            for (condition, context) in contexts() {
                let (after, orders) = binding.clone().step(cue.clone(), context);
                let outcome = show_outcome(&binding, &after, &orders);
                if plain.as_ref() != Some(&outcome) {
                    let cue = format!("{}{condition}", show_cue(&cue));
                    writeln!(found, "  {cue:<64} {outcome}").expect("a string takes all");
                }
                plain.get_or_insert(outcome);
            }
        }
    }
    if found != PINNED {
        let place = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/src/correlation/transitions.txt"
        );
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
            "the transitions differ from {place}:\n{}\nif that is meant: BLESS=1 cargo test --lib transitions, and \
             read the difference before it is committed",
            differs.join("\n")
        );
    }
}

/// Invariant 6 and the orders, as laws over all pairs rather than one by one.
#[test]
fn no_pair_opens_or_serves_beside_a_lease() {
    for binding in bindings() {
        for cue in cues() {
            for (_, context) in contexts() {
                let (after, orders) = binding.clone().step(cue.clone(), context);
                let what = format!("{binding:?} on {cue:?} gives {after:?} and {orders:?}");
                let opens = orders
                    .iter()
                    .filter(|order| matches!(order, Order::Open { .. }))
                    .count();
                let serves = orders
                    .iter()
                    .filter(|order| matches!(order, Order::Serve { .. }))
                    .count();
                let ends = orders
                    .iter()
                    .filter(|order| matches!(order, Order::End { .. }))
                    .count();
                assert!(opens + serves + ends <= 1, "{what}");
                // A lease comes only by Serve, and goes only by Closed or TimedOut, after End.
                let (held, held_after) = (binding.held(), after.held());
                let closes = matches!(cue, Cue::Closed(_) | Cue::TimedOut { .. });
                assert_eq!(
                    held.is_none() && held_after.is_some(),
                    serves == 1,
                    "{what}"
                );
                assert!(held.is_none() || held_after == held || closes, "{what}");
                assert!(opens == 0 || held_after.is_none(), "{what}");
                assert_eq!(
                    opens == 1,
                    matches!(
                        after,
                        Binding::Opening {
                            ticket: Some(Ticket(8)),
                            ..
                        }
                    ),
                    "{what}"
                );
                let ending = |binding: &Binding| matches!(binding, Binding::Draining { .. });
                assert!(ending(&binding) || ending(&after) == (ends == 1), "{what}");
            }
        }
    }
}

fn disk(diskseq: DiskSeq) -> &'static str {
    if diskseq == A { "A" } else { "B" }
}

fn show_binding(binding: &Binding) -> String {
    match binding {
        Binding::Absent { .. } => text("Absent"),
        Binding::Opening {
            diskseq,
            ticket: Some(ticket),
        } => {
            format!("Opening {} (ticket {})", disk(*diskseq), ticket.0)
        }
        Binding::Opening {
            diskseq,
            ticket: None,
        } => {
            format!("Opening {} (behind another open)", disk(*diskseq))
        }
        Binding::Serving(held) => {
            format!(
                "Serving {} (generation {})",
                disk(held.diskseq),
                held.generation.0
            )
        }
        Binding::Draining {
            held, cut: false, ..
        } => format!("Draining {}", disk(held.diskseq)),
        Binding::Draining {
            held, cut: true, ..
        } => format!("Draining {} (cut)", disk(held.diskseq)),
        Binding::Released { diskseq, .. } => format!("Released {}", disk(*diskseq)),
        Binding::Ambiguous {
            held: Some(held), ..
        } => format!("Ambiguous (holds {})", disk(held.diskseq)),
        Binding::Ambiguous { held: None, .. } => text("Ambiguous"),
        Binding::Failed {
            diskseq, failure, ..
        } => {
            format!(
                "Failed {failure:?}{}",
                diskseq
                    .map(|d| format!(" on {}", disk(d)))
                    .unwrap_or_default()
            )
        }
    }
}

fn show_want(want: &Want) -> String {
    match want {
        Want::Nothing { .. } => text("nothing"),
        Want::Disk(diskseq) => format!("disk {}", disk(*diskseq)),
        Want::Released { diskseq, .. } => format!("released {}", disk(*diskseq)),
        Want::Ambiguous {
            keep: Some(keep), ..
        } => format!("ambiguous, keep {}", disk(*keep)),
        Want::Ambiguous { keep: None, .. } => text("ambiguous"),
        Want::Blocked { .. } => text("blocked"),
    }
}

fn show_cue(cue: &Cue) -> String {
    match cue {
        Cue::Want(want) => format!("want {}", show_want(want)),
        Cue::Opened { .. } => text("opened"),
        Cue::OpenRefused { failure, .. } => format!("open refused ({failure:?})"),
        Cue::OpenExpired { .. } => text("open expired"),
        Cue::RetryDue(want) => format!("retry due, want {}", show_want(want)),
        Cue::Closed(want) => format!("closed, want {}", show_want(want)),
        Cue::TimedOut { .. } => text("timed out"),
    }
}

fn show_outcome(before: &Binding, after: &Binding, orders: &[Order]) -> String {
    if before == after && orders.is_empty() {
        return text("-");
    }
    let orders: Vec<String> = orders
        .iter()
        .map(|order| match order {
            Order::Open { diskseq, ticket } => {
                format!("open {} (ticket {})", disk(*diskseq), ticket.0)
            }
            Order::Cancel { ticket } => format!("cancel ticket {}", ticket.0),
            Order::Serve { ticket, held } => {
                format!(
                    "serve ticket {} as generation {}",
                    ticket.0, held.generation.0
                )
            }
            Order::Unseal { generation } => format!("unseal generation {}", generation.0),
            Order::End {
                generation,
                how: EndHow::Drain { .. },
            } => {
                format!("drain generation {}", generation.0)
            }
            Order::End {
                generation,
                how: EndHow::Cut { .. },
            } => format!("cut generation {}", generation.0),
        })
        .collect();
    let told = if before.reason() == after.reason() {
        ""
    } else {
        ", new reason"
    };
    let orders = if orders.is_empty() {
        String::new()
    } else {
        format!("; {}", orders.join(", "))
    };
    format!("{}{told}{orders}", show_binding(after))
}
