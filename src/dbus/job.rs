//! The Job object: one call that lasts. PURE: a view in, properties out.

use std::collections::BTreeMap;

use zbus::{ObjectPath, Variant};

use super::introspect::{Interface, Signal};
use super::tree::Properties;
use super::volume::text;
use super::{JobView, Stage, paths};

pub const JOB: Interface = Interface {
    name: "org.nbdtrack1.Job",
    methods: &[],
    signals: &[Signal {
        name: "Completed",
        carries: &[("success", "b"), ("error", "s"), ("message", "s")],
    }],
    properties: &[
        ("Id", "t"),
        ("Operation", "s"),
        ("Target", "s"),
        ("Exports", "ao"),
        ("Caller", "s"),
        ("CallerUid", "u"),
        ("Started", "t"),
        ("Deadline", "t"),
        ("Stage", "s"),
        ("Clients", "u"),
        ("Progress", "d"),
    ],
    writable: &[],
};

/// The operation that reads a backup to its end.
pub const FINISH_BACKUP: &str = "finish-backup";

/// Nobody knows the caller's user.
const NO_USER: u32 = u32::MAX;

/// Returns all properties, in the order of the table.
pub fn properties(view: &JobView) -> Properties {
    let exports: Vec<ObjectPath<'static>> = view
        .exports
        .iter()
        .filter_map(|name| ObjectPath::try_from(paths::export(name)).ok())
        .collect();
    vec![
        ("Id", Variant::new(view.id)),
        ("Operation", Variant::new(view.operation)),
        ("Target", Variant::new(text(&view.target))),
        ("Exports", Variant::new(exports)),
        ("Caller", Variant::new(text(&view.caller.name))),
        (
            "CallerUid",
            Variant::new(view.caller.uid.unwrap_or(NO_USER)),
        ),
        ("Started", Variant::new(view.started_usec)),
        ("Deadline", Variant::new(view.deadline_usec)),
        ("Stage", Variant::new(view.stage.name())),
        ("Clients", Variant::new(view.clients)),
        ("Progress", Variant::new(view.progress())),
    ]
}

impl JobView {
    /// From 0 to 1: the clients are the most of it, the last flush and the close of the disk the rest; where a backup is read afterwards,
    /// that is.
    fn progress(&self) -> f64 {
        let clients = match self.operation {
            FINISH_BACKUP => 0.1,
            _ => 0.9,
        };
        match self.stage {
            Stage::Done => 1.0,
            Stage::Verifying(read) => {
                let read = f64::from(read.min(1000)) / 1000.0;
                clients + (1.0 - clients) * read
            }
            Stage::Closing => clients,
            Stage::Draining => {
                let left = f64::from(self.clients) / f64::from(self.clients_max.max(1));
                clients * (1.0 - left.min(1.0))
            }
        }
    }
}

/// What a session is told as: `Id`, `Export`, `Generation`, `Peer`, `Age`.
pub fn session(session: &super::SessionView) -> BTreeMap<&'static str, Variant<'static>> {
    BTreeMap::from([
        ("Id", Variant::new(session.id)),
        ("Export", Variant::new(text(session.export.as_str()))),
        ("Generation", Variant::new(session.generation.0)),
        ("Peer", Variant::new(text(&session.peer))),
        ("Age", Variant::new(session.age_ms)),
    ])
}

#[cfg(test)]
mod tests {
    use super::super::Caller;
    use super::*;

    #[test]
    fn progress_only_grows_while_clients_leave() {
        let mut view = JobView {
            id: 1,
            operation: "prepare-detach",
            target: "loop:/x".to_owned(),
            exports: Vec::new(),
            caller: Caller {
                name: ":1.1".to_owned(),
                uid: None,
                unit: String::new(),
            },
            started_usec: 0,
            deadline_usec: 0,
            stage: Stage::Draining,
            clients: 4,
            clients_max: 4,
        };
        let mut last = -1.0;
        for clients in (1..=4).rev() {
            view.clients = clients;
            assert!(view.progress() > last, "{clients}");
            last = view.progress();
        }
        view.clients = 0;
        for stage in [Stage::Closing, Stage::Done] {
            view.stage = stage;
            assert!(view.progress() > last, "{stage:?}");
            last = view.progress();
        }
        assert!((last - 1.0).abs() < f64::EPSILON);
        view.operation = FINISH_BACKUP;
        let stages = [0, 1, 999].map(Stage::Verifying);
        last = -1.0;
        for stage in [Stage::Draining]
            .into_iter()
            .chain(stages)
            .chain([Stage::Done])
        {
            view.stage = stage;
            assert!(
                view.progress() > last || stage == Stage::Verifying(0),
                "{stage:?}"
            );
            last = view.progress();
        }
    }
}
