//! What a line of the log is about.

use super::view::State;

/// The words are a promise: operators search the log for them, and the journal gives each a MESSAGE_ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Topic {
    /// The export came there.
    State(State),
    Attached,
    Detached,
    Resized,
    Released,
    TakenBack,
    StillAttached,
    Refused,
    NotDurable,
    Moved,
    Pinned,
    Pin,
    Store,
    Survey,
}

impl Topic {
    pub const fn name(self) -> &'static str {
        match self {
            Topic::State(state) => state.name(),
            Topic::Attached => "attached",
            Topic::Detached => "detached",
            Topic::Resized => "resized",
            Topic::Released => "released",
            Topic::TakenBack => "taken back",
            Topic::StillAttached => "still attached",
            Topic::Refused => "refused",
            Topic::NotDurable => "not durable",
            Topic::Moved => "moved",
            Topic::Pinned => "pinned",
            Topic::Pin => "pin",
            Topic::Store => "store",
            Topic::Survey => "survey",
        }
    }

    /// All but those of states.
    pub const EVENTS: [Topic; 13] = [
        Topic::Attached,
        Topic::Detached,
        Topic::Resized,
        Topic::Released,
        Topic::TakenBack,
        Topic::StillAttached,
        Topic::Refused,
        Topic::NotDurable,
        Topic::Moved,
        Topic::Pinned,
        Topic::Pin,
        Topic::Store,
        Topic::Survey,
    ];
}
