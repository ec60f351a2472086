//! The header of a QCOW2 image and its extensions. PURE: bytes in, a [`Header`] or the reason for refusing the image out.
//!
//! Whatever is not understood, or is bigger than any image has it, is refused here, before anything is opened for writing and
//! before a number of the file sizes anything in memory. Layout: QEMU `docs/interop/qcow2.rst`, "Header" and "Header extensions";
//! upper bounds: QEMU `block/qcow2.h`, but for what is said to be ours.

use super::extensions::{Extensions, Fields};

/// At most so much of a file is read for its header, in bytes: the first cluster, if that is smaller.
pub const HEADER_BYTES_MAX: usize = 64 << 10;

pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";
const V2_BYTES: u64 = 72;
const V3_BYTES: u64 = 104;
/// `QCOW_MAX_L1_SIZE`, bytes.
pub(super) const L1_BYTES_MAX: u64 = 32 << 20;
/// `QCOW_MAX_REFTABLE_SIZE`, bytes.
pub(super) const REFTABLE_BYTES_MAX: u64 = 8 << 20;
/// `QCOW_MAX_SNAPSHOTS`.
const SNAPSHOTS_MAX: u32 = 65_536;
/// docs/interop/qcow2.rst: "Length of the backing file name in bytes. Must not be longer than 1023 bytes."
pub(super) const BACKING_NAME_BYTES_MAX: u32 = 1023;

const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const BITMAPS_VALID: u64 = 1 << 0;

/// Why an image is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "it does not begin as a QCOW2 image does; if its bytes are the disk, say format = \"raw\""
    )]
    NotQcow2,
    #[error("QCOW2 of version {0}: 2 and 3 are served")]
    Version(u32),
    #[error("its header is cut off")]
    CutOff,
    #[error("it is encrypted, which is not served")]
    Encrypted,
    #[error(
        "whoever wrote it last did not close it, and its reference counts may be wrong; see to it with: qemu-img check -r all"
    )]
    Dirty,
    #[error("it is marked corrupt; see to it with: qemu-img check")]
    Corrupt,
    #[error(
        "its data are in an external file: that is read, with read_only = true, and neither written nor checked here"
    )]
    DataFile,
    #[error("its data are in an external file, which it names not at all or not as a file's name")]
    DataFileName,
    #[error("it needs what is not understood here: {0}")]
    Unknown(String),
    #[error("compressed by method {0}: 0 (zlib) and 1 (zstd) are served")]
    Compression(u8),
    #[error("{what} is {found}, which no image has ({allowed})")]
    Absurd {
        what: &'static str,
        found: u64,
        allowed: &'static str,
    },
    #[error("{what} at byte {offset} lies outside of the file, which has {file_bytes} bytes")]
    Outside {
        what: &'static str,
        offset: u64,
        file_bytes: u64,
    },
    #[error(
        "{one} and {other} both lie at byte {offset}; see to it with: qemu-img check -r all, on a copy"
    )]
    Overlap {
        one: &'static str,
        other: &'static str,
        offset: u64,
    },
    #[error(
        "two of its clusters both lie at byte {offset}, and its tables say so of neither: a write to one would change the other; see to it with: qemu-img check -r all, on a copy"
    )]
    Doubled { offset: u64 },
    #[error(
        "its file was cut off: clusters that its tables name lie behind the end; what there is can be read with read_only = true"
    )]
    CutShort,
    #[error(
        "its tables have {0} bytes, more than are looked through before it is written; it is read with read_only = true"
    )]
    Unsearched(u64),
    #[error(
        "its file is far longer than what its reference counts are of; see to it with: qemu-img check -r all, on a copy; it is read with read_only = true"
    )]
    Uncounted,
    #[error("its file has {0} clusters, more than are checked")]
    TooLong(u64),
    #[error(
        "its tables have more than {0} bytes, as often as its snapshots refer to them, and are not checked"
    )]
    TooManyTables(u64),
    #[error("its backing file has no name that can be followed")]
    BackingName,
}

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    Zlib,
    Zstd,
}

