//! Carrying out what the middle orders.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::backup::shelf::Shelf;
use super::control::Control;
use super::log;
use super::reports::Report;
use crate::correlation::{
    Action, Change, DiskSeq, Event, ExportName, INTERNAL, Mark, Notice, OpenDisk, OpenRefusal,
    OpenedDisk, Reply, RequestError, RequestId, Ticket,
};
use crate::dbus::{Answer, Publication};
use crate::identity::Format;
use crate::image::Image;
use crate::image::beneath::{FileError, Roots};
use crate::image::{block, qcow2, raw};

impl Control {
    /// Carries out actions in their order; what is told goes to the bus as one batch after them.
    pub fn carry_out(&mut self, actions: Vec<Action>) {
        let mut notices = Vec::new();
        let mut replies = Vec::new();
        // The middle's own changes of one turn are one order: a twin begins a conflict of each export of its volume.
        let mut own = Vec::new();
        let mut counted = Vec::new();
        for action in actions {
            match action {
                Action::OpenDisk(order) => self.open_disk(order),
                Action::DropOpened { ticket } => self.drop_opened(ticket),
                Action::Serve {
                    export,
                    ticket,
                    generation,
                    read_only,
                    turns,
                } => {
                    let image = self
                        .opened
                        .remove(&ticket)
                        .expect("the middle serves a ticket once, after its open");
                    self.door.take_turns(&export, turns);
                    self.door.serve(&export, generation, image, read_only);
                }
                Action::Refuse {
                    export,
                    kind,
                    reason,
                } => self.door.refuse(&export, kind, &reason),
                Action::Unseal { export, generation } => self.door.unseal(&export, generation),
                Action::Grow { export, generation } => self.door.grow(&export, generation),
                Action::Hide { export, reason } => {
                    if self.door.hide(&export, &reason) == 0 {
                        let unused = Event::Unused { export };
                        self.reports.send(Report::Happened(unused));
                    }
                }
                Action::HideAndCount {
                    request,
                    export,
                    reason,
                } => {
                    let clients = self.door.hide(&export, &reason);
                    counted.push(Event::Counted { request, clients });
                }
                Action::Show { export } => self.door.show(&export),
                Action::Forget { export } => self.door.forget(&export),
                Action::EndLease {
                    export,
                    generation,
                    how,
                } => {
                    let reports = self.reports.clone();
                    let name = export.clone();
                    let report = move |end| {
                        let event = Event::LeaseEnded {
                            export: name.clone(),
                            generation,
                            end,
                        };
                        reports.send(Report::Happened(event));
                    };
                    self.door
                        .end_lease(&export, generation, how, Box::new(report));
                }
                Action::Persist {
                    request: INTERNAL,
                    mut changes,
                } => own.append(&mut changes),
                Action::Persist { request, changes } => {
                    self.write_own(&mut own);
                    self.write(request, changes);
                }
                Action::Reply { request, reply } => replies.push((request, reply)),
                Action::Survey { reason } => {
                    // Any later survey will do.
                    let _asked = self.observer.survey(reason);
                    let _asked = self.files.check();
                }
                Action::WatchFile { file } => self.files.watch(file),
                Action::UnwatchFile { file } => self.files.unwatch(&file),
                Action::LookUpPaths => self.look_up_paths(),
                Action::Tell(notice) => notices.push(notice),
                Action::Log(decision) => log::decision(&decision),
            }
        }
        self.write_own(&mut own);
        self.publish(notices, replies);
        self.keep_claims();
        for event in counted {
            self.apply(event);
        }
    }

    fn write_own(&mut self, changes: &mut Vec<Change>) {
        if !changes.is_empty() {
            self.write(INTERNAL, std::mem::take(changes));
        }
    }

