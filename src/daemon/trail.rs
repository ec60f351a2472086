//! What the loop has remembered in the audit trail, and what it answers from it. Never waits for it.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::control::{Asker, Control};
use crate::correlation::{
    Ensure, Inquiry, Notice, Record, RecordKind, Reply, Request, RequestError, RequestId,
};
use crate::dbus::{Answer, Caller, Subject};
use crate::mapping::{History, now_us};
use crate::nbd::{Client, Door, Seen};

/// Events that an explanation tells.
const EXPLAINED_EVENTS: u32 = 12;

/// Turned away clients that are remembered in a second: one that asks in a loop must not wear the disk out.
const REFUSED_A_SECOND: u32 = 20;

/// The trail, and the calls that are not answered yet.
pub(super) struct Trail {
    pub history: History,
    /// As many as the loop has callers.
    calls: HashMap<RequestId, Record>,
}

impl Trail {
    pub fn new(history: History, door: &Door) -> Trail {
        history.note(Record {
            detail: format!("nbdtrack {}", env!("CARGO_PKG_VERSION")),
            ..Record::new(RecordKind::Started, now_us())
        });
        let clients = history.clone();
        // A lock that session threads hold for a comparison; it bounds refusals only.
        let refusals = Mutex::new(Window::new(REFUSED_A_SECOND));
        door.on_client_seen(Box::new(move |client: Client<'_>| {
            let admitted = client.seen != Seen::Refused
                || refusals
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .admits(Instant::now());
            if admitted {
                clients.note(Record {
                    export: client.export.to_owned(),
                    new: client.seen.name().to_owned(),
                    detail: client.reason.to_owned(),
                    peer: client.peer.address.clone(),
                    uid: client.peer.uid,
                    ..Record::new(RecordKind::Client, now_us())
                });
            }
        }));
        Trail {
            history,
            calls: HashMap::new(),
        }
    }

    /// A call that changes something; told when it is answered.
    pub fn note_call(&mut self, request: RequestId, what: &Request, caller: &Caller) {
        self.calls.insert(request, called(what, caller));
    }

    /// A call that was refused before the middle heard of it.
    pub fn note_refused(&self, what: &Request, caller: &Caller, reason: &str) {
        self.history.note(Record {
            detail: format!("refused: {reason}"),
            ..called(what, caller)
        });
    }

    /// A call that the middle does not hear of, with what came of it.
    pub fn note_other(&self, method: &str, caller: &Caller, detail: String) {
        self.history.note(Record {
            detail,
            ..by(method, caller)
        });
    }

    pub fn note_answer(&mut self, request: RequestId, reply: &Result<Reply, RequestError>) {
        let Some(mut record) = self.calls.remove(&request) else {
            return;
        };
        record.detail = match reply {
            Ok(Reply::Done) => "done".to_owned(),
            Ok(Reply::Added { created: true, .. }) => format!("created{}", record.detail),
            Ok(Reply::Added { created: false, .. }) => {
                format!("was there already{}", record.detail)
            }
            Err(error) => format!("refused: {error}{}", record.detail),
        };
        self.history.note(record);
    }
}

impl Control {
    pub(super) fn note_notices(&mut self, notices: &[Notice]) {
        for notice in notices {
            self.serving.on_notice(notice, || match notice {
                Notice::ExportState { export, .. } => self.correlation.export(export)?.disk,
                _ => None,
            });
            if let Some(record) = self.correlation.record(notice, now_us()) {
                self.trail.history.note(record);
            }
        }
    }

    /// Answers from the trail in a task of its own: as many as D-Bus lets readers in, each ends by the trail's deadline.
    pub(super) fn answer_from_history(&self, inquiry: Inquiry, asker: Asker) {
        let history = self.trail.history.clone();
        tokio::spawn(async move {
            let answer = history.ask(inquiry).await;
            let answer = answer.map(Answer::Records);
            // Who asked may have gone.
            let _gone = asker.send(answer.map_err(|error| RequestError::Failed(error.to_string())));
        });
    }

