//! What each target does with an input, as a function: the fuzzer calls it, and `tests/fuzz_corpus.rs` replays the corpus with it.

pub mod config;
pub mod handshake;
pub mod identity;
pub mod qcow2;
pub mod session;
pub mod uevent;
pub mod wire;

/// Numbers out of an input; zeroes when it is used up.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    pub fn short(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
