//! EDGE: reads the configuration's files, bounded. Decides only which files belong to it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::SourceFile;

/// The file in a folder that is given as the configuration.
const MAIN_FILE: &str = "nbdtrack.toml";
/// The folder beside the main file whose `*.toml` are read after it.
pub(super) const CONF_D: &str = "conf.d";
/// Bytes of one file: 10,000 exports of some 150 bytes fit, a disk image given by mistake does not.
pub const FILE_BYTES_MAX: u64 = 4 << 20;
/// Files in `conf.d`: one for each of 10,000 exports, which is what the daemon is measured with.
pub(super) const FILES_MAX: usize = 10_000;
/// Bytes of all files, which are in memory at once.
pub(super) const TOTAL_BYTES_MAX: u64 = 64 << 20;

/// Why the configuration could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(
        "{0}: there is no such file; give one with --config, or a folder with {MAIN_FILE} in it"
    )]
    Missing(PathBuf),
    #[error(
        "{0}: there is no {MAIN_FILE} in this folder; make one, or give another place with --config"
    )]
    FolderWithoutFile(PathBuf),
    #[error("{0}: not a regular file")]
    NotAFile(PathBuf),
    /// Taken for a file that was cut off: as "no exports" it would end every session at the next reload.
    #[error("{0}: the file is empty; a configuration without exports has at least a comment")]
    Empty(PathBuf),
    #[error("{path}: more than {limit} bytes; this is no configuration")]
    TooLarge { path: PathBuf, limit: u64 },
    /// A folder that is made anew, or whose file system is not mounted: as "no exports" it would end every session of its files.
    #[error(
        "{0}: the folder is gone, and what its files said stays; if no exports are meant, make it an empty folder"
    )]
    FolderGone(PathBuf),
    #[error("{0}: more than {FILES_MAX} files")]
    TooMany(PathBuf),
    #[error("{0}: with this file the configuration has more than {TOTAL_BYTES_MAX} bytes")]
    TooLargeTogether(PathBuf),
    #[error("{path}: not text (UTF-8): byte {at} is 0x{byte:02x}")]
    NotText { path: PathBuf, at: usize, byte: u8 },
    #[error("{path}: {source}")]
    Kernel { path: PathBuf, source: io::Error },
}

/// Reads the main file at `path` (or in that folder) and, sorted by name in byte order, `conf.d/*.toml` beside it.
///
/// Blocks as files do: not for the event loop.
///
/// # Errors
/// The first file that cannot be read; none is left out silently but those that are no configuration by their
/// name (not `*.toml`, or an editor's: beginning with `.` or `#`) or their kind (folders, sockets).
pub fn read(path: &Path) -> Result<Vec<SourceFile>, ReadError> {
    let main = main_file(path)?;
    let files = conf_d(&folder_beside(&main))?.unwrap_or_default();
    sources(path, main, files)
}

/// As [`read`], after a reading that had so many files.
///
/// # Errors
/// As there, and [`ReadError::FolderGone`] when that one had files of `conf.d` and there is no such folder any more.
pub fn read_again(path: &Path, before: usize) -> Result<Vec<SourceFile>, ReadError> {
    let main = main_file(path)?;
    let folder = folder_beside(&main);
    let files = match conf_d(&folder)? {
        Some(files) => files,
        // One is the main file.
        None if before > 1 => return Err(ReadError::FolderGone(folder)),
        None => Vec::new(),
    };
    sources(path, main, files)
}

fn folder_beside(main: &Path) -> PathBuf {
    main.parent().unwrap_or(Path::new(".")).join(CONF_D)
}

fn sources(path: &Path, main: PathBuf, others: Vec<PathBuf>) -> Result<Vec<SourceFile>, ReadError> {
    let mut left = TOTAL_BYTES_MAX;
    let mut files =
        vec![source(main, &mut left)?.ok_or_else(|| ReadError::NotAFile(path.to_owned()))?];
    for path in others {
        files.extend(source(path, &mut left)?);
    }
    Ok(files)
}

/// One file, whatever its name.
pub(super) fn one(path: &Path) -> Result<SourceFile, ReadError> {
    let file = source(path.to_owned(), &mut { FILE_BYTES_MAX })?;
    file.ok_or_else(|| ReadError::NotAFile(path.to_owned()))
}

pub(super) fn main_file(path: &Path) -> Result<PathBuf, ReadError> {
    match fs::metadata(path) {
        Ok(found) if !found.is_dir() => Ok(path.to_owned()),
        Ok(_) => {
            let file = path.join(MAIN_FILE);
            match fs::metadata(&file) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Err(ReadError::FolderWithoutFile(path.to_owned()))
                }
                _ => Ok(file),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(ReadError::Missing(path.to_owned()))
        }
        Err(source) => Err(kernel(path)(source)),
    }
}

/// Its files, sorted by name; `None` where there is no such folder.
fn conf_d(folder: &Path) -> Result<Option<Vec<PathBuf>>, ReadError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries.map_err(kernel(folder))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(kernel(folder))?.file_name();
        let bytes = name.as_encoded_bytes();
        if !bytes.ends_with(b".toml") || bytes.starts_with(b".") || bytes.starts_with(b"#") {
            continue;
        }
        if found.len() == FILES_MAX {
            return Err(ReadError::TooMany(folder.to_owned()));
        }
        found.push(folder.join(name));
    }
    found.sort();
    Ok(Some(found))
}

/// One file, `None` when it is none. `left` is how many bytes all files may still have.
fn source(path: PathBuf, left: &mut u64) -> Result<Option<SourceFile>, ReadError> {
    // O_NONBLOCK: a FIFO in the place of a file must not stop the daemon.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(&path)
        .map_err(kernel(&path))?;
    if !file.metadata().map_err(kernel(&path))?.is_file() {
        return Ok(None);
    }
    let bytes = bounded(&file, &path)?;
    let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    *left = left
        .checked_sub(len)
        .ok_or_else(|| ReadError::TooLargeTogether(path.clone()))?;
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(ReadError::Empty(path));
    }
    let not_text = |at: usize, byte: u8| ReadError::NotText {
        path: path.clone(),
        at,
        byte,
    };
    if let Some(at) = bytes.iter().position(|b| *b == 0) {
        return Err(not_text(at, 0));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        not_text(at, error.as_bytes().get(at).copied().unwrap_or(0))
    })?;
    Ok(Some(SourceFile { path, text }))
}

/// The file's bytes, by what is there and not by what its size says.
fn bounded(file: &File, path: &Path) -> Result<Vec<u8>, ReadError> {
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(kernel(path))?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > FILE_BYTES_MAX {
        return Err(ReadError::TooLarge {
            path: path.to_owned(),
            limit: FILE_BYTES_MAX,
        });
    }
    Ok(bytes)
}

fn kernel(path: &Path) -> impl FnOnce(io::Error) -> ReadError {
    let path = path.to_owned();
    move |source| ReadError::Kernel { path, source }
}