    /// The middle explains, the trail tells what led there; an explanation does without the trail when that has trouble.
    pub(super) fn explain(&self, subject: &Subject, asker: Asker) {
        let explained = match subject {
            Subject::Export(name) => self
                .correlation
                .explain_export(name)
                .map(|explanation| {
                    let disk = self.correlation.export(name).and_then(|view| view.disk);
                    let volume = disk.and_then(|disk| self.correlation.disk(disk));
                    (explanation, Some(name.to_string()), volume.map(|view| view.id))
                })
                .ok_or_else(|| format!("{name}: no such export")),
            Subject::Disk(called) => self
                .correlation
                .disk_called(called)
                .and_then(|diskseq| self.correlation.explain_disk(diskseq))
                .map(|explanation| {
                    let id = explanation.volume.clone();
                    (explanation, None, Some(id))
                })
                .ok_or_else(|| {
                    format!("{called}: no attached whole disk of this node or number; partitions are not served")
                }),
        };
        let (explanation, export, volume) = match explained {
            Ok(explained) => explained,
            Err(reason) => {
                let _gone = asker.send(Err(RequestError::NotFound(reason)));
                return;
            }
        };
        let inquiry = Inquiry {
            export,
            volume: volume.filter(|id| !id.is_empty()),
            newest: true,
            limit: EXPLAINED_EVENTS,
            ..Inquiry::default()
        };
        let history = self.trail.history.clone();
        tokio::spawn(async move {
            let told = if inquiry.export.is_none() && inquiry.volume.is_none() {
                Ok(Vec::new())
            } else {
                history.ask(inquiry).await
            };
            let (events, remark) = match told {
                Ok(events) => (events, String::new()),
                Err(error) => (Vec::new(), error.to_string()),
            };
            let _gone = asker.send(Ok(Answer::Explained {
                explanation: Box::new(explanation),
                events,
                remark,
            }));
        });
    }
}

fn called(what: &Request, caller: &Caller) -> Record {
    let (method, export, volume) = match what {
        Request::AddExport { definition, .. } => (
            "AddExport",
            definition.name.to_string(),
            definition.volume.to_string(),
        ),
        Request::EnsureVmExport(ensure) => (
            "EnsureVmExport",
            ensure.disk.export().to_string(),
            ensure
                .volume
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
        ),
        Request::RemoveExport { name, .. } => ("RemoveExport", name.to_string(), String::new()),
        Request::PrepareDetach { volume, .. } => {
            ("PrepareDetach", String::new(), volume.to_string())
        }
        Request::CancelDetach { volume } => ("CancelDetach", String::new(), volume.to_string()),
        Request::ResolveConflict { name, .. } => {
            ("ResolveConflict", name.to_string(), String::new())
        }
        Request::Pin { name, anew, .. } => {
            let method = if *anew { "Repin" } else { "ConfirmPin" };
            (method, name.to_string(), String::new())
        }
        Request::Unpin { name } => ("Unpin", name.to_string(), String::new()),
    };
    Record {
        export,
        volume,
        diskseq: match what {
            Request::ResolveConflict { diskseq, .. } | Request::Pin { diskseq, .. } => diskseq.0,
            _ => 0,
        },
        // The answer comes before it.
        detail: match what {
            Request::EnsureVmExport(ensure) => purpose(ensure),
            _ => String::new(),
        },
        ..by(method, caller)
    }
}

/// What a caller says that it needs a VM's disk for.
fn purpose(ensure: &Ensure) -> String {
    let mut text = String::new();
    if ensure.moves {
        text.push_str("; it may move");
    }
    if !ensure.job.is_empty() {
        text.push_str("; job ");
        text.push_str(&ensure.job);
    }
    text
}

/// A call, of which is to be said what came of it.
pub(super) fn by(method: &str, caller: &Caller) -> Record {
    Record {
        new: method.to_owned(),
        peer: caller.name.clone(),
        uid: caller.uid,
        unit: caller.unit.clone(),
        ..Record::new(RecordKind::Call, now_us())
    }
}

/// Lets so many through in each second.
struct Window {
    max: u32,
    began: Option<Instant>,
    used: u32,
}

impl Window {
    fn new(max: u32) -> Window {
        Window {
            max,
            began: None,
            used: 0,
        }
    }

    fn admits(&mut self, now: Instant) -> bool {
        if self
            .began
            .is_none_or(|began| now.duration_since(began) >= Duration::from_secs(1))
        {
            self.began = Some(now);
            self.used = 0;
        }
        self.used = self.used.saturating_add(1);
        self.used <= self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_admits_its_number_in_each_second() {
        let mut window = Window::new(2);
        let start = Instant::now();
        let later = start + Duration::from_millis(1_001);
        let admitted = [start, start, start, later].map(|at| window.admits(at));
        assert_eq!(admitted, [true, true, false, true]);
    }
}
