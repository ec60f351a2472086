//! nbdtrack: NBD exports that follow the volume, not the path.

pub mod cli;
pub mod config;
pub mod correlation;
pub mod daemon;
pub mod dbus;
pub mod identity;
pub mod image;
pub mod mapping;
pub mod nbd;
pub mod udev;
