//! `Rescan`: answered when everything that is attached has been looked at since it was asked for, disks and files.

use super::control::{Asker, Control};
use super::keeper::Order;
use crate::correlation::Mark;
use crate::dbus::{Answer, Publication};
use crate::files::{Round, Told};

/// A caller of `Rescan` and what it waits for.
pub(super) struct Rescan {
    asker: Asker,
    /// A survey that began after this; `None` when it has come.
    survey: Option<Mark>,
    /// This look at the files, or a later one; `None` when it has come.
    files: Option<Round>,
}

impl Control {
    pub(super) fn rescan(&mut self, asker: Asker) {
        self.order(Order::Look);
        // Those whose callers have given up are not kept.
        self.rescans.retain(|rescan| !rescan.asker.is_closed());
        self.rescans.push(Rescan {
            asker,
            survey: Some(self.observer.survey("a caller asked for it")),
            files: Some(self.files.check()),
        });
    }

    /// A survey has come that began at `began`.
    pub(super) fn on_survey(&mut self, began: Mark) {
        for rescan in &mut self.rescans {
            rescan.survey = rescan.survey.filter(|asked| *asked >= began);
        }
        self.answer_rescans();
    }

    pub(super) fn on_file(&mut self, told: Told) {
        match told {
            Told::Happened(event) => self.apply(event),
            Told::Checked(round) => {
                for rescan in &mut self.rescans {
                    rescan.files = rescan.files.filter(|asked| *asked > round);
                }
                self.answer_rescans();
                self.service.looked(round);
                self.tell_ready();
            }
        }
    }

    fn answer_rescans(&mut self) {
        let (done, waiting): (Vec<Rescan>, _) = std::mem::take(&mut self.rescans)
            .into_iter()
            .partition(|rescan| rescan.survey.is_none() && rescan.files.is_none());
        self.rescans = waiting;
        self.publisher.offer(
            done.into_iter()
                .map(|rescan| Publication::Reply(rescan.asker, Ok(Answer::Done)))
                .collect(),
        );
    }
}
