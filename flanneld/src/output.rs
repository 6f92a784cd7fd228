//! How commands write: in which format, and tables on a terminal with colours and line breaks.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use flannel_core::text::Plain;
use terminal_size::{Width, terminal_size_of};
use textwrap::{WordSeparator, WordSplitter};

use crate::flags::{UsageError, Values};

/// The format of a command's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Table,
    /// With more columns, and without line breaks on a terminal.
    Wide,
    Json,
}

/// How often a command prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeat {
    Once,
    /// Whenever the output changes.
    OnChange,
}

/// The options `-o`, `-json`, `-w` and `-watch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Output {
    pub(crate) format: Format,
    pub(crate) repeat: Repeat,
}

impl Output {
    pub(crate) fn read(values: &Values) -> Result<Self, UsageError> {
        let format = match values.text("o") {
            "table" => Format::Table,
            "wide" => Format::Wide,
            "json" => Format::Json,
            other => return Err(UsageError::value("o", other, "must be table, wide or json")),
        };
        let format = match (values.bool("json"), values.is_given("o")) {
            (false, _) => format,
            (true, true) if format != Format::Json => {
                return Err(UsageError::Combination(
                    "give -json or -o, not both: -json is the same as -o json".to_owned(),
                ));
            }
            (true, _) => Format::Json,
        };
        let repeat = if values.bool("w") || values.bool("watch") { Repeat::OnChange } else { Repeat::Once };
        Ok(Self { format, repeat })
    }
}

/// How stdout shows tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Screen {
    /// The column at which lines are broken.
    width: Option<usize>,
    colours: Colours,
    /// Whether the screen is cleared before a table is shown again.
    is_cleared: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Colours {
    On,
    Off,
}

/// The least room for the last column; with less, lines are not broken.
const ROOM: usize = 24;

impl Screen {
    /// Returns the properties of stdout. Without a terminal, lines are neither broken nor coloured, nor is JSON.
    pub(crate) fn of_stdout(format: Format) -> Self {
        let is_terminal = io::stdout().is_terminal() && format != Format::Json;
        let width = terminal_size_of(io::stdout()).map(|(Width(width), _)| usize::from(width));
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let is_screen = is_terminal && !is_dumb;
        // https://no-color.org
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            width: width.filter(|_| is_terminal && format == Format::Table),
            colours: if is_screen && !refused { Colours::On } else { Colours::Off },
            is_cleared: is_screen,
        }
    }

    /// Returns the text as it is shown. It is escaped, because another program may have answered at the agent's
    /// address.
    pub(crate) fn render(self, text: &str) -> String {
        let lines = text.lines().map(|line| format!("{}\n", self.line(&Plain(line).to_string())));
        lines.collect()
    }

    fn line(self, line: &str) -> String {
        let broken = match self.width {
            Some(width) => broken(line, width),
            None => line.to_owned(),
        };
        match self.colours {
            Colours::On => coloured(&broken),
            Colours::Off => broken,
        }
    }

    /// Returns what clears the screen before a table is shown again; on other outputs an empty line separates them.
    pub(crate) fn separator(self) -> &'static str {
        if self.is_cleared { "\x1b[H\x1b[2J" } else { "\n" }
    }
}

/// Writes to stdout. Returns whether there is still a reader: it is not an error if one closes a pipe early.
pub(crate) fn write(text: &str) -> io::Result<bool> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        other => other.map(|()| true),
    }
}

/// Returns a duration in its two largest units, such as `23h59m`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    match (hours, minutes) {
        (48.., _) => format!("{}d{:02}h", hours / 24, hours % 24),
        (1.., _) => format!("{hours}h{:02}m", minutes % 60),
        (_, 1..) => format!("{minutes}m{:02}s", seconds % 60),
        _ => format!("{seconds}s"),
    }
}

/// Breaks a row in its last column, whose lines stay below each other.
fn broken(line: &str, width: usize) -> String {
    let start = cells(line).last().map_or(0, |(start, _)| *start);
    if width < start + ROOM {
        return line.to_owned();
    }
    let indent = " ".repeat(start);
    let (head, last) = line.split_at(start);
    let options = textwrap::Options::new(width).initial_indent(&indent).subsequent_indent(&indent).break_words(false);
    let options = options.word_separator(WordSeparator::AsciiSpace).word_splitter(WordSplitter::NoHyphenation);
    format!("{head}{}", textwrap::fill(last, options).split_off(start))
}

