//! Files and images that are served, and QEMU's tools that judge them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Outcome;
use super::ground::Ground;
use super::process;
use super::scene::Scene;
use crate::hold;

/// QEMU's tools are waited for so long.
const LIMIT: Duration = Duration::from_secs(60);

/// What images that crash are made of, in turns: small clusters have many tables to be torn. Each can have snapshots.
pub const KINDS: &[&str] = &[
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=64k",
    "extended_l2=on,cluster_size=16k",
    "compat=0.10,cluster_size=1k",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=8k,refcount_bits=4",
];

/// A folder that may be served from, and a daemon without exports.
pub fn scene(ground: &Ground) -> Outcome<(Scene, PathBuf)> {
    let folder = ground.file("backups");
    std::fs::create_dir_all(&folder)?;
    Ok((Scene::told(ground, roots(&folder), &[])?, folder))
}

/// The line that lets `folder` be served from.
pub fn roots(folder: &Path) -> String {
    format!("file_roots = [{:?}]\n", text(folder))
}

pub fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

pub fn qemu_img(args: &[&str]) -> Outcome<String> {
    process::succeed("qemu-img", args, LIMIT)
}

/// Commands of qemu-io on a file or an NBD URI, each of which succeeds.
pub fn qemu_io(target: &str, format: &str, commands: &[&str]) -> Outcome<()> {
    let mut args = vec!["-f", format];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(target);
    let said = process::succeed("qemu-io", &args, LIMIT)?;
    hold!(!said.contains("failed") && !said.contains("rror"), "{said}");
    Ok(())
}
