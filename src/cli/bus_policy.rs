//! Whom files of a bus's policy let call nbdtrack: looks for those that let everybody. Changes nothing.

use std::path::{Path, PathBuf};

use crate::dbus::BUS_NAME;

/// Where the system's bus reads its policy.
pub(super) const PLACES: [&str; 2] = ["/usr/share/dbus-1/system.d", "/etc/dbus-1/system.d"];

/// The first file that lets everybody's calls reach the daemon, whether that asks polkit or not.
pub(super) fn open_to_all() -> Option<PathBuf> {
    let mut files: Vec<PathBuf> = PLACES
        .iter()
        .filter_map(|place| Path::new(place).read_dir().ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|of| of == "conf"))
        .collect();
    files.sort();
    files.into_iter().find(|path| {
        let text = std::fs::read_to_string(path);
        text.is_ok_and(|text| opens_to_all(&text))
    })
}

/// Whether a policy that holds for everybody lets calls reach whoever owns [`BUS_NAME`]. PURE.
fn opens_to_all(text: &str) -> bool {
    let text = without_comments(text).replace('\'', "\"");
    let rule = format!("send_destination=\"{BUS_NAME}\"");
    text.split("<policy").skip(1).any(|policy| {
        let policy = policy.split("</policy>").next().unwrap_or_default();
        let head = policy.split('>').next().unwrap_or_default();
        head.contains("context=")
            && policy.split("<allow").skip(1).any(|allow| {
                allow
                    .split('>')
                    .next()
                    .is_some_and(|allow| allow.contains(&rule))
            })
    })
}

fn without_comments(text: &str) -> String {
    let mut parts = text.split("<!--");
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        kept.push_str(part.split_once("-->").map_or("", |(_, rest)| rest));
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_rule_for_everybody_to_the_daemons_own_name_opens_it_to_all() {
        let shipped = [
            include_str!("../../dbus/org.nbdtrack1.conf"),
            include_str!("../../dbus/org.nbdtrack1-polkit.conf"),
        ];
        for text in shipped {
            assert!(!opens_to_all(text), "{text}");
        }
        let rule = "<allow send_destination='org.nbdtrack1' send_type='method_call'/>";
        let of =
            |whose: &str| format!("<busconfig>\n<policy {whose}>\n{rule}\n</policy></busconfig>");
        for everybody in ["context=\"mandatory\"", "context='default'"] {
            assert!(opens_to_all(&of(everybody)));
            assert!(!opens_to_all(&format!("<!-- {} -->", of(everybody))));
            assert!(!opens_to_all(&of(everybody).replace("allow", "deny")));
        }
        assert!(!opens_to_all(&of("user=\"volumed\"")));
    }
}
