//! Disks of VMs: what names one, which export is its own, and the mapping that says so durably. PURE.

use std::fmt;
use std::sync::Arc;

use super::facts::ExportName;

/// The longest id of a VM, in bytes: three UUIDs, and its export's name still fits in any table's key.
pub const VM_ID_BYTES_MAX: usize = 128;
/// The longest name of a VM, in bytes: what the appliances' table holds.
pub const VM_NAME_BYTES_MAX: usize = 255;
/// The highest unit: more than any hypervisor's bus has.
pub const DISK_UNIT_MAX: u32 = 65_535;

const PREFIX: &str = "migration-vm-";
const UNIT: &str = "-disk";

/// One disk of one VM.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmDisk {
    vm_id: Arc<str>,
    unit: u32,
}

/// Why something names no disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VmDiskError {
    #[error("vm_id: cannot be empty")]
    Empty,
    #[error("vm_id: at most {VM_ID_BYTES_MAX} bytes, this has {0}")]
    TooLong(usize),
    #[error(
        "vm_id: {0:?} is not allowed; an id is letters, digits, '.', '_' and '-', and begins with a letter or a digit"
    )]
    Character(char),
    #[error("disk: at most {DISK_UNIT_MAX}, this is {0}")]
    Unit(u32),
    #[error("vm_name: at most {VM_NAME_BYTES_MAX} bytes without control characters")]
    Name,
}

impl VmDisk {
    /// # Errors
    /// Names the argument that cannot be.
    pub fn new(vm_id: &str, unit: u32) -> Result<VmDisk, VmDiskError> {
        if vm_id.is_empty() {
            return Err(VmDiskError::Empty);
        }
        if vm_id.len() > VM_ID_BYTES_MAX {
            return Err(VmDiskError::TooLong(vm_id.len()));
        }
        // It becomes a part of a name that is put into files, URIs and shells.
        let strange = |(at, c): (usize, char)| {
            let inside = at > 0 && matches!(c, '.' | '_' | '-');
            (!c.is_ascii_alphanumeric() && !inside).then_some(c)
        };
        if let Some(c) = vm_id.char_indices().find_map(strange) {
            return Err(VmDiskError::Character(c));
        }
        if unit > DISK_UNIT_MAX {
            return Err(VmDiskError::Unit(unit));
        }
        Ok(VmDisk {
            vm_id: vm_id.into(),
            unit,
        })
    }

    pub fn vm_id(&self) -> &str {
        &self.vm_id
    }

    pub fn unit(&self) -> u32 {
        self.unit
    }

    /// The name of its export. No other disk has the same: what follows the last `-disk` is the unit, in its one spelling.
    pub fn export(&self) -> ExportName {
        ExportName::parse(&format!("{PREFIX}{}{UNIT}{}", self.vm_id, self.unit))
            .expect("an id is some 128 bytes without control characters")
    }

    /// Whose export has this name.
    pub fn of_export(name: &ExportName) -> Option<VmDisk> {
        let (vm_id, unit) = name.as_str().strip_prefix(PREFIX)?.rsplit_once(UNIT)?;
        let disk = VmDisk::new(vm_id, unit.parse().ok()?).ok()?;
        (disk.export() == *name).then_some(disk)
    }
}

impl fmt::Display for VmDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk {} of VM {}", self.unit, self.vm_id)
    }
}

/// Durable: the export of a VM's disk, which has the disk's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    pub disk: VmDisk,
    /// As people call the VM; may be empty.
    pub vm_name: String,
}

impl Mapping {
    /// # Errors
    /// The name is too long, or would break a line.
    pub fn new(disk: VmDisk, vm_name: &str) -> Result<Mapping, VmDiskError> {
        if vm_name.len() > VM_NAME_BYTES_MAX || vm_name.chars().any(char::is_control) {
            return Err(VmDiskError::Name);
        }
        Ok(Mapping {
            disk,
            vm_name: vm_name.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_the_appliances_and_leads_back() {
        let disk = VmDisk::new("4205784a-098a-40f1-1f1e-a5cd2597fd59", 0).unwrap();
        let name = disk.export();
        assert_eq!(
            name.as_str(),
            "migration-vm-4205784a-098a-40f1-1f1e-a5cd2597fd59-disk0"
        );
        assert_eq!(VmDisk::of_export(&name), Some(disk));
    }

    #[test]
    fn an_id_that_looks_like_a_name_is_no_other_disk() {
        let tricky = VmDisk::new("a-disk1", 2).unwrap();
        assert_eq!(VmDisk::of_export(&tricky.export()), Some(tricky.clone()));
        for name in [
            "migration-vm-a-disk01",
            "migration-vm-a-disk+1",
            "migration-vm--disk1",
            "migration-vm-a-disk",
            "vm-a-disk1",
        ] {
            assert_eq!(
                VmDisk::of_export(&ExportName::parse(name).unwrap()),
                None,
                "{name}"
            );
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_argument() {
        let long = "x".repeat(VM_ID_BYTES_MAX + 1);
        for (vm_id, unit, wanted) in [
            ("", 0, "vm_id: cannot be empty"),
            (long.as_str(), 0, "vm_id: at most 128"),
            ("a/b", 0, "vm_id: '/' is not allowed"),
            ("-a", 0, "vm_id: '-' is not allowed"),
            ("ä", 0, "vm_id: 'ä' is not allowed"),
            ("a", 65_536, "disk: at most 65535"),
        ] {
            let error = VmDisk::new(vm_id, unit).unwrap_err().to_string();
            assert!(error.starts_with(wanted), "{error}");
        }
        let disk = VmDisk::new("a", 0).unwrap();
        assert!(Mapping::new(disk.clone(), "web 1\n").is_err());
        assert!(Mapping::new(disk, &"x".repeat(256)).is_err());
    }
}