/// The file beneath an image, as its header names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingName {
    /// As it stands there: absolute, beside the image, or anything else.
    pub name: String,
    /// Its format; `None` where the header leaves that to a guess.
    pub format: Option<String>,
}

/// What the header says, within its bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub version: u32,
    /// Virtual size in bytes: a multiple of 512, and not 0.
    pub size: u64,
    /// 9 to 21.
    pub cluster_bits: u32,
    /// Byte of the active L1 table, and the entries of it that the size needs, at most 4 Mi.
    pub l1_offset: u64,
    pub l1_entries: u64,
    pub reftable_offset: u64,
    /// Bytes; at most 8 MiB.
    pub reftable_bytes: u64,
    /// 0 to 6: a reference count has `1 << order` bits.
    pub refcount_order: u32,
    pub extended_l2: bool,
    pub compression: Compression,
    pub backing: Option<BackingName>,
    /// The file that the guest's clusters are in instead of this one, as it stands in the header. Never compressed ones.
    pub data_file: Option<String>,
    pub snapshots: u32,
    /// Persistent bitmaps that are in step with the data; a write would make them lie.
    pub bitmaps: bool,
    /// Where the directory of bitmaps is to lie: its first byte, and its length.
    pub bitmap_directory: Option<(u64, u64)>,
    /// Autoclear bits that are set: who writes has to clear those that it does not know.
    pub autoclear: u64,
    /// Whoever wrote it last did not close it.
    pub dirty: bool,
    /// Someone found it damaged.
    pub corrupt: bool,
}

impl Header {
    /// Reads a header from the first bytes of a file (all of it, or [`HEADER_BYTES_MAX`]) that has `file_bytes` bytes.
    ///
    /// # Errors
    /// The first reason for not serving the image.
    pub fn read(bytes: &[u8], file_bytes: u64) -> Result<Header, Refusal> {
        let header = Header::describe(bytes, file_bytes)?;
        if header.corrupt {
            return Err(Refusal::Corrupt);
        }
        if header.dirty {
            return Err(Refusal::Dirty);
        }
        Ok(header)
    }

