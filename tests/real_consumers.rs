//! The consumers that are shown to others, on a real daemon and a real disk.

use std::path::Path;
use std::time::Duration;

use support::ground::{Need, real, skip};
use support::loops::LoopDevice;
use support::scene::{Scene, Volume};
use support::{Outcome, hold, process};

const NEEDS: &[Need] = &[
    Need::Loop,
    Need::Bus,
    Need::Tool("nbdinfo"),
    Need::Tool("losetup"),
];
const BYTES: u64 = 4 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// Twice: attach, have it exported, job, prepare the detach, detach. The second time the export is found, and follows the volume to another device.
fn runs_through(name: &str, program: &Path, shows_the_job: bool) -> Outcome<()> {
    real(name, NEEDS, |ground| {
        let mut scene = Scene::empty(ground)?;
        let volume = Volume::make(ground.path(), "vol-c", BYTES)?;
        let socket = scene.home.socket.display().to_string();
        let devices = [LoopDevice::add()?, LoopDevice::add()?];
        for (round, device) in devices.iter().enumerate() {
            let attach = format!("losetup {} {}", device.node(), volume.image.display());
            let detach = format!("losetup -d {}", device.node());
            let mut command = process::command(program);
            command
                .args(["vm-c", "3", &volume.id(), &socket, &attach, &detach])
                .env("NBDTRACK_BUS", &scene.bus.address);
            let done = process::run_command(name, command, LIMIT)?;
            let said = format!("{}{}", done.stdout, done.stderr);
            hold!(done.status.success(), "{said}");
            hold!(done.stdout.contains(&BYTES.to_string()), "{said}");
            let made = ["created", "true]"].iter().any(|word| said.contains(word));
            hold!(made == (round == 0), "made by the first alone: {said}");
            if shows_the_job {
                hold!(done.stdout.contains("prepare-detach: "), "{said}");
                let last = done.stdout.lines().last().unwrap_or_default();
                hold!(last.starts_with("done"), "{said}");
            }
            let export = scene.client.export("migration-vm-vm-c-disk3")?;
            let of = export.as_ref().and_then(|export| export.get("VmId"));
            hold!(of.is_some_and(|vm| vm.text() == "vm-c"), "{export:?}");
            scene
                .client
                .reach_state("migration-vm-vm-c-disk3", "Absent", LIMIT)?;
        }
        scene.stop()
    })
}

fn example(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("examples/consumers")
        .join(name)
}

#[test]
fn the_shell_consumer_runs_through() -> Outcome<()> {
    runs_through("shell consumer", &example("volume.sh"), false)
}

#[test]
fn the_python_consumer_runs_through() -> Outcome<()> {
    let there = process::run(support::ground::PYTHON, &["-c", "import dbus, gi"], LIMIT)?;
    if !there.status.success() {
        return skip(
            "python consumer",
            "Debian's python3-dbus or python3-gi is not installed",
        );
    }
    runs_through("python consumer", &example("volume.py"), true)
}

/// Where Debian keeps the sources of Go packages.
const GO_PACKAGES: &str = "/usr/share/gocode";

#[test]
fn the_go_consumer_runs_through() -> Outcome<()> {
    let library = Path::new(GO_PACKAGES).join("src/github.com/godbus/dbus");
    if !process::installed("go") || !library.exists() {
        return skip(
            "go consumer",
            "golang-go or golang-github-godbus-dbus-dev is not installed",
        );
    }
    let folder = tempfile::tempdir()?;
    let program = folder.path().join("volume");
    let mut build = process::command("go");
    build
        .args(["build", "-o"])
        .args([&program, &example("volume.go")])
        .env("GO111MODULE", "off")
        .env("GOPATH", GO_PACKAGES)
        .env("GOCACHE", folder.path().join("cache"));
    let built = process::run_command("go build", build, 4 * LIMIT)?;
    hold!(built.status.success(), "go build: {}", built.stderr);
    runs_through("go consumer", &program, true)
}
