//! A file that is to be made for an export, and the call that asks for one. PURE.

use std::time::Duration;

use super::facts::ExportName;
use crate::identity::Format;

/// What of a new file is there before anything was written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing: room is taken as it is written.
    #[default]
    Off,
    /// The tables of an image, with a place for each cluster; no room.
    Metadata,
    /// Room, taken from the file system without being written.
    Falloc,
    /// Room, written with zeroes.
    Full,
}

impl Preallocation {
    pub const ALL: [Preallocation; 4] = [
        Preallocation::Off,
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ];

    /// The word for it, which is QEMU's.
    pub fn name(self) -> &'static str {
        match self {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        }
    }

    /// The one of this name.
    pub fn parse(name: &str) -> Option<Preallocation> {
        Preallocation::ALL.into_iter().find(|p| p.name() == name)
    }
}

/// A file that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewImage {
    pub format: Format,
    /// Virtual size in bytes; `None` for that of the backing file.
    pub size: Option<u64>,
    /// Bytes; `None` for 64 KiB. Of QCOW2 only.
    pub cluster_bytes: Option<u32>,
    /// What it lies on, as its header is to name it, and the format of that. Of QCOW2 only.
    pub backing: Option<(String, Format)>,
    pub preallocation: Preallocation,
}

/// A file that is to be made and exported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateImage {
    pub name: ExportName,
    /// Absolute; `None` for the export's name in the first folder that files may be served from.
    pub path: Option<String>,
    pub new: NewImage,
    /// For the export to serve.
    pub wait: Duration,
}

impl CreateImage {
    /// Where the file is to be, with `root` as the first folder that files may be served from.
    ///
    /// # Errors
    /// Says what has to be said.
    pub fn place(&self, root: Option<&str>) -> Result<String, String> {
        if let Some(path) = &self.path {
            return Ok(path.clone());
        }
        let root = root.ok_or("option path: say one; file_roots in [server] has no folder")?;
        file_in(root, self.name.as_str(), self.new.format)
            .ok_or_else(|| "option path: say one; the export's name is no file's".to_owned())
    }
}

/// The path of a file of this name and format in `folder`; `None` for a name that no file should have.
pub fn file_in(folder: &str, name: &str, format: Format) -> Option<String> {
    let ending = match format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    };
    // 255 bytes are the longest name of a file (limits.h, NAME_MAX); what is made beside it has a longer one.
    let fits = name.len() <= 200 && !name.contains('/') && !name.starts_with('.');
    fits.then(|| format!("{}/{name}.{ending}", folder.trim_end_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exports_name_is_a_files_only_where_it_can_be_one() {
        let named = |name| file_in("/backups/", name, Format::Qcow2);
        assert_eq!(named("a-b").as_deref(), Some("/backups/a-b.qcow2"));
        for name in ["a/b", "..", ".hidden", &"x".repeat(201)] {
            assert_eq!(named(name), None, "{name}");
        }
    }
}
