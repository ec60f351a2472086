//! What each block of a volume may hold: the judge's side of every write.

use std::path::Path;

use support::Outcome;
use support::pattern::{self, Expected, Tally};
use support::stream::{BLOCK, Report};

/// The writes that may be seen in one block: not older than what was promised, not newer than what was sent.
#[derive(Debug, Clone, Copy)]
struct Span {
    promised: u64,
    sent: u64,
}

/// One volume's blocks of [`BLOCK`] bytes.
#[derive(Debug, Clone)]
pub struct Ledger(Vec<Span>);

impl Ledger {
    /// Everything was stamped with `sequence`.
    pub fn stamped(bytes: u64, sequence: u64) -> Ledger {
        let blocks = usize::try_from(bytes.div_ceil(BLOCK as u64)).unwrap_or(0);
        let span = Span {
            promised: sequence,
            sent: sequence,
        };
        Ledger(vec![span; blocks])
    }

    /// The volume has another size; new blocks have no promise, and are to be written before they are judged.
    pub fn resize(&mut self, bytes: u64) {
        let blocks = usize::try_from(bytes.div_ceil(BLOCK as u64)).unwrap_or(0);
        let none = Span {
            promised: 0,
            sent: 0,
        };
        self.0.resize(blocks, none);
    }

    pub fn blocks(&self) -> usize {
        self.0.len()
    }

    /// A write of one block is about to be sent.
    pub fn sent(&mut self, block: usize, sequence: u64) {
        self.0[block].sent = self.0[block].sent.max(sequence);
    }

    /// The write is durable.
    pub fn durable(&mut self, block: usize, sequence: u64) {
        self.sent(block, sequence);
        self.0[block].promised = self.0[block].promised.max(sequence);
    }

    /// Adds what a stream sent and was promised.
    pub fn add(&mut self, report: &Report) {
        for (block, promise) in report.blocks.iter().enumerate() {
            self.sent(block, promise.sent);
            self.durable(block, promise.flushed);
        }
    }

    /// Compares every byte of the backing file.
    pub fn judge(&self, file: &Path, volume: &str, bytes: u64) -> Outcome<Tally> {
        let may = |offset: u64, sequence: u64| {
            let block = usize::try_from(offset / BLOCK as u64).unwrap_or(usize::MAX);
            let span = self.0.get(block);
            span.is_some_and(|s| (s.promised..=s.sent).contains(&sequence))
        };
        let expected = Expected {
            volume,
            bytes,
            sequence: &may,
        };
        pattern::examine_file(file, &expected)
    }
}
