//! A message of the kernel's event socket, of any bytes.

use nbdtrack::udev::uevent::{self, Heard};

pub fn run(data: &[u8]) {
    if let Ok(Heard::Disk(hint)) = uevent::parse(data) {
        assert!(data.ends_with(&[0]));
        // What removes a disk was said by the message.
        let says = |word: &[u8]| data.windows(word.len()).any(|part| part == word);
        assert!(!hint.removed || says(b"remove") && !says(b"\0SYNTH_UUID="));
        assert!(says(b"MAJOR=") && says(b"MINOR="));
    }
}
