//! Where something stands in a file, as a person counts, and what is wrong there.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Something that is wrong in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub file: PathBuf,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        write!(f, "{file}:{}:{}: {}", self.line, self.column, self.message)
    }
}

/// A place in a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) file: &'a Path,
    pub(super) line: usize,
    pub(super) column: usize,
}

impl Place<'_> {
    pub(super) fn problem(&self, message: impl Into<String>) -> Problem {
        Problem {
            file: self.file.to_owned(),
            line: self.line,
            column: self.column,
            message: message.into(),
        }
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file.display(), self.line, self.column)
    }
}

/// Turns byte offsets of one file into places; built once, so that a place costs the length of its line.
pub(super) struct Places<'a> {
    file: &'a Path,
    text: &'a str,
    /// Byte offsets at which lines begin.
    lines: Vec<usize>,
}

impl<'a> Places<'a> {
    pub(super) fn new(file: &'a Path, text: &'a str) -> Places<'a> {
        let lines = text
            .match_indices('\n')
            .map(|(at, _)| at + 1)
            .collect::<Vec<_>>();
        Places {
            file,
            text,
            lines: [vec![0], lines].concat(),
        }
    }

    /// The place at which a span begins; total, also for a span past the end.
    pub(super) fn at(&self, span: Range<usize>) -> Place<'a> {
        let offset = span.start.min(self.text.len());
        let line = self.lines.partition_point(|start| *start <= offset);
        let start = self.lines.get(line - 1).copied().unwrap_or(0);
        let before = self.text.as_bytes().get(start..offset).unwrap_or_default();
        // One for each character: UTF-8's continuation bytes don't count.
        let column = 1 + before.iter().filter(|b| (**b & 0xc0) != 0x80).count();
        Place {
            file: self.file,
            line,
            column,
        }
    }
}
