//! Whose rules hold at the door: those of the files, but for a section that the middle has refused. What it was before stays, and its clients
//! are those of before.

use std::collections::BTreeMap;

use crate::correlation::{Action, Event, ExportName, Notice, SectionsChange};
use crate::daemon::control::Control;
use crate::nbd::{Access, Rules};

/// What the files say, and what holds in its place.
#[derive(Debug, Default)]
pub(in crate::daemon) struct SectionRules {
    said: Rules,
    /// Of the sections that are refused, what held before.
    kept: BTreeMap<ExportName, Access>,
}

impl SectionRules {
    /// Of a reading or a look-up: what it says, `None` for what was said last, and which sections the middle refuses now. Gives what holds,
    /// when that is not what held.
    fn judged(&mut self, said: Option<Rules>, refused: &[(ExportName, String)]) -> Option<Rules> {
        let held = |name: &ExportName| {
            let held = self.kept.get(name);
            held.or_else(|| self.said.exports.get(name))
                .cloned()
                .unwrap_or_default()
        };
        let kept: BTreeMap<ExportName, Access> = refused
            .iter()
            .map(|(name, _)| (name.clone(), held(name)))
            .collect();
        if said.is_none() && kept == self.kept {
            return None;
        }
        self.kept = kept;
        if let Some(said) = said {
            self.said = said;
        }
        let mut rules = self.said.clone();
        for (name, access) in &self.kept {
            rules.exports.insert(name.clone(), access.clone());
        }
        Some(rules)
    }
}

impl Control {
    /// Has the middle judge what the configuration says, and then carries that out; the rules of the door come first: a client that comes to a
    /// new export meets its rules.
    pub(in crate::daemon) fn take_sections(&mut self, change: SectionsChange, said: Option<Rules>) {
        let now = self.started.elapsed();
        let actions = self.correlation.apply(now, Event::Sections(change));
        let refused = actions.iter().find_map(|action| match action {
            Action::Tell(Notice::Reloaded(difference)) => Some(&*difference.refused),
            _ => None,
        });
        let rules = self.reload.rules.judged(said, refused.unwrap_or_default());
        if let Some(rules) = rules {
            self.door.rule(rules);
        }
        self.carry_out(actions);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ExportName {
        ExportName::parse(text).unwrap()
    }

    fn at_most(clients_max: u32) -> Access {
        Access {
            clients_max,
            ..Access::default()
        }
    }

    fn said(exports: &[(&str, u32)]) -> Rules {
        let exports = exports
            .iter()
            .map(|(text, most)| (name(text), at_most(*most)));
        Rules {
            exports: exports.collect(),
            ..Rules::default()
        }
    }

    #[test]
    fn a_section_that_is_refused_keeps_the_rules_that_it_had_until_it_is_taken() {
        let refused = [(name("a"), "why".to_owned())];
        let mut rules = SectionRules::default();
        let first = rules.judged(Some(said(&[("a", 1), ("b", 1)])), &[]);
        assert_eq!(first, Some(said(&[("a", 1), ("b", 1)])));
        // Changed, and refused; the other is taken.
        for (most, other) in [(2, 2), (3, 3)] {
            let now = rules.judged(Some(said(&[("a", most), ("b", other)])), &refused);
            assert_eq!(now, Some(said(&[("a", 1), ("b", other)])));
            assert_eq!(rules.judged(None, &refused), None, "as it was");
        }
        // What it stood against has gone.
        assert_eq!(rules.judged(None, &[]), Some(said(&[("a", 3), ("b", 3)])));
        assert_eq!(rules.judged(None, &[]), None);
        // One that had none is open to all, as what was added over D-Bus is.
        let now = rules.judged(Some(said(&[("a", 4)])), &[(name("c"), String::new())]);
        assert_eq!(now, Some(said(&[("a", 4), ("c", 0)])));
    }
}
