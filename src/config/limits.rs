//! `[limits]`: what clients may make the server hold. PURE.

use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use super::table::{Reading, Table};

/// `[limits]`. What is left out has its default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub connections_per_address: u32,
    pub handshakes: u32,
    pub options: u32,
    /// 0 for no limit.
    pub requests_per_second: u32,
    /// Bytes.
    pub in_flight_bytes: u64,
    /// Bytes.
    pub in_flight_bytes_all: u64,
    pub handshake: Duration,
    pub send: Duration,
    pub request: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections_per_address: 1024,
            handshakes: 1024,
            options: 4096,
            requests_per_second: 0,
            in_flight_bytes: 64 << 20,
            in_flight_bytes_all: 512 << 20,
            handshake: Duration::from_secs(10),
            send: Duration::from_secs(10),
            request: Duration::from_secs(30),
        }
    }
}

pub(super) fn limits<'a>(value: Spanned<DeValue<'a>>, reading: &mut Reading<'a>) -> Limits {
    let mut limits = Limits::default();
    let Some(mut table) = Table::of(value, "[limits]", reading) else {
        return limits;
    };
    for (key, most, least, field) in [
        (
            "max_connections_per_address",
            65_536,
            1,
            &mut limits.connections_per_address,
        ),
        ("max_handshakes", 65_536, 1, &mut limits.handshakes),
        ("max_options", 1 << 20, 16, &mut limits.options),
        (
            "max_requests_per_second",
            10_000_000,
            0,
            &mut limits.requests_per_second,
        ),
    ] {
        if let Some(number) = table.number(key, least..=most) {
            *field = u32::try_from(number).unwrap_or(u32::MAX);
        }
    }
    // At least one of the largest requests; at most what a machine has.
    for (key, field) in [
        (
            "max_in_flight_mib_per_connection",
            &mut limits.in_flight_bytes,
        ),
        ("max_in_flight_mib", &mut limits.in_flight_bytes_all),
    ] {
        if let Some(mib) = table.number(key, 32..=1 << 20) {
            *field = mib << 20;
        }
    }
    for (key, field) in [
        ("handshake_timeout_s", &mut limits.handshake),
        ("send_timeout_s", &mut limits.send),
        ("request_timeout_s", &mut limits.request),
    ] {
        if let Some(seconds) = table.number(key, 1..=3_600) {
            *field = Duration::from_secs(seconds);
        }
    }
    table.end(&[
        "max_connections_per_address",
        "max_handshakes",
        "max_options",
        "max_requests_per_second",
        "max_in_flight_mib_per_connection",
        "max_in_flight_mib",
        "handshake_timeout_s",
        "send_timeout_s",
        "request_timeout_s",
    ]);
    limits
}