/// Returns the cells of a row with their positions. At least two spaces are between two cells.
fn cells(line: &str) -> Vec<(usize, &str)> {
    let mut cells = Vec::new();
    let mut start = 0;
    for part in line.split("  ") {
        let text = part.trim_start();
        if !text.is_empty() {
            cells.push((start + part.len() - text.len(), text.trim_end()));
        }
        start += part.len() + 2;
    }
    cells
}

/// Colours the heading, and cells that name a state.
fn coloured(line: &str) -> String {
    let cells = cells(line);
    let is_heading =
        cells.len() > 1 && cells.iter().all(|(_, cell)| cell.chars().all(|c| c.is_ascii_uppercase() || c == ' '));
    let mut text = String::new();
    let mut end = 0;
    for (start, cell) in cells {
        let style = if is_heading { Style::new().bold() } else { style(cell) };
        text += &line[end..start];
        text += &format!("{style}{cell}{style:#}");
        end = start + cell.len();
    }
    text + &line[end..]
}

fn style(cell: &str) -> Style {
    let colour = match cell {
        "ready" | "programmed" | "live" | "in place" | "ok" => AnsiColor::Green,
        "degraded" | "skipped" | "quarantined" | "withheld" | "flapping" | "waits for" | "STALE" | "WARNING" => {
            AnsiColor::Yellow
        }
        "not ready" | "refused" | "conflict" | "ERROR" => AnsiColor::Red,
        _ => return Style::new(),
    };
    colour.on_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::parse;

    fn read(args: &[&str]) -> Result<Output, String> {
        let values = parse(args.iter().map(|arg| (*arg).to_owned())).unwrap().values;
        Output::read(&values).map_err(|error| error.to_string())
    }

    #[test]
    fn formats_are_read_and_those_that_exclude_each_other_are_errors() {
        let once = |format| Ok(Output { format, repeat: Repeat::Once });
        assert_eq!(read(&[]), once(Format::Table));
        assert_eq!(read(&["-o", "wide"]), once(Format::Wide));
        assert_eq!(read(&["-json"]), once(Format::Json));
        assert_eq!(read(&["-json", "-o=json"]), once(Format::Json));
        for watch in ["-w", "-watch"] {
            assert_eq!(read(&[watch]), Ok(Output { format: Format::Table, repeat: Repeat::OnChange }));
        }
        assert!(read(&["-o=yaml"]).unwrap_err().contains("must be table, wide or json"));
        assert!(read(&["-o=wide", "-json"]).unwrap_err().contains("not both"));
    }

    #[test]
    fn durations_have_their_two_largest_units() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m00s"),
            (3_599, "59m59s"),
            (86_399, "23h59m"),
            (86_400, "24h00m"),
            (172_800, "2d00h"),
            (2_588_400, "29d23h"),
        ] {
            assert_eq!(duration(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn on_a_terminal_rows_are_broken_in_their_last_column_and_states_have_colours() {
        let screen = Screen { width: Some(40), colours: Colours::Off, is_cleared: false };
        let row = "store        etcd at http://10.0.0.1:2379 is lost";
        let shown = screen.render(row);
        assert_eq!(shown, "store        etcd at\n             http://10.0.0.1:2379 is\n             lost\n");
        let narrow = Screen { width: Some(20), ..screen };
        assert_eq!(narrow.render(row), format!("{row}\n"));
        let colours = Screen { width: None, colours: Colours::On, is_cleared: false };
        assert_eq!(colours.render("state  not ready"), "state  \x1b[31mnot ready\x1b[0m\n");
        assert_eq!(colours.render("SUBNET  NODE"), "\x1b[1mSUBNET\x1b[0m  \x1b[1mNODE\x1b[0m\n");
        let plain = Screen { width: None, colours: Colours::Off, is_cleared: false };
        assert_eq!(plain.render("a  ready\n\x1b[2J"), "a  ready\n\\u001b[2J\n");
    }
}
