//! Exports of one VM's disks, asked for as an appliance does.

use super::bus::{Client, Options, Refused};
use super::scene::STEP_LIMIT;
use super::{Outcome, until};
use zbus::Variant;

pub const VM: &str = "4205784a-098a-40f1-1f1e-a5cd2597fd59";

/// The export of a disk of [`VM`].
pub fn name(unit: u32) -> String {
    format!("migration-vm-{VM}-disk{unit}")
}

/// Whether it was made by this.
pub fn ensure(client: &Client, unit: u32, volume: &str) -> Result<bool, Refused> {
    let options = Options::from([("volume", Variant::from(volume))]);
    let answer = client.call("EnsureVmExport", &(VM, unit, "web 1", options))?;
    let (_, _, created): (zbus::OwnedObjectPath, String, bool) = answer.body().deserialize()?;
    Ok(created)
}

/// As [`ensure`], and waits for nothing to be served.
pub fn ensure_now(client: &Client, unit: u32, volume: &str) -> Result<(), Refused> {
    let options = Options::from([
        ("volume", Variant::from(volume)),
        ("wait_ms", Variant::from(0_u32)),
    ]);
    client.call("EnsureVmExport", &(VM, unit, "web 1", options))?;
    Ok(())
}

/// Until the database is reached, calls are told to come back.
pub fn ensure_when_up(client: &Client, unit: u32, volume: &str) -> Outcome<()> {
    until(STEP_LIMIT, "the database to be reached", || {
        match ensure(client, unit, volume) {
            Ok(_) => Ok(Some(())),
            Err(refusal) if refusal.is("NotReady") => Ok(None),
            Err(refusal) => Err(refusal.into()),
        }
    })
}
