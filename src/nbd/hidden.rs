//! Exports that are on their way out: no new clients, while those that are there go on.

use crate::correlation::ExportName;
use crate::sync::lock;

use super::door::Door;

impl Door {
    /// Takes `name` out of LIST and turns new clients away, whatever else is said of it until `show` or `forget`; sessions
    /// that exist go on.
    pub fn hide(&self, name: &ExportName, reason: &str) {
        let mut exports = lock(&self.shared().exports);
        if let Some(export) = exports.get_mut(name) {
            export.hidden = Some(reason.to_owned());
        }
    }

    /// Takes `hide` back.
    pub fn show(&self, name: &ExportName) {
        let mut exports = lock(&self.shared().exports);
        if let Some(export) = exports.get_mut(name) {
            export.hidden = None;
        }
    }
}
