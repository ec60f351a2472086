//! EDGE: the place, which is the path of the stock server's binary: what dpkg says of it, and the files there. At every moment, also after a
//! crash between two steps, there is an executable at the path: each is put there by a rename. And at every moment one is the stock server, at
//! the path or aside from it, as a copy that is on the disk before the other goes. Not as a second name of one file: on an overlay the first
//! name of a file of a lower layer stays that file, and cannot be renamed onto any more.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::TakeOverError;
use super::call::{must, run, step};

/// Where the stock server's binary can be: Debian has merged `/usr`, whose paths are both; another one might not. Our own units have
/// what stands aside from there as a condition.
pub(super) const PLACES: [&str; 2] = ["/bin/nbd-server", "/usr/bin/nbd-server"];

/// A file as the kernel knows it: device and inode.
pub(super) type Executable = (u64, u64);

/// Whether two paths have the same program.
pub(super) fn same(one: &Path, other: &Path) -> io::Result<bool> {
    Ok(
        fs::metadata(one)?.len() == fs::metadata(other)?.len()
            && fs::read(one)? == fs::read(other)?,
    )
}

pub(super) fn identity(path: &Path) -> io::Result<Executable> {
    let facts = fs::metadata(path)?;
    Ok((facts.dev(), facts.ino()))
}

/// Where the stock server's binary is.
pub(super) struct Place {
    /// As its package has it: what dpkg diverts.
    pub binary: PathBuf,
    /// Where it is while its place is taken.
    pub stock: PathBuf,
    /// The diversion is there.
    pub taken: bool,
    /// The stock package is installed.
    pub packaged: bool,
}

impl Place {
    /// `None` when the stock package is not installed, and no diversion is left of it.
    ///
    /// # Errors
    /// [`TakeOverError::Foreign`] when somebody else diverted it; when dpkg cannot be asked.
    pub(super) fn look(package: &str) -> Result<Option<Place>, TakeOverError> {
        let (known, files) = run("dpkg-query", &["--listfiles", package])?;
        let mut files = files.lines().map(Path::new).filter(|_| known);
        // Of a package that is removed and not purged dpkg knows its configuration only.
        let packaged = files.find(|path| path.ends_with("bin/nbd-server"));
        let candidates = match packaged {
            Some(binary) => vec![binary],
            None => PLACES.iter().map(Path::new).collect(),
        };
        for binary in candidates {
            let (now, stock) = (now_at(binary)?, stock_of(binary));
            let taken = now == stock;
            if !taken && packaged.is_none() {
                continue;
            }
            if !taken && now != *binary {
                return Err(TakeOverError::Foreign {
                    binary: binary.to_owned(),
                    to: now,
                });
            }
            return Ok(Some(Place {
                taken,
                packaged: packaged.is_some(),
                binary: binary.to_owned(),
                stock,
            }));
        }
        Ok(None)
    }

    /// Asked again: an exchange that failed changes it.
    fn is_diverted(&self) -> Result<bool, TakeOverError> {
        Ok(now_at(&self.binary)? == self.stock)
    }

    /// What is at the path is the stock server, which is aside, too.
    pub(super) fn has_stock(&self) -> bool {
        same(&self.binary, &self.stock).unwrap_or(false)
    }

    /// Whether a process that runs this is what serves in the stock server's place.
    pub(super) fn is_in_place(&self, executable: Executable) -> bool {
        let runs = |path: &Path| identity(path).is_ok_and(|there| there == executable);
        let stock = runs(&self.stock) || (runs(&self.binary) && self.has_stock());
        self.stock.exists() && !stock
    }

    /// Whether what is at the path is this very program.
    pub(super) fn is_ours(&self) -> Result<bool, TakeOverError> {
        let own = same(&self.binary, Path::new("/proc/self/exe"));
        let there = self.binary.exists();
        Ok(there && own.map_err(|error| step(self.binary.display().to_string(), error))?)
    }

    /// Copies this program beside the place, to the disk: what is left to do then takes no room, and no time.
    pub(super) fn copy_ours(&self) -> Result<(), TakeOverError> {
        let new = self.beside(NEW);
        let copy = || -> io::Result<()> {
            remove(&new)?;
            let mut from = File::open("/proc/self/exe")?;
            let mut to = File::create_new(&new)?;
            io::copy(&mut from, &mut to)?;
            to.set_permissions(fs::Permissions::from_mode(0o755))?;
            to.sync_all()
        };
        copy().map_err(|error| {
            self.forget_copy();
            let what = format!("copy this program to {}", self.binary.display());
            step(what, error)
        })
    }

