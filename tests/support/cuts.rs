//! Calls in which the daemon is killed, at one system call.

use std::path::PathBuf;
use std::process::Stdio;

use super::daemon::binary;
use super::ground::Ground;
use super::process::{Running, command};
use super::scene::{STEP_LIMIT, Scene};
use super::{Doing, Outcome, until};
use crate::hold;

/// A call, and the system call at whose beginning the daemon is killed while it carries it out.
pub struct Cut<'a> {
    pub what: &'a str,
    pub words: Vec<String>,
    pub call: &'static str,
    /// Of this file or folder; or of this name, in whatever folder.
    pub of: PathBuf,
    /// Whether its file system has files without a name (`O_TMPFILE`).
    pub nameless: bool,
}

/// Has the kernel kill the daemon at its next system call `call` that concerns `of` (strace(1), "Syscall Tampering").
fn kill_at(scene: &mut Scene, ground: &Ground, cut: &Cut<'_>) -> Outcome<Running> {
    let told = ground.file("strace.told");
    let mut strace = command("strace");
    strace
        .args(["-f", "-o", "/dev/null", "-P"])
        .arg(&cut.of)
        .args(["-e", &format!("trace=openat,{}", cut.call)])
        .args(["-e", &format!("inject={}:signal=SIGKILL:when=1", cut.call)])
        .args(["-p", &scene.daemon()?.pid().to_string()]);
    if !cut.nameless {
        // The first is the one that looks the folder up.
        strace.args(["-e", "inject=openat:error=EOPNOTSUPP:when=2"]);
    }
    strace.stderr(std::fs::File::create(&told)?);
    let strace = Running(strace.spawn().doing("start strace")?);
    until(STEP_LIMIT, "strace to be attached", || {
        let said = std::fs::read_to_string(&told)?;
        Ok(said.contains(" attached").then_some(()))
    })?;
    Ok(strace)
}

/// Carries out the call until the daemon is killed in it, and starts it again.
pub fn cut_off(scene: &mut Scene, ground: &Ground, cut: &Cut<'_>) -> Outcome<()> {
    let mut strace = kill_at(scene, ground, cut)?;
    let mut asking = command(binary());
    asking.args(["--bus", &scene.bus.address]).args(&cut.words);
    asking.stdout(Stdio::null()).stderr(Stdio::null());
    let mut asking = Running(asking.spawn()?);
    let what = format!("{} at {}", cut.what, cut.call);
    scene.daemon()?.running.wait(STEP_LIMIT).doing(&what)?;
    strace.wait(STEP_LIMIT)?;
    let status = asking.wait(STEP_LIMIT)?;
    hold!(!status.success(), "{what}: it was told that all is well");
    scene.daemon = None;
    scene.start()
}
