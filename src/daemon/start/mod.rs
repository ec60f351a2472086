//! What a start needs before the loop runs: settings, rights, sockets, the files of the run.

pub(in crate::daemon) mod activation;
pub(in crate::daemon) mod configure;
pub(in crate::daemon) mod database_address;
pub(in crate::daemon) mod rights;
pub(in crate::daemon) mod runtime_files;
pub(in crate::daemon) mod settings;
pub(in crate::daemon) mod sockets;
pub(in crate::daemon) mod store;
