//! The reading of the configuration's files: what belongs to it, what is refused, and how it says so.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nbdtrack::config::{FILE_BYTES_MAX, ReadError, read, read_again};

#[test]
fn a_folder_stands_for_the_file_in_it_and_conf_d_is_sorted() {
    let folder = tempfile::tempdir().expect("a folder");
    let conf_d = folder.path().join("conf.d");
    fs::create_dir(&conf_d).expect("conf.d");
    write(&folder.path().join("nbdtrack.toml"), b"# main");
    for name in [
        "b.toml",
        "a.toml",
        "B.toml",
        ".#a.toml",
        "#a.toml#",
        ".hidden.toml",
        "a.toml~",
        "a.conf",
    ] {
        write(&conf_d.join(name), b"# one");
    }
    fs::create_dir(conf_d.join("folder.toml")).expect("a folder of that name");
    let names = |path: &Path| -> Vec<String> {
        let files = read(path).expect("readable");
        files
            .iter()
            .map(|f| {
                f.path
                    .file_name()
                    .expect("a name")
                    .to_string_lossy()
                    .into_owned()
            })
            .collect()
    };
    let expected = ["nbdtrack.toml", "B.toml", "a.toml", "b.toml"];
    assert_eq!(names(folder.path()), expected);
    assert_eq!(names(&folder.path().join("nbdtrack.toml")), expected);
}

/// A folder that was made anew, or whose file system was not mounted, was "no exports" and ended every session of its files.
#[test]
fn conf_d_that_had_files_and_is_gone_is_refused_and_none_that_never_was_there_or_is_empty() {
    let folder = tempfile::tempdir().expect("a folder");
    let (conf_d, aside) = (folder.path().join("conf.d"), folder.path().join("aside"));
    write(&folder.path().join("nbdtrack.toml"), b"# main");
    let files = |before| read_again(folder.path(), before).map(|files| files.len());
    assert!(matches!(files(0), Ok(1)), "at a start");
    assert!(matches!(files(1), Ok(1)), "it never was there");
    fs::create_dir(&conf_d).expect("conf.d");
    write(&conf_d.join("a.toml"), b"# one");
    assert!(matches!(files(1), Ok(2)));
    fs::rename(&conf_d, &aside).expect("renamed");
    let gone = files(2).expect_err("refused");
    assert!(
        gone.to_string().contains("conf.d: the folder is gone")
            && gone.to_string().contains("empty folder"),
        "{gone}"
    );
    fs::create_dir(&conf_d).expect("conf.d");
    assert!(matches!(files(2), Ok(1)), "an empty one is meant");
}

#[test]
fn what_is_no_configuration_is_refused_by_its_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        write(&path, bytes);
        path
    };
    let refused = |path: &Path| {
        let error = read(path).expect_err("refused");
        assert!(
            error.to_string().contains(&*path.to_string_lossy()),
            "{error}"
        );
        error
    };
    assert!(matches!(
        refused(folder.path()),
        ReadError::FolderWithoutFile(_)
    ));
    assert!(matches!(
        refused(&folder.path().join("none.toml")),
        ReadError::Missing(_)
    ));
    assert!(matches!(refused(&file("empty", b"")), ReadError::Empty(_)));
    assert!(matches!(
        refused(&file("blank", b" \n\t\n")),
        ReadError::Empty(_)
    ));
    assert!(matches!(
        refused(&file("binary", b"\x7fELF\x02\x01\x00")),
        ReadError::NotText { at: 6, byte: 0, .. }
    ));
    assert!(matches!(
        refused(&file("latin1", b"# \xe9\n")),
        ReadError::NotText {
            at: 2,
            byte: 0xe9,
            ..
        }
    ));
    assert!(matches!(
        refused(Path::new("/dev/zero")),
        ReadError::NotAFile(_)
    ));
    let large = folder.path().join("large");
    fs::File::create(&large)
        .and_then(|f| f.set_len(50 << 20))
        .expect("a sparse file");
    assert!(matches!(
        refused(&large),
        ReadError::TooLarge {
            limit: FILE_BYTES_MAX,
            ..
        }
    ));
}

#[test]
fn a_fifo_does_not_hold_up_the_daemon() {
    let folder = tempfile::tempdir().expect("a folder");
    let fifo = folder.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
    assert!(fifo.as_os_str().as_bytes().ends_with(b"fifo"));
    assert!(matches!(read(&fifo), Err(ReadError::NotAFile(_))));
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("written");
}
