//! The list of claims: what the daemon writes and the udev rule's question reads. PURE.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use crate::correlation::DiskSeq;
use crate::identity::Identity;

/// The file is ours, but a broken one must not make udev's worker read for ever: 10,000 exports have about 3 MB.
pub const LIST_BYTES_MAX: u64 = 64 << 20;

/// What is claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimList {
    /// The highest diskseq that was there when the daemon first started in this boot: later disks were attached after boot.
    pub boot_diskseq: DiskSeq,
    /// Claim every disk that was attached after boot.
    pub hotplugged: bool,
    /// Patterns of identities that are claimed.
    pub serials: Vec<String>,
    /// Patterns of identities that are never claimed.
    pub except: Vec<String>,
    /// The candidate identities of the exports' volumes, as `scheme:value`.
    pub identities: BTreeSet<String>,
}

impl Default for ClaimList {
    fn default() -> ClaimList {
        ClaimList {
            boot_diskseq: DiskSeq(0),
            hotplugged: false,
            serials: Vec::new(),
            except: Vec::new(),
            identities: BTreeSet::new(),
        }
    }
}

/// Why a disk is claimed; the word is what udev's database shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    Export,
    Serial,
    Hotplugged,
}

impl Why {
    pub fn name(self) -> &'static str {
        match self {
            Why::Export => "export",
            Why::Serial => "serial",
            Why::Hotplugged => "hotplugged",
        }
    }
}

impl ClaimList {
    /// The file's text, a fact a line.
    pub fn render(&self) -> String {
        let mut out =
            "# Written by nbdtrack; read by 'nbdtrack udev-claim', which udev's rules run.\n"
                .to_owned();
        let mut fact = |key: &str, value: &str| {
            // A value with a line end could say another fact. No identity has one; a pattern of the configuration might.
            if !value.contains(['\n', '\r']) {
                let _ = writeln!(out, "{key} {value}");
            }
        };
        fact("boot-diskseq", &self.boot_diskseq.0.to_string());
        fact("hotplugged", if self.hotplugged { "yes" } else { "no" });
        for pattern in &self.except {
            fact("except", pattern);
        }
        for pattern in &self.serials {
            fact("serial", pattern);
        }
        for identity in &self.identities {
            fact("identity", identity);
        }
        out
    }

    /// Reads [`Self::render`]'s text; unknown facts are those of another version and are passed over.
    ///
    /// # Errors
    /// Without a number of the boot's last disk nothing can be said.
    pub fn parse(text: &str) -> Result<ClaimList, String> {
        let mut list = ClaimList::default();
        let mut seq = None;
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((key, value)) = line.split_once(' ') else {
                continue;
            };
            match key {
                "boot-diskseq" => seq = value.parse().ok(),
                "hotplugged" => list.hotplugged = value == "yes",
                "except" => list.except.push(value.to_owned()),
                "serial" => list.serials.push(value.to_owned()),
                "identity" => {
                    list.identities.insert(value.to_owned());
                }
                _ => {}
            }
        }
        list.boot_diskseq = DiskSeq(seq.ok_or("the list has no line boot-diskseq")?);
        Ok(list)
    }

    /// Whether a disk is claimed; the reason why not is for people. `identities` is `Err` when the disk did not tell them:
    /// then no exception can be ruled out, and a list that has any leaves the disk alone.
    ///
    /// # Errors
    /// Why it is not claimed.
    pub fn judge(
        &self,
        diskseq: Option<DiskSeq>,
        identities: Result<&BTreeSet<Identity>, &str>,
    ) -> Result<Why, String> {
        let hotplugged =
            self.hotplugged && diskseq.is_some_and(|diskseq| diskseq > self.boot_diskseq);
        let identities = match identities {
            Ok(identities) => identities,
            Err(_) if hotplugged && self.except.is_empty() => return Ok(Why::Hotplugged),
            Err(reason) => return Err(format!("its identity was not read: {reason}")),
        };
        let any = |patterns: &[String]| {
            patterns
                .iter()
                .find(|pattern| identities.iter().any(|i| glob(pattern, &i.value)))
                .cloned()
        };
        if let Some(pattern) = any(&self.except) {
            return Err(format!("excepted by {pattern}"));
        }
        if identities
            .iter()
            .any(|identity| self.identities.contains(&identity.to_string()))
        {
            return Ok(Why::Export);
        }
        if any(&self.serials).is_some() {
            return Ok(Why::Serial);
        }
        if hotplugged {
            return Ok(Why::Hotplugged);
        }
        Err("nothing claims it".to_owned())
    }
}