    /// Copies what is in the stock server's place beside it, for [`Place::put_old_back`].
    pub(super) fn keep_old(&self) -> Result<(), TakeOverError> {
        match self.has_stock() {
            // It came so far before it was cut off, and what it kept is what was there before.
            true => Ok(()),
            false => self.copy(&self.binary, &self.beside(OLD)),
        }
    }

    /// Copies a program, with all that it has, to the disk and under its name when it is whole.
    fn copy(&self, from: &Path, to: &Path) -> Result<(), TakeOverError> {
        let part = self.beside(PART);
        let copied = must(
            "cp",
            &[
                "--preserve=all",
                "--",
                &from.display().to_string(),
                &part.display().to_string(),
            ],
        );
        let put = || -> io::Result<()> {
            File::open(&part)?.sync_all()?;
            fs::rename(&part, to)?;
            self.sync_folder()
        };
        let put = copied.and_then(|_| put().map_err(|error| step(to.display().to_string(), error)));
        if put.is_err() {
            let _left = fs::remove_file(&part);
        }
        put
    }

    /// Has dpkg say whether it would divert the place, and leaves it as it is.
    pub(super) fn can_step_aside(&self) -> Result<(), TakeOverError> {
        let (binary, stock) = self.shown();
        if self.is_ours()? {
            let why = "it is nbdtrack, and not diverted; 'apt-get install --reinstall nbd-server' puts the stock server there";
            return Err(step(binary, why));
        }
        if !self.binary.exists() {
            let why = "the stock server is not there; 'apt-get install --reinstall nbd-server' puts it there";
            return Err(step(binary, why));
        }
        // With that it looks what is aside; which may be there since an exchange was cut off.
        let rename = match self.is_cut_off() {
            true => "--no-rename",
            false => "--rename",
        };
        let args = [
            "--test", "--local", rename, "--divert", &stock, "--add", &binary,
        ];
        must("dpkg-divert", &args).map(drop)
    }

    /// As [`Place::can_step_aside`], for the way back. That its lists can be written dpkg does not try.
    pub(super) fn can_come_back(&self) -> Result<(), TakeOverError> {
        let (binary, _) = self.shown();
        let args = ["--test", "--local", "--no-rename", "--remove", &binary];
        must("dpkg-divert", &args).map(drop)
    }

    /// Copies the stock server aside, and has dpkg know it there. It stays at the path, too.
    pub(super) fn step_aside(&self) -> Result<(), TakeOverError> {
        if self.is_diverted()? {
            return Ok(());
        }
        if !self.has_stock() {
            self.copy(&self.binary, &self.stock)?;
        }
        let (binary, stock) = self.shown();
        divert(&["--divert", &stock, "--add", &binary])
    }

    /// Takes the diversion out, if there is one, and the stock server's copy, which is at the path by now.
    pub(super) fn undivert(&self) -> Result<(), TakeOverError> {
        if self.is_diverted()? {
            let (binary, _) = self.shown();
            // dpkg would take the copy away before it has written its list, and where it cannot the only other one is overwritten by ours.
            divert(&["--remove", &binary])?;
        }
        // Or another version of it, which dpkg put there after an exchange was cut off.
        if self.stock.exists() && self.binary.exists() && !self.is_ours()? {
            remove(&self.stock).map_err(|error| step(self.stock.display().to_string(), error))?;
        }
        let synced = self.sync_folder();
        synced.map_err(|error| step(self.binary.display().to_string(), error))
    }

    /// Takes ours and the diversion away where the stock package is not installed any more.
    pub(super) fn clear(&self) -> Result<(), TakeOverError> {
        // First: without the diversion nothing says any more that it is ours to take away.
        remove(&self.binary).map_err(|error| step(self.binary.display().to_string(), error))?;
        let (binary, _) = self.shown();
        divert(&["--remove", &binary])
    }

    /// Puts what [`Place::copy_ours`] has copied into the place.
    pub(super) fn put_ours(&self) -> Result<(), TakeOverError> {
        // An exchange that was cut off came so far.
        if self.is_ours()? {
            self.forget_copy();
            return Ok(());
        }
        self.put(NEW)
    }

    /// Puts the stock server into its place.
    pub(super) fn put_stock(&self) -> Result<(), TakeOverError> {
        // What is beside a place that is not diverted is not the stock server's.
        if self.has_stock() || !self.is_diverted()? {
            return Ok(());
        }
        self.must_be_aside()?;
        self.copy(&self.stock, &self.beside(NEW))?;
        self.put(NEW)
    }

    fn put(&self, ending: &str) -> Result<(), TakeOverError> {
        self.must_be_aside()?;
        let put = fs::rename(self.beside(ending), &self.binary).and_then(|()| self.sync_folder());
        put.map_err(|error| step(self.binary.display().to_string(), error))
    }

