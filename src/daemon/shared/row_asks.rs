//! What rows of the shared table ask for, answered as what callers ask: by the same checks, in the same trail.

use super::row_paths::Earliest;
use crate::correlation::{
    Ensure, Mapping, NamedPath, PathFound, RemoveMode, Request, RequestError, VmDisk, Written,
};
use crate::daemon::control::{Asker, Control};
use crate::dbus::{Call, Caller, Command};
use crate::identity::{Format, VolumeId};
use crate::mapping::basis::RowSaid;
use crate::mapping::reconcile::Demand;
use std::time::Duration;

/// The drain of an export whose row went; it has no clients.
const REMOVE_WITHIN: Duration = Duration::from_secs(5);

/// What a row asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::daemon) struct RowDemand {
    /// 0 for one that was deleted.
    pub row: i64,
    pub disk: VmDisk,
    pub demand: Demand,
    pub said: RowSaid,
}

/// One row's request.
pub(in crate::daemon) struct RowAsks {
    pub asks: RowDemand,
    /// Where its path leads.
    pub found: Result<PathFound, String>,
    /// When that path was written.
    pub written: Earliest,
    pub asker: Asker,
}

impl Control {
    pub(in crate::daemon) fn on_row_asks(&mut self, asks: RowAsks) {
        let name = match asks.asks.row {
            0 => "a row that was deleted".to_owned(),
            row => format!("row {row}"),
        };
        match self.request_of(&asks) {
            Ok(request) => {
                // The middle orders what it asks for before it returns.
                self.orders.by_row = Some(asks.asks.said);
                self.on_command(Command {
                    call: Call::Request(request),
                    reply: asks.asker,
                    caller: Caller {
                        name: format!("{name} of vm_export_mappings"),
                        uid: None,
                        unit: String::new(),
                    },
                });
                self.orders.by_row = None;
            }
            Err(error) => self.answer(asks.asker, Err(error)),
        }
    }

    fn request_of(&mut self, asks: &RowAsks) -> Result<Request, RequestError> {
        let RowDemand { disk, demand, .. } = &asks.asks;
        let ensure = |vm_name: &str, volume: Option<VolumeId>| {
            let unfit = |error: crate::correlation::VmDiskError| {
                RequestError::InvalidArgument(error.to_string())
            };
            let mapping = Mapping::new(disk.clone(), vm_name).map_err(unfit)?;
            Ok(Request::EnsureVmExport(Ensure {
                disk: disk.clone(),
                mapping,
                moves: volume.is_some(),
                volume,
                diskseq: None,
                read_only: None,
                share: None,
                job: String::new(),
                // The row is answered by what is stored; that it serves is told by its state.
                wait: Duration::ZERO,
            }))
        };
        let volume = |text: Result<VolumeId, crate::identity::VolumeIdError>| {
            text.map_err(|error| RequestError::InvalidArgument(error.to_string()))
        };
        match demand {
            Demand::Remove => Ok(Request::RemoveExport {
                name: disk.export(),
                mode: RemoveMode::Safe,
                within: REMOVE_WITHIN,
            }),
            Demand::Rename { vm_name } => ensure(vm_name, None),
            Demand::Restore {
                vm_name,
                volume: text,
            } => ensure(vm_name, Some(volume(VolumeId::parse(text))?)),
            Demand::Serve {
                vm_name,
                device_path,
                ..
            } if !device_path.starts_with("/dev/") => {
                let format =
                    Format::told(device_path, None).map_err(RequestError::InvalidArgument)?;
                ensure(
                    vm_name,
                    Some(volume(VolumeId::of_file(device_path, format))?),
                )
            }
            Demand::Serve {
                vm_name,
                device_path,
                ..
            } => {
                let path = NamedPath {
                    path: device_path.clone(),
                    trust: false,
                    written: match asks.written {
                        Ok(us) => self.reload.clock.moment().written(Some(us)),
                        Err(why) => Written::Unknown(why),
                    },
                    at: asks.found.clone(),
                };
                let volume = self.correlation.volume_at(disk, &path)?;
                ensure(vm_name, Some(volume))
            }
        }
    }
}
