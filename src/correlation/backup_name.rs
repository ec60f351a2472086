//! Names of backups' exports: `backup-CONTEXT-diskN-full-20261125T040000`. PURE.
//!
//! A name is at most 63 characters of letters, digits, `.`, `_`, `-` and `~`, whatever the context is. A context that fits stands in it as
//! it is. Of any other its beginning stands there, as far as it can be shown, then `~` and a digest of the whole: `~` is in no context
//! that stands as it is, so no two contexts have one name.

use std::fmt;

use sha2::{Digest, Sha256};

use super::facts::ExportName;
use super::vm::DISK_UNIT_MAX;

/// The longest name: under 64 characters.
pub const BACKUP_NAME_BYTES_MAX: usize = 63;
/// The longest context that is taken, in bytes.
pub const CONTEXT_BYTES_MAX: usize = 4_096;
/// 9999-12-31T23:59:59, the last second with a year of four digits.
pub const AT_SECONDS_MAX: u64 = 253_402_300_799;

/// Characters of the digest, of five bits each: who could choose contexts would have to try 2^40 of them for two of one digest.
const DIGEST_CHARS: usize = 16;
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
const PREFIX: &str = "backup-";
const UNIT: &str = "-disk";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum BackupKind {
    Full,
    Incremental,
}

impl BackupKind {
    pub fn name(self) -> &'static str {
        match self {
            BackupKind::Full => "full",
            BackupKind::Incremental => "incr",
        }
    }
}

/// What a backup is of, as far as its name says.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum BackupContext {
    Whole(String),
    /// The beginning, made readable, and the digest of the whole.
    Cut {
        beginning: String,
        digest: String,
    },
}

/// The parts of a backup's name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct BackupName {
    pub context: BackupContext,
    pub disk: u32,
    pub kind: BackupKind,
    /// Seconds since 1970, UTC; at most [`AT_SECONDS_MAX`].
    pub at: u64,
}

/// Why there is no such name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackupNameError {
    #[error("context: cannot be empty")]
    Empty,
    #[error("context: at most {CONTEXT_BYTES_MAX} bytes, this has {0}")]
    TooLong(usize),
    #[error("disk: at most {DISK_UNIT_MAX}, this is {0}")]
    Disk(u32),
    #[error("at: the year has more than four digits")]
    At,
    #[error(
        "not a backup's name: expected backup-CONTEXT-diskN-full-YYYYMMDDTHHMMSS, or incr for full"
    )]
    Form,
}

impl BackupName {
    /// Names the backup of one disk that is made at `at`, in seconds since 1970.
    ///
    /// # Errors
    /// Names the argument that cannot be.
    pub fn new(
        context: &str,
        disk: u32,
        kind: BackupKind,
        at: u64,
    ) -> Result<BackupName, BackupNameError> {
        if context.is_empty() {
            return Err(BackupNameError::Empty);
        }
        if context.len() > CONTEXT_BYTES_MAX {
            return Err(BackupNameError::TooLong(context.len()));
        }
        if disk > DISK_UNIT_MAX {
            return Err(BackupNameError::Disk(disk));
        }
        if at > AT_SECONDS_MAX {
            return Err(BackupNameError::At);
        }
        let room = room(disk);
        let context = if context.len() <= room && context.chars().all(is_plain) {
            BackupContext::Whole(context.to_owned())
        } else {
            let shown = context.chars().map(|c| if is_plain(c) { c } else { '_' });
            BackupContext::Cut {
                beginning: shown.take(room - 1 - DIGEST_CHARS).collect(),
                digest: digest(context),
            }
        };
        Ok(BackupName {
            context,
            disk,
            kind,
            at,
        })
    }

    /// Takes a name apart; only what [`BackupName::new`] can have made is one.
    ///
    /// # Errors
    /// [`BackupNameError::Form`]
    pub fn parse(name: &str) -> Result<BackupName, BackupNameError> {
        let parsed = parse(name).ok_or(BackupNameError::Form)?;
        // One spelling: no leading zeros, no other case, nothing that is too long.
        if parsed.to_string() == name && name.len() <= BACKUP_NAME_BYTES_MAX {
            Ok(parsed)
        } else {
            Err(BackupNameError::Form)
        }
    }

    pub fn export(&self) -> ExportName {
        ExportName::parse(&self.to_string()).expect("at most 63 plain characters, and some")
    }
}

