//! What a word of a disk makes of what is known of it, and what of that is in doubt. PURE.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::disks::{Disk, Disks};
use super::facts::{DiskFacts, DiskSeq, Reading};
use crate::identity::{Identity, Scheme};

/// What was known of a disk, and was not confirmed by the last word of it: another disk may be there by now, or it did not say this time. Sessions go
/// on, in the first case for a while, and nobody new comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Doubt {
    pub of: BTreeSet<Identity>,
    pub why: String,
    /// Where something said that another disk may be there: how long sessions go on without a word of the disk, since the start.
    pub until: Option<Duration>,
}

impl Doubt {
    /// Nobody is to write to this disk any more.
    pub fn is_over(&self, now: Duration) -> bool {
        self.until.is_some_and(|until| until <= now)
    }
}

impl Disks {
    /// What a disk is known as after this word of it, and what of that is in doubt.
    pub(super) fn weigh(
        &self,
        facts: &DiskFacts,
        before: Option<&Disk>,
    ) -> (Arc<BTreeSet<Identity>>, Option<Arc<Doubt>>) {
        let said = |read: &BTreeSet<Identity>| Arc::new(self.with_attachment(facts.diskseq, read));
        let Some(before) = before else {
            let nothing = BTreeSet::new();
            return (said(facts.identities.read().unwrap_or(&nothing)), None);
        };
        let doubted_until = before.doubt.as_ref().and_then(|doubt| doubt.until);
        let (read, unread) = match &facts.identities {
            // What a path leads to is looked up: one that is not among them leads elsewhere.
            Reading::Known(read) if facts.diskseq.is_file() => return (said(read), None),
            Reading::Paths(paths) => {
                let doubt = paths.unasked.first_key_value().map(|(_, why)| Doubt {
                    of: paths.unasked.keys().cloned().collect(),
                    why: why.clone(),
                    // What is open stays the file that it is.
                    until: None,
                });
                return (said(&paths.all), doubt.map(Arc::new));
            }
            Reading::Known(read) => (read, None),
            Reading::Partly(partly) => (&partly.read, Some(&partly.unread)),
            Reading::Unknown(_) => return (before.identities.clone(), before.doubt.clone()),
            Reading::Doubtful(why) => {
                // Said again, it is no reason to wait longer.
                let until = doubted_until.unwrap_or(self.now + self.confirm_within);
                let doubt = Doubt {
                    of: BTreeSet::clone(&before.identities),
                    why: why.clone(),
                    until: Some(until),
                };
                return (before.identities.clone(), Some(Arc::new(doubt)));
            }
        };
        let failed = |scheme| unread.and_then(|unread| unread.get(&scheme));
        // A partition table is what its owner writes: one that is read and is not there has been taken away.
        let lost: BTreeSet<Identity> = before
            .said()
            .filter(|one| !read.contains(one))
            .filter(|one| one.scheme != Scheme::GptGuid || failed(one.scheme).is_some())
            .cloned()
            .collect();
        let is_another = |one: &&Identity| {
            let same_scheme = |lost: &Identity| lost.scheme == one.scheme;
            !before.identities.contains(one) && lost.iter().any(same_scheme)
        };
        // Another value under the same scheme is another volume, and all that was known is that of the one before.
        let Some(first) = lost
            .first()
            .filter(|_| !read.iter().any(|one| is_another(&one)))
        else {
            return (said(read), None);
        };
        let why = match lost.iter().find_map(|one| failed(one.scheme)) {
            Some(why) => format!(
                "the disk could not be asked for {}: {why}",
                first.scheme.name()
            ),
            None => format!("the disk was {first} and does not say so now"),
        };
        let known = said(&read.union(&lost).cloned().collect());
        let doubt = Doubt {
            of: lost,
            why,
            until: doubted_until,
        };
        (known, Some(Arc::new(doubt)))
    }

    /// A file has no attachment: it is known by what it is.
    fn with_attachment(&self, diskseq: DiskSeq, said: &BTreeSet<Identity>) -> BTreeSet<Identity> {
        let attachment =
            (!diskseq.is_file()).then(|| Identity::of_attachment(&self.boot.0, diskseq.0));
        said.iter().cloned().chain(attachment).collect()
    }
}
