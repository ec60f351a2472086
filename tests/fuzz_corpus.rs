//! Promise: no bytes from a peer, a disk, the kernel's socket or a file do more than be refused. Replays the fuzzer's corpus, and turns and joins
//! its inputs for a while; `make fuzz` looks for new ones.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test ends where something is missing, and its numbers fit"
)]

#[path = "../fuzz/src/lib.rs"]
mod nbdtrack_fuzz;

use std::path::Path;
use std::time::{Duration, Instant};

use nbdtrack_fuzz::{config, handshake, identity, qcow2, session, uevent, wire};

/// Milliseconds of turned inputs for each target; `FUZZ_MS` says otherwise.
const TURNED_MS: u64 = 1_500;

fn replay(name: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name);
    let mut inputs: Vec<Vec<u8>> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
        .collect();
    assert!(!inputs.is_empty(), "{}: no corpus", folder.display());
    inputs.sort();
    for input in &inputs {
        run(input);
    }
    let wanted = std::env::var("FUZZ_MS").ok();
    let limit = wanted.map_or(TURNED_MS, |text| text.parse().expect("FUZZ_MS is a number"));
    let seed = std::env::var("FUZZ_SEED").ok();
    let mut state = seed.map_or(0x9e37_79b9_7f4a_7c15, |text| {
        text.parse().expect("FUZZ_SEED is a number")
    });
    let began = Instant::now();
    let mut count = 0_u64;
    while began.elapsed() < Duration::from_millis(limit) {
        let input = turned(&inputs, &mut state);
        let done = std::panic::catch_unwind(|| run(&input));
        if done.is_err() {
            let kept = std::env::temp_dir().join(format!("nbdtrack-fuzz-{name}"));
            std::fs::write(&kept, &input).unwrap();
            panic!(
                "{name}: input {count} fails; it is kept in {}",
                kept.display()
            );
        }
        count += 1;
    }
    println!(
        "MEASURED: fuzz {name}: {} inputs of the corpus, {count} turned ones in {limit} ms",
        inputs.len()
    );
}

/// Parts of two inputs, with some bytes turned.
fn turned(inputs: &[Vec<u8>], state: &mut u64) -> Vec<u8> {
    let mut next = |below: usize| {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        usize::try_from(*state >> 11).unwrap() % below.max(1)
    };
    let mut input = inputs[next(inputs.len())].clone();
    let other = &inputs[next(inputs.len())];
    match next(4) {
        0 => input.truncate(next(input.len() + 1)),
        1 => input.extend_from_slice(&other[next(other.len() + 1)..]),
        2 => input.extend((0..next(200)).map(|_| next(256) as u8)),
        _ => {}
    }
    for _ in 0..next(8) {
        let len = input.len();
        if let Some(byte) = input.get_mut(next(len)) {
            *byte = if next(2) == 0 {
                next(256) as u8
            } else {
                *byte ^ (1 << next(8))
            };
        }
    }
    input.truncate(4096);
    input
}

macro_rules! targets {
    ($($claim:ident: $name:ident,)*) => {
        $(#[test] fn $claim() { replay(stringify!($name), $name::run); })*
    };
}

targets! {
    no_bytes_break_the_wire: wire,
    no_peer_breaks_the_handshake: handshake,
    no_session_leaves_its_model: session,
    no_text_breaks_the_configuration: config,
    no_disk_breaks_its_identity: identity,
    no_message_breaks_the_event_socket: uevent,
    no_image_breaks_its_reader: qcow2,
}
