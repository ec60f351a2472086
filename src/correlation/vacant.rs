//! What is done to an export without clients alone: another volume under a name that they know, or its end by a safe removal. PURE.
//!
//! If clients were counted first and turned away then, one that comes in between would go on, unseen, under a name that means another volume. So
//! the door turns new ones away and counts those that are there in one step, and what was asked is judged again at once, with the count.

use super::{Action, Correlation, ExportName, RemoveMode, Request, RequestError, RequestId};

/// Whether an export has no clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Vacancy {
    /// They were not counted.
    Unknown,
    /// It has none, and gets none while this is judged.
    Sure,
}

impl Correlation {
    /// `what` is asked of an export without clients alone, and nothing else speaks against it.
    pub(super) fn count_clients(&mut self, request: RequestId, what: Request) {
        let Some((export, why, _)) = subject(&what) else {
            return;
        };
        let reason = format!("export {export} {why}");
        self.counting.insert(request, what);
        self.out.push(Action::HideAndCount {
            request,
            export,
            reason,
        });
    }

    /// New clients are turned away, and there are so many.
    pub(super) fn on_counted(&mut self, request: RequestId, clients: u32) {
        let Some(what) = self.counting.remove(&request) else {
            return;
        };
        let Some((export, _, until)) = subject(&what) else {
            return;
        };
        let outcome = match clients {
            0 => self.judge_request(request, what, Vacancy::Sure),
            clients => Err(RequestError::InUse(format!(
                "export {export} has {clients} clients{until}; 'nbdtrack sessions {export}' lists them, 'nbdtrack end-session ID' ends one"
            ))),
        };
        // Unless that is being done which it was hidden for.
        self.show(&export);
        self.answer_refused(request, outcome);
    }
}

/// The export that a request is about if it is done without clients alone, why no new ones are let in meanwhile, and what those that are there
/// are in the way of.
fn subject(what: &Request) -> Option<(ExportName, &'static str, &'static str)> {
    Some(match what {
        Request::EnsureVmExport(ensure) => (
            ensure.disk.export(),
            "is being given another volume",
            " of the volume that it is now: end them before it is moved",
        ),
        Request::Pin { name, .. } => (
            name.clone(),
            "is being given another volume",
            " of the volume that it is now: end them before its path means another",
        ),
        Request::Unpin { name } => (
            name.clone(),
            "is being unpinned",
            " of the volume that it is now: end them before its path means another",
        ),
        Request::RemoveExport {
            name,
            mode: RemoveMode::Safe,
            ..
        } => (
            name.clone(),
            "is being removed",
            ": end them first, or remove it with mode hide, which waits until they have left, soft or hard",
        ),
        _ => return None,
    })
}
