//! A disk that becomes another one under an open descriptor: the fence that no removal announces.

use support::Outcome;
use support::client::Client;
use support::ground::{Need, real};
use support::hold;
use support::scene::{STEP_LIMIT, Scene, Volume};

const NEEDS: &[Need] = &[Need::Loop, Need::Bus];
const BYTES: u64 = 4 << 20;

#[test]
fn disk_that_is_exchanged_while_open_is_fenced_and_never_read_again() -> Outcome<()> {
    real("exchange", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-c"], BYTES)?;
        let ours = Volume::make(ground.path(), "ours", BYTES)?;
        let theirs = Volume::make(ground.path(), "theirs", BYTES)?;
        ours.stamp(1)?;
        theirs.stamp(1)?;
        let device = support::loops::LoopDevice::add()?;
        device.attach_read_only(&ours.image)?;
        scene.client.add_export("ours", &ours.id())?;

        let mut reader = Client::open(&scene.endpoint(), "ours")?;
        let mut bytes = [0; 4096];
        hold!(
            reader.read(0, &mut bytes)?.is_ok(),
            "the disk cannot be read"
        );
        let mut bystander = Client::open(&scene.endpoint(), "vol-c")?;

        let mark = scene.client.mark();
        device.change_backing(&theirs.image)?;
        scene
            .client
            .wait_state(mark, "ours", "Absent", STEP_LIMIT)?;

        // The session was cut; at the most it hears of the shutdown. It never sees the other volume's bytes.
        if let Ok(Ok(())) = reader.read(0, &mut bytes) {
            hold!(false, "read {:02x?} after the exchange", &bytes[..16]);
        }
        hold!(
            Client::open(&scene.endpoint(), "ours").is_err(),
            "a new client was served"
        );
        hold!(
            bystander.read(0, &mut bytes)?.is_ok(),
            "another export was disturbed"
        );

        // It comes back: another incarnation, another generation.
        let mark = scene.client.mark();
        device.change_backing(&ours.image)?;
        scene
            .client
            .wait_state(mark, "ours", "Serving", STEP_LIMIT)?;
        let generation = scene
            .export("ours")?
            .get("Generation")
            .map_or(0, |w| w.number());
        hold!(generation == 2, "generation {generation}");
        drop((reader, bystander));
        scene.stop()
    })
}
