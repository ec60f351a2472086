//! What a dry run of `import` has shown to a person, out of its JSON: which export becomes which volume, from which disk.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::Failure;

/// More than any import shows; a file of another kind is not read to its end.
const PLAN_BYTES_MAX: usize = 64 << 20;

/// One export that the dry run would have made; the others have no volume.
#[derive(Debug, Deserialize)]
struct Row {
    export: String,
    path: String,
    volume: Option<String>,
    diskseq: Option<u64>,
}

/// What was shown of each export.
#[derive(Debug)]
pub(super) struct Shown(BTreeMap<String, Row>);

impl Shown {
    /// # Errors
    /// `Argument`: the file cannot be read, or is no output of a dry run with `--json`.
    pub(super) fn read(path: &Path) -> Result<Shown, Failure> {
        let unfit = |why: String| Failure::Argument(format!("{}: {why}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| unfit(error.to_string()))?;
        if text.len() > PLAN_BYTES_MAX {
            return Err(unfit("it is too long for a plan".to_owned()));
        }
        Shown::parse(&text).map_err(unfit)
    }

    fn parse(text: &str) -> Result<Shown, String> {
        let rows: Vec<Row> = serde_json::from_str(text).map_err(|error| {
            format!("it is not what 'nbdtrack --json import --dry-run' prints: {error}")
        })?;
        let of_export = rows.into_iter().map(|row| (row.export.clone(), row));
        Ok(Shown(of_export.collect()))
    }

    /// Whether this is what was shown. The number alone would not do: it begins anew with each boot.
    ///
    /// # Errors
    /// What was shown instead, in words.
    pub(super) fn agrees(
        &self,
        export: &str,
        path: &str,
        volume: &str,
        diskseq: u64,
    ) -> Result<(), String> {
        let shown = self.0.get(export).filter(|row| row.path == path);
        let Some(Row {
            volume: Some(was),
            diskseq: Some(number),
            ..
        }) = shown
        else {
            return Err(format!(
                "the plan does not have it; it is {volume}, diskseq {diskseq}"
            ));
        };
        if (was.as_str(), *number) != (volume, diskseq) {
            return Err(format!(
                "the plan has {was}, diskseq {number}, and at the path is {volume}, diskseq {diskseq} now"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_very_disk_that_was_shown_agrees() {
        let shown = Shown::parse(
            r#"[{"export":"a","path":"/dev/vdc","volume":"disk:serial:x","diskseq":7,"done":false,"result":""},
                {"export":"b","path":"/dev/vdd","volume":null,"diskseq":null,"done":false,"result":"skipped: "}]"#,
        )
        .unwrap();
        assert_eq!(shown.agrees("a", "/dev/vdc", "disk:serial:x", 7), Ok(()));
        for (export, path, volume, diskseq, says) in [
            (
                "a",
                "/dev/vdc",
                "disk:serial:y",
                7,
                "has disk:serial:x, diskseq 7",
            ),
            (
                "a",
                "/dev/vdc",
                "disk:serial:x",
                8,
                "has disk:serial:x, diskseq 7",
            ),
            ("a", "/dev/vdd", "disk:serial:x", 7, "does not have it"),
            ("b", "/dev/vdd", "disk:serial:x", 7, "does not have it"),
            ("c", "/dev/vdc", "disk:serial:x", 7, "does not have it"),
        ] {
            let told = shown.agrees(export, path, volume, diskseq).unwrap_err();
            assert!(told.contains(says), "{told}");
        }
        assert!(Shown::parse("{}").is_err());
    }
}
