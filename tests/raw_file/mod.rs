//! A plain file, opened as the daemon opens one.
// Each test file uses its part; a helper that fails fails the test.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use nbdtrack::correlation::{DeviceNode, DeviceNumber, ExportName, OpenDisk, Ticket};
use nbdtrack::identity::{Identity, Scheme};
use nbdtrack::image::beneath::Roots;
use nbdtrack::image::block::{Block, Claims};
use nbdtrack::image::raw;

pub fn order(path: &Path, roots: &Roots) -> OpenDisk {
    let path = path.to_str().unwrap();
    OpenDisk {
        ticket: Ticket(1),
        export: ExportName::parse("a").unwrap(),
        node: DeviceNode(path.to_owned()),
        number: DeviceNumber::of_file(1),
        diskseq: roots.find(path).unwrap().incarnation,
        identity: Identity::new(Scheme::File, path),
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
