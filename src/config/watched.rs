//! EDGE: which entries of which folders are the configuration, for who looks out for changes of them.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::files::{CONF_D, main_file};
use super::ini_files::main_at;
use super::nbd_server::{include_of, settings_path_of};

/// A folder, and which of its entries matter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watched {
    pub folder: PathBuf,
    which: Which,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Which {
    Named(OsString),
    Ending(&'static str),
}

impl Watched {
    /// Whether an entry of this name is read, or leads to what is.
    pub fn counts(&self, name: &OsStr) -> bool {
        let bytes = name.as_encoded_bytes();
        match &self.which {
            Which::Named(wanted) => name == wanted,
            // An editor's, or one that is being written beside its place.
            Which::Ending(ending) => {
                bytes.ends_with(ending.as_bytes())
                    && !bytes.starts_with(b".")
                    && !bytes.starts_with(b"#")
            }
        }
    }
}

/// What the configuration at `path` is made of now. Reads nbd-server's main file for the folder that it includes; blocks as files do.
pub fn watched(path: &Path) -> Vec<Watched> {
    let main = main_file(path).unwrap_or_else(|_| path.to_owned());
    let mut found = Vec::new();
    name(&main, &mut found);
    let beside = folder_of(main.parent().unwrap_or(Path::new(".")));
    let (folder, ending) = match super::is_ini(&main) {
        true => {
            let file = main_at(&main);
            if let Some(settings) = settings_path_of(&file) {
                name(&settings, &mut found);
            }
            (include_of(&file), ".conf")
        }
        false => (Some(beside.join(CONF_D)), ".toml"),
    };
    let Some(folder) = folder else { return found };
    // It may come, or be put in another's place.
    if let (Some(above), Some(name)) = (folder.parent(), folder.file_name()) {
        found.push(Watched {
            folder: folder_of(above),
            which: Which::Named(name.to_owned()),
        });
    }
    found.push(Watched {
        folder,
        which: Which::Ending(ending),
    });
    found
}

/// The name itself, and what a link of that name leads to.
fn name(file: &Path, found: &mut Vec<Watched>) {
    let target = file.canonicalize().ok().filter(|target| target != file);
    for file in std::iter::once(file).chain(target.as_deref()) {
        if let (Some(folder), Some(name)) = (file.parent(), file.file_name()) {
            found.push(Watched {
                folder: folder_of(folder),
                which: Which::Named(name.to_owned()),
            });
        }
    }
}

/// The parent of a bare file name is empty, and is where the daemon was started.
fn folder_of(folder: &Path) -> PathBuf {
    match folder.as_os_str().is_empty() {
        true => PathBuf::from("."),
        false => folder.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_an_editor_leaves_beside_a_file_does_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let main = folder.path().join("config");
        let text = format!(
            "[generic]\nincludedir = {0}/conf.d\nx-settings = {0}/ours.toml\n",
            folder.path().display()
        );
        fs::write(&main, text).unwrap();
        let watched = watched(&main);
        let counts = |folder: &Path, name: &str| {
            watched
                .iter()
                .any(|w| w.folder == folder && w.counts(OsStr::new(name)))
        };
        let conf = folder.path().join("conf.d");
        assert!(counts(folder.path(), "config"));
        assert!(counts(folder.path(), "conf.d"));
        assert!(counts(folder.path(), "ours.toml"));
        assert!(counts(&conf, "a.conf"));
        for name in [
            ".a.conf.swp",
            "#a.conf#",
            "a.conf~",
            "4913",
            ".a.conf",
            "a.toml",
        ] {
            assert!(!counts(&conf, name), "{name}");
        }
        for name in ["config~", ".config.swp", "other"] {
            assert!(!counts(folder.path(), name), "{name}");
        }
    }

    #[test]
    fn a_link_is_watched_at_both_of_its_ends() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().join("real");
        fs::create_dir(&real).unwrap();
        fs::write(real.join("it.toml"), "# nothing\n").unwrap();
        let link = folder.path().join("nbdtrack.toml");
        std::os::unix::fs::symlink("real/it.toml", &link).unwrap();
        let watched = watched(folder.path());
        let counts = |folder: &Path, name: &str| {
            let name = OsStr::new(name);
            watched.iter().any(|w| {
                w.folder.canonicalize().ok() == folder.canonicalize().ok() && w.counts(name)
            })
        };
        assert!(counts(folder.path(), "nbdtrack.toml"));
        assert!(counts(&real, "it.toml"));
        assert!(!counts(&real, "nbdtrack.toml"));
    }
}
