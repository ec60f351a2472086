//! A file, opened as the daemon opens one.
// Each test file uses its part; a helper that fails fails the test.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each program uses a part of it, and ends where something is missing"
)]

use std::path::Path;
use std::time::Duration;

use nbdtrack::correlation::{DeviceNode, DeviceNumber, ExportName, OpenDisk, Ticket};
use nbdtrack::identity::{Format, Identity};
use nbdtrack::image::beneath::Roots;
use nbdtrack::image::block::{Block, Claims, OpenError};
use nbdtrack::image::qcow2::{self, Qcow2};
use nbdtrack::image::raw;

pub fn order(path: &Path, roots: &Roots) -> OpenDisk {
    order_as(path, roots, Format::Raw)
}

pub fn order_as(path: &Path, roots: &Roots, format: Format) -> OpenDisk {
    let path = path.to_str().unwrap();
    OpenDisk {
        ticket: Ticket(1),
        export: ExportName::parse("a").unwrap(),
        node: DeviceNode(path.to_owned()),
        number: DeviceNumber::of_file(1),
        diskseq: roots.find(path, format).unwrap().incarnation,
        identity: Identity::new(format.scheme(), path),
        write: true,
        direct: false,
        within: Duration::from_secs(10),
    }
}

/// The file, below its folder.
pub fn open(folder: &Path, path: &Path) -> Block {
    let roots = Roots::new(vec![folder.to_owned()]);
    raw::open(&order(path, &roots), &roots, &Claims::default()).unwrap()
}

/// The image, below its folder.
pub fn open_qcow2(folder: &Path, path: &Path, write: bool) -> Result<Qcow2, OpenError> {
    let roots = Roots::new(vec![folder.to_owned()]);
    let mut order = order_as(path, &roots, Format::Qcow2);
    order.write = write;
    qcow2::open(&order, &roots, &Claims::default())
}
