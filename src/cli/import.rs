//! `import`: disks of VMs that something else has paths for become exports by the identity of the disk that is there now. A person runs
//! it and sees which disk each path means, so it is that person's word and no guess.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};
use zbus::Variant;

use super::Failure;
use super::show::{plain, print, print_json};
use super::table::printable;
use crate::config::nbd_server::Backing;
use crate::config::{self};
use crate::correlation::VmDisk;
use crate::dbus::client::{Client, ClientError, Objects, Options, Properties};

#[derive(Debug, Args)]
pub struct Import {
    /// nbd-server's configuration, whose sections are called migration-vm-VM_ID-diskN; without it the rows of the shared table that wait
    #[arg(long, value_name = "PATH")]
    from: Option<PathBuf>,
    /// Only show what would be done
    #[arg(long)]
    dry_run: bool,
    /// Also where a disk of a VM is another volume now; refused while its export has clients
    #[arg(long = "move")]
    moves: bool,
}

/// One disk of a VM, and the path that something has for it.
struct Named {
    disk: VmDisk,
    vm_name: String,
    path: String,
    /// Why it is none that a path means a disk for.
    left_out: Option<String>,
}

/// What is to be done about one.
enum Plan {
    Ensure { volume: String, disk: String },
    Skip(String),
}

pub async fn import(client: &Client, asked: &Import, as_json: bool) -> Result<(), Failure> {
    let named = match &asked.from {
        Some(path) => sections(path)?,
        None => waiting(&client.mappings().await.map_err(Failure::Client)?),
    };
    let objects = client.objects().await.map_err(Failure::Client)?;
    let (mut told, mut failed) = (Vec::new(), 0);
    for one in named {
        let plan = plan(&one, &objects);
        let outcome = match &plan {
            Plan::Skip(why) => Ok(format!("skipped: {why}")),
            Plan::Ensure { volume, disk } if asked.dry_run => {
                Ok(format!("would be {volume}, {disk}"))
            }
            Plan::Ensure { volume, disk } => ensure(client, &one, volume, asked.moves)
                .await
                .map(|()| format!("is {volume}, {disk}")),
        };
        let (done, text) = match outcome {
            Ok(text) => (matches!(plan, Plan::Ensure { .. }) && !asked.dry_run, text),
            Err(error) => {
                failed += 1;
                (false, format!("refused: {error}"))
            }
        };
        let export = one.disk.export();
        if as_json {
            told.push(json!({
                "export": export.as_str(), "path": one.path, "done": done, "result": text,
            }));
        } else {
            print(&format!(
                "{export}: {} {}\n",
                printable(&one.path),
                printable(&text)
            ))?;
        }
    }
    if as_json {
        print_json(&Value::Array(told))?;
    }
    match failed {
        0 => Ok(()),
        failed => Err(Failure::Argument(format!("{failed} were refused"))),
    }
}

/// The sections that are called as disks of VMs.
fn sections(path: &Path) -> Result<Vec<Named>, Failure> {
    let files = config::read_ini(path).files;
    let judged = config::nbd_server::judge(&files, &Default::default());
    for problem in &judged.problems {
        eprintln!("{problem}");
    }
    if judged.generic.is_none() {
        return Err(Failure::Config(judged.problems.len()));
    }
    let named = judged.sections.values().filter_map(|section| {
        let disk = VmDisk::of_export(&section.name)?;
        let by_hand =
            |option: &str| format!("nbdtrack ensure {} {} {option}", disk.vm_id(), disk.unit());
        let (path, left_out) = match &section.backing {
            Backing::Device(path) => (path.display().to_string(), None),
            Backing::Volume(volume) => {
                let make = by_hand(&format!("--volume {volume}"));
                let why = format!("x-volume says which volume it is, whatever the path: {make}");
                (volume.to_string(), Some(why))
            }
            Backing::File(path, format) => {
                let make = format!("--path {} --format {}", path.display(), format.name());
                let make = by_hand(&make);
                let why = format!("it is a file, and no disk is there: {make}");
                (path.display().to_string(), Some(why))
            }
        };
        Some(Named {
            disk,
            vm_name: String::new(),
            path,
            left_out,
        })
    });
    Ok(named.collect())
}

/// The rows that the daemon does not believe by itself.
fn waiting(rows: &[Properties]) -> Vec<Named> {
    let named = rows.iter().filter(|row| text(row, "Status") == "waiting");
    named
        .filter_map(|row| {
            let disk = VmDisk::new(&text(row, "VmId"), text(row, "DiskUnit").parse().ok()?).ok()?;
            Some(Named {
                disk,
                vm_name: text(row, "VmName"),
                path: text(row, "DevicePath"),
                left_out: None,
            })
        })
        .filter(|named| !named.path.is_empty())
        .collect()
}

fn plan(named: &Named, objects: &Objects) -> Plan {
    if let Some(why) = &named.left_out {
        return Plan::Skip(why.clone());
    }
    let node = match std::fs::canonicalize(&named.path) {
        Ok(node) => node.display().to_string(),
        Err(error) => return Plan::Skip(error.to_string()),
    };
    let at = |volume: &&Properties| text(volume, "DeviceNode") == node;
    let Some(volume) = objects.volumes.values().find(at) else {
        return Plan::Skip("no whole disk is there".to_owned());
    };
    let id = text(volume, "Id");
    if id.is_empty() {
        return Plan::Skip(
            "the disk there has no identity by which it could be found again".to_owned(),
        );
    }
    let diskseq = text(volume, "DiskSeq");
    let export = named.disk.export();
    let has = |known: &&Properties| {
        text(known, "Name") == export.as_str() && text(known, "DiskSeq") == diskseq
    };
    if objects.exports.values().any(|known| has(&known)) {
        return Plan::Skip("it is exported from that disk already".to_owned());
    }
    Plan::Ensure {
        volume: format!("disk:{id}"),
        disk: format!(
            "the disk with diskseq {diskseq} on {node} (serial \"{}\", {} bytes)",
            text(volume, "Serial"),
            text(volume, "Size")
        ),
    }
}

async fn ensure(
    client: &Client,
    named: &Named,
    volume: &str,
    moves: bool,
) -> Result<(), ClientError> {
    let options = Options::from([
        ("volume", Variant::new(volume)),
        ("move", Variant::new(moves)),
        ("job", Variant::new("import")),
    ]);
    let (vm_id, unit) = (named.disk.vm_id(), named.disk.unit());
    client
        .ensure(vm_id, unit, &named.vm_name, options, None)
        .await
        .map(drop)
}

fn text(properties: &Properties, name: &str) -> String {
    properties
        .get(name)
        .map(|value| plain(value))
        .unwrap_or_default()
}
