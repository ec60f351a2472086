//! What a take-over changes, in words, before it changes anything.

use super::Failure;
use super::machine::Machine;
use super::place::Place;
use crate::cli::show::{print, print_json};
use crate::cli::table::{TableStyle, lay_out};
use crate::config::nbd_server::{Backing, Judged};
use crate::daemon;

/// What a take-over changes, in words.
pub(super) struct Plan {
    steps: Vec<String>,
    /// Export, what it names, the disk that is there, its serial, bytes.
    volumes: Vec<[String; 5]>,
    problems: Vec<String>,
}

impl Plan {
    pub(super) fn of(machine: &Machine, place: &Place, judged: &Judged) -> Plan {
        let mut steps = Vec::new();
        if place.taken {
            steps.push(format!(
                "{} is diverted already; this version of nbdtrack takes its place",
                place.binary.display()
            ));
        } else {
            steps.push(format!(
                "{} steps aside to {} (dpkg-divert), and nbdtrack takes its place",
                place.binary.display(),
                place.stock.display()
            ));
        }
        steps.extend(machine.service_lines());
        steps.extend(machine.own_service_is_kept_away());
        let volumes = judged.sections.values().map(|section| {
            let name = section.name.to_string();
            match &section.backing {
                Backing::Volume(volume) => [
                    name,
                    volume.to_string(),
                    String::new(),
                    String::new(),
                    String::new(),
                ],
                Backing::Device(path) | Backing::File(path, _) => {
                    let [disk, serial, bytes] = daemon::disk_at(path);
                    [name, path.display().to_string(), disk, serial, bytes]
                }
            }
        });
        Plan {
            steps,
            volumes: volumes.collect(),
            problems: judged.problems.iter().map(ToString::to_string).collect(),
        }
    }

    pub(super) fn show(&self, json: bool) -> Result<(), Failure> {
        let keys = ["export", "names", "disk", "serial", "bytes"];
        if json {
            let volumes = self.volumes.iter().map(|row| {
                let pairs = keys.iter().zip(row);
                let pairs = pairs.map(|(key, value)| ((*key).to_owned(), value.clone().into()));
                serde_json::Value::Object(pairs.collect())
            });
            let volumes: Vec<_> = volumes.collect();
            print_json(&serde_json::json!({
                "steps": self.steps, "exports": volumes, "problems": self.problems,
            }))?;
            return Ok(());
        }
        for problem in &self.problems {
            eprintln!("{problem}");
        }
        print(&(self.steps.join("\n") + "\n"))?;
        let header = ["EXPORT", "NAMES", "THE DISK THERE", "SERIAL", "BYTES"];
        let rows: Vec<Vec<String>> = self.volumes.iter().map(|row| row.to_vec()).collect();
        Ok(print(&lay_out(&header, &rows, TableStyle::of_stdout()))?)
    }
}
