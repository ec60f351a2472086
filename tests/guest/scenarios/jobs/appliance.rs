//! The appliance's side of a failback: its table of VMs' disks in a MariaDB outside the guest, made and written as its ORM does. It knows nothing
//! of the tables that the daemon keeps beside it, and asks them only for the verdict.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::bed::STEP;
use support::mariadb::MariaDb;
use support::{Doing, Outcome, until};

const TABLE: &str = "CREATE TABLE vm_export_mappings (
    id BIGINT UNSIGNED AUTO_INCREMENT PRIMARY KEY,
    vm_id VARCHAR(191) NOT NULL, disk_unit_number BIGINT NOT NULL, vm_name LONGTEXT NOT NULL,
    export_name VARCHAR(191) NOT NULL, device_path LONGTEXT NOT NULL, status VARCHAR(191) DEFAULT 'active',
    created_at DATETIME(3) NULL, updated_at DATETIME(3) NULL,
    UNIQUE KEY (export_name), UNIQUE KEY (vm_id, disk_unit_number)) CHARACTER SET utf8mb4";

pub struct Appliance(MariaDb);

impl Appliance {
    /// Starts the database with its data in `folder`, and makes the table.
    pub fn begin(folder: &Path) -> Outcome<Appliance> {
        let data = folder.join("database");
        std::fs::create_dir(&data).doing(data.display())?;
        let server = MariaDb::make(&data, &[])?;
        server.sql(TABLE)?;
        Ok(Appliance(server))
    }

    /// On the host's loopback.
    pub fn port(&self) -> u16 {
        self.0.port
    }

    /// Inserts the row of a disk, with the node that the appliance has found it at; a row that is there already says it from now on.
    pub fn insert(&self, vm: &str, unit: usize, export: &str, node: &str) -> Outcome<()> {
        self.0
            .sql(&format!(
                "INSERT INTO vm_export_mappings (vm_id, disk_unit_number, vm_name, export_name, device_path, status, created_at, updated_at)
                 VALUES ('{vm}', {unit}, 'db 1', '{export}', '{node}', 'active', UTC_TIMESTAMP(3), UTC_TIMESTAMP(3))
                 ON DUPLICATE KEY UPDATE device_path = VALUES(device_path), status = 'active', updated_at = VALUES(updated_at)"
            ))
            .map(drop)
    }

    /// Waits until the daemon has looked at the table a few times more. A row is a word about a disk that was there for more than a second when
    /// it was written, and while the daemon was looking.
    pub fn looked_at(&self) -> Outcome<()> {
        let looks = || {
            self.0.sql("DO SLEEP(0.1)")?;
            self.0.status("Com_checksum")
        };
        let first = looks()?;
        until(STEP, "the daemon to look at the table", || {
            Ok((looks()? > first + 3).then_some(()))
        })
    }

    /// Waits until the rows of these exports say so, each line an export, its `device_path`, `status` and state; how long it took.
    pub fn rows_are(&self, wanted: &[String]) -> Outcome<Duration> {
        let began = Instant::now();
        let names: Vec<String> = wanted
            .iter()
            .filter_map(|line| Some(format!("'{}'", line.split('\t').next()?)))
            .collect();
        // It is the server that waits between two looks.
        let ask = format!(
            "DO SLEEP(0.1); SELECT export_name, device_path, status, state FROM nbdtrack_vm_exports WHERE export_name IN ({}) ORDER BY export_name",
            names.join(", ")
        );
        let mut wanted = wanted.to_vec();
        wanted.sort_unstable();
        let mut last = String::new();
        until(STEP, format!("the rows {wanted:?}"), || {
            last = self.0.sql(&ask)?;
            Ok(last.lines().eq(&wanted).then(|| began.elapsed()))
        })
        .doing(format!("they are {last:?}"))
    }
}
