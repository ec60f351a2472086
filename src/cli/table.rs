//! Lays out rows: aligned under a header on a terminal, plain and separated by tabs in a pipe. PURE but for
//! [`TableStyle::of_stdout`].

/// Where the table goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableStyle {
    /// A person reads it.
    pub terminal: bool,
    /// The terminal shows colours, and NO_COLOR is not set.
    pub colour: bool,
}

impl TableStyle {
    /// Asks standard output and the environment (<https://no-color.org>).
    pub fn of_stdout() -> TableStyle {
        use std::io::IsTerminal;
        let terminal = std::io::stdout().is_terminal();
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        TableStyle {
            terminal,
            colour: terminal && !refused && !dumb,
        }
    }

    /// Paints a state's name.
    pub fn state(self, text: &str) -> String {
        let code = match text {
            "Serving" => "32",
            "Ambiguous" | "Failed" => "31",
            _ => "33",
        };
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// Lays out `rows` under `header`.
pub fn lay_out(header: &[&str], rows: &[Vec<String>], look: TableStyle) -> String {
    let clean: Vec<Vec<String>> = rows
        .iter()
        .map(|row| row.iter().map(|cell| printable(cell)).collect())
        .collect();
    if !look.terminal {
        return clean.iter().map(|row| row.join("\t") + "\n").collect();
    }
    let widths: Vec<usize> = header
        .iter()
        .enumerate()
        .map(|(column, title)| {
            let cells = clean.iter().filter_map(|row| row.get(column));
            cells
                .map(|cell| cell.chars().count())
                .chain([title.len()])
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut out = String::new();
    let titles: Vec<String> = header.iter().map(|title| (*title).to_owned()).collect();
    for (number, row) in std::iter::once(&titles).chain(&clean).enumerate() {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths.get(column).copied().unwrap_or(0);
            let gap = " ".repeat(width.saturating_sub(cell.chars().count()) + 2);
            let is_state = number > 0 && header.get(column) == Some(&"STATE");
            line.push_str(&if is_state {
                look.state(cell)
            } else {
                cell.clone()
            });
            line.push_str(&gap);
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Names come from outside: control characters would move a terminal's cursor or break a row.
pub fn printable(text: &str) -> String {
    if text.is_empty() {
        return "-".to_owned();
    }
    let clean = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().map(clean).collect()
}

/// Writes bytes for people: `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut tenths = u128::from(bytes) * 10;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or("");
    if tenths % 10 == 0 {
        format!("{} {name}", tenths / 10)
    } else {
        format!("{}.{} {name}", tenths / 10, tenths % 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Vec<String>> {
        vec![
            vec!["a".to_owned(), "Serving".to_owned()],
            vec!["long\x1b[2Jname".to_owned(), String::new()],
        ]
    }

    #[test]
    fn a_terminal_gets_columns_and_never_a_control_character_of_a_name() {
        let look = TableStyle {
            terminal: true,
            colour: false,
        };
        let text = lay_out(&["NAME", "STATE"], &rows(), look);
        assert_eq!(
            text,
            "NAME          STATE\na             Serving\nlong\u{fffd}[2Jname  -\n"
        );
    }

    #[test]
    fn a_pipe_gets_tabs_and_no_header() {
        let look = TableStyle {
            terminal: false,
            colour: false,
        };
        assert!(lay_out(&["NAME", "STATE"], &rows(), look).starts_with("a\tServing\n"));
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(10 << 30), "10 GiB");
        assert_eq!(size(u64::MAX), "15.9 EiB");
    }
}
