//! A real systemd-udevd that reaches nobody but us: in mount and network namespaces of this program's own, without
//! a single rule. The one file of the benchmark with system calls.

use std::ffi::CString;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;

use support::ground::Ground;
use support::process::{Running, command};
use support::trouble;
use support::{Doing, Outcome, until};

const BINARY: &str = "/lib/systemd/systemd-udevd";
/// Whoever uses libudev looks for this to know whether udevd runs.
const CONTROL: &str = "/run/udev/control";
/// Where udevd keeps its state, and where it finds rules; each is empty for us.
const EMPTIED: [&str; 3] = ["/run/udev", "/etc/udev/rules.d", "/usr/lib/udev/rules.d"];

/// Gives this thread, and all it starts later, namespaces of their own. The kernel's events come to every network
/// namespace; udevd's stay in its own.
pub fn enter_namespaces() -> Outcome<()> {
    // SAFETY: takes flags only.
    if unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWNET) } < 0 {
        let e = std::io::Error::last_os_error();
        trouble!("namespaces of our own (this needs root): {e}");
    }
    mount("none", "/", None, libc::MS_REC | libc::MS_PRIVATE)?;
    for folder in EMPTIED {
        if Path::new(folder).is_dir() {
            mount("tmpfs", folder, Some("tmpfs"), 0)?;
        }
    }
    Ok(())
}

fn mount(source: &str, target: &str, kind: Option<&str>, flags: libc::c_ulong) -> Outcome<()> {
    let source = CString::new(source)?;
    let place = CString::new(target)?;
    let kind = kind.map(CString::new).transpose()?;
    // SAFETY: the strings end with a zero byte and live until the call returns; the null pointers are allowed.
    let answer = unsafe {
        libc::mount(
            source.as_ptr(),
            place.as_ptr(),
            kind.as_ref().map_or(std::ptr::null(), |kind| kind.as_ptr()),
            flags,
            std::ptr::null(),
        )
    };
    if answer < 0 {
        let e = std::io::Error::last_os_error();
        trouble!("mount over {target}: {e}");
    }
    Ok(())
}

/// Why no udevd can be started here.
pub fn lacking() -> Option<String> {
    if !Path::new(BINARY).exists() {
        return Some(format!("{BINARY} is not installed"));
    }
    (!Path::new("/run/udev").is_dir())
        .then(|| "there is no /run/udev to put a private one over".to_owned())
}

/// A running udevd; asked to end when dropped, its workers with it.
pub struct Udevd(Running);

/// Starts udevd and waits until it listens.
pub fn start(ground: &Ground) -> Outcome<Udevd> {
    let log = std::fs::File::create(ground.file("udevd.log"))?;
    let mut command = command(BINARY);
    command.stdout(Stdio::null()).stderr(log);
    let mut udevd = Udevd(Running(command.spawn().doing("start systemd-udevd")?));
    until(Duration::from_secs(10), "systemd-udevd to listen", || {
        if let Some(status) = udevd.0.0.try_wait()? {
            trouble!("systemd-udevd ended: {status}");
        }
        Ok(Path::new(CONTROL).exists().then_some(()))
    })?;
    Ok(udevd)
}

impl Drop for Udevd {
    fn drop(&mut self) {
        if self.0.signal(Signal::SIGTERM).is_ok() {
            // It is killed right after, should it not end by itself.
            let _ = self.0.wait(Duration::from_secs(5));
        }
        let _ = std::fs::remove_file(CONTROL);
    }
}