impl fmt::Display for BackupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        match &self.context {
            BackupContext::Whole(context) => f.write_str(context)?,
            BackupContext::Cut { beginning, digest } => write!(f, "{beginning}~{digest}")?,
        }
        let (year, month, day) = date(self.at / 86_400);
        let (hour, minute, second) = (self.at / 3_600 % 24, self.at / 60 % 60, self.at % 60);
        write!(
            f,
            "{UNIT}{}-{}-{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}",
            self.disk,
            self.kind.name()
        )
    }
}

/// Characters that the context of this disk may have.
fn room(disk: u32) -> usize {
    let digits = disk.checked_ilog10().map_or(1, |log| log as usize + 1);
    BACKUP_NAME_BYTES_MAX - PREFIX.len() - UNIT.len() - digits - "-full-20261125T040000".len()
}

fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

fn digest(context: &str) -> String {
    let digest = Sha256::digest(context.as_bytes());
    let mut bits = digest
        .iter()
        .fold((0_u32, 0_u128), |(count, bits), byte| {
            if count < 16 {
                (count + 1, bits << 8 | u128::from(*byte))
            } else {
                (count, bits)
            }
        })
        .1;
    (0..DIGEST_CHARS)
        .map(|_| {
            // The upper five bits, one after the other.
            let at = usize::try_from(bits >> 123).unwrap_or(0);
            bits <<= 5;
            char::from(ALPHABET[at])
        })
        .collect()
}

fn parse(name: &str) -> Option<BackupName> {
    let mut parts = name.strip_prefix(PREFIX)?.rsplitn(3, '-');
    let (at, kind, rest) = (parts.next()?, parts.next()?, parts.next()?);
    let (context, disk) = rest.rsplit_once(UNIT)?;
    let kind = [BackupKind::Full, BackupKind::Incremental]
        .into_iter()
        .find(|known| known.name() == kind)?;
    let disk = disk.parse().ok().filter(|disk| *disk <= DISK_UNIT_MAX)?;
    let context = match context.split_once('~') {
        None if !context.is_empty()
            && context.len() <= room(disk)
            && context.chars().all(is_plain) =>
        {
            BackupContext::Whole(context.to_owned())
        }
        Some((beginning, digest))
            if digest.len() == DIGEST_CHARS
                && digest.bytes().all(|byte| ALPHABET.contains(&byte))
                && beginning.chars().all(is_plain) =>
        {
            BackupContext::Cut {
                beginning: beginning.to_owned(),
                digest: digest.to_owned(),
            }
        }
        _ => return None,
    };
    Some(BackupName {
        context,
        disk,
        kind,
        at: seconds(at)?,
    })
}

/// `YYYYMMDDTHHMMSS` in seconds since 1970.
fn seconds(text: &str) -> Option<u64> {
    let (date_text, time) = text.split_once('T')?;
    let digits = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|byte| byte.is_ascii_digit())
    };
    if !digits(date_text, 8) || !digits(time, 6) {
        return None;
    }
    let number = |text: &str| text.parse::<u64>().ok();
    let (year, month, day) = (
        number(&date_text[..4])?,
        number(&date_text[4..6])?,
        number(&date_text[6..])?,
    );
    let (hour, minute, second) = (
        number(&time[..2])?,
        number(&time[2..4])?,
        number(&time[4..])?,
    );
    let valid = year >= 1970
        && (1..=12).contains(&month)
        && (1..=days_of(year, month)).contains(&day)
        && hour < 24
        && minute < 60
        && second < 60;
    if !valid {
        return None;
    }
    let days = days_before_year(year) - days_before_year(1970)
        + (1..month).map(|month| days_of(year, month)).sum::<u64>()
        + (day - 1);
    Some(days * 86_400 + hour * 3_600 + minute * 60 + second)
}

/// Year, month and day of a number of days since 1970.
fn date(days: u64) -> (u64, u64, u64) {
    let mut year = 1970 + days / 366;
    while days_before_year(year + 1) - days_before_year(1970) <= days {
        year += 1;
    }
    let mut left = days - (days_before_year(year) - days_before_year(1970));
    let mut month = 1;
    while left >= days_of(year, month) {
        left -= days_of(year, month);
        month += 1;
    }
    (year, month, left + 1)
}

/// Days of the Gregorian calendar before the first of January of this year, counted from year 1.
fn days_before_year(year: u64) -> u64 {
    let before = year.saturating_sub(1);
    before * 365 + before / 4 - before / 100 + before / 400
}

