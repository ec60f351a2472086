//! What a row of a shared database has to say for a change to be written over it. PURE.
//!
//! A row may be written by an appliance between the look that read it and the change that follows; written over, its request would be
//! lost, and the change be one of what nobody wants any more.

use super::reconcile::{KnownDisk, Values};

/// What a row said that asks for something; `None` for one that was not there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RowSaid(pub Option<Values>);

/// By whose word a row is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Basis {
    /// Its own: that of what it said when it was looked at.
    Row(RowSaid),
    /// Somebody's who asked for the export.
    Caller {
        /// What he may know of the row, if it waits for a person.
        told: Option<Values>,
        /// The disk is exported here already, or was until now.
        exported: bool,
    },
}

impl Basis {
    /// Whether `put` may be written where the row says `now`, and beside it stands what was `wrote` last; `None` for what is not there.
    pub fn allows(&self, now: Option<&Values>, wrote: Option<&Values>, put: &KnownDisk) -> bool {
        let (told, exported) = match self {
            Basis::Row(RowSaid(said)) => return now == said.as_ref(),
            Basis::Caller { told, exported } => (told.as_ref(), *exported),
        };
        if put.active && !exported {
            // Nothing is given another volume by that: who says which one it is, says it of the row, too.
            return true;
        }
        let Some(now) = now else {
            // Of who deletes a row and who asks for its export, the last one has the word.
            return true;
        };
        if told == Some(now) {
            return true;
        }
        match wrote {
            // An end is what the appliance asked for, too.
            Some(wrote) if !put.active => {
                let active = wrote.active;
                Values {
                    active,
                    ..now.clone()
                } == *wrote
            }
            Some(wrote) => now == wrote,
            // Nobody's. Where the volume is absent no path says another one.
            None => {
                let path = &now.device_path;
                !now.active
                    || path.is_empty()
                    || put.device_path.is_empty()
                    || *path == put.device_path
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: &str = "/dev/vdc";

    fn values(path: &str) -> Values {
        Values {
            vm_name: "web".to_owned(),
            export_name: "e".to_owned(),
            device_path: path.to_owned(),
            active: true,
        }
    }

    fn put(active: bool) -> KnownDisk {
        KnownDisk {
            vm_name: "web 2".to_owned(),
            active,
            device_path: HERE.to_owned(),
            kept: true,
        }
    }

    fn caller(told: Option<Values>) -> Basis {
        let exported = true;
        Basis::Caller { told, exported }
    }

    /// An appliance saves the row of a job that is over, or writes the path of the next one, before it asks.
    #[test]
    fn who_asks_for_an_export_that_is_not_there_is_not_refused_for_what_its_row_says() {
        let (wrote, now) = (values(HERE), values("/dev/vdd"));
        for active in [true, false] {
            let now = Values {
                active,
                ..now.clone()
            };
            let [new, known] = [false, true].map(|exported| {
                let told = None;
                Basis::Caller { told, exported }.allows(Some(&now), Some(&wrote), &put(true))
            });
            assert_eq!((new, known), (true, false));
        }
    }

    /// The row said vdc; by the time that its request was accepted it said vdd, and was written over.
    #[test]
    fn a_rows_own_word_holds_only_while_it_says_so() {
        let (wrote, said, since) = (values(HERE), values("/dev/vdd"), values("/dev/vde"));
        let row = |said: &Values| Basis::Row(RowSaid(Some(said.clone())));
        assert!(row(&said).allows(Some(&said), Some(&wrote), &put(true)));
        assert!(!row(&said).allows(Some(&since), Some(&wrote), &put(true)));
        assert!(!row(&said).allows(None, Some(&wrote), &put(true)));
        let inactive = Values {
            active: false,
            ..wrote.clone()
        };
        assert!(!row(&inactive).allows(Some(&wrote), Some(&wrote), &put(false)));
        let deleted = Basis::Row(RowSaid(None));
        assert!(deleted.allows(None, Some(&wrote), &put(false)));
        assert!(!deleted.allows(Some(&said), Some(&wrote), &put(false)));
    }

    #[test]
    fn a_caller_writes_over_what_was_written_here_or_told_and_over_nothing_else() {
        let (wrote, new) = (values(HERE), values("/dev/vdd"));
        for active in [true, false] {
            let put = put(active);
            assert!(caller(None).allows(Some(&wrote), Some(&wrote), &put));
            assert!(!caller(None).allows(Some(&new), Some(&wrote), &put));
            assert!(caller(Some(new.clone())).allows(Some(&new), Some(&wrote), &put));
            let older = caller(Some(values("/dev/vde")));
            assert!(!older.allows(Some(&new), Some(&wrote), &put));
            assert!(caller(None).allows(None, Some(&wrote), &put));
        }
        let ended = Values {
            active: false,
            ..wrote.clone()
        };
        assert!(caller(None).allows(Some(&ended), Some(&wrote), &put(false)));
        assert!(!caller(None).allows(Some(&ended), Some(&wrote), &put(true)));
    }

    #[test]
    fn a_row_of_nobody_is_taken_by_who_says_its_volume_unless_it_says_another_than_is_exported() {
        let elsewhere = values("/dev/vdd");
        assert!(!caller(None).allows(Some(&elsewhere), None, &put(true)));
        assert!(caller(None).allows(Some(&values(HERE)), None, &put(true)));
        assert!(caller(None).allows(Some(&values("")), None, &put(true)));
        let new = KnownDisk {
            device_path: String::new(),
            ..put(true)
        };
        assert!(caller(None).allows(Some(&elsewhere), None, &new));
    }
}
