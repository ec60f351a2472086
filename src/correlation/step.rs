//! The one step of an export's machine. PURE.
//!
//! ```text
//!            Disk                 Opened               (Nothing | Released | other disk)
//!   Absent ────────▶ Opening ───────────────▶ Serving ──────────────▶ Draining ─┐
//!     ▲ ▲              │ refused, late          │ ▲                     │       │ TimedOut
//!     │ │              ▼                twin    ▼ │ twin left    Closed │       ▼
//!     │ └─────────── Failed ◀────┐         Ambiguous ───▶ Draining      │     Failed (orphan)
//!     │                Blocked ──┘          (may hold)                  │
//!     └──────────────── settle again: Absent, Opening, Released, Ambiguous, Failed
//! ```
//!
//! `step` is total: every pair of binding and cue has its arm, and what an arm ignores it says why.

use super::binding::{Binding, Context, Cue, Failure, Held, Order, Want};
use super::messages::EndHow;

type Step = (Binding, Vec<Order>);

impl Binding {
    /// Moves one step. Never fails, never waits.
    pub fn step(self, cue: Cue, context: Context) -> Step {
        use Binding::{Absent, Ambiguous, Draining, Failed, Opening, Released, Serving};
        match (self, cue) {
            // Nothing is held: go where the facts say.
            (Absent { .. } | Released { .. } | Ambiguous { held: None, .. }, Cue::Want(want)) => {
                enter(want, context)
            }
            // The same open would meet the same answer: wait for the retry, or for other facts.
            (
                Failed {
                    diskseq: Some(failed),
                    failure: failure @ (Failure::Open | Failure::Busy),
                    reason,
                },
                Cue::Want(Want::Disk(wanted)),
            ) if failed == wanted => stay(Failed {
                diskseq: Some(failed),
                failure,
                reason,
            }),
            (Failed { .. }, Cue::Want(want)) => enter(want, context),
            (failed @ Failed { .. }, Cue::RetryDue(Want::Disk(_))) if context.ticket.is_none() => {
                stay(failed)
            }
            (Failed { .. }, Cue::RetryDue(want)) => enter(want, context),

            // An open is outstanding.
            (
                Opening {
                    diskseq,
                    ticket: Some(ticket),
                },
                Cue::Want(Want::Disk(wanted)),
            ) if wanted == diskseq => stay(Opening {
                diskseq,
                ticket: Some(ticket),
            }),
            (
                Opening {
                    diskseq,
                    ticket: None,
                },
                Cue::Want(Want::Disk(wanted)),
            ) if wanted == diskseq => enter(Want::Disk(wanted), context),
            (Opening { ticket, .. }, Cue::Want(want)) => {
                let (binding, mut orders) = enter(want, context);
                orders.splice(0..0, ticket.map(|ticket| Order::Cancel { ticket }));
                (binding, orders)
            }
            (
                Opening {
                    diskseq,
                    ticket: Some(ticket),
                },
                Cue::Opened { size, read_only },
            ) => {
                let held = Held {
                    diskseq,
                    generation: context.generation,
                    size,
                    read_only,
                };
                (Serving(held), vec![Order::Serve { ticket, held }])
            }
            (Opening { diskseq, .. }, Cue::OpenRefused { failure, reason }) => stay(Failed {
                diskseq: Some(diskseq),
                failure,
                reason,
            }),
            (Opening { diskseq, ticket }, Cue::OpenExpired { reason }) => (
                Failed {
                    diskseq: Some(diskseq),
                    failure: Failure::Open,
                    reason,
                },
                ticket
                    .map(|ticket| Order::Cancel { ticket })
                    .into_iter()
                    .collect(),
            ),

            // A lease exists.
            (Serving(held), Cue::Want(Want::Disk(wanted))) if wanted == held.diskseq => {
                stay(Serving(held))
            }
            (
                Serving(held)
                | Ambiguous {
                    held: Some(held), ..
                },
                Cue::Want(Want::Ambiguous {
                    keep: Some(keep),
                    reason,
                }),
            ) if keep == held.diskseq => stay(Ambiguous {
                held: Some(held),
                reason,
            }),
            (
                Ambiguous {
                    held: Some(held), ..
                },
                Cue::Want(Want::Disk(wanted)),
            ) if wanted == held.diskseq => (
                Serving(held),
                vec![Order::Unseal {
                    generation: held.generation,
                }],
            ),
            (
                Serving(held)
                | Ambiguous {
                    held: Some(held), ..
                },
                Cue::Want(want),
            ) => end(held, why_end(&want), context.ending),
            // Invariant 6: what comes next waits until this lease is closed. Only a drain may become a cut.
            (
                Draining {
                    held,
                    cut: false,
                    reason,
                },
                Cue::Want(_),
            ) => match context.ending {
                how @ EndHow::Cut { .. } => end(held, reason, how),
                EndHow::Drain { .. } => stay(Draining {
                    held,
                    cut: false,
                    reason,
                }),
            },
            (
                Draining {
                    held,
                    cut: true,
                    reason,
                },
                Cue::Want(_),
            ) => stay(Draining {
                held,
                cut: true,
                reason,
            }),
            (Draining { .. }, Cue::Closed(want)) => enter(want, context),
            (Draining { held, .. }, Cue::TimedOut { reason }) => stay(Failed {
                diskseq: Some(held.diskseq),
                failure: Failure::Orphan,
                reason,
            }),

            // A timer that was set in an earlier state.
            (
                other @ (Absent { .. }
                | Opening { .. }
                | Serving(_)
                | Draining { .. }
                | Released { .. }
                | Ambiguous { .. }),
                Cue::RetryDue(_),
            ) => ignore(other, "nothing has failed"),
            (
                other @ (Absent { .. }
                | Serving(_)
                | Draining { .. }
                | Released { .. }
                | Ambiguous { .. }
                | Failed { .. }),
                Cue::OpenExpired { .. },
            ) => ignore(other, "the open was answered or cancelled"),
            (
                other @ (Absent { .. }
                | Opening { ticket: None, .. }
                | Serving(_)
                | Draining { .. }
                | Released { .. }
                | Ambiguous { .. }
                | Failed { .. }),
                Cue::Opened { .. },
            )
            | (
                other @ (Absent { .. }
                | Serving(_)
                | Draining { .. }
                | Released { .. }
                | Ambiguous { .. }
                | Failed { .. }),
                Cue::OpenRefused { .. },
            ) => ignore(other, "late answer to a cancelled open"),
            (
                other @ (Absent { .. }
                | Opening { .. }
                | Serving(_)
                | Released { .. }
                | Ambiguous { .. }
                | Failed { .. }),
                Cue::Closed(_) | Cue::TimedOut { .. },
            ) => ignore(other, "the lease of an orphan, counted elsewhere"),
        }
    }
}