    /// Opens in a thread of the blocking pool: a disk may take for ever.
    fn open_disk(&mut self, order: OpenDisk) {
        self.opening += 1;
        let reports = self.reports.clone();
        let order = Box::new(order);
        if let Err(refused) = self.may_be_opened(&order) {
            reports.send(Report::Opened {
                order,
                mark: Mark::default(),
                result: Err(refused),
            });
            return;
        }
        let claims = Arc::clone(&self.claims);
        let reader = self.observer.identity_reader();
        let roots = Arc::clone(&self.roots);
        let shelf = self.shelf.clone();
        let opens = self.files.opens();
        tokio::task::spawn_blocking(move || {
            let result = answered(|| {
                is_no_link_to_a_backup(&order, &roots, &shelf)?;
                let opened = match order.identity.format() {
                    Some(Format::Raw) => raw::open(&order, &roots, &claims).map(shared),
                    Some(Format::Qcow2) => qcow2::open(&order, &roots, &claims).map(shared),
                    None => {
                        let read = |number| reader.read(number);
                        block::open(&order, &read, &claims).map(shared)
                    }
                };
                opened.map_err(OpenRefusal::from)
            });
            // Files are watched by an edge that counts its own observations.
            let mark = match order.identity.format() {
                Some(_) => opens.opened(order.diskseq),
                None => reader.mark(),
            };
            reports.send(Report::Opened {
                order,
                mark,
                result,
            });
        });
    }

    /// Whoever asks for it, and by whatever name: a backup that is complete stays as it was finished.
    fn may_be_opened(&self, order: &OpenDisk) -> Result<(), OpenRefusal> {
        match order.identity.file() {
            Some(path) if order.write => Ok(self.shelf.may_be_written(path, order.diskseq)?),
            _ => Ok(()),
        }
    }

    /// What a thread has opened, or why it has not. Asked again: a backup can have become complete meanwhile, and lets go of its file then.
    pub(super) fn on_opened(
        &mut self,
        order: &OpenDisk,
        mark: Mark,
        result: Result<Arc<dyn Image>, OpenRefusal>,
    ) {
        let ticket = order.ticket;
        let result = match (result, self.may_be_opened(order)) {
            (Ok(image), Err(refused)) => {
                // Closing it can wait for its file system. Nothing was written through it.
                tokio::task::spawn_blocking(move || drop(image));
                Err(refused)
            }
            (result, _) => result,
        };
        let result = result.map(|image| {
            let opened = OpenedDisk {
                size: image.size(),
                mark,
                read_only: image.read_only(),
            };
            self.opened.insert(ticket, image);
            opened
        });
        self.apply(Event::DiskOpened { ticket, result });
        self.opening -= 1;
        if self.opening == 0 {
            self.tell_ready();
        }
    }

    /// Closes in a thread of the blocking pool: the last close of a disk syncs it.
    fn drop_opened(&mut self, ticket: Ticket) {
        let image = self.opened.remove(&ticket);
        let reports = self.reports.clone();
        tokio::task::spawn_blocking(move || {
            // The hook of panics has told it.
            let _told = catch_unwind(AssertUnwindSafe(|| drop(image)));
            reports.send(Report::Happened(Event::Dropped { ticket }));
        });
    }

    /// Brings the objects up to date, then tells of what happened, then answers: whoever hears of a change
    /// or is answered can see it.
    pub fn publish(
        &mut self,
        notices: Vec<Notice>,
        replies: Vec<(RequestId, Result<Reply, RequestError>)>,
    ) {
        self.note_notices(&notices);
        let now = tokio::time::Instant::now();
        let mut exports = BTreeSet::new();
        let mut disks = BTreeSet::new();
        let mut signals = Vec::new();
        for notice in notices {
            match notice {
                Notice::Export(name) => {
                    exports.insert(name);
                }
                // A disk lists its exports, of which there may be ten thousand.
                Notice::Disk(_) | Notice::Exports(_) if !self.publisher.is_served() => {}
                Notice::Disk(diskseq) => {
                    disks.insert(diskseq);
                }
                Notice::Exports(diskseq) => {
                    if self.disk_lists.may_be_told(diskseq, now) {
                        disks.insert(diskseq);
                    }
                }
                Notice::Reloaded(difference) => signals.extend(self.reloaded(difference)),
                signal => signals.push(Publication::Signal(signal)),
            }
        }
        let mut batch: Vec<Publication> = disks
            .into_iter()
            .map(|diskseq| self.disk(diskseq, now))
            .collect();
        batch.extend(exports.into_iter().map(|name| self.export(name)));
        batch.extend(signals);
        for (request, reply) in replies {
            if let Some(task) = self.wished.remove(&request) {
                // It ends with the daemon only.
                let _ended = task.send(reply);
                continue;
            }
            self.trail.note_answer(request, &reply);
            batch.extend(self.end_job(request, &reply));
            // A caller that has gone has taken its receiver along, which costs nothing.
            let Some(asker) = self.asked.remove(&request) else {
                continue;
            };
            let answer = reply.map(|reply| match reply {
                Reply::Done => Answer::Done,
                Reply::Added { name, created } => Answer::Added { name, created },
            });
            batch.push(Publication::Reply(asker, answer));
        }
        if !batch.is_empty() {
            self.publisher.offer(batch);
        }
    }