    /// As [`Header::read`], of an image that may be marked dirty or corrupt: for those who look and do not serve.
    ///
    /// # Errors
    /// The first reason for not reading the image.
    pub fn describe(bytes: &[u8], file_bytes: u64) -> Result<Header, Refusal> {
        if bytes.get(..4) != Some(&MAGIC) {
            return Err(Refusal::NotQcow2);
        }
        let at = Fields(bytes);
        let version = at.u32(4)?;
        let header_bytes = match version {
            2 => V2_BYTES,
            3 => u64::from(at.u32(100)?),
            other => return Err(Refusal::Version(other)),
        };
        let cluster_bits = within("cluster_bits", at.u32(20)?, 9, 21, "9 to 21")?;
        let cluster = 1_u64 << cluster_bits;
        if version == 3
            && (header_bytes < V3_BYTES || header_bytes > cluster || header_bytes % 8 != 0)
        {
            return Err(absurd(
                "the header's length",
                header_bytes,
                "104 to a cluster",
            ));
        }
        // What lies behind the first cluster is no part of the header.
        let first = usize::try_from(cluster).map_or(bytes.len(), |n| bytes.len().min(n));
        let at = Fields(&bytes[..first]);
        let v3 = |offset| if version == 3 { at.u64(offset) } else { Ok(0) };
        let (incompatible, autoclear) = (v3(72)?, v3(88)?);
        let extensions = Extensions::read(&at, header_bytes)?;
        refuse_features(incompatible, &extensions)?;
        if at.u32(32)? != 0 || extensions.crypto {
            return Err(Refusal::Encrypted);
        }
        let compression = match incompatible & COMPRESSION_TYPE {
            0 => Compression::Zlib,
            _ if header_bytes <= V3_BYTES => return Err(Refusal::CutOff),
            _ => match at.byte(104)? {
                0 => Compression::Zlib,
                1 => Compression::Zstd,
                other => return Err(Refusal::Compression(other)),
            },
        };
        let refcount_order = match version {
            3 => within("refcount_order", at.u32(96)?, 0, 6, "0 to 6")?,
            _ => 4,
        };
        let extended_l2 = incompatible & EXTENDED_L2 != 0;
        if extended_l2 && cluster_bits < 14 {
            // `QCOW_EXTL2_SUBCLUSTERS_PER_CLUSTER`: 32 subclusters of at least 512 bytes.
            return Err(absurd(
                "cluster_bits",
                cluster_bits.into(),
                "14 to 21 with subclusters",
            ));
        }
        let size = at.u64(24)?;
        if size == 0 || size % 512 != 0 || i64::try_from(size).is_err() {
            return Err(absurd(
                "the virtual size",
                size,
                "a multiple of 512 bytes below 2^63",
            ));
        }
        let (l1_offset, l1_entries) = l1(&at, size, cluster_bits, extended_l2, file_bytes)?;
        let reftable_offset = at.u64(48)?;
        let reftable_bytes = u64::from(at.u32(56)?) << cluster_bits;
        if reftable_bytes == 0 || reftable_bytes > REFTABLE_BYTES_MAX {
            return Err(absurd(
                "the refcount table's length",
                reftable_bytes,
                "a cluster to 8 MiB",
            ));
        }
        inside(
            "the refcount table",
            reftable_offset,
            reftable_bytes,
            cluster,
            file_bytes,
        )?;
        let snapshots = within(
            "nb_snapshots",
            at.u32(60)?,
            0,
            SNAPSHOTS_MAX,
            "at most 65536",
        )?;
        Ok(Header {
            version,
            size,
            cluster_bits,
            l1_offset,
            l1_entries,
            reftable_offset,
            reftable_bytes,
            refcount_order,
            extended_l2,
            compression,
            backing: backing(&at, extensions.backing_format)?,
            data_file: extensions.data_file,
            snapshots,
            bitmaps: extensions.bitmaps.is_some() && autoclear & BITMAPS_VALID != 0,
            bitmap_directory: extensions.bitmaps,
            autoclear,
            dirty: incompatible & DIRTY != 0,
            corrupt: incompatible & CORRUPT != 0,
        })
    }

    /// Bytes.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Base 2 logarithm of the entries of an L2 table.
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }

    /// Base 2 logarithm of the bytes that are allocated or not as one: a subcluster, or a cluster.
    pub fn unit_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 5 } else { 0 }
    }
}

/// The virtual size in bytes, of the first 32 bytes of a file or more.
///
/// # Errors
/// It is no QCOW2 image.
pub fn virtual_size(bytes: &[u8]) -> Result<u64, Refusal> {
    if bytes.get(..4) != Some(&MAGIC) {
        return Err(Refusal::NotQcow2);
    }
    Fields(bytes).u64(24)
}

fn l1(
    at: &Fields<'_>,
    size: u64,
    cluster_bits: u32,
    extended_l2: bool,
    file_bytes: u64,
) -> Result<(u64, u64), Refusal> {
    let l2_bits = cluster_bits - if extended_l2 { 4 } else { 3 };
    let needed = size.div_ceil(1 << (cluster_bits + l2_bits));
    let found = u64::from(at.u32(36)?);
    if found * 8 > L1_BYTES_MAX || found < needed {
        return Err(absurd(
            "the L1 table's length",
            found,
            "as many entries as the size needs, at most 4194304",
        ));
    }
    let offset = at.u64(40)?;
    inside(
        "the L1 table",
        offset,
        found * 8,
        1 << cluster_bits,
        file_bytes,
    )?;
    Ok((offset, needed))
}

