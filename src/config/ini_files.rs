//! EDGE: reads nbd-server's configuration, bounded: the main file and the `*.conf` of its `includedir`. A file that cannot be read is
//! told as such, so that what stood in it before stays. `known_files.rs` passes over what is as it was.

use std::collections::BTreeMap;
use std::fs::{self, Metadata, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::files::{FILE_BYTES_MAX, FILES_MAX, TOTAL_BYTES_MAX, one};
use super::nbd_server::{COMMAND_LINE, CommandLine, Generic, IniFile, include_of};
use super::{Config, Problem, parse_settings};

/// All files as they were read.
#[derive(Debug, Default)]
pub struct IniFiles {
    /// The main file, then the others in byte order of their names.
    pub files: Vec<IniFile>,
    /// When each was last written, in microseconds since 1970; without those that could not be read.
    pub written_us: BTreeMap<PathBuf, u64>,
}

/// Whether the configuration at `path` is nbd-server's: a file whose first line that says anything is `[generic]`.
///
/// What cannot be read is not.
pub fn is_ini(path: &Path) -> bool {
    let mut left = TOTAL_BYTES_MAX;
    !path.is_dir()
        && source(path, &mut left).is_ok_and(|read| super::document::is_nbd_server(&read.text))
}

/// Reads everything. Blocks as files do: not for the event loop.
pub fn read_ini(main: &Path) -> IniFiles {
    let mut read = IniFiles::default();
    let mut left = TOTAL_BYTES_MAX;
    read.take(main, &mut left);
    match read.files.first().map(included) {
        Some(Ok(paths)) => paths.iter().for_each(|path| read.take(path, &mut left)),
        Some(Err(unlisted)) => read.files.push(unlisted),
        None => {}
    }
    read
}

/// As [`read_ini`], and what the command line names after the files. Beside that the main file may be missing, or be none
/// (`-C /dev/null`): then it says nothing.
pub fn read_ini_beside(main: &Path, line: Option<&CommandLine>) -> IniFiles {
    let Some(line) = line else {
        return read_ini(main);
    };
    let mut read = match says_nothing(main) {
        true => IniFiles {
            files: vec![nothing_at(main)],
            ..IniFiles::default()
        },
        false => read_ini(main),
    };
    read.files.push(of_line(line));
    read
}

/// Only the main file, for what has to be known before all others are read. As with [`read_ini_beside`], it may be missing beside a
/// command line.
pub fn read_ini_main(main: &Path, line: Option<&CommandLine>) -> IniFile {
    if line.is_some() && says_nothing(main) {
        return nothing_at(main);
    }
    main_at(main)
}

/// What the file that `x-settings` names says, and the defaults where nothing is named. Blocks as files do.
///
/// # Errors
/// A file that cannot be read, with the place of its name; all that is wrong in it, with its own.
pub fn settings_of(generic: &Generic) -> Result<Config, Vec<Problem>> {
    let Some(named) = &generic.settings else {
        return Ok(Config::default());
    };
    let file = one(Path::new(&named.name))
        .map_err(|error| vec![named.problem(format!("[generic]: x-settings: {error}"))])?;
    parse_settings(&file)
}

/// The files that the main file includes; a folder that cannot be listed is as a file that cannot be read: what stood in its files stays.
pub(super) fn included(main: &IniFile) -> Result<Vec<PathBuf>, IniFile> {
    let Some(folder) = include_of(main) else {
        return Ok(Vec::new());
    };
    conf_files(&folder).map_err(|message| IniFile {
        path: folder,
        text: Err(message),
    })
}

/// There is no file, or what is there is none.
pub(super) fn says_nothing(main: &Path) -> bool {
    match fs::metadata(main) {
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        Ok(facts) => !facts.is_file() && !facts.is_dir(),
    }
}

pub(super) fn of_line(line: &CommandLine) -> IniFile {
    IniFile {
        path: COMMAND_LINE.into(),
        text: Ok(line.section.clone()),
    }
}

/// A main file that says nothing.
pub(super) fn nothing_at(main: &Path) -> IniFile {
    IniFile {
        path: main.to_owned(),
        text: Ok("[generic]\n".to_owned()),
    }
}

/// The main file at `path`, for what else it names.
pub(super) fn main_at(path: &Path) -> IniFile {
    IniFile {
        path: path.to_owned(),
        text: source(path, &mut { TOTAL_BYTES_MAX }).map(|read| read.text),
    }
}

impl IniFiles {
    fn take(&mut self, path: &Path, left: &mut u64) {
        let text = match source(path, left) {
            Ok(read) => {
                self.written_us
                    .insert(path.to_owned(), written_us(&read.facts));
                Ok(read.text)
            }
            Err(message) => Err(message),
        };
        self.files.push(IniFile {
            path: path.to_owned(),
            text,
        });
    }
}

/// The folder's files, sorted; the stock server takes them in the order of the directory, which is none.
fn conf_files(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let failed = |error: std::io::Error| format!("includedir: {error}");
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let bytes = name.as_encoded_bytes();
        // An editor's, or one that is being written beside its place.
        if !bytes.ends_with(b".conf") || bytes.starts_with(b".") || bytes.starts_with(b"#") {
            continue;
        }
        let path = folder.join(&name);
        // The folder says what an entry is; only where a link leads has to be asked.
        let is_folder = match entry.file_type() {
            Ok(kind) if !kind.is_symlink() => kind.is_dir(),
            _ => fs::metadata(&path).is_ok_and(|facts| facts.is_dir()),
        };
        if !is_folder {
            found.push(path);
        }
        if found.len() > FILES_MAX {
            return Err(format!("includedir: more than {FILES_MAX} files"));
        }
    }
    // Of one folder, so this is the order of the names' bytes; paths by themselves are compared part by part.
    found.sort_unstable_by(|a, b| a.as_os_str().cmp(b.as_os_str()));
    Ok(found)
}

