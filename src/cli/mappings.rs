//! `mappings`: the table of VMs' disks, listed and pruned.

use clap::{Args, Subcommand};
use clap_complete::ArgValueCandidates;
use serde_json::json;

use super::complete;
use super::show::{object, plain, print_json, table_of};
use crate::dbus::client::{Client, ClientError, Properties};

#[derive(Debug, Args)]
pub struct Mappings {
    /// Only the disks of this VM
    #[arg(long, value_name = "VM_ID", add = ArgValueCandidates::new(complete::vms))]
    vm: Option<String>,
    /// Only those whose export is there
    #[arg(long)]
    active: bool,
    /// Only those whose export was removed
    #[arg(long, conflicts_with = "active")]
    inactive: bool,
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Delete the rows of exports that were removed
    Prune(Prune),
}

#[derive(Debug, Args)]
struct Prune {
    /// Only show which would go
    #[arg(long)]
    dry_run: bool,
    /// Only those that have not changed for so many days
    #[arg(long, value_name = "N", default_value_t = 0)]
    days: u32,
}

/// Lists, or prunes.
pub async fn mappings(
    client: &Client,
    asked: &Mappings,
    as_json: bool,
) -> Result<std::io::Result<()>, ClientError> {
    let Some(What::Prune(prune)) = &asked.what else {
        let mut rows = client.mappings().await?;
        rows.retain(|row| asked.wants(row));
        return Ok(show(&rows, as_json));
    };
    let rows = client.prune_mappings(prune.days, prune.dry_run).await?;
    if as_json {
        let rows: Vec<_> = rows.iter().map(object).collect();
        return Ok(print_json(
            &json!({ "pruned": rows, "dry_run": prune.dry_run }),
        ));
    }
    let what = if prune.dry_run {
        "would be deleted"
    } else {
        "deleted"
    };
    for row in &rows {
        if let Err(error) = super::commands::done(false, what, &text(row, "Export")) {
            return Ok(Err(error));
        }
    }
    Ok(super::show::print(&format!("{} rows {what}\n", rows.len())))
}

impl Mappings {
    fn wants(&self, row: &Properties) -> bool {
        let status = text(row, "Status");
        self.vm.as_ref().is_none_or(|vm| text(row, "VmId") == *vm)
            && (!self.active || status == "active")
            && (!self.inactive || status == "inactive")
    }
}

fn show(rows: &[Properties], as_json: bool) -> std::io::Result<()> {
    if as_json {
        return print_json(&rows.iter().map(object).collect());
    }
    let columns = [
        "VmId",
        "DiskUnit",
        "VmName",
        "Export",
        "DevicePath",
        "Status",
        "State",
        "UpdatedAt",
        "Reason",
    ];
    let header = [
        "VM", "DISK", "NAME", "EXPORT", "PATH", "STATUS", "STATE", "UPDATED", "REASON",
    ];
    table_of(&header, &columns, rows, "no disks of VMs")
}

fn text(row: &Properties, name: &str) -> String {
    row.get(name).map(|value| plain(value)).unwrap_or_default()
}
