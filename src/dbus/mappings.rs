//! The Manager's members about the table of VMs' disks: arguments in, a [`Call`] out; rows to dictionaries. PURE.

use std::collections::BTreeMap;

use zbus::{Message, Variant};

use super::Call;
use super::introspect::Method;
use super::options::{Options, no_such_method, only_options};
use super::volume::text;
use crate::correlation::{MappingRow, RequestError, WAITING};

/// Ten years: older is as good as any.
pub const DAYS_MAX: u32 = 3_650;

pub const LIST_MAPPINGS: Method = Method {
    name: "ListMappings",
    takes: &[("options", "a{sv}")],
    gives: &[("mappings", "aa{sv}")],
};
pub const PRUNE_MAPPINGS: Method = Method {
    name: "PruneMappings",
    takes: &[("options", "a{sv}")],
    gives: &[("mappings", "aa{sv}")],
};

/// Reads the call out of a message of one of the methods above.
///
/// # Errors
/// `InvalidArgument`, naming the argument; `NotSupported` for another method.
pub fn parse(method: &str, message: &Message) -> Result<Call, RequestError> {
    match method {
        "ListMappings" => only_options(message)?.end().map(|()| Call::Mappings),
        "PruneMappings" => prune(only_options(message)?),
        other => Err(no_such_method(other)),
    }
}

fn prune(mut options: Options) -> Result<Call, RequestError> {
    let days = options.number("days")?.unwrap_or(0);
    let dry_run = options.truth("dry_run")?.unwrap_or(false);
    options.end()?;
    let days = u32::try_from(days)
        .ok()
        .filter(|days| *days <= DAYS_MAX)
        .ok_or_else(|| {
            RequestError::InvalidArgument(format!(
                "option days: from 0 to {DAYS_MAX}, this is {days}"
            ))
        })?;
    Ok(Call::PruneMappings { days, dry_run })
}

/// Rows as they go over the bus.
pub fn mappings(rows: &[MappingRow]) -> Vec<BTreeMap<&'static str, Variant<'_>>> {
    rows.iter()
        .map(|row| {
            let status = match row.active {
                true => "active",
                false if row.state == WAITING => "waiting",
                false => "inactive",
            };
            BTreeMap::from([
                ("Id", Variant::new(row.id)),
                ("VmId", Variant::new(text(&row.vm_id))),
                ("DiskUnit", Variant::new(row.unit)),
                ("VmName", Variant::new(text(&row.vm_name))),
                ("Export", Variant::new(text(&row.export))),
                ("DevicePath", Variant::new(text(&row.device_path))),
                ("Status", Variant::new(status)),
                ("CreatedAt", Variant::new(text(&row.created))),
                ("UpdatedAt", Variant::new(text(&row.updated))),
                ("State", Variant::new(text(&row.state))),
                ("Reason", Variant::new(text(&row.reason))),
                ("VolumeId", Variant::new(text(&row.volume))),
            ])
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prune_names_its_days_and_nothing_else() {
        let with = |options: BTreeMap<&'static str, Variant<'static>>| {
            let message = Message::method_call("/org/nbdtrack1", "PruneMappings");
            parse("PruneMappings", &message.build(&options).unwrap())
        };
        let all = Call::PruneMappings {
            days: 0,
            dry_run: false,
        };
        assert_eq!(with(BTreeMap::new()).unwrap(), all);
        let old = BTreeMap::from([("days", Variant::new(3_651_u64))]);
        let text = with(old).unwrap_err().to_string();
        assert!(text.contains("option days: from 0 to 3650"), "{text}");
        let strange = BTreeMap::from([("status", Variant::new("active"))]);
        assert!(with(strange).is_err());
    }
}
