//! The kernel's table of mounts, proc_pid_mountinfo(5). PURE.

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount<'a> {
    /// `major:minor` of its file system; some give their files other numbers.
    pub number: &'a str,
    /// The mount point.
    pub point: String,
    /// The type of its file system.
    pub kind: &'a str,
    /// What the file system says that it is mounted from: a node, a server's folder, or any word.
    pub source: &'a str,
}

/// The mounts of a table, in its order: the last of several on one point is the one that is seen. A line that is none is passed over.
pub fn mounts(table: &str) -> impl Iterator<Item = Mount<'_>> {
    table.lines().filter_map(mount)
}

fn mount(line: &str) -> Option<Mount<'_>> {
    // Between the two parts stands a number of fields that may grow.
    let (first, second) = line.split_once(" - ")?;
    let mut fields = first.split(' ');
    let (number, point) = (fields.nth(2)?, fields.nth(1)?);
    let mut fields = second.split(' ');
    let (kind, source) = (fields.next()?, fields.next()?);
    Some(Mount {
        number,
        point: plain(point),
        kind,
        source,
    })
}

/// Without the octal numbers that blanks and backslashes are told by.
fn plain(point: &str) -> String {
    // The backslash last: what it makes is no beginning of another.
    let signs = [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ];
    signs.iter().fold(point.to_owned(), |point, (octal, sign)| {
        point.replace(octal, sign)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_taken_apart_whatever_optional_fields_it_has() {
        let table = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n\
                     nothing\n\
                     37 36 0:41 / /far/old\\040ones\\134040 rw - nfs4 far:/o rw\n";
        let found: Vec<Mount<'_>> = mounts(table).collect();
        let mount = |number, point: &str, kind, source| Mount {
            number,
            point: point.to_owned(),
            kind,
            source,
        };
        let expected = [
            mount("98:0", "/mnt2", "ext3", "/dev/root"),
            mount("0:41", "/far/old ones\\040", "nfs4", "far:/o"),
        ];
        assert_eq!(found, expected);
    }
}