    fn export(&self, name: ExportName) -> Publication {
        let view = self.correlation.export(&name);
        let state = match &view {
            Some(view) => view.mapping_state(),
            None => self.correlation.kept_mapping_state(&name),
        };
        self.states.say(&name, state);
        match view {
            Some(view) => Publication::Export {
                clients: self.door.clients(&name),
                view,
            },
            None => Publication::ExportGone(name),
        }
    }

    /// Tells the lists of exports that have rested.
    pub(super) fn tell_disk_lists(&mut self) {
        let now = tokio::time::Instant::now();
        let due = self.disk_lists.take(now);
        let batch = due.into_iter().map(|diskseq| self.disk(diskseq, now));
        let batch = batch.collect();
        self.publisher.offer(batch);
    }

    fn disk(&mut self, diskseq: DiskSeq, now: tokio::time::Instant) -> Publication {
        let view = self.correlation.disk(diskseq);
        let exports = view.as_ref().map_or(0, |view| view.exports.len());
        self.disk_lists.told(diskseq, exports, now);
        match view {
            Some(view) => Publication::Disk(view),
            None => Publication::DiskGone(diskseq),
        }
    }
}

/// Refuses to open for writing what is a complete backup by a link: the number that its incarnation is known by has that of its file system in it, which can be
/// another one after a mount or a restart of the machine. Blocks.
fn is_no_link_to_a_backup(
    order: &OpenDisk,
    roots: &Roots,
    shelf: &Shelf,
) -> Result<(), OpenRefusal> {
    let Some(path) = order.identity.file().filter(|_| order.write) else {
        return Ok(());
    };
    let complete = shelf.known().backups.complete_paths();
    let found = match roots.known_as(path, &complete) {
        Ok(found) => found,
        Err(error @ FileError::Kernel { .. }) => {
            return Err(OpenRefusal::BackupUnknown {
                path: path.to_owned(),
                reason: error.to_string(),
            });
        }
        // What leads to no file is the opening's to tell.
        Err(_) => None,
    };
    let known = shelf.known();
    found.map_or(Ok(()), |path| {
        Ok(known.backups.may_be_written(path, None)?)
    })
}

/// What an open gives, also when it breaks: an order that nobody answers would keep its disk from every export for good.
fn answered<T>(open: impl FnOnce() -> Result<T, OpenRefusal>) -> Result<T, OpenRefusal> {
    // What it had in hand is dropped, and closed by that.
    catch_unwind(AssertUnwindSafe(open)).unwrap_or(Err(OpenRefusal::Broken))
}

fn shared<T: Image + 'static>(image: T) -> Arc<dyn Image> {
    Arc::new(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::panic, reason = "it is what is tested")]
    fn an_open_that_breaks_is_answered() {
        let broken = answered::<()>(|| panic!("a fault"));
        assert_eq!(broken, Err(OpenRefusal::Broken));
        assert_eq!(answered(|| Ok::<i32, OpenRefusal>(7)), Ok(7));
    }
}
