//! `[claim]`: which disks the machine's own storage stack is kept away from. PURE.

use toml::Spanned;
use toml::de::DeValue;

use super::ClaimRules;
use super::table::{Reading, Table};

pub(super) fn claim<'a>(value: Spanned<DeValue<'a>>, reading: &mut Reading<'a>) -> ClaimRules {
    let mut rules = ClaimRules::default();
    let Some(mut table) = Table::of(value, "[claim]", reading) else {
        return rules;
    };
    rules.hotplugged = table.get("hotplugged").is_some_and(Spanned::into_inner);
    rules.serials = patterns("serials", &mut table);
    rules.except = patterns("except", &mut table);
    table.end(&["hotplugged", "serials", "except"]);
    rules
}

fn patterns(key: &'static str, table: &mut Table<'_, '_>) -> Vec<String> {
    let mut found = Vec::new();
    let items = table.get::<Vec<Spanned<String>>>(key);
    for item in items.map(Spanned::into_inner).unwrap_or_default() {
        let text = item.get_ref();
        let problem = if found.len() == PATTERNS_MAX {
            format!("{key}: at most {PATTERNS_MAX} patterns")
        } else if text.is_empty() || text.len() > PATTERN_BYTES_MAX {
            format!("{key}: a pattern has 1 to {PATTERN_BYTES_MAX} bytes")
        } else if text.chars().any(char::is_control) {
            format!("{key}: a pattern has no control characters")
        } else {
            found.push(text.clone());
            continue;
        };
        table.reading.tell(item.span(), problem);
        break;
    }
    found
}

/// Each is compared with each identity of each disk that comes.
const PATTERNS_MAX: usize = 1_000;
/// The longest identity is shorter.
const PATTERN_BYTES_MAX: usize = 256;
