//! What fstab(5), crypttab(5) and the kernel's command line call a device by. PURE.

use std::path::{Path, PathBuf};

/// One device that the machine's own configuration names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spec {
    /// A path below `/dev`.
    Path(PathBuf),
    /// What stands on the disk: the property by which blkid(8) tells it, and its value.
    Content {
        property: &'static str,
        value: String,
        /// Where udev links what has it.
        link: PathBuf,
    },
}

/// Tag, folder of udev's links, property of `blkid -o udev` (libblkid; systemd `60-persistent-storage.rules`).
const TAGS: [(&str, &str, &str); 4] = [
    ("UUID=", "by-uuid", "ID_FS_UUID_ENC"),
    ("LABEL=", "by-label", "ID_FS_LABEL_ENC"),
    ("PARTUUID=", "by-partuuid", "ID_PART_ENTRY_UUID"),
    ("PARTLABEL=", "by-partlabel", "ID_PART_ENTRY_NAME"),
];

impl Spec {
    /// `None` for what is no block device: `tmpfs`, `server:/export`, a file.
    pub fn parse(word: &str) -> Option<Spec> {
        for (tag, folder, property) in TAGS {
            let content = |value: String, link: PathBuf| Spec::Content {
                property,
                value,
                link,
            };
            if let Some(value) = word.strip_prefix(tag) {
                let value = unescaped(value.trim_matches('"'));
                let link = Path::new("/dev/disk").join(folder).join(encoded(&value));
                return Some(content(value, link));
            }
            let prefix = format!("/dev/disk/{folder}/");
            if let Some(name) = unescaped(word).strip_prefix(&prefix) {
                let link = Path::new(&prefix).join(name);
                return Some(content(decoded(name), link));
            }
        }
        let path = unescaped(word);
        path.starts_with("/dev/")
            .then(|| Spec::Path(PathBuf::from(path)))
    }
}

/// The devices of a table whose lines have theirs in the column `column`, from 0.
pub fn in_table(text: &str, column: usize) -> Vec<Spec> {
    text.lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .filter_map(|line| line.split_whitespace().nth(column))
        .filter_map(Spec::parse)
        .collect()
}

/// The devices of the kernel's command line.
pub fn in_command_line(text: &str) -> Vec<Spec> {
    text.split_whitespace()
        .filter_map(|word| {
            word.strip_prefix("root=")
                .or_else(|| word.strip_prefix("resume="))
        })
        .filter_map(Spec::parse)
        .collect()
}

/// fstab(5): blanks in a field are written `\040`, as three octal digits.
fn unescaped(text: &str) -> String {
    replaced(text, "\\", 8, 3)
}

/// udev writes what a file name cannot have as `\x20`.
pub fn decoded(text: &str) -> String {
    replaced(text, "\\x", 16, 2)
}

fn replaced(text: &str, mark: &str, radix: u32, digits: usize) -> String {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(mark) {
        out.extend_from_slice(before.as_bytes());
        let number = after.get(..digits);
        match number.and_then(|digits| u8::from_str_radix(digits, radix).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &after[digits..];
            }
            None => {
                out.extend_from_slice(mark.as_bytes());
                rest = after;
            }
        }
    }
    out.extend_from_slice(rest.as_bytes());
    String::from_utf8_lossy(&out).into_owned()
}

/// As udev encodes a value for a link (systemd `device-nodes.c`, `encode_devnode_name`).
fn encoded(value: &str) -> String {
    let mut out = String::new();
    for c in value.chars() {
        match c {
            c if c.is_ascii_alphanumeric() || "#+-.:=@_".contains(c) || !c.is_ascii() => {
                out.push(c)
            }
            c => out.push_str(&format!("\\x{:02x}", u32::from(c))),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(property: &'static str, value: &str, link: &str) -> Spec {
        Spec::Content {
            property,
            value: value.to_owned(),
            link: PathBuf::from(link),
        }
    }

    #[test]
    fn tables_name_devices_by_path_and_by_content() {
        let fstab = "# UUID=no /x\nUUID=\"a-b\" / ext4\n LABEL=my\\040disk /d xfs\n/dev/disk/by-label/my\\x20disk /e\n\
                     /dev/mapper/vg-lv none swap\ntmpfs /tmp tmpfs\nserver:/x /y nfs\n/swapfile none swap\n\n";
        let label = content(
            "ID_FS_LABEL_ENC",
            "my disk",
            "/dev/disk/by-label/my\\x20disk",
        );
        let expected = [
            content("ID_FS_UUID_ENC", "a-b", "/dev/disk/by-uuid/a-b"),
            label.clone(),
            label,
            Spec::Path(PathBuf::from("/dev/mapper/vg-lv")),
        ];
        assert_eq!(in_table(fstab, 0), expected);
        let crypttab = "data PARTUUID=1234-01 none luks\n";
        let part = content(
            "ID_PART_ENTRY_UUID",
            "1234-01",
            "/dev/disk/by-partuuid/1234-01",
        );
        assert_eq!(in_table(crypttab, 1), [part]);
        let words = in_command_line("quiet root=/dev/vda1 ro resume=UUID=c root2=/dev/x");
        let uuid = content("ID_FS_UUID_ENC", "c", "/dev/disk/by-uuid/c");
        assert_eq!(words, [Spec::Path(PathBuf::from("/dev/vda1")), uuid]);
    }

    #[test]
    fn escapes_at_the_end_and_broken_ones_stay_as_they_are() {
        for text in ["a\\", "a\\x", "a\\x2", "\\xzz", "é\\xé"] {
            assert_eq!(decoded(text), text);
        }
        assert_eq!(decoded("a\\x20b\\x2f"), "a b/");
    }
}
