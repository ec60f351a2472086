//! Who may call what, where the bus's policy lets everyone call because polkit is asked (`[dbus] polkit`). PURE.

use std::collections::BTreeSet;
use std::time::Duration;

use zbus::Message;

use super::callers::KnownCaller;
use super::export::EXPORT;
use super::introspect::{INTROSPECTABLE, Interface, OBJECT_MANAGER, PEER, PROPERTIES};
use super::job::JOB;
use super::log_control::LOG_CONTROL;
use super::manager::{self, MANAGER};
use super::reply::{Refusal, method_of};
use super::volume::VOLUME;
use super::{Call, DeleteBackup, reply};
use crate::correlation::{BackupFiles, RemoveMode, Request};

/// Who calls without polkit, beside root: what a bus's policy says of users, the daemon cannot see.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Access {
    /// They call everything.
    pub users: BTreeSet<u32>,
    /// It reads.
    pub group: Option<u32>,
}

/// What a call does, and so which of polkit's actions it needs (`dbus/org.nbdtrack1.policy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    Read,
    Change,
    /// Says which disk is a volume, cuts clients off in the middle of what they write, or deletes what nobody else has.
    Dangerous,
}

/// A drain that is to be over sooner is a cut for whoever writes more than a moment's worth: with no time at all it is one for everybody.
const DRAIN_MIN: Duration = Duration::from_secs(5);

impl Right {
    /// The name of polkit's action.
    pub fn action(self) -> &'static str {
        match self {
            Right::Read => "org.nbdtrack1.read",
            Right::Change => "org.nbdtrack1.change",
            Right::Dangerous => "org.nbdtrack1.dangerous",
        }
    }

    fn of(call: &Call) -> Right {
        match call {
            Call::Request(
                Request::RemoveExport {
                    mode: RemoveMode::Soft,
                    within,
                    ..
                }
                | Request::PrepareDetach { within, .. },
            ) if *within < DRAIN_MIN => Right::Dangerous,
            Call::Request(
                Request::RemoveExport {
                    mode: RemoveMode::Hard,
                    ..
                }
                | Request::PrepareDetach { hard: true, .. }
                | Request::ResolveConflict { .. }
                | Request::Pin { .. }
                | Request::Unpin { .. },
            )
            | Call::DeleteBackup(DeleteBackup {
                files: BackupFiles::Delete,
                ..
            }) => Right::Dangerous,
            Call::FinishBackup(asked) if asked.mode == RemoveMode::Hard => Right::Dangerous,
            Call::Request(_)
            | Call::Rescan
            | Call::Reload
            | Call::EndSession(_)
            | Call::PruneMappings { .. }
            | Call::CreateImage(_)
            | Call::BeginBackup(_)
            | Call::FinishBackup(_)
            | Call::DeleteBackup(_)
            | Call::SetLogLevel(_) => Right::Change,
            Call::ResolveVolume(_)
            | Call::Sessions(_)
            | Call::Pins { .. }
            | Call::Mappings
            | Call::Backups
            | Call::Stats
            | Call::Explain(_)
            | Call::History(_)
            | Call::Measures
            | Call::Metrics => Right::Read,
        }
    }
}

impl Call {
    /// Whether something may be another way afterwards.
    pub fn changes(&self) -> bool {
        Right::of(self) != Right::Read
    }
}

impl Access {
    /// Whether a caller needs no polkit for this.
    pub fn lets(&self, known: &KnownCaller, right: Right) -> bool {
        let Some(uid) = known.caller.uid else {
            return false;
        };
        uid == 0 || self.users.contains(&uid) || (right == Right::Read && known.in_group)
    }
}

/// What a message asks for, by its method and arguments alone: whether its object exists is not yet said to a caller who may not
/// know. `None` for what says nothing of disks or exports.
///
/// # Errors
/// The refusal of a method that is in no table, or of arguments that it does not take.
pub fn right(message: &Message) -> Result<Option<Right>, Refusal> {
    let header = message.header();
    let member = header.member().map_or("", |member| member.as_str());
    let wanted = header.interface().map(|interface| interface.as_str());
    let (interface, method) = method_of(&ALL, wanted, member, message)?;
    if interface == PEER.name {
        return Ok(None);
    }
    if interface == MANAGER.name {
        return match manager::parse(method, message) {
            Ok(call) => Ok(Some(Right::of(&call))),
            Err(error) => Err(reply::Refusal::from(error)),
        };
    }
    Ok(Some(match method {
        "Set" => Right::Change,
        _ => Right::Read,
    }))
}