fn refuse_features(incompatible: u64, extensions: &Extensions) -> Result<(), Refusal> {
    // What it needs comes first: the other bits may mean something else then.
    let known = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;
    let unknown = incompatible & !known;
    if unknown != 0 {
        let names: Vec<String> = (0..64)
            .filter(|bit| unknown & (1 << bit) != 0)
            .map(|bit| {
                extensions
                    .name(bit)
                    .unwrap_or_else(|| format!("incompatible feature {bit}"))
            })
            .collect();
        return Err(Refusal::Unknown(names.join(", ")));
    }
    // docs/interop/qcow2.rst: the name belongs to the bit. QEMU takes another name from its command line; here there is none.
    let named = extensions.data_file.as_deref().unwrap_or_default();
    match incompatible & DATA_FILE != 0 {
        true if named.is_empty() => Err(Refusal::DataFileName),
        false if extensions.data_file.is_some() => Err(Refusal::DataFileName),
        _ => Ok(()),
    }
}

fn backing(at: &Fields<'_>, format: Option<String>) -> Result<Option<BackingName>, Refusal> {
    let (offset, len) = (at.u64(8)?, at.u32(16)?);
    if offset == 0 {
        return Ok(None);
    }
    if len == 0 || len > BACKING_NAME_BYTES_MAX {
        return Err(Refusal::BackingName);
    }
    let bytes = at
        .bytes(offset, len.into())
        .map_err(|_| Refusal::BackingName)?;
    let name = std::str::from_utf8(bytes).map_err(|_| Refusal::BackingName)?;
    if name.chars().any(char::is_control) {
        return Err(Refusal::BackingName);
    }
    Ok(Some(BackingName {
        name: name.to_owned(),
        format,
    }))
}

fn within(
    what: &'static str,
    found: u32,
    min: u32,
    max: u32,
    allowed: &'static str,
) -> Result<u32, Refusal> {
    if (min..=max).contains(&found) {
        return Ok(found);
    }
    Err(absurd(what, found.into(), allowed))
}

fn absurd(what: &'static str, found: u64, allowed: &'static str) -> Refusal {
    Refusal::Absurd {
        what,
        found,
        allowed,
    }
}

