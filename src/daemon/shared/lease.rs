//! The name of this daemon in the shared database, renewed while that is reached: nothing may be written for hours, and the server ends what says
//! nothing.

use tokio::time::Instant;

use super::table::{Link, SharedTable};
use crate::mapping::LEASE_RENEWED;

impl SharedTable {
    /// When [`SharedTable::renew`] is wanted next; `None` while the database is away.
    pub fn renewal(&self) -> Option<Instant> {
        match &self.link {
            Link::Up(_) => self.renewal,
            _ => None,
        }
    }

    /// Renews it. One that was lost, or cannot be renewed, ends the connection.
    pub async fn renew(&mut self) {
        self.renewal = Some(Instant::now() + LEASE_RENEWED);
        let Link::Up(database) = &mut self.link else {
            return;
        };
        let renewed = database.renew().await;
        self.count_retried();
        if let Err(error) = renewed {
            self.fail(error.to_string());
        }
    }
}
