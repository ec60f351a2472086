//! `org.freedesktop.LogControl1`: the daemon's log level, as `systemctl service-log-level` reads and sets it
//! (org.freedesktop.LogControl1(5)). PURE.

use zbus::Variant;

use super::introspect::Interface;
use super::options::one_of;
use super::tree::Properties;
use crate::correlation::RequestError;

/// Where systemctl looks for it.
pub const PATH: &str = "/org/freedesktop/LogControl1";

pub const LOG_CONTROL: Interface = Interface {
    name: "org.freedesktop.LogControl1",
    methods: &[],
    signals: &[],
    properties: &[
        ("LogLevel", "s"),
        ("LogTarget", "s"),
        ("SyslogIdentifier", "s"),
    ],
    writable: &["LogLevel"],
};

/// How much is logged, by syslog's names (syslog(3)); what lies between two of ours is the louder one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogLevel {
    Error,
    Warning,
    #[default]
    Info,
    Debug,
}

impl LogLevel {
    pub fn name(self) -> &'static str {
        match self {
            LogLevel::Error => "err",
            LogLevel::Warning => "warning",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
        }
    }

    /// Reads a level as systemd names it.
    ///
    /// # Errors
    /// `InvalidArgument` with the names that there are.
    pub fn parse(text: &str) -> Result<LogLevel, RequestError> {
        let words = [
            ("emerg", LogLevel::Error),
            ("alert", LogLevel::Error),
            ("crit", LogLevel::Error),
            ("err", LogLevel::Error),
            ("warning", LogLevel::Warning),
            ("notice", LogLevel::Info),
            ("info", LogLevel::Info),
            ("debug", LogLevel::Debug),
        ];
        one_of("LogLevel", text, &words)
    }
}

/// What the log does now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogState {
    pub level: LogLevel,
    /// `console` or `journal`.
    pub target: &'static str,
}

impl Default for LogState {
    fn default() -> LogState {
        LogState {
            level: LogLevel::Info,
            target: "console",
        }
    }
}

/// Returns all properties, in the order of the table.
pub fn properties(state: LogState) -> Properties {
    vec![
        ("LogLevel", Variant::new(state.level.name())),
        ("LogTarget", Variant::new(state.target)),
        ("SyslogIdentifier", Variant::new("nbdtrack")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_of_systemd_is_understood_and_ours_are_told_by_its_names() {
        for level in [
            "emerg", "alert", "crit", "err", "warning", "notice", "info", "debug",
        ] {
            let read = LogLevel::parse(level).unwrap();
            assert_eq!(LogLevel::parse(read.name()), Ok(read));
        }
        assert!(LogLevel::parse("trace").is_err());
    }
}