/// A structure that begins at a cluster and lies inside of the file, behind the header.
fn inside(
    what: &'static str,
    offset: u64,
    len: u64,
    cluster: u64,
    file_bytes: u64,
) -> Result<(), Refusal> {
    let end = offset.checked_add(len);
    if offset >= cluster
        && offset.is_multiple_of(cluster)
        && end.is_some_and(|end| end <= file_bytes)
    {
        return Ok(());
    }
    Err(Refusal::Outside {
        what,
        offset,
        file_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE_BYTES: u64 = 1 << 30;

    /// A header of version 3 with clusters of 64 KiB and 1 GiB of virtual size.
    fn header() -> Vec<u8> {
        let mut bytes = vec![0; 65536];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(4, &3_u32.to_be_bytes());
        put(20, &16_u32.to_be_bytes());
        put(24, &(1_u64 << 30).to_be_bytes());
        put(36, &2_u32.to_be_bytes());
        put(40, &0x30000_u64.to_be_bytes());
        put(48, &0x10000_u64.to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        put(96, &4_u32.to_be_bytes());
        put(100, &112_u32.to_be_bytes());
        bytes
    }

    fn with(changes: &[(usize, &[u8])]) -> Result<Header, Refusal> {
        let mut bytes = header();
        for (at, field) in changes {
            bytes[*at..*at + field.len()].copy_from_slice(field);
        }
        Header::read(&bytes, FILE_BYTES)
    }

    #[test]
    fn whole_header_is_read() {
        let read = with(&[]).unwrap();
        assert_eq!(
            (read.size, read.l1_entries, read.reftable_bytes),
            (1 << 30, 2, 65536)
        );
        assert_eq!(read.compression, Compression::Zlib);
        assert_eq!(read.backing, None);
        let mut named = vec![0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 3];
        named.extend(b"raw\0\0\0\0\0");
        let backing = with(&[
            (8, &200_u64.to_be_bytes()),
            (16, &4_u32.to_be_bytes()),
            (112, &named),
            (200, b"base"),
        ]);
        let backing = backing.unwrap().backing.unwrap();
        assert_eq!(
            (backing.name.as_str(), backing.format.as_deref()),
            ("base", Some("raw"))
        );
    }

    #[test]
    fn what_no_image_has_is_refused_by_name() {
        let rows: &[(usize, &[u8], &str)] = &[
            (0, b"QFIX", "does not begin"),
            (7, &[1], "version 1"),
            (20, &[0, 0, 0, 8], "cluster_bits is 8"),
            (20, &[0, 0, 0, 22], "cluster_bits is 22"),
            (20, &[0xff; 4], "cluster_bits is 4294967295"),
            (24, &[0; 8], "the virtual size is 0"),
            (24, &[0xff; 8], "the virtual size"),
            (31, &[1], "the virtual size"),
            (
                24,
                &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe, 0],
                "the L1 table's length is 2",
            ),
            (35, &[1], "encrypted"),
            (36, &[0, 0, 0, 1], "the L1 table's length is 1"),
            (36, &[0, 0x40, 0, 1], "the L1 table's length is 4194305"),
            (40, &[0; 8], "the L1 table at byte 0"),
            (47, &[1], "the L1 table at byte 196609"),
            (40, &[0xff; 6], "lies outside"),
            (48, &[0; 8], "the refcount table at byte 0"),
            (56, &[0; 4], "the refcount table's length is 0"),
            (56, &[0, 0, 1, 0], "the refcount table's length is 16777216"),
            (60, &[0, 1, 0, 1], "nb_snapshots is 65537"),
            (79, &[1], "qemu-img check -r all"),
            (79, &[2], "marked corrupt"),
            (79, &[4], "external file"),
            (
                79,
                &[
                    8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 112, 2,
                ],
                "compressed by method 2",
            ),
            (72, &[0x80], "incompatible feature 63"),
            (96, &[0, 0, 0, 7], "refcount_order is 7"),
            (100, &[0, 0, 0, 96], "the header's length is 96"),
            (100, &[0, 0, 0, 107], "the header's length is 107"),
            (100, &[0xff; 4], "the header's length"),
            (112, &[1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff], "cut off"),
            (112, &[0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 0], "encrypted"),
            (112, &[0x44, 0x41, 0x54, 0x41, 0, 0, 0, 0], "external file"),
        ];
        for (at, field, word) in rows {
            let told = with(&[(*at, field)]).unwrap_err().to_string();
            assert!(told.contains(word), "{at}: {told}");
        }
        for (offset, len) in [(200_u64, 0_u32), (200, 1024), (u64::MAX, 4), (65_534, 4)] {
            let told = with(&[(8, &offset.to_be_bytes()), (16, &len.to_be_bytes())]);
            assert_eq!(told.unwrap_err(), Refusal::BackingName, "{offset}+{len}");
        }
        let whole = header();
        for len in 0..113 {
            assert!(
                Header::read(&whole[..len], FILE_BYTES).is_err() || len >= 104,
                "{len}"
            );
        }
        assert!(
            Header::read(&whole, 0x30000)
                .unwrap_err()
                .to_string()
                .contains("L1 table")
        );
    }

    #[test]
    fn unknown_features_are_told_by_the_names_that_the_image_gives_them() {
        let mut table = vec![0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 48, 0, 40];
        table.extend(b"time travel\n");
        table.resize(8 + 48, 0);
        let told = with(&[(72, &[0, 0, 1]), (112, &table)])
            .unwrap_err()
            .to_string();
        assert!(told.contains("time travel\\n"), "{told}");
    }
}
