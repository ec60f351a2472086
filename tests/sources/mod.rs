//! Reads `src/`, for the tests that hold what stands in it.

use std::path::{Path, PathBuf};

/// Every source file by its path below `src/`.
pub fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("src can be read") {
            let path = entry.expect("src can be read").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).expect("sources are text");
                let below = path.strip_prefix(&root).expect("it was found there");
                found.push((below.to_owned(), text));
            }
        }
    }
    assert!(found.len() > 5, "the sources are found");
    found
}
