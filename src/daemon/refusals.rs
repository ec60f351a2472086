//! Calls that polkit keeps from the loop, in the audit trail. Bounded, for whoever is refused can call again at once: of one user and
//! method the first is told, and after a minute how many came after it. A call for which a password is wanted is no refusal: of two calls with
//! which a person is asked the first ends so, and is not to stand for the second.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::trail::by;
use crate::correlation::Record;
use crate::dbus::{Caller, Denial};
use crate::mapping::History;

/// How long those of one user, method and end are one.
const TOLD_EVERY: Duration = Duration::from_secs(60);
/// Users, methods and ends that are told apart at one time; the others are told as one. With two records of each in a minute, a flood of all
/// of them takes a day to push other calls out of the trail.
const KINDS_MAX: usize = 64;

/// A user, a method and how it ended; `None` for all that there is no room for.
type Kind = Option<(Option<u32>, String, Denial)>;

pub(super) struct Refusals {
    history: History,
    /// How many came after the first, of at most [`KINDS_MAX`] kinds and one for the others. Held for a map operation.
    more: Mutex<HashMap<Kind, u64>>,
}

impl Refusals {
    pub fn new(history: History) -> Arc<Refusals> {
        Arc::new(Refusals {
            history,
            more: Mutex::default(),
        })
    }

    /// Needs a running tokio runtime.
    pub fn note(self: &Arc<Self>, method: &str, caller: &Caller, denial: Denial, reason: &str) {
        let Some(kind) = self.begin(caller.uid, method, denial) else {
            return;
        };
        self.history.note(Record {
            detail: format!("{}: {reason}", word(denial)),
            ..by(method, caller)
        });
        let (refusals, method, caller) = (self.clone(), method.to_owned(), caller.clone());
        // One task for each kind; it ends with its minute, or with the daemon, which then tells no number.
        tokio::spawn(async move {
            tokio::time::sleep(TOLD_EVERY).await;
            if let Some(record) = refusals.end(&kind, &method, &caller) {
                refusals.history.note(record);
            }
        });
    }

    /// The kind of a refusal that is to be told; `None` for one that is only counted.
    fn begin(&self, uid: Option<u32>, method: &str, denial: Denial) -> Option<Kind> {
        let mut more = self.more();
        let mut kind = Some((uid, method.to_owned(), denial));
        if more.len() >= KINDS_MAX && !more.contains_key(&kind) {
            kind = None;
        }
        match more.get_mut(&kind) {
            Some(count) => {
                *count = count.saturating_add(1);
                None
            }
            None => {
                more.insert(kind.clone(), 0);
                Some(kind)
            }
        }
    }

    /// The minute of a kind is over; what there is to tell of those after the first.
    fn end(&self, kind: &Kind, method: &str, caller: &Caller) -> Option<Record> {
        let count = self.more().remove(kind).filter(|count| *count > 0)?;
        let seconds = TOLD_EVERY.as_secs();
        Some(match kind {
            Some((.., denial)) => Record {
                detail: format!(
                    "{}: {count} more of this user within {seconds} s",
                    word(*denial)
                ),
                ..by(
                    method,
                    &Caller {
                        name: String::new(),
                        ..caller.clone()
                    },
                )
            },
            None => Record {
                detail: format!(
                    "not carried out: {count} more of several users and methods within {seconds} s"
                ),
                ..by(
                    "",
                    &Caller {
                        name: String::new(),
                        uid: None,
                        unit: String::new(),
                    },
                )
            },
        })
    }

    fn more(&self) -> MutexGuard<'_, HashMap<Kind, u64>> {
        self.more.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the trail says of it, before the reason.
fn word(denial: Denial) -> &'static str {
    match denial {
        Denial::PasswordWanted => "not carried out",
        Denial::Refused => "refused",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::correlation::Inquiry;
    use crate::mapping::Bounds;

    fn caller(uid: u32) -> Caller {
        Caller {
            name: ":1.7".to_owned(),
            uid: Some(uid),
            unit: "shell.scope".to_owned(),
        }
    }

    #[tokio::test]
    async fn a_flood_is_a_record_for_each_user_and_method_and_then_its_number() {
        let folder = tempfile::tempdir().unwrap();
        let (history, task) = History::keep(folder.path(), Bounds::default());
        let refusals = Refusals::new(history.clone());
        for _ in 0..10_000 {
            refusals.note("Rescan", &caller(5), Denial::PasswordWanted, "ask");
            refusals.note("Rescan", &caller(5), Denial::Refused, "no");
        }
        refusals.note("Reload", &caller(5), Denial::Refused, "no");
        refusals.note("Rescan", &caller(6), Denial::Refused, "no");
        let kind = Some((Some(5), "Rescan".to_owned(), Denial::Refused));
        let told = refusals.end(&kind, "Rescan", &caller(5)).unwrap();
        assert_eq!(told.detail, "refused: 9999 more of this user within 60 s");
        assert_eq!((told.uid, told.new.as_str()), (Some(5), "Rescan"));
        assert!(refusals.end(&kind, "Rescan", &caller(5)).is_none());
        let asked = Inquiry {
            limit: 100,
            ..Inquiry::default()
        };
        let kept = history.ask(asked).await.unwrap();
        let kept: Vec<_> = kept
            .iter()
            .map(|record| (record.uid, record.new.as_str(), record.detail.as_str()))
            .collect();
        assert_eq!(
            kept,
            [
                (Some(5), "Rescan", "not carried out: ask"),
                (Some(5), "Rescan", "refused: no"),
                (Some(5), "Reload", "refused: no"),
                (Some(6), "Rescan", "refused: no"),
            ]
        );
        task.end().await;
    }

    #[tokio::test]
    async fn more_users_than_are_told_apart_are_one() {
        let folder = tempfile::tempdir().unwrap();
        let (history, _task) = History::keep(folder.path(), Bounds::default());
        let refusals = Refusals::new(history);
        for uid in 0..1_000 {
            refusals.note("Rescan", &caller(uid), Denial::Refused, "no");
        }
        assert_eq!(refusals.more().len(), KINDS_MAX + 1);
        let told = refusals.end(&None, "Rescan", &caller(1)).unwrap();
        assert!(
            told.detail.contains("935 more of several"),
            "{}",
            told.detail
        );
    }
}
