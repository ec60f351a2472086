//! The table that several machines share: read, asked and written beside the loop.

pub(in crate::daemon) mod keep;
pub(in crate::daemon) mod lease;
pub(in crate::daemon) mod look;
pub(in crate::daemon) mod looks;
pub(in crate::daemon) mod row_asks;
pub(in crate::daemon) mod row_paths;
pub(in crate::daemon) mod table;
pub(in crate::daemon) mod writes;