/// Goes to where the facts say, with nothing held (invariant 6).
fn enter(want: Want, context: Context) -> Step {
    match want {
        Want::Nothing { reason } => stay(Binding::Absent { reason }),
        Want::Disk(diskseq) => (
            Binding::Opening {
                diskseq,
                ticket: context.ticket,
            },
            context
                .ticket
                .map(|ticket| Order::Open { diskseq, ticket })
                .into_iter()
                .collect(),
        ),
        Want::Released { diskseq, reason } => stay(Binding::Released { diskseq, reason }),
        Want::Ambiguous { reason, .. } => stay(Binding::Ambiguous { held: None, reason }),
        Want::Blocked { failure, reason } => stay(Binding::Failed {
            diskseq: None,
            failure,
            reason,
        }),
    }
}

fn end(held: Held, reason: String, how: EndHow) -> Step {
    let cut = matches!(how, EndHow::Cut { .. });
    (
        Binding::Draining { held, cut, reason },
        vec![Order::End {
            generation: held.generation,
            how,
        }],
    )
}

fn why_end(want: &Want) -> String {
    match want {
        Want::Nothing { reason }
        | Want::Released { reason, .. }
        | Want::Ambiguous { reason, .. }
        | Want::Blocked { reason, .. } => reason.clone(),
        Want::Disk(diskseq) => format!("the volume is on another disk now (diskseq {diskseq})"),
    }
}

fn stay(binding: Binding) -> Step {
    (binding, Vec::new())
}

/// Nothing happens, because of `_why`.
fn ignore(binding: Binding, _why: &'static str) -> Step {
    stay(binding)
}
