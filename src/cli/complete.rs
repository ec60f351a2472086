//! Completes live names: exports and volumes of the running daemon. Who asks is a person at a shell, so no answer within a
//! second is no candidates, and nothing is ever printed but candidates.

use std::time::Duration;

use clap_complete::CompletionCandidate;

use super::show::plain;
use crate::dbus::Bus;
use crate::dbus::client::{Client, Objects, Properties};

const WITHIN: Duration = Duration::from_secs(1);

/// Names of exports, each with its state.
pub fn exports() -> Vec<CompletionCandidate> {
    candidates(|objects| {
        let exports = objects.exports.values();
        exports
            .map(|export| (text(export, "Name"), text(export, "State")))
            .collect()
    })
}

/// Volumes that exports know, as `profile:id`.
pub fn volumes() -> Vec<CompletionCandidate> {
    candidates(|objects| {
        let exports = objects.exports.values();
        exports
            .map(|export| (text(export, "VolumeId"), text(export, "Name")))
            .collect()
    })
}

/// Ids of VMs whose disks are exported.
pub fn vms() -> Vec<CompletionCandidate> {
    candidates(|objects| {
        let exports = objects.exports.values();
        exports
            .map(|export| (text(export, "VmId"), text(export, "Name")))
            .collect()
    })
}

/// Nodes of attached disks.
pub fn disks() -> Vec<CompletionCandidate> {
    candidates(|objects| {
        let volumes = objects.volumes.values();
        volumes
            .map(|volume| (text(volume, "DeviceNode"), text(volume, "Id")))
            .collect()
    })
}

/// Sequence numbers of attached disks.
pub fn diskseqs() -> Vec<CompletionCandidate> {
    candidates(|objects| {
        let volumes = objects.volumes.values();
        volumes
            .map(|volume| (text(volume, "DiskSeq"), text(volume, "DeviceNode")))
            .collect()
    })
}

fn candidates(pick: fn(&Objects) -> Vec<(String, String)>) -> Vec<CompletionCandidate> {
    let Some(objects) = objects() else {
        return Vec::new();
    };
    let mut pairs = pick(&objects);
    pairs.retain(|(value, _)| !value.is_empty());
    pairs.sort();
    pairs.dedup_by(|a, b| a.0 == b.0);
    pairs
        .into_iter()
        .map(|(value, help)| CompletionCandidate::new(value).help(Some(help.into())))
        .collect()
}

fn objects() -> Option<Objects> {
    let bus = Bus::parse(&bus_of(std::env::args())).ok()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    runtime.block_on(async {
        let asking = async { Client::connect(&bus).await.ok()?.objects().await.ok() };
        tokio::time::timeout(WITHIN, asking).await.ok()?
    })
}

/// The bus that the unfinished line names.
fn bus_of(mut words: impl Iterator<Item = String>) -> String {
    while let Some(word) = words.next() {
        if word == "--bus"
            && let Some(bus) = words.next()
        {
            return bus;
        }
        if let Some(bus) = word.strip_prefix("--bus=") {
            return bus.to_owned();
        }
    }
    "system".to_owned()
}

fn text(properties: &Properties, name: &str) -> String {
    properties
        .get(name)
        .map(|value| plain(value))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bus_of_the_line_is_the_one_that_is_asked() {
        let bus = |line: &str| bus_of(line.split(' ').map(str::to_owned));
        assert_eq!(
            bus("nbdtrack -- nbdtrack --bus unix:path=/x remove"),
            "unix:path=/x"
        );
        assert_eq!(bus("nbdtrack --bus=unix:path=/y"), "unix:path=/y");
        assert_eq!(bus("nbdtrack remove"), "system");
    }
}
