//! Which disk an export serves. PURE: no I/O, no clock, no thread; the same state, time and event give
//! the same actions.

mod facts;
mod messages;
mod view;

pub use facts::*;
pub use messages::*;
pub use view::*;
