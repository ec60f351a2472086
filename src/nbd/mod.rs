//! The embedded NBD server. EDGE: `wire`, `command` and `handshake` are pure; the others do.
//!
//! A connection flows `listener → poller → session → transmission → command → execute → lease → image → conn`;
//! `door` is what the daemon calls. Two kinds of thread (`crew`) and one that waits for all of them (`poller`).

mod access;
mod account;
mod asked;
mod bound;
mod closing;
mod command;
mod conn;
mod crew;
mod crowd;
mod door;
mod ending;
mod execute;
mod gate;
pub mod handshake;
mod hidden;
mod inline;
mod input;
mod interest;
mod lease;
mod limits;
mod listener;
mod meter;
#[cfg(all(test, feature = "model"))]
mod model;
#[cfg(all(test, feature = "model"))]
mod model_image;
mod pipes;
mod poller;
mod predecessors;
mod pulse;
mod rate;
mod reply;
mod session;
mod sessions;
mod shared;
mod shortage;
mod socket;
mod stats;
mod transmission;
pub mod wire;
mod witness;
mod work;

pub use access::{Access, AllowList, Rules};
pub use door::Door;
pub use lease::Report;
pub use limits::Limits;
pub use meter::{BUCKETS_US, Measured, Operation};
pub use pulse::Pulse;
pub use sessions::SessionFacts;
pub use stats::{Stat, Stats};
pub use witness::{Client, ClientWitness, Peer, Seen};
