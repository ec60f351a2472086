//! `import`: disks of VMs that something else has paths for become exports by the identity of the disk that is there now. A person runs
//! it and sees which disk each path means, so it is that person's word and no guess.
//!
//! Each path is looked at in its own turn, before and after the daemon is asked about its disk, and the daemon is told which disk was
//! seen: the one before may have waited, and disks come and go meanwhile.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};
use zbus::Variant;

use super::Failure;
use super::import_plan::Shown;
use super::show::{plain, print, print_json};
use super::table::printable;
use crate::config::nbd_server::Backing;
use crate::config::{self};
use crate::correlation::{DiskSeq, PathFound, VmDisk};
use crate::dbus::client::{Client, Objects, Options, Properties};
use crate::udev;

#[derive(Debug, Args)]
pub struct Import {
    /// nbd-server's configuration, whose sections are called migration-vm-VM_ID-diskN; without it the rows of the shared table that wait
    #[arg(long, value_name = "PATH")]
    from: Option<PathBuf>,
    /// Only show what would be done
    #[arg(long)]
    dry_run: bool,
    /// Only what a dry run with --json has shown, which is in this file, and each only from the very disk that it has shown
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    plan: Option<PathBuf>,
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
    Ensure(Seen),
    Skip(String),
}

/// The disk at a path, and what it is.
struct Seen {
    volume: String,
    diskseq: DiskSeq,
    /// For people.
    disk: String,
}

pub async fn import(client: &Client, asked: &Import, as_json: bool) -> Result<(), Failure> {
    let named = match &asked.from {
        Some(path) => sections(path)?,
        None => waiting(&client.mappings().await.map_err(Failure::Client)?),
    };
    let shown = asked.plan.as_deref().map(Shown::read).transpose()?;
    let (mut told, mut failed) = (Vec::new(), 0);
    for one in named {
        let export = one.disk.export();
        let (mut done, mut volume, mut diskseq) = (false, None, None);
        let text = match plan(client, &one).await {
            Err(error) => Err(error),
            Ok(Plan::Skip(why)) => Ok(format!("skipped: {why}")),
            Ok(Plan::Ensure(seen)) => {
                volume = Some(seen.volume.clone());
                diskseq = Some(seen.diskseq.0);
                let agreed = match &shown {
                    None => Ok(()),
                    Some(shown) => {
                        shown.agrees(export.as_str(), &one.path, &seen.volume, seen.diskseq.0)
                    }
                };
                let Seen { volume, disk, .. } = &seen;
                match agreed {
                    Err(error) => Err(error),
                    Ok(()) if asked.dry_run => Ok(format!("would be {volume}, {disk}")),
                    Ok(()) => ensure(client, &one, &seen, asked.moves).await.map(|()| {
                        done = true;
                        format!("is {volume}, {disk}")
                    }),
                }
            }
        };
        let text = text.unwrap_or_else(|error| {
            failed += 1;
            format!("refused: {error}")
        });
        if as_json {
            told.push(json!({
                "export": export.as_str(), "path": one.path, "volume": volume, "diskseq": diskseq,
                "done": done, "result": text,
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

/// Looks at the path, asks the daemon about the disk there, and looks again.
async fn plan(client: &Client, named: &Named) -> Result<Plan, String> {
    if let Some(why) = &named.left_out {
        return Ok(Plan::Skip(why.clone()));
    }
    let (found, diskseq) = match look(&named.path) {
        Ok(at) => at,
        Err(why) => return Ok(Plan::Skip(why)),
    };
    let objects = client.objects().await.map_err(|error| error.to_string())?;
    let plan = judge(named, &found, diskseq, &objects);
    match look(&named.path) {
        Ok((still, same)) if still.node == found.node && same == diskseq => Ok(plan),
        Ok(_) | Err(_) => {
            Err("another disk came to the path while it was looked at; run it again".to_owned())
        }
    }
}

/// The disk at a path, as the kernel has it at this moment.
fn look(path: &str) -> Result<(PathFound, DiskSeq), String> {
    if !Path::new(path).is_absolute() {
        return Err("it is not an absolute path".to_owned());
    }
    let found = udev::look_up(path).map_err(|error| error.to_string())?;
    let diskseq = found.diskseq.ok_or("no whole disk is there")?;
    // udev sets its links some 100 ms after the kernel has made the node: until then they are those of the disk before.
    let of_another = found.linked_us.zip(found.born_us);
    if path.starts_with("/dev/disk/") && of_another.is_some_and(|(linked, born)| linked < born) {
        return Err(format!(
            "the link was made before the disk that it leads to came, so for another one; if it is right, 'udevadm trigger {}' \
             makes it anew",
            found.node
        ));
    }
    Ok((found, diskseq))
}

fn judge(named: &Named, found: &PathFound, diskseq: DiskSeq, objects: &Objects) -> Plan {
    let is_it = |volume: &&Properties| {
        text(volume, "DiskSeq") == diskseq.to_string() && text(volume, "DeviceNode") == found.node.0
    };
    let Some(volume) = objects.volumes.values().find(is_it) else {
        return Plan::Skip(
            "no whole disk is there that the daemon knows; a disk that has just come is known in a moment"
                .to_owned(),
        );
    };
    let id = text(volume, "Id");
    if id.is_empty() {
        return Plan::Skip(
            "the disk there has no identity by which it could be found again".to_owned(),
        );
    }
    let export = named.disk.export();
    let has = |known: &&Properties| {
        text(known, "Name") == export.as_str() && text(known, "DiskSeq") == diskseq.to_string()
    };
    if objects.exports.values().any(|known| has(&known)) {
        return Plan::Skip("it is exported from that disk already".to_owned());
    }
    Plan::Ensure(Seen {
        volume: format!("disk:{id}"),
        diskseq,
        disk: format!(
            "the disk with diskseq {diskseq} on {} (serial \"{}\", {} bytes)",
            found.node,
            text(volume, "Serial"),
            text(volume, "Size")
        ),
    })
}

async fn ensure(client: &Client, named: &Named, seen: &Seen, moves: bool) -> Result<(), String> {
    let options = Options::from([
        ("volume", Variant::new(seen.volume.as_str())),
        ("diskseq", Variant::new(seen.diskseq.0)),
        ("move", Variant::new(moves)),
        ("job", Variant::new("import")),
    ]);
    let (vm_id, unit) = (named.disk.vm_id(), named.disk.unit());
    client
        .ensure(vm_id, unit, &named.vm_name, options, None)
        .await
        .map(drop)
        .map_err(|error| error.to_string())
}

fn text(properties: &Properties, name: &str) -> String {
    properties
        .get(name)
        .map(|value| plain(value))
        .unwrap_or_default()
}
