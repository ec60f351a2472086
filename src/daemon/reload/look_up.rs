//! Where the paths of the configuration lead, looked up anew for a disk that came to where a link led. No file is read for it: whoever
//! writes them says when they are to be taken. EDGE: paths, which may lead through a file system that never answers, so a thread looks.

use super::last_reading::LastReading;
use super::turn::{Owed, Turn, What};
use crate::config::Pace;
use crate::correlation::SectionsChange;
use crate::daemon::control::Control;
use crate::daemon::reports::Report;

/// What a look-up has found.
pub(in crate::daemon) struct LookedUp {
    pub change: SectionsChange,
    /// For the next reading.
    pub last: Box<LastReading>,
}

impl Control {
    /// For a disk that came. While the files are read, or something hangs, it is owed: what goes on may have looked before.
    pub(in crate::daemon) fn look_up_paths(&mut self) {
        self.reload.owed.paths = true;
        if matches!(self.reload.turn, Turn::Rest) {
            self.begin_look_up();
        }
    }

    pub(in crate::daemon) fn begin_look_up(&mut self) {
        let (place, mut last) = match self.reload.borrow() {
            Ok(borrowed) => borrowed,
            // It stays owed.
            Err(error) => {
                tracing::error!(%error, "the paths of the configuration cannot be looked up");
                self.tell_ready();
                return;
            }
        };
        self.reload.owed.paths = false;
        let own = Owed {
            files: false,
            paths: true,
        };
        let last_word = self.reload.turn.begin(What::Paths, own);
        let reports = self.reports.clone();
        place.take(move || {
            let found = last.look_up(&Pace::default());
            reports.send(match last_word.take() {
                true => {
                    let change = last.found(found);
                    Report::LookedUp(LookedUp { change, last })
                }
                false => Report::ReadTooLate(last),
            });
        });
    }

    pub(in crate::daemon) fn on_looked_up(&mut self, looked: LookedUp) {
        self.reload.last = Some(looked.last);
        if !self.stopping {
            self.take_sections(looked.change, None);
        }
        self.reload.turn = Turn::Rest;
        let again = std::mem::take(&mut self.reload.again);
        self.go_on_reading(again);
    }
}
