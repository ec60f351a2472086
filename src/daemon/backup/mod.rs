//! The life of a backup, as the bus asks for it: its calls, its steps, and what its row says.

pub(in crate::daemon) mod beside;
pub(in crate::daemon) mod calls;
pub(in crate::daemon) mod reading;
pub(in crate::daemon) mod shelf;
pub(in crate::daemon) mod steps;
pub(in crate::daemon) mod unflushed;
