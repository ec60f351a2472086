//! `backup` and `backups`: begun, finished, deleted and listed, by the daemon.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;

use super::Failure;
use super::image::{Asking, bytes};
use super::lasting;
use super::progress::ProgressLine;
use super::show::{object, plain, print, print_json, table_of};
use crate::correlation::{
    BackupFiles, BeginBackup, Children, ExportName, Interrupted, Preallocation,
};
use crate::dbus::client::{Client, Properties};

/// How often a terminal is told how far a backup is.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub struct Asked {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make the image of a backup, and export it for its one writer
    Begin(Begin),
    /// Take the export away, check the image, and keep what is in it: it is complete then
    Finish(Finish),
    /// Delete a backup and its file
    Delete(Delete),
}

#[derive(Debug, Args)]
struct Begin {
    /// What the backup is of: the VM or the job
    context: String,
    /// The number of the disk
    disk: u32,
    /// Virtual size in bytes, or with K, M, G, T or P; not needed with a parent
    #[arg(long, value_name = "SIZE", value_parser = bytes, required_unless_present = "parent")]
    size: Option<u64>,
    /// The complete backup that it lies on: it is incremental then
    #[arg(long, value_name = "NAME")]
    parent: Option<String>,
    /// When it is made, in seconds since 1970; now, without it
    #[arg(long, value_name = "SECONDS")]
    at: Option<u64>,
    /// Where its file is made [default: beside the parent, or in the first of file_roots]
    #[arg(long, value_name = "PATH")]
    folder: Option<String>,
    /// Bytes of a cluster, from 512 to 2M [default: 64K]
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    cluster_size: Option<u64>,
    /// What is there before anything is written
    #[arg(long, value_name = "MODE", value_parser = ["off", "metadata", "falloc", "full"], default_value = "off")]
    preallocation: String,
    /// How long to wait until it serves [default: 10]
    #[arg(long, value_name = "SECONDS", value_parser = super::seconds)]
    wait: Option<Duration>,
}

#[derive(Debug, Args)]
struct Finish {
    /// The backup
    name: String,
    /// Refuse while its export has clients
    #[arg(long)]
    safe: bool,
    /// Cut its clients off rather than drain them
    #[arg(long, conflicts_with = "safe")]
    hard: bool,
    /// Take it although the daemon ended while it was written
    #[arg(long)]
    interrupted: bool,
    /// How long to wait until it is complete [default: 300]
    #[arg(long, value_name = "SECONDS", value_parser = super::seconds)]
    wait: Option<Duration>,
}

#[derive(Debug, Args)]
struct Delete {
    /// The backup
    name: String,
    /// Delete those that lie on it, too
    #[arg(long)]
    children: bool,
    /// Only forget them, and leave their files
    #[arg(long)]
    keep_files: bool,
}

pub async fn backup(client: &Client, asked: &Asked, as_json: bool) -> Result<(), Asking> {
    match &asked.command {
        Command::Begin(asked) => begin(client, asked, as_json).await,
        Command::Finish(asked) => finish(client, asked, as_json).await,
        Command::Delete(asked) => {
            let children = match asked.children {
                true => Children::Delete,
                false => Children::Keep,
            };
            let files = match asked.keep_files {
                true => BackupFiles::Keep,
                false => BackupFiles::Delete,
            };
            let deleted = client.delete_backup(&asked.name, children, files);
            let deleted = lasting::shown(client, deleted).await?;
            if as_json {
                return said(print_json(&json!({ "deleted": deleted })));
            }
            let lines: String = deleted
                .iter()
                .map(|name| format!("deleted: {name}\n"))
                .collect();
            said(print(&lines))
        }
    }
}

async fn begin(client: &Client, asked: &Begin, as_json: bool) -> Result<(), Asking> {
    let wrong = |text: String| Asking::Failure(Failure::Argument(text));
    let parent = asked.parent.as_deref().map(ExportName::parse).transpose();
    let cluster = asked.cluster_size.map(u32::try_from).transpose();
    let wanted = BeginBackup {
        context: asked.context.clone(),
        disk: asked.disk,
        parent: parent.map_err(|error| wrong(format!("--parent: {error}")))?,
        size: asked.size,
        at: asked.at,
        folder: asked.folder.clone(),
        cluster_bytes: cluster.map_err(|_| wrong("--cluster-size: at most 2M".to_owned()))?,
        preallocation: Preallocation::parse(&asked.preallocation).unwrap_or_default(),
        wait: asked.wait.unwrap_or(Duration::from_secs(10)),
    };
    let name = lasting::shown(client, client.begin_backup(&wanted)).await?;
    if as_json {
        return said(print_json(&json!({ "name": name })));
    }
    said(print(&format!("{name}\n")))
}

async fn finish(client: &Client, asked: &Finish, as_json: bool) -> Result<(), Asking> {
    let mode = match (asked.safe, asked.hard) {
        (true, _) => "safe",
        (_, true) => "hard",
        _ => "soft",
    };
    let interrupted = match asked.interrupted {
        true => Interrupted::Finish,
        false => Interrupted::Refuse,
    };
    let finished = client.finish_backup(&asked.name, mode, interrupted, asked.wait);
    let backup = shown(client, &asked.name, finished).await?;
    if as_json {
        return said(print_json(&object(&backup)));
    }
    let text = |name: &str| {
        backup
            .get(name)
            .map(|value| plain(value))
            .unwrap_or_default()
    };
    said(print(&format!(
        "complete: {}, SHA-256 {}\n",
        text("Name"),
        text("Sha256")
    )))
}

/// Shows how far the reading of a backup is until `finished` is.
async fn shown<T>(client: &Client, name: &str, finished: impl Future<Output = T>) -> T {
    let mut finished = std::pin::pin!(finished);
    let mut line = ProgressLine::begin();
    let mut tick = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            finished = &mut finished => return finished,
            _ = tick.tick(), if line.is_seen() => {}
        }
        // What cannot be shown is not missed.
        let reading = tokio::time::timeout(LOOK, client.reading_of(name)).await;
        if let Ok(Ok(Some(share))) = reading {
            line.show(share);
        }
    }
}

/// Lists the backups.
pub fn list(backups: &[Properties], as_json: bool) -> std::io::Result<()> {
    if as_json {
        return print_json(&backups.iter().map(object).collect());
    }
    let columns = [
        "Name", "State", "Size", "Parent", "Children", "Path", "Sha256", "Reason",
    ];
    let header = [
        "NAME", "STATE", "SIZE", "PARENT", "CHILDREN", "PATH", "SHA-256", "REASON",
    ];
    table_of(&header, &columns, backups, "no backups")
}

fn said(printed: std::io::Result<()>) -> Result<(), Asking> {
    Ok(printed.map_err(Failure::Output)?)
}
