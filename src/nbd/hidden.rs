//! Exports that are on their way out, or to another volume: no new clients, while those that are there go on.

use crate::correlation::ExportName;
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::lock;

use super::door::Door;

/// How many clients an export has, of all its leases, and whether it takes new ones. One word: whoever hides the export knows at once how many
/// came before, and after that none comes, also of those that have looked the export up and are about to be bound.
#[derive(Debug, Default)]
pub(super) struct Clients(AtomicU32);

const HIDDEN: u32 = 1 << 31;

/// Why a client is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turned {
    Hidden,
    Full,
}

impl Clients {
    /// One more, of `max` at most (0 for any number); how many there are then.
    pub(super) fn enter(&self, max: u32) -> Result<u32, Turned> {
        let entered = self
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
                let room = max == 0 || word < max;
                (word & HIDDEN == 0 && room).then_some(word + 1)
            });
        match entered {
            Ok(before) => Ok(before + 1),
            Err(word) if word & HIDDEN != 0 => Err(Turned::Hidden),
            Err(_) => Err(Turned::Full),
        }
    }

    /// One has left; how many there are then.
    pub(super) fn leave(&self) -> u32 {
        (self.0.fetch_sub(1, Ordering::AcqRel) & !HIDDEN) - 1
    }

    pub(super) fn count(&self) -> u32 {
        self.0.load(Ordering::Acquire) & !HIDDEN
    }

    /// None comes any more; how many there are.
    fn hide(&self) -> u32 {
        self.0.fetch_or(HIDDEN, Ordering::AcqRel) & !HIDDEN
    }

    pub(super) fn show(&self) {
        self.0.fetch_and(!HIDDEN, Ordering::AcqRel);
    }
}

impl Door {
    /// Takes `name` out of LIST and turns new clients away, whatever else is said of it until `show` or `forget`; sessions
    /// that exist go on. How many there are: none comes after they were counted.
    pub fn hide(&self, name: &ExportName, reason: &str) -> u32 {
        let mut exports = lock(&self.shared().exports);
        exports.get_mut(name).map_or(0, |export| {
            export.hidden = Some(reason.to_owned());
            export.clients.hide()
        })
    }

    /// Takes `hide` back.
    pub fn show(&self, name: &ExportName) {
        let mut exports = lock(&self.shared().exports);
        if let Some(export) = exports.get_mut(name) {
            export.hidden = None;
            export.clients.show();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client that had looked the export up before it was hidden was bound after the clients had been counted.
    #[test]
    fn whoever_hides_counts_every_client_that_is_let_in() {
        let clients = Clients::default();
        assert_eq!(clients.enter(2), Ok(1));
        assert_eq!(clients.enter(2), Ok(2));
        assert_eq!(clients.enter(2), Err(Turned::Full));
        assert_eq!(clients.leave(), 1);
        assert_eq!(clients.hide(), 1);
        assert_eq!(clients.enter(0), Err(Turned::Hidden));
        assert_eq!((clients.count(), clients.hide()), (1, 1));
        assert_eq!(clients.leave(), 0);
        assert_eq!(clients.hide(), 0);
        clients.show();
        assert_eq!(clients.enter(1), Ok(1));
    }
}