/// Every interface that one of our objects has. No two have a method of one name, so a call that names no interface means the
/// same here and where it is carried out.
const ALL: [&Interface; 9] = [
    &PEER,
    &INTROSPECTABLE,
    &PROPERTIES,
    &OBJECT_MANAGER,
    &MANAGER,
    &LOG_CONTROL,
    &EXPORT,
    &VOLUME,
    &JOB,
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use zbus::Variant;

    use super::super::Caller;
    use super::*;

    type Options = BTreeMap<&'static str, Variant<'static>>;

    fn message<B: serde::Serialize + zbus::DynamicType>(member: &'static str, body: &B) -> Message {
        Message::method_call("/org/nbdtrack1", member)
            .build(body)
            .unwrap()
    }

    fn wanted(message: &Message) -> Option<Right> {
        right(message).unwrap_or_else(|refusal| panic!("{}", refusal.text))
    }

    #[test]
    fn what_cuts_decides_or_deletes_is_dangerous_and_its_gentle_form_is_not() {
        let none = Options::new();
        let hard = Options::from([("mode", Variant::new("hard"))]);
        let cut = Options::from([("hard", Variant::new(true))]);
        let keep = Options::from([("keep_files", Variant::new(true))]);
        let within = |ms: u32| Options::from([("timeout_ms", Variant::new(ms))]);
        let [at_once, short, long] = [0, 4_999, 5_000].map(within);
        let safe = Options::from([
            ("mode", Variant::new("safe")),
            ("timeout_ms", Variant::new(0_u32)),
        ]);
        for (message, right) in [
            (message("RemoveExport", &("a", &none)), Right::Change),
            (message("RemoveExport", &("a", &hard)), Right::Dangerous),
            (message("RemoveExport", &("a", &at_once)), Right::Dangerous),
            (message("RemoveExport", &("a", &short)), Right::Dangerous),
            (message("RemoveExport", &("a", &long)), Right::Change),
            (message("RemoveExport", &("a", &safe)), Right::Change),
            (message("PrepareDetach", &("loop:/x", &none)), Right::Change),
            (
                message("PrepareDetach", &("loop:/x", &at_once)),
                Right::Dangerous,
            ),
            (message("PrepareDetach", &("loop:/x", &long)), Right::Change),
            (
                message("PrepareDetach", &("loop:/x", &cut)),
                Right::Dangerous,
            ),
            (message("DeleteBackup", &("a", &none)), Right::Dangerous),
            (message("DeleteBackup", &("a", &keep)), Right::Change),
            (
                message("ResolveConflict", &("a", 1_u64, &none)),
                Right::Dangerous,
            ),
            (
                message("ConfirmPin", &("a", 1_u64, &none)),
                Right::Dangerous,
            ),
            (message("Repin", &("a", 1_u64, &none)), Right::Dangerous),
            (message("Unpin", &("a", &none)), Right::Dangerous),
            (message("Rescan", &none), Right::Change),
            (message("GetStats", &none), Right::Read),
            (message("GetManagedObjects", &()), Right::Read),
            (
                message("Set", &("a", "b", Variant::new(1_u32))),
                Right::Change,
            ),
        ] {
            let member = message.header().member().unwrap().to_string();
            assert_eq!(wanted(&message), Some(right), "{member}");
        }
        assert_eq!(wanted(&message("Ping", &())), None);
        assert!(right(&message("NoSuchMethod", &())).is_err());
        assert!(right(&message("Rescan", &1_u32)).is_err());
    }

    #[test]
    fn no_two_interfaces_have_a_method_of_one_name() {
        let names: Vec<&str> = ALL
            .iter()
            .flat_map(|interface| interface.methods)
            .map(|method| method.name)
            .collect();
        let once: BTreeSet<&str> = names.iter().copied().collect();
        assert_eq!(once.len(), names.len());
    }

    #[test]
    fn root_and_named_users_call_all_and_the_group_reads() {
        let access = Access {
            users: BTreeSet::from([5]),
            group: Some(7),
        };
        let known = |uid, in_group| KnownCaller {
            caller: Caller {
                name: ":1.7".to_owned(),
                uid,
                unit: String::new(),
            },
            in_group,
        };
        for right in [Right::Read, Right::Change, Right::Dangerous] {
            assert!(access.lets(&known(Some(0), false), right));
            assert!(access.lets(&known(Some(5), false), right));
            let reads = right == Right::Read;
            assert_eq!(access.lets(&known(Some(9), true), right), reads);
            assert!(!access.lets(&known(Some(9), false), right));
            assert!(!access.lets(&known(None, true), right));
        }
    }
}
