//! The output for people: 80 columns, and colours only if wanted.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

/// The longest line.
const COLUMNS: usize = 80;

/// The destination of the output.
pub(crate) struct Screen {
    out: Box<dyn Write>,
    colours: bool,
    /// Whether a line has been started and not ended.
    midway: bool,
    interactive: bool,
}

/// The style of a piece of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    Plain,
    Bold,
    Dim,
    Good,
    Bad,
}

/// The alignment of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

impl Screen {
    pub(crate) fn stdout() -> Self {
        let interactive = io::stdout().is_terminal();
        let unwanted = |name, value: &str| std::env::var_os(name).is_some_and(|it| it == value);
        // https://no-color.org: any value but the empty one.
        let forbidden = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let colours = interactive && !forbidden && !unwanted("TERM", "dumb");
        Self { out: Box::new(io::stdout()), colours, midway: false, interactive }
    }

    /// Writes to standard error, for messages while standard output has another use.
    pub(crate) fn stderr() -> Self {
        Self { out: Box::new(io::stderr()), colours: false, midway: false, interactive: false }
    }

    /// Shows nothing.
    pub(crate) fn silent() -> Self {
        Self { out: Box::new(io::sink()), colours: false, midway: false, interactive: false }
    }

    pub(crate) fn title(&mut self, title: &str, rest: &str) -> io::Result<()> {
        let styled = self.styled(title, Style::Bold);
        writeln!(self.out, "{styled}: {rest}")
    }

    pub(crate) fn section(&mut self, title: &str) -> io::Result<()> {
        let styled = self.styled(title, Style::Bold);
        writeln!(self.out, "\n{styled}")
    }

    pub(crate) fn blank(&mut self) -> io::Result<()> {
        writeln!(self.out)
    }

    /// Prints an explanation.
    pub(crate) fn note(&mut self, text: &str) -> io::Result<()> {
        self.line(&[(text, Style::Dim)])
    }

    pub(crate) fn line(&mut self, parts: &[(&str, Style)]) -> io::Result<()> {
        let text: String = parts.iter().map(|(text, style)| self.styled(text, *style)).collect();
        writeln!(self.out, "  {text}")
    }

    /// Prints text of any length, broken between words. Further lines are indented by `hang` more.
    pub(crate) fn wrapped(&mut self, indent: usize, hang: usize, text: &str, style: Style) -> io::Result<()> {
        for line in wrap(indent, hang, text) {
            let styled = self.styled(&line, style);
            writeln!(self.out, "{styled}")?;
        }
        Ok(())
    }

    /// Prints a line unchanged, including its spaces, unless it is too long.
    pub(crate) fn verbatim(&mut self, indent: usize, text: &str) -> io::Result<()> {
        if indent + text.chars().count() > COLUMNS {
            return self.wrapped(indent, 4, text, Style::Plain);
        }
        writeln!(self.out, "{:indent$}{text}", "")
    }

    /// Prints rows in columns of the necessary width. The first row is the head.
    pub(crate) fn table(&mut self, aligns: &[Align], rows: &[Vec<String>]) -> io::Result<()> {
        let widths: Vec<usize> = (0..aligns.len())
            .map(|column| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max())
            .map(Option::unwrap_or_default)
            .collect();
        for (nth, row) in rows.iter().enumerate() {
            let cells = row.iter().zip(aligns.iter().zip(&widths)).map(|(cell, (align, width))| match align {
                Align::Left => format!("{cell:<width$}"),
                Align::Right => format!("{cell:>width$}"),
            });
            let text = cells.collect::<Vec<_>>().join("  ");
            let style = if nth == 0 { Style::Dim } else { Style::Plain };
            self.line(&[(text.trim_end(), style)])?;
        }
        Ok(())
    }

    /// Prints the current step in `width` columns; the outcome follows on the same line.
    pub(crate) fn begin(&mut self, what: &str, width: usize) -> io::Result<()> {
        write!(self.out, "  {what:<width$}")?;
        self.midway = true;
        self.out.flush()
    }

    pub(crate) fn end(&mut self, outcome: &str, style: Style) -> io::Result<()> {
        let styled = self.styled(outcome, style);
        self.midway = false;
        writeln!(self.out, "{styled}")
    }

    /// Reports that the user interrupted the run.
    pub(crate) fn interrupted(&mut self) -> io::Result<()> {
        // A terminal shows ^C where the cursor was.
        if std::mem::take(&mut self.midway) || self.interactive {
            writeln!(self.out)?;
        }
        self.line(&[("Interrupted. Nothing is left behind.", Style::Plain)])
    }

    /// Reports that the run cannot continue.
    pub(crate) fn fail(&mut self, text: &str) -> io::Result<()> {
        if std::mem::take(&mut self.midway) {
            writeln!(self.out)?;
        }
        self.out.flush()?;
        let text = wrap(0, 2, &format!("quickstart: {text}")).join("\n");
        writeln!(io::stderr(), "{text}")
    }

    fn styled(&self, text: &str, style: Style) -> String {
        let code = match style {
            Style::Plain => return text.to_owned(),
            _ if !self.colours => return text.to_owned(),
            Style::Bold => "1",
            Style::Dim => "2",
            Style::Good => "32",
            Style::Bad => "31",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// Formats a time for people.
pub(crate) fn duration(time: Duration) -> String {
    let millis = time.as_secs_f64() * 1e3;
    match millis {
        ..10.0 => format!("{millis:.1} ms"),
        ..1000.0 => format!("{millis:.0} ms"),
        _ => format!("{:.1} s", millis / 1e3),
    }
}

fn wrap(indent: usize, hang: usize, text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = " ".repeat(indent);
    let mut empty = true;
    for word in text.split_whitespace() {
        if !empty && line.chars().count() + 1 + word.chars().count() > COLUMNS {
            lines.push(std::mem::replace(&mut line, " ".repeat(indent + hang)));
            empty = true;
        }
        if !std::mem::replace(&mut empty, false) {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines.push(line);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_broken_between_words_and_hangs() {
        let text = ["word"; 40].join(" ");
        let lines = wrap(4, 2, &text);
        assert!(lines.iter().all(|line| line.len() <= COLUMNS));
        assert!(lines[0].starts_with("    w") && lines[1].starts_with("      w"));
        assert_eq!(lines.join(" ").split_whitespace().count(), 40);
    }

    #[test]
    fn times_have_the_digits_that_matter() {
        let shown = [1.234, 56.7, 999.4, 1500.0].map(|millis| duration(Duration::from_secs_f64(millis / 1e3)));
        assert_eq!(shown, ["1.2 ms", "57 ms", "999 ms", "1.5 s"]);
    }
}
