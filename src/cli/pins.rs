//! `pins`, `repin`, `unpin`: what the paths of nbd-server's configuration mean.

use clap::{Args, Subcommand};
use clap_complete::ArgValueCandidates;

use super::complete;
use super::show::{print_json, table_of};
use crate::dbus::client::{Client, ClientError, Properties};

#[derive(Debug, Args)]
pub struct Pins {
    /// Only those that wait for someone
    #[arg(long)]
    pending: bool,
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Say that the path means the disk that is there
    Confirm(Confirm),
}

#[derive(Debug, Args)]
struct Confirm {
    /// The export
    #[arg(required_unless_present = "all", add = ArgValueCandidates::new(complete::exports))]
    name: Option<String>,
    /// The disk, by the DISKSEQ that 'nbdtrack pins' shows
    #[arg(long, value_name = "N", required_unless_present = "all")]
    diskseq: Option<u64>,
    /// Confirm each that waits, with the disk that is there now
    #[arg(long, conflicts_with_all = ["name", "diskseq"])]
    all: bool,
}

/// Lists, or confirms.
pub async fn pins(
    client: &Client,
    asked: &Pins,
    as_json: bool,
) -> Result<std::io::Result<()>, ClientError> {
    let Some(What::Confirm(confirm)) = &asked.what else {
        return Ok(show(&client.pins(asked.pending).await?, as_json));
    };
    if let (Some(name), Some(diskseq)) = (&confirm.name, confirm.diskseq) {
        client.pin(name, diskseq, false).await?;
        return Ok(super::commands::done(as_json, "confirmed", name));
    }
    // Each by the disk that was read here, so none that comes meanwhile is confirmed.
    for pin in client.pins(true).await? {
        let diskseq = pin
            .get("DiskSeq")
            .and_then(|value| u64::try_from(&**value).ok());
        let name = pin
            .get("Export")
            .and_then(|value| <&str>::try_from(&**value).ok());
        if let (Some(name), Some(diskseq)) = (name, diskseq.filter(|diskseq| *diskseq > 0)) {
            client.pin(name, diskseq, false).await?;
            if let Err(error) = super::commands::done(as_json, "confirmed", name) {
                return Ok(Err(error));
            }
        }
    }
    Ok(Ok(()))
}

fn show(pins: &[Properties], as_json: bool) -> std::io::Result<()> {
    if as_json {
        return print_json(&pins.iter().map(super::show::object).collect());
    }
    let columns = [
        "Export", "Path", "PinnedTo", "DiskSeq", "Id", "Serial", "Size", "Reason",
    ];
    let header = [
        "EXPORT",
        "PATH",
        "PINNED TO",
        "DISKSEQ",
        "DISK",
        "SERIAL",
        "BYTES",
        "WAITS FOR",
    ];
    table_of(&header, &columns, pins, "no paths that could be pinned")
}
