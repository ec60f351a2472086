//! QCOW2 images for the rows of files, made by qemu-img out of a server's raw image: they hold the same bytes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use support::Outcome;
use support::process::succeed;

const LIMIT: Duration = Duration::from_secs(120);
/// Images above the one that holds the data, in the row of a chain.
const DEPTH: usize = 8;
/// What a turn writes at most fits in, in bytes: nothing is written twice before it is given back.
pub const FRESH_BYTES: u64 = 2 << 30;

/// How an image comes to its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contents {
    /// Every cluster is its own.
    Whole,
    Compressed,
    /// None is: they are those of the image beneath.
    Overlay,
    /// The same, eight images down.
    Chain,
    /// Nothing, and much room.
    Fresh,
}

impl Contents {
    pub fn name(self) -> &'static str {
        match self {
            Contents::Whole => "qcow2",
            Contents::Compressed => "qcow2-compressed",
            Contents::Overlay => "qcow2-overlay",
            Contents::Chain => "qcow2-chain-8",
            Contents::Fresh => "qcow2-fresh",
        }
    }
}

/// The image beside `raw`, made anew.
pub fn make(raw: &Path, contents: Contents) -> Outcome<PathBuf> {
    let path = raw.with_extension(contents.name());
    let from_raw = |how: &[&str], to: &Path| {
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
        args.extend(how);
        let (raw, to) = (raw.to_string_lossy(), to.to_string_lossy());
        args.extend([&*raw, &*to]);
        succeed("qemu-img", &args, LIMIT).map(drop)
    };
    match contents {
        Contents::Whole => from_raw(&[], &path)?,
        Contents::Compressed => from_raw(&["-c"], &path)?,
        Contents::Overlay | Contents::Chain => {
            let above = if contents == Contents::Chain {
                DEPTH
            } else {
                1
            };
            let beneath = raw.with_extension("base");
            from_raw(&[], &beneath)?;
            overlays(beneath, above, &path)?;
        }
        Contents::Fresh => {
            let (path, size) = (path.to_string_lossy(), FRESH_BYTES.to_string());
            succeed("qemu-img", &["create", "-f", "qcow2", &path, &size], LIMIT)?;
        }
    }
    Ok(path)
}

/// `count` empty images upon each other, the topmost at `path`.
fn overlays(mut beneath: PathBuf, count: usize, path: &Path) -> Outcome<()> {
    for level in 1..=count {
        let next = if level == count {
            path.to_owned()
        } else {
            path.with_extension(format!("level{level}"))
        };
        let (base, top) = (beneath.to_string_lossy(), next.to_string_lossy());
        let args = ["create", "-f", "qcow2", "-F", "qcow2", "-b", &base, &top];
        succeed("qemu-img", &args, LIMIT)?;
        beneath = next;
    }
    Ok(())
}
