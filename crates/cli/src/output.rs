//! What is printed: results on standard output, as a table or as JSON; progress and questions on standard error.

use crate::failure::{Doing, Failure, Outcome};
use comfy_table::ContentArrangement;
use comfy_table::presets::NOTHING;
use serde::Serialize;
use std::fmt;
use std::io::{self, BufRead, IsTerminal, Write};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    #[default]
    Table,
    Json,
}

/// How this run of the command speaks.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    pub format: Format,
    /// Destructive verbs do not ask.
    pub yes: bool,
}

impl Output {
    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// A line for people; nothing when JSON is wanted.
    pub fn say(&self, text: &str) -> Outcome {
        if self.is_json() { Ok(()) } else { print(text) }
    }

    pub fn json(&self, value: &impl Serialize) -> Outcome {
        print(&serde_json::to_string_pretty(value).doing("cannot print the answer")?)
    }

    /// The value as JSON, or what `table` makes of it.
    pub fn show<T: Serialize>(&self, value: &T, table: impl FnOnce(&T) -> String) -> Outcome {
        match self.format {
            Format::Json => self.json(value),
            Format::Table => print(&table(value)),
        }
    }

    /// Something to look at while waiting.
    pub fn progress(&self, text: &str) {
        eprintln!("{text}");
    }

    /// Says what will be done and asks, unless `--yes`. Without a terminal nobody can answer, so it is refused.
    pub fn confirm(&self, what: &str) -> Outcome {
        if self.yes {
            return Ok(());
        }
        if !io::stdin().is_terminal() {
            return Err(Failure::usage(format!("{what} This was not confirmed.")).hint("add --yes to confirm"));
        }
        eprint!("{what} Go on? [y/N] ");
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer).doing("cannot read the answer")?;
        match answer.trim() {
            "y" | "Y" | "yes" => Ok(()),
            _ => Err(Failure::usage("not confirmed, nothing was done")),
        }
    }
}

/// Prints and tells if it could not; a reader that went away (`| head`) is no failure.
pub fn print(text: &str) -> Outcome {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).doing("cannot print"),
        _ => Ok(()),
    }
}

/// A plain table: columns two spaces apart, no lines, no trailing space.
pub struct Table(comfy_table::Table);

impl Table {
    pub fn new(header: &[&str]) -> Table {
        let mut table = comfy_table::Table::new();
        table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled).set_header(header);
        Table(table)
    }
    pub fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        self.0.add_row(cells.into_iter().map(Into::into).collect::<Vec<String>>());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        // Each cell is padded by one space on both sides; the one at the line's start is not wanted.
        let lines: Vec<&str> = text.lines().map(|line| line.strip_prefix(' ').unwrap_or(line).trim_end()).collect();
        f.write_str(&lines.join("\n"))
    }
}

/// A list in a cell; `-` when there is nothing.
pub fn list(words: &[String]) -> String {
    if words.is_empty() { "-".into() } else { words.join(",") }
}

/// Something that may be missing, in a cell.
pub fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

/// Names and values of one thing, one a line, values in a column.
pub fn fields(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines: Vec<String> = pairs.iter().map(|(name, value)| format!("{name:width$}  {value}")).collect();
    lines.join("\n")
}

/// A moment for people: the time of day in UTC, to the millisecond; the date is in the JSON.
pub fn time_of_day(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    format!("{:02}:{:02}:{:02}.{:03}", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60, unix_ms % 1000)
}

/// Day and minute, in UTC.
pub fn moment(unix_ms: u64) -> String {
    let minutes = unix_ms / 60_000;
    // Days since 0000-03-01, so that the leap day is a year's last; 146,097 days are 400 years.
    let days = minutes / 1440 + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", minutes / 60 % 24, minutes % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_told_as_the_calendar_has_them() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_399, "2000-02-28 23:59 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59 UTC"),
            (1_795_611_360, "2026-11-25 09:56 UTC"),
            (4_107_542_400, "2100-03-01 00:00 UTC"),
        ] {
            assert_eq!(moment(seconds * 1000), text);
        }
    }

    #[test]
    fn tables_line_up_without_trailing_spaces() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(["a", "online"]);
        table.row(["longer", "down"]);
        assert_eq!(table.to_string(), "NAME    STATE\na       online\nlonger  down");
    }

    #[test]
    fn a_destructive_verb_without_a_terminal_and_without_yes_is_refused() {
        let output = Output { format: Format::Table, yes: true };
        assert!(output.confirm("This deletes web1.").is_ok());
        if !io::stdin().is_terminal() {
            let failure = Output { yes: false, ..output }.confirm("This deletes web1.").expect_err("nobody answers");
            assert_eq!(failure.code, crate::failure::Code::Usage);
            assert!(failure.hint.is_some_and(|hint| hint.contains("--yes")));
        }
    }

    #[test]
    fn moments_are_shown_to_the_millisecond() {
        assert_eq!(time_of_day(86_400_000 + 3_723_004), "01:02:03.004");
    }
}
