//! `[dbus]`: who may call beyond those whom the bus's policy lets. PURE.

use toml::Spanned;
use toml::de::DeValue;

use super::table::{Reading, Table};

/// `[dbus]`. What is left out has its default: the bus's policy decides alone.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BusAccess {
    /// Callers who are not root, not one of `users` and not of the group are asked of polkit.
    pub polkit: bool,
    /// Who calls everything without polkit, by name; only with `polkit`.
    pub users: Vec<String>,
}

pub(super) fn bus_access<'a>(value: Spanned<DeValue<'a>>, reading: &mut Reading<'a>) -> BusAccess {
    let mut access = BusAccess::default();
    let Some(mut table) = Table::of(value, "[dbus]", reading) else {
        return access;
    };
    access.polkit = table.get("polkit").is_some_and(Spanned::into_inner);
    let items = table.get::<Vec<Spanned<String>>>("users");
    for item in items.map(Spanned::into_inner).unwrap_or_default() {
        let text = item.get_ref();
        let problem = if access.users.len() == USERS_MAX {
            format!("users: at most {USERS_MAX} names")
        } else if text.is_empty() || text.len() > USER_BYTES_MAX {
            format!("users: a name has 1 to {USER_BYTES_MAX} bytes")
        } else if text.chars().any(char::is_control) {
            "users: a name has no control characters".to_owned()
        } else {
            access.users.push(text.clone());
            continue;
        };
        table.reading.tell(item.span(), problem);
        break;
    }
    if !access.polkit && !access.users.is_empty() {
        // Read as a grant it would be none: without polkit only the bus's policy lets anyone call.
        let message =
            "users: only with polkit = true; without it the bus's policy says who may call";
        table.tell_at("users", message.to_owned());
    }
    table.end(&["polkit", "users"]);
    access
}

const USERS_MAX: usize = 64;
/// useradd(8): a name has at most 32 characters; directories of companies have longer ones.
const USER_BYTES_MAX: usize = 256;
