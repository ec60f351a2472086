//! What callers ask of the loop over D-Bus: a change goes to the middle, a question is answered at once, a survey is ordered.

use super::control::{Asker, Control};
use super::keeper::Order;
use super::log;
use crate::correlation::{Event, Request, RequestError};
use crate::dbus::{Answer, Call, Caller, Command, Filter, Publication, SessionView};
use crate::identity::VolumeId;
use crate::nbd::SessionFacts;

impl Control {
    pub(super) fn on_command(&mut self, command: Command) {
        let Command {
            call,
            reply,
            caller,
        } = command;
        // Ending a session and a log that says more are of use while exports drain.
        let goes_on = matches!(call, Call::EndSession(_) | Call::SetLogLevel(_));
        if self.stopping && call.changes() && !goes_on {
            let stopping = RequestError::NotReady("the daemon is stopping".to_owned());
            return self.answer(reply, Err(stopping));
        }
        match call {
            Call::Request(what) => match self.refusal(&what) {
                Some(error) => {
                    self.trail.note_refused(&what, &caller, &error.to_string());
                    self.answer(reply, Err(error));
                }
                None => self.begin(what, reply, caller),
            },
            Call::Reload => {
                self.trail.note_other("Reload", &caller, "asked".to_owned());
                self.reload_for(reply);
            }
            Call::Sessions(of) => {
                let sessions = self.door.sessions(of.as_ref());
                let sessions = sessions.into_iter().map(view).collect();
                self.answer(reply, Ok(Answer::Sessions(sessions)));
            }
            Call::EndSession(id) => {
                let ended = self.door.end_session(id);
                let what = if ended { "ended" } else { "there is no" };
                let detail = format!("{what} session {id}");
                self.trail.note_other("EndSession", &caller, detail);
                let none = || {
                    let error = format!("there is no session {id}; 'nbdtrack sessions' lists them");
                    RequestError::NotFound(error)
                };
                self.answer(reply, ended.then_some(Answer::Done).ok_or_else(none));
            }
            Call::Pins { pending } => {
                let mut pins = self.correlation.pins();
                pins.retain(|pin| pin.pending || !pending);
                self.answer(reply, Ok(Answer::Pins(pins)));
            }
            Call::CreateImage(asked) => self.create_image(asked, reply, &caller),
            Call::BeginBackup(asked) => self.begin_backup(asked, reply, &caller),
            Call::FinishBackup(asked) => self.finish_backup(asked, reply, &caller),
            Call::DeleteBackup(asked) => self.delete_backup(&asked, reply, &caller),
            Call::Backups => self.list_backups(reply),
            Call::Mappings => self.order(Order::List { asker: reply }),
            Call::PruneMappings { days, dry_run } => {
                if !dry_run {
                    let detail = format!("rows that are inactive for {days} days");
                    self.trail.note_other("PruneMappings", &caller, detail);
                }
                self.order(Order::Prune {
                    days,
                    dry_run,
                    asker: reply,
                });
            }
            Call::SetLogLevel(level) => {
                let state = log::set_level(level);
                let detail = format!("log level {}", level.name());
                self.trail.note_other("Set", &caller, detail);
                self.publisher.offer(vec![
                    Publication::Log(state),
                    Publication::Reply(reply, Ok(Answer::Done)),
                ]);
            }
            Call::ResolveVolume(filter) => {
                self.answer(reply, Ok(Answer::Volumes(self.resolve(&filter))))
            }
            Call::Rescan => self.rescan(reply),
            Call::Stats => {
                let stats = self.stats().into_iter();
                let stats = stats.map(|stat| (stat.name.to_owned(), stat.value));
                self.answer(reply, Ok(Answer::Stats(stats.collect())));
            }
            Call::Measures => {
                self.answer(reply, Ok(Answer::Measures(self.measures())));
            }
            Call::Metrics => self.answer(reply, Ok(Answer::Metrics(self.metrics()))),
            Call::Explain(subject) => self.explain(&subject, reply),
            Call::History(inquiry) => self.answer_from_history(inquiry, reply),
        }
    }

    /// Why the middle is not asked at all: what it cannot know of files and rules.
    fn refusal(&self, what: &Request) -> Option<RequestError> {
        if let Some(volume) = volume_named(what)
            && let Err(reason) = self.rules.permit(volume)
        {
            return Some(RequestError::InvalidArgument(reason));
        }
        self.shelf
            .permit(what)
            .err()
            .map(|reason| RequestError::InUse(reason.to_string()))
    }

    fn begin(&mut self, what: Request, reply: Asker, caller: Caller) {
        let request = self.next_request();
        self.asked.insert(request, reply);
        self.trail.note_call(request, &what, &caller);
        let job = self.job_of(request, &what, caller);
        self.apply(Event::Asked { request, what });
        // What was answered at once is no job.
        if self.asked.contains_key(&request) {
            self.begin_job(job);
        }
    }

    pub(super) fn answer(&self, asker: Asker, answer: Result<Answer, RequestError>) {
        self.publisher
            .offer(vec![Publication::Reply(asker, answer)]);
    }

    fn resolve(&self, filter: &Filter) -> Vec<crate::correlation::DiskSeq> {
        let of_volume = filter
            .volume
            .as_ref()
            .map(|volume| self.correlation.disks_of(volume));
        self.correlation
            .diskseqs()
            .filter(|diskseq| {
                of_volume
                    .as_ref()
                    .is_none_or(|disks| disks.contains(diskseq))
            })
            .filter(|diskseq| {
                self.correlation.disk(*diskseq).is_some_and(|disk| {
                    filter
                        .serial
                        .as_ref()
                        .is_none_or(|serial| disk.serial == *serial)
                        && filter.wwid.as_ref().is_none_or(|wwid| disk.wwid == *wwid)
                        && filter.node.as_ref().is_none_or(|node| disk.node.0 == *node)
                        && filter.diskseq.is_none_or(|wanted| wanted == *diskseq)
                })
            })
            .collect()
    }
}

/// The volume that a request would have served.
fn volume_named(what: &Request) -> Option<&VolumeId> {
    match what {
        Request::AddExport { definition, .. } => Some(&definition.volume),
        Request::EnsureVmExport(ensure) => ensure.volume.as_ref(),
        _ => None,
    }
}

fn view(session: SessionFacts) -> SessionView {
    SessionView {
        id: session.id,
        export: session.export,
        generation: session.generation,
        peer: session.peer,
        age_ms: u64::try_from(session.age.as_millis()).unwrap_or(u64::MAX),
    }
}
