//! Whom the machine knows by the names in `[dbus]`.

use std::time::Duration;

use nix::unistd::{Group, User};

use crate::config::BusAccess;
use crate::dbus::Access;

/// The group that reads (systemd/nbdtrack.sysusers).
const GROUP: &str = "nbdtrack";

/// A directory of users on another machine may not answer.
const NAMES_WITHIN: Duration = Duration::from_secs(10);

/// Looks the names up, once. One that the machine does not know lets no one call and is told; when the lookup takes too long,
/// no one but root calls without polkit.
pub(super) async fn access(rules: BusAccess) -> Access {
    let asked = tokio::task::spawn_blocking(move || look_up(&rules.users));
    match tokio::time::timeout(NAMES_WITHIN, asked).await {
        Ok(Ok(access)) => access,
        Ok(Err(_)) | Err(_) => {
            tracing::warn!(
                "[dbus]: the names of users were not found within {} s; until the next start polkit is asked about \
                 everyone but root",
                NAMES_WITHIN.as_secs()
            );
            Access::default()
        }
    }
}

fn look_up(users: &[String]) -> Access {
    let mut access = Access::default();
    for name in users {
        match User::from_name(name) {
            Ok(Some(user)) => {
                access.users.insert(user.uid.as_raw());
            }
            Ok(None) => tracing::warn!("[dbus] users: this machine has no user {name:?}"),
            Err(error) => tracing::warn!("[dbus] users: {name:?} cannot be looked up: {error}"),
        }
    }
    access.group = Group::from_name(GROUP)
        .ok()
        .flatten()
        .map(|group| group.gid.as_raw());
    access
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_unknown_name_lets_no_one_call() {
        let rules = BusAccess {
            polkit: true,
            users: vec!["root".to_owned(), "no-such-user".to_owned()],
        };
        assert_eq!(
            access(rules).await.users.into_iter().collect::<Vec<_>>(),
            [0]
        );
    }
}