    /// What is at the path may be the stock server, of which the last copy must not be written over.
    pub(super) fn must_be_aside(&self) -> Result<(), TakeOverError> {
        match self.stock.exists() {
            true => Ok(()),
            false => Err(TakeOverError::Lost(self.stock.clone())),
        }
    }

    /// Puts back what [`Place::keep_old`] has kept, if there is such.
    pub(super) fn put_old_back(&self) -> Result<(), TakeOverError> {
        match self.beside(OLD).exists() {
            true => self.put(OLD),
            false => Ok(()),
        }
    }

    /// Writes down, beside the place and on the disk, which units an exchange stops, so that one that is repeated after it was cut off, or
    /// failed, starts them though it finds none.
    pub(super) fn remember(&self, units: &[&str]) -> Result<(), TakeOverError> {
        let known = self.remembered();
        let knows = |unit: &&str| known.iter().any(|was| was == unit);
        if self.is_cut_off() && units.iter().all(knows) {
            return Ok(());
        }
        let (new, ran) = (self.beside(RAN_NEW), self.beside(RAN));
        let write = || -> io::Result<()> {
            let mut to = File::create(&new)?;
            to.write_all((units.join("\n") + "\n").as_bytes())?;
            to.sync_all()?;
            fs::rename(&new, &ran)?;
            self.sync_folder()
        };
        write().map_err(|error| {
            let _left = fs::remove_file(&new);
            step(format!("{}: what runs", ran.display()), error)
        })
    }

    /// An exchange began, and did not come to its end.
    pub(super) fn is_cut_off(&self) -> bool {
        self.beside(RAN).exists()
    }

    /// What it had written down.
    pub(super) fn remembered(&self) -> Vec<String> {
        let text = fs::read_to_string(self.beside(RAN)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// The exchange is over: what was written down, and what was in the place before, are not needed any more.
    pub(super) fn forget(&self) {
        for ending in [PART, NEW, OLD, RAN_NEW, RAN] {
            // A rest is in no one's way, and goes with the next exchange.
            let _left = fs::remove_file(self.beside(ending));
        }
    }

    /// The copy is not needed: nothing was begun.
    pub(super) fn forget_copy(&self) {
        let _left = fs::remove_file(self.beside(NEW));
    }

    fn sync_folder(&self) -> io::Result<()> {
        File::open(self.binary.parent().unwrap_or(Path::new("/")))?.sync_all()
    }

    fn shown(&self) -> (String, String) {
        let (binary, stock) = (self.binary.display(), self.stock.display());
        (binary.to_string(), stock.to_string())
    }

    /// A name beside the place, in the same folder.
    fn beside(&self, ending: &str) -> PathBuf {
        with_ending(&self.binary, ending)
    }
}

/// Where dpkg has a package's file.
fn now_at(binary: &Path) -> Result<PathBuf, TakeOverError> {
    let shown = binary.display().to_string();
    let now = must("dpkg-divert", &["--truename", &shown])?;
    Ok(PathBuf::from(now.trim()))
}

/// Changes dpkg's list and has it on the disk: dpkg does not sync the folder in which it renames the new list, and what follows that list is on
/// another file system where `/var` is one.
fn divert(change: &[&str]) -> Result<(), TakeOverError> {
    let args = [["--local", "--no-rename"].as_slice(), change].concat();
    must("dpkg-divert", &args)?;
    let synced = File::open(DPKG).and_then(|folder| folder.sync_all());
    synced.map_err(|error| step(DPKG, error))
}

/// Where the stock binary goes.
pub(super) fn stock_of(binary: &Path) -> PathBuf {
    with_ending(binary, ".stock")
}

fn with_ending(binary: &Path, ending: &str) -> PathBuf {
    let mut name = binary.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Where dpkg has its lists.
const DPKG: &str = "/var/lib/dpkg";
const NEW: &str = ".nbdtrack-new";
const OLD: &str = ".nbdtrack-old";
const PART: &str = ".nbdtrack-part";
const RAN: &str = ".nbdtrack-ran";
const RAN_NEW: &str = ".nbdtrack-ran-new";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_units_do_not_start_while_the_stock_binary_stands_aside() {
        let units = [
            include_str!("../../../systemd/nbdtrack.service"),
            include_str!("../../../systemd/nbdtrack.socket"),
        ];
        for binary in PLACES {
            let aside = stock_of(Path::new(binary));
            let line = format!("\nConditionPathExists=!{}\n", aside.display());
            assert!(units.iter().all(|unit| unit.contains(&line)), "{line}");
        }
    }
}
