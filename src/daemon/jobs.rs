//! Calls that last, as objects that others can watch: how many clients are left, how much of a backup is read, and how it ended.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::control::Control;
use crate::correlation::{ExportName, Reply, Request, RequestError, RequestId};
use crate::dbus::{Caller, JobView, Publication, Stage};

impl Control {
    /// What `what` would be as a job; `None` for what does not last by its clients.
    pub(super) fn job_of(
        &self,
        request: RequestId,
        what: &Request,
        caller: Caller,
    ) -> Option<JobView> {
        let (operation, target, exports, within) = match what {
            Request::PrepareDetach { volume, within, .. } => {
                let exports = self.correlation.exports_on(volume).into_iter().collect();
                ("prepare-detach", volume.to_string(), exports, *within)
            }
            Request::RemoveExport { name, within, .. } => {
                let exports = vec![name.clone()];
                ("remove-export", name.to_string(), exports, *within)
            }
            Request::AddExport { .. }
            | Request::EnsureVmExport(_)
            | Request::CancelDetach { .. }
            | Request::ResolveConflict { .. }
            | Request::Pin { .. }
            | Request::Unpin { .. } => return None,
        };
        Some(self.new_job(request, operation, target, exports, within, caller))
    }

    pub(super) fn new_job(
        &self,
        request: RequestId,
        operation: &'static str,
        target: String,
        exports: Vec<ExportName>,
        within: Duration,
        caller: Caller,
    ) -> JobView {
        let clients = self.clients_of(&exports);
        let now = SystemTime::now();
        JobView {
            id: request.0,
            operation,
            target,
            exports,
            caller,
            started_usec: since_epoch(now),
            deadline_usec: since_epoch(now + within),
            stage: stage(clients),
            clients,
            clients_max: clients,
        }
    }

    pub(super) fn begin_job(&mut self, job: Option<JobView>) {
        if let Some(job) = job {
            self.publisher.offer(vec![Publication::Job(job.clone())]);
            self.jobs.insert(RequestId(job.id), job);
        }
    }

    /// Clients of these exports came or went.
    pub(super) fn progress_jobs(&mut self, changed: &std::collections::BTreeSet<ExportName>) {
        let concerned: Vec<RequestId> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.exports.iter().any(|name| changed.contains(name)))
            .map(|(request, _)| *request)
            .collect();
        for request in concerned {
            let Some(job) = self.jobs.get(&request) else {
                continue;
            };
            let clients = self.clients_of(&job.exports);
            if let Some(job) = self.jobs.get_mut(&request) {
                job.clients = clients;
                job.clients_max = job.clients_max.max(clients);
                // Whoever still came in is not waited for twice.
                if !matches!(job.stage, Stage::Verifying(_)) {
                    job.stage = stage(clients);
                }
                self.publisher.offer(vec![Publication::Job(job.clone())]);
            }
        }
    }

    /// A backup is being read, so much of it of 1,000.
    pub(super) fn progress_reading(&mut self, request: RequestId, read: u32) {
        if let Some(job) = self.jobs.get_mut(&request) {
            job.stage = Stage::Verifying(read);
            self.publisher.offer(vec![Publication::Job(job.clone())]);
        }
    }

    /// The end of the job that `request` was, if it was one; to be told before the reply.
    pub(super) fn end_job(
        &mut self,
        request: RequestId,
        reply: &Result<Reply, RequestError>,
    ) -> Option<Publication> {
        self.finish_job(request, reply.clone().map(drop))
    }

    pub(super) fn finish_job(
        &mut self,
        request: RequestId,
        result: Result<(), RequestError>,
    ) -> Option<Publication> {
        let mut job = self.jobs.remove(&request)?;
        job.clients = self.clients_of(&job.exports);
        if result.is_ok() {
            job.stage = Stage::Done;
        }
        Some(Publication::JobDone { job, result })
    }

    fn clients_of(&self, exports: &[ExportName]) -> u32 {
        exports.iter().map(|name| self.door.clients(name)).sum()
    }
}

fn stage(clients: u32) -> Stage {
    if clients > 0 {
        Stage::Draining
    } else {
        Stage::Closing
    }
}

/// Microseconds; 0 for a clock before the epoch.
fn since_epoch(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
