//! Draws `top`: a line of sums, the table, a line of keys; usable at 80 by 24.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Paragraph, Row as Cells, Table, TableState, Wrap};

use super::super::table::{printable, size};
use super::model::{Model, Row, Sort};

const COLUMNS: [(Sort, u16); 7] = [
    (Sort::Name, 24),
    (Sort::State, 9),
    (Sort::Clients, 7),
    (Sort::Read, 10),
    (Sort::Written, 10),
    (Sort::Iops, 7),
    (Sort::Latency, 8),
];

/// Draws everything.
pub fn draw(frame: &mut Frame<'_>, model: &Model) {
    let [head, body, foot] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Min(1),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let rows = model.rows();
    frame.render_widget(Paragraph::new(sums(model, &rows)), head);
    match rows.get(model.selected).filter(|_| model.detail) {
        Some(row) => {
            frame.render_widget(Paragraph::new(detail(row)).wrap(Wrap { trim: false }), body)
        }
        None => {
            let mut state = TableState::default().with_selected(Some(model.selected));
            frame.render_stateful_widget(table(model, &rows), body, &mut state);
        }
    }
    let keys = if model.typing {
        format!(
            "filter: {}_  (Enter keeps, Esc clears)",
            printable_or_empty(&model.filter)
        )
    } else if model.detail {
        "Esc back  q quit".to_owned()
    } else {
        "q quit  s sort  r reverse  / filter  Enter look into  arrows move".to_owned()
    };
    frame.render_widget(Paragraph::new(keys).style(dim()), foot);
}

fn sums(model: &Model, rows: &[&Row]) -> Vec<Line<'static>> {
    let sum = |pick: fn(&Row) -> f64| rows.iter().map(|row| pick(row)).sum::<f64>();
    let clients: u64 = rows.iter().map(|row| row.clients).sum();
    let serving = rows.iter().filter(|row| row.state == "Serving").count();
    let first = format!(
        "nbdtrack  {} of {} exports, {serving} serving  {} volumes  {clients} clients",
        rows.len(),
        model.total(),
        model.volumes
    );
    let second = if model.trouble.is_empty() {
        format!(
            "read {}/s  write {}/s  {:.0} IOPS{}",
            amount(sum(|row| row.read)),
            amount(sum(|row| row.written)),
            sum(|row| row.iops),
            if model.filter.is_empty() {
                String::new()
            } else {
                format!("  filter: {}", printable(&model.filter))
            }
        )
    } else {
        format!("NO NEWS: {}", printable(&model.trouble))
    };
    vec![Line::from(first), Line::from(second)]
}

fn table<'a>(model: &Model, rows: &[&'a Row]) -> Table<'a> {
    let titles = COLUMNS.iter().map(|(sort, _)| {
        let mark = match (model.sort == *sort, model.descending) {
            (true, true) => "v",
            (true, false) => "^",
            (false, _) => "",
        };
        Cell::from(format!("{}{mark}", sort.title()))
    });
    let lines = rows.iter().map(|row| {
        Cells::new([
            Cell::from(printable(&row.name)),
            Cell::from(row.state.clone()).style(state_style(&row.state, model.colour)),
            Cell::from(row.clients.to_string()),
            Cell::from(amount(row.read)),
            Cell::from(amount(row.written)),
            Cell::from(format!("{:.0}", row.iops)),
            Cell::from(row.latency_us.map_or("-".to_owned(), latency)),
        ])
    });
    let widths = COLUMNS.map(|(sort, width)| match sort {
        Sort::Name => Constraint::Min(width),
        _ => Constraint::Length(width),
    });
    Table::new(lines, widths)
        .header(Cells::new(titles).style(Style::new().add_modifier(Modifier::BOLD)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
}

fn detail(row: &Row) -> Vec<Line<'static>> {
    let line = |title: &str, value: String| Line::from(format!("{title:<11} {value}"));
    let mut lines = vec![
        line("export", printable(&row.name)),
        line("state", row.state.clone()),
    ];
    if !row.reason.is_empty() {
        lines.push(line("reason", printable(&row.reason)));
    }
    lines.extend([
        line("volume", printable(&row.volume)),
        line("disk", printable(&row.node)),
        line("generation", row.generation.to_string()),
        line("size", size(row.size)),
        line("clients", row.clients.to_string()),
        line("read", format!("{}/s", amount(row.read))),
        line("written", format!("{}/s", amount(row.written))),
        line("requests", format!("{:.0}/s", row.iops)),
        line("latency", row.latency_us.map_or("-".to_owned(), latency)),
        line("failed", format!("{} since the start", row.failed)),
        Line::default(),
        Line::from(format!(
            "'nbdtrack explain {}' says why, 'nbdtrack history' what was",
            printable(&row.name)
        )),
    ]);
    lines
}

fn state_style(state: &str, colour: bool) -> Style {
    if !colour {
        return Style::new();
    }
    Style::new().fg(match state {
        "Serving" => Color::Green,
        "Ambiguous" | "Failed" => Color::Red,
        _ => Color::Yellow,
    })
}

fn dim() -> Style {
    Style::new().add_modifier(Modifier::DIM)
}

fn printable_or_empty(text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        printable(text)
    }
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate: not negative, and `as` saturates"
)]
fn amount(bytes: f64) -> String {
    size(bytes as u64)
}

