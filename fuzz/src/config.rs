//! A configuration of any text: a value or its problems, each at a place that is there.

use std::path::PathBuf;

use nbdtrack::config::{SourceFile, parse};

pub fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data).into_owned();
    // A line of its own divides the main file from one of conf.d.
    let (main, other) = text.split_once("\n---\n").unwrap_or((&text, ""));
    let files = [("main.toml", main), ("other.toml", other)].map(|(path, text)| SourceFile {
        path: PathBuf::from(path),
        text: text.to_owned(),
    });
    match parse(&files) {
        Ok(config) => {
            for export in &config.exports {
                assert!(config.identity.permit(&export.volume).is_ok());
                assert!(!export.volume.candidates().is_empty());
            }
        }
        Err(problems) => {
            assert!(!problems.is_empty());
            for problem in problems {
                let text = &files
                    .iter()
                    .find(|file| file.path == problem.file)
                    .unwrap()
                    .text;
                assert!(problem.line >= 1 && problem.line <= text.lines().count() + 1);
                assert!(problem.column >= 1);
            }
        }
    }
}