fn days_of(year: u64, month: u64) -> u64 {
    match month {
        2 if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => {
            29
        }
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 2026-11-25T04:00:00
    const AT: u64 = 1_795_579_200;

    fn name(context: &str) -> BackupName {
        BackupName::new(context, 0, BackupKind::Full, AT).unwrap()
    }

    #[test]
    fn a_context_that_fits_is_read_back_as_it_was() {
        let backup = BackupName::new("web-1.prod", 12, BackupKind::Incremental, AT).unwrap();
        let text = "backup-web-1.prod-disk12-incr-20261125T040000";
        assert_eq!(backup.to_string(), text);
        assert_eq!(BackupName::parse(text), Ok(backup));
    }

    #[test]
    fn a_uuid_is_cut_and_two_of_one_beginning_differ() {
        let one = name("4205784a-098a-40f1-1f1e-a5cd2597fd59").to_string();
        let two = name("4205784a-098a-40f1-1f1e-a5cd2597fd5a").to_string();
        assert!(
            one.starts_with("backup-4205784a-098~") && one.len() == 63,
            "{one}"
        );
        assert_ne!(one, two);
        // The digest of one release is that of the next: names are kept for years.
        assert_eq!(
            name("ä").to_string(),
            "backup-_~gptnop7oqkiezdl2-disk0-full-20261125T040000"
        );
    }

    #[test]
    fn what_looks_like_the_end_of_a_name_is_context() {
        for context in ["a-disk1", "-disk0-full-20", "a-disk", "-", "full", "a-incr"] {
            let backup = name(context);
            assert_eq!(
                BackupName::parse(&backup.to_string()),
                Ok(backup),
                "{context}"
            );
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in [
            "backup--disk0-full-20261125T040000",
            "backup-a-disk00-full-20261125T040000",
            "backup-a-disk0-FULL-20261125T040000",
            "backup-a-disk0-full-20260229T040000",
            "backup-a-disk0-full-20261125T240000",
            "backup-a-disk0-full-19691125T040000",
            "backup-a~b-disk0-full-20261125T040000",
            "backup-a b-disk0-full-20261125T040000",
            "backup-a-disk65536-full-20261125T040000",
            "backup-a-full-20261125T040000",
            "migration-vm-a-disk0",
            "",
        ] {
            assert_eq!(
                BackupName::parse(text),
                Err(BackupNameError::Form),
                "{text}"
            );
        }
        assert!(BackupName::new("", 0, BackupKind::Full, AT).is_err());
        assert!(BackupName::new("a", 65_536, BackupKind::Full, AT).is_err());
        assert!(BackupName::new("a", 0, BackupKind::Full, AT_SECONDS_MAX + 1).is_err());
        assert!(BackupName::new(&"a".repeat(4_097), 0, BackupKind::Full, AT).is_err());
    }

    fn contexts() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-zA-Z0-9._-]{1,40}",
            // Close to what separates the parts, and to the border of what fits.
            "[a-]{0,3}(-disk[0-9]{1,2})?(-full|-incr)?(-[0-9]{8}T[0-9]{6})?~?[a-z2-7]{0,20}",
            ".{1,80}",
            "[\\x00-\\x1f/~$'\" ]{1,40}",
        ]
        .prop_filter("some", |context| !context.is_empty())
    }

    proptest! {
        #[test]
        fn every_context_has_a_name_that_is_short_plain_and_read_back(
            context in contexts(), disk in 0..=65_535_u32, at in 0..=AT_SECONDS_MAX, full: bool
        ) {
            let kind = if full { BackupKind::Full } else { BackupKind::Incremental };
            let backup = BackupName::new(&context, disk, kind, at).unwrap();
            let text = backup.to_string();
            prop_assert!(text.len() < 64, "{}", text);
            prop_assert!(text.chars().all(|c| is_plain(c) || c == '~'), "{}", text);
            prop_assert_eq!(BackupName::parse(&text), Ok(backup.clone()));
            if let BackupContext::Whole(whole) = &backup.context {
                prop_assert_eq!(whole, &context);
            }
        }

        #[test]
        fn two_contexts_never_have_one_name(
            one in contexts(), two in contexts(), disk in 0..=65_535_u32, other_disk in 0..=65_535_u32
        ) {
            let of = |context: &str, disk| BackupName::new(context, disk, BackupKind::Full, AT).unwrap().to_string();
            prop_assert_eq!(of(&one, disk) == of(&two, other_disk), one == two && disk == other_disk);
        }
    }
}