fn latency(us: f64) -> String {
    if us < 1_000.0 {
        format!("{us:.0} us")
    } else if us < 1_000_000.0 {
        format!("{:.1} ms", us / 1_000.0)
    } else {
        format!("{:.1} s", us / 1_000_000.0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::{Duration, Instant};

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::{KeyCode, KeyEvent};
    use zbus::{OwnedVariant, Variant};

    use super::super::model::{After, Sample};
    use super::*;
    use crate::dbus::client::{Objects, Properties};

    fn export(name: &str, state: &str, clients: u32) -> Properties {
        let owned = |value: Variant<'static>| OwnedVariant::try_from(value).unwrap();
        BTreeMap::from([
            ("Name".to_owned(), owned(Variant::new(name.to_owned()))),
            ("State".to_owned(), owned(Variant::new(state.to_owned()))),
            ("Reason".to_owned(), owned(Variant::new(String::new()))),
            (
                "VolumeId".to_owned(),
                owned(Variant::new(format!("loop:/{name}"))),
            ),
            ("DeviceNode".to_owned(), owned(Variant::new("/dev/loop7"))),
            ("Generation".to_owned(), owned(Variant::new(3_u64))),
            ("Size".to_owned(), owned(Variant::new(10_u64 << 30))),
            ("Clients".to_owned(), owned(Variant::new(clients))),
        ])
    }

    fn sample(at: Instant, reads: u64) -> Sample {
        let exports = [
            ("vm-a", "Serving", 2),
            ("vm-b", "Absent", 0),
            ("vm-c", "Failed", 1),
        ];
        let stats = BTreeMap::from([
            ("reads".to_owned(), reads),
            ("bytes_read".to_owned(), reads * 4_096),
            ("timed".to_owned(), reads),
            ("microseconds".to_owned(), reads * 250),
        ]);
        Sample {
            at,
            objects: Objects {
                volumes: BTreeMap::new(),
                exports: exports
                    .iter()
                    .map(|(name, state, clients)| {
                        (format!("/{name}"), export(name, state, *clients))
                    })
                    .collect(),
            },
            stats: BTreeMap::from([("vm-a".to_owned(), stats)]),
        }
    }

    fn model() -> Model {
        let mut model = Model::new(false);
        let start = Instant::now();
        model.take(sample(start, 100));
        model.take(sample(start + Duration::from_secs(2), 20_100));
        model
    }

    fn shown(model: &Model) -> String {
        let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
        terminal.draw(|frame| draw(frame, model)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let lines: Vec<String> = (0..24)
            .map(|y| {
                (0..80)
                    .map(|x| buffer[(x, y)].symbol().to_owned())
                    .collect::<String>()
            })
            .map(|line| line.trim_end().to_owned())
            .collect();
        lines.join("\n").trim_end().to_owned()
    }

    fn press(model: &mut Model, code: KeyCode) -> After {
        model.on_key(KeyEvent::from(code))
    }

    #[test]
    fn everything_fits_on_80_by_24() {
        let text = shown(&model());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[0],
            "nbdtrack  3 of 3 exports, 1 serving  0 volumes  3 clients"
        );
        assert_eq!(lines[1], "read 39 MiB/s  write 0 B/s  10000 IOPS");
        assert_eq!(
            lines[2],
            "NAME^                    STATE     CLIENTS READ/s     WRITE/s   IOPS    LATENCY"
        );
        assert!(lines[3].starts_with("vm-a "), "{text}");
        assert!(lines[3].ends_with("10000   250 us"), "{text}");
        assert_eq!(lines.len(), 24);
        assert!(lines[23].starts_with("q quit  s sort"));
    }

    #[test]
    fn keys_sort_filter_look_into_and_quit() {
        let mut model = model();
        for key in "/fail".chars() {
            press(&mut model, KeyCode::Char(key));
        }
        press(&mut model, KeyCode::Enter);
        assert_eq!(model.rows().len(), 1);
        assert!(shown(&model).contains("filter: fail"));
        press(&mut model, KeyCode::Enter);
        let text = shown(&model);
        assert!(
            text.contains("export      vm-c") && text.contains("generation  3"),
            "{text}"
        );
        press(&mut model, KeyCode::Esc);
        press(&mut model, KeyCode::Esc);
        assert_eq!(model.rows().len(), 3);
        press(&mut model, KeyCode::Char('s'));
        press(&mut model, KeyCode::Char('s'));
        assert_eq!(
            (model.sort, model.rows()[0].name.as_str()),
            (Sort::Clients, "vm-a")
        );
        press(&mut model, KeyCode::Char('r'));
        assert_eq!(model.rows()[0].name, "vm-b");
        press(&mut model, KeyCode::End);
        assert_eq!(model.selected, 2);
        assert_eq!(press(&mut model, KeyCode::Char('q')), After::Quit);
    }

    #[test]
    fn a_daemon_that_went_away_leaves_the_last_picture_and_says_so() {
        let mut model = model();
        model.lost("no one owns the name".to_owned());
        let text = shown(&model);
        assert!(
            text.contains("NO NEWS: no one owns the name") && text.contains("vm-a"),
            "{text}"
        );
    }
}