/// Whether all of `text` matches a pattern in which `*` stands for any characters and `?` for one, whatever the case.
pub fn glob(pattern: &str, text: &str) -> bool {
    let fold = |s: &str| s.to_lowercase().chars().collect::<Vec<char>>();
    let (pattern, text) = (fold(pattern), fold(text));
    let (mut p, mut t) = (0, 0);
    // After the last star: where the pattern goes on, and up to where the star has eaten.
    let mut star = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                p += 1;
                star = Some((p, t));
            }
            Some(c) if *c == '?' || *c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => {
                let Some((after, eaten)) = star else {
                    return false;
                };
                p = after;
                t = eaten + 1;
                star = Some((after, t));
            }
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Scheme;
    use proptest::prelude::*;

    fn disk(serial: &str) -> BTreeSet<Identity> {
        BTreeSet::from([Identity::new(Scheme::VirtioSerial, serial)])
    }

    fn list() -> ClaimList {
        ClaimList {
            boot_diskseq: DiskSeq(9),
            hotplugged: false,
            serials: vec!["5f0c2a1e*".to_owned()],
            except: vec!["BACKUP-*".to_owned()],
            identities: BTreeSet::from(["virtio-serial:vol-1".to_owned()]),
        }
    }

    #[test]
    fn a_disk_is_claimed_by_its_export_its_serial_or_because_it_came_after_boot() {
        let all = ClaimList {
            hotplugged: true,
            ..list()
        };
        let nothing = Err("nothing claims it".to_owned());
        let excepted = Err("excepted by BACKUP-*".to_owned());
        let table = [
            (&list(), 9, "vol-1", Ok(Why::Export)),
            (&list(), 9, "5f0c2a1e7b1d4c559c39", Ok(Why::Serial)),
            (&list(), 10, "other", nothing.clone()),
            (&all, 10, "other", Ok(Why::Hotplugged)),
            // What was there at boot is the machine's own.
            (&all, 9, "other", nothing),
            (&all, 10, "backup-7", excepted.clone()),
            (&list(), 10, "BACKUP-vol-1", excepted),
        ];
        for (list, seq, serial, expected) in table {
            let said = list.judge(Some(DiskSeq(seq)), Ok(&disk(serial)));
            assert_eq!(said, expected, "{seq} {serial}");
        }
    }

    #[test]
    fn a_disk_that_does_not_tell_its_identity_may_be_an_exception() {
        let mut all = ClaimList {
            hotplugged: true,
            ..list()
        };
        let judge = |list: &ClaimList| list.judge(Some(DiskSeq(10)), Err("hung"));
        assert!(judge(&all).is_err());
        all.except.clear();
        assert_eq!(judge(&all), Ok(Why::Hotplugged));
        // A kernel without diskseq cannot say what came after boot.
        assert!(all.judge(None, Ok(&disk("other"))).is_err());
    }

    #[test]
    fn the_file_says_what_was_written_and_nothing_else() {
        let list = list();
        assert_eq!(ClaimList::parse(&list.render()), Ok(list));
        let sly = ClaimList {
            serials: vec!["x\nhotplugged yes".to_owned()],
            ..ClaimList::default()
        };
        let read = ClaimList::parse(&sly.render()).expect("a list");
        assert!(!read.hotplugged && read.serials.is_empty());
        for broken in ["", "hotplugged yes", "boot-diskseq x", "boot-diskseq -1"] {
            assert!(ClaimList::parse(broken).is_err(), "{broken:?}");
        }
    }

    #[test]
    fn patterns_match_the_whole_text() {
        for (pattern, text, expected) in [
            ("abc", "ABC", true),
            ("ab", "abc", false),
            ("ab*", "abc", true),
            ("*bc", "abc", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*a*b*", "xxaxxbxx", true),
            ("*a*b", "ab-a-b-", false),
            ("", "", true),
            ("*", "", true),
            ("?", "", false),
        ] {
            assert_eq!(glob(pattern, text), expected, "{pattern} {text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "(boot-diskseq |hotplugged |identity |[a-z0-9 #\n]){0,30}") {
            let _ = ClaimList::parse(&text);
        }

        #[test]
        fn no_pattern_takes_long(pattern in "[*?ab]{0,60}", text in "[ab]{0,200}") {
            let _ = glob(&pattern, &text);
        }
    }
}
