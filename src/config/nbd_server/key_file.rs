//! The text of an nbd-server configuration as GLib's GKeyFile reads it. PURE: text in, groups with places out.
//!
//! The rules are GLib's (glib/gkeyfile.c, measured with 2.74; `tests/key_file_glib.rs` compares every one with the
//! library where it is installed). Where GLib would stop, so does this; where GLib is lenient, this is.

use std::collections::BTreeMap;
use std::path::Path;

use crate::config::place::{Place, Problem};

/// A parsed file: its groups in the order in which they first appear, a group that is repeated being one.
#[derive(Debug, Default)]
pub(crate) struct KeyFile<'a> {
    pub groups: Vec<Group<'a>>,
}

#[derive(Debug)]
pub(crate) struct Group<'a> {
    pub name: &'a str,
    pub at: Place<'a>,
    /// Of a key that is repeated, the last counts.
    pub entries: BTreeMap<&'a str, Entry<'a>>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry<'a> {
    /// As it stands there: without the blanks before it, with those after it, its escapes not yet decoded.
    raw: &'a str,
    /// Where the key begins.
    pub at: Place<'a>,
}

impl<'a> KeyFile<'a> {
    /// # Errors
    /// The first line that GLib would refuse, with its place.
    pub fn parse(file: &'a Path, text: &'a str) -> Result<KeyFile<'a>, Problem> {
        let mut groups: Vec<Group<'a>> = Vec::new();
        let mut index: BTreeMap<&str, usize> = BTreeMap::new();
        let mut current: Option<usize> = None;
        for (number, whole) in text.split('\n').enumerate() {
            // A carriage return before the line's end goes; the last line has no end.
            let ended = text.len() > offset(text, whole) + whole.len();
            let whole = match whole.strip_suffix('\r') {
                Some(rest) if ended => rest,
                _ => whole,
            };
            let line = whole.trim_start_matches(is_space);
            let before = whole.len() - line.len();
            let column = 1 + whole.get(..before).map_or(0, |blank| blank.chars().count());
            let at = Place {
                file,
                line: number + 1,
                column,
            };
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(name) = group_header(line) {
                if name.is_empty() || name.contains(['[', ']']) || name.chars().any(is_control) {
                    return Err(at.problem(format!("[{}]: not a group's name", shown(name))));
                }
                current = Some(*index.entry(name).or_insert_with(|| {
                    groups.push(Group {
                        name,
                        at,
                        entries: BTreeMap::new(),
                    });
                    groups.len() - 1
                }));
                continue;
            }
            let (key, raw) = key_and_value(line).ok_or_else(|| {
                at.problem(format!(
                    "\"{}\": expected [group], key = value, or a comment that begins with #",
                    shown(line)
                ))
            })?;
            let Some((which, group)) =
                current.and_then(|which| Some((which, groups.get_mut(which)?)))
            else {
                return Err(at.problem("a key before the first [group]"));
            };
            if !is_key(key) {
                return Err(at.problem(format!("\"{}\": not a key's name", shown(key))));
            }
            if which == 0 && key == "Encoding" && !raw.eq_ignore_ascii_case("utf-8") {
                return Err(at.problem(format!("Encoding = {}: such a file is UTF-8", shown(raw))));
            }
            group.entries.insert(key, Entry { raw, at });
        }
        Ok(KeyFile { groups })
    }
}

impl<'a> Entry<'a> {
    /// `g_key_file_get_boolean`: blanks after the word are taken.
    pub fn boolean(&self) -> Result<bool, String> {
        match self.raw.trim_end_matches(is_space) {
            "true" | "1" => Ok(true),
            "false" | "0" => Ok(false),
            other => Err(format!("\"{}\" is no boolean: true or false", shown(other))),
        }
    }

    /// `g_key_file_get_integer`: an `int`; whatever follows a blank is not looked at.
    pub fn integer(&self) -> Result<i32, String> {
        let word = self.raw.split(is_space).next().unwrap_or_default();
        word.parse()
            .map_err(|_| format!("\"{}\" is no whole number of 32 bits", shown(self.raw)))
    }

    /// `g_key_file_get_int64`: nothing may follow, not even a blank; what is too large is the largest.
    pub fn int64(&self) -> Result<i64, String> {
        let bad = || format!("\"{}\" is no whole number", shown(self.raw));
        let digits = self.raw.strip_prefix(['+', '-']).unwrap_or(self.raw);
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        let limit = if self.raw.starts_with('-') {
            i64::MIN
        } else {
            i64::MAX
        };
        Ok(self.raw.parse().unwrap_or(limit))
    }

    /// `g_key_file_get_string`: escapes decoded. U+FFFD stands for what was not UTF-8.
    pub fn string(&self) -> Result<String, String> {
        if self.raw.contains('\u{fffd}') {
            return Err(format!("\"{}\" is not UTF-8", shown(self.raw)));
        }
        let mut text = String::with_capacity(self.raw.len());
        let mut chars = self.raw.chars();
        while let Some(c) = chars.next() {
            if c != '\\' {
                text.push(c);
                continue;
            }
            text.push(match chars.next() {
                Some('s') => ' ',
                Some('n') => '\n',
                Some('t') => '\t',
                Some('r') => '\r',
                Some('\\') => '\\',
                Some(other) => {
                    return Err(format!("\\{}: no such escape", other.escape_debug()));
                }
                None => return Err("a backslash at the end of the line".to_owned()),
            });
        }
        Ok(text)
    }
}

/// `[name]` with nothing but blanks and tabs after it.
fn group_header(line: &str) -> Option<&str> {
    let (name, rest) = line.strip_prefix('[')?.split_once(']')?;
    rest.chars().all(|c| c == ' ' || c == '\t').then_some(name)
}

fn key_and_value(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=')?;
    let key = key.trim_end_matches(is_space);
    (!key.is_empty()).then(|| (key, value.trim_start_matches(is_space)))
}

/// A name, with a locale in brackets after it or not.
fn is_key(key: &str) -> bool {
    let (name, locale) = match key.split_once('[') {
        None => (key, None),
        Some((name, rest)) => match rest.strip_suffix(']') {
            Some(locale) => (name, Some(locale)),
            None => return false,
        },
    };
    let locale_fits = locale.is_none_or(|locale| {
        locale
            .chars()
            .all(|c| c.is_alphanumeric() || "-_.@".contains(c))
    });
    !name.is_empty() && !name.contains(']') && !name.ends_with(' ') && locale_fits
}

/// `g_ascii_isspace`, which does not count the vertical tab.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0c')
}

fn is_control(c: char) -> bool {
    c.is_ascii_control()
}

/// Where `part` begins in `text`, of which it is a part.
fn offset(text: &str, part: &str) -> usize {
    part.as_ptr() as usize - text.as_ptr() as usize
}

/// As much of a foreign text as belongs into a message.
pub(crate) fn shown(text: &str) -> String {
    text.chars()
        .take(SHOWN_CHARS_MAX)
        .flat_map(char::escape_debug)
        .collect()
}

const SHOWN_CHARS_MAX: usize = 100;