/// One file as it was read.
pub(super) struct Source {
    pub text: String,
    /// Asked before it was read.
    pub facts: Metadata,
}

/// When it was last written, in microseconds since 1970; times before that are 0.
pub(super) fn written_us(facts: &Metadata) -> u64 {
    let since = facts.modified().ok();
    let since = since.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |since| {
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    })
}

/// Takes so many bytes of a file from what is left.
pub(super) fn spend(len: u64, left: &mut u64) -> Result<(), String> {
    *left = left.checked_sub(len).ok_or_else(|| {
        format!("with this file the configuration has more than {TOTAL_BYTES_MAX} bytes")
    })?;
    Ok(())
}

pub(super) fn source(path: &Path, left: &mut u64) -> Result<Source, String> {
    // O_NONBLOCK: a FIFO in the place of a file must not stop the daemon.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(|error| error.to_string())?;
    let facts = file.metadata().map_err(|error| error.to_string())?;
    if !facts.is_file() {
        return Err("not a regular file".to_owned());
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| error.to_string())?;
    let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if len > FILE_BYTES_MAX {
        return Err(format!(
            "more than {FILE_BYTES_MAX} bytes; this is no configuration"
        ));
    }
    spend(len, left)?;
    // Taken for a file that is being written: as "no exports" it would end every session at the next reload.
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err("the file is empty; one without exports has at least a comment".to_owned());
    }
    Ok(Source {
        text: String::from_utf8_lossy(&bytes).into_owned(),
        facts,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_read_in_the_order_of_names_without_what_is_no_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let main = folder.path().join("config");
        let conf = folder.path().join("conf.d");
        fs::create_dir(&conf).unwrap();
        fs::create_dir(conf.join("folder.conf")).unwrap();
        let text = format!("# ours\n[generic]\nincludedir = {}\n", conf.display());
        fs::write(&main, text).unwrap();
        for name in [
            "b.conf",
            "a.conf",
            ".a.conf.swp",
            ".hidden.conf",
            "#a.conf",
            "a.conf~",
            "c.txt",
        ] {
            fs::write(conf.join(name), "# nothing\n").unwrap();
        }
        fs::write(conf.join("z.conf"), "").unwrap();
        fs::write(conf.join("y.conf"), b"# \xff\n").unwrap();
        assert!(is_ini(&main) && !is_ini(&conf.join("a.conf")) && !is_ini(folder.path()));
        let read = read_ini(&main);
        let names: Vec<_> = read
            .files
            .iter()
            .map(|file| file.path.file_name().unwrap().to_str().unwrap())
            .collect();
        assert_eq!(names, ["config", "a.conf", "b.conf", "y.conf", "z.conf"]);
        assert!(read.files[4].text.is_err());
        assert_eq!(read.files[3].text.as_deref(), Ok("# \u{fffd}\n"));
        assert_eq!(read.written_us.len(), 4);
        fs::remove_dir_all(&conf).unwrap();
        let read = read_ini(&main);
        assert_eq!(read.files.len(), 2);
        assert_eq!(read.files[1].path, conf);
        assert!(read.files[1].text.is_err());
    }
}
