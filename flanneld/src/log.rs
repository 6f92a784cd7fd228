//! Logs on stderr. A slow reader must not block the agent, so lines pass through a bounded queue.

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use flannel_core::text::{Cut, Escaping, Plain};
use tracing::{Dispatch, Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::options::{LogFormat, LogOptions};

/// Lines that may wait for a reader; further ones are dropped and counted.
const QUEUE: usize = 1024;
/// The longest line, in bytes. Longer lines are cut, with a note. Together with the queue this bounds the log's memory.
const MAX_LINE: usize = 16 * 1024;
/// How long shutdown waits for queued lines.
const FLUSH: Duration = Duration::from_millis(200);

/// The sender of lines to stderr. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Log {
    lines: SyncSender<Vec<u8>>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    queued: AtomicU64,
    written: AtomicU64,
    dropped: AtomicU64,
}

impl Log {
    /// Starts the writer's thread and sends this program's traces to it.
    pub(crate) fn start(options: LogOptions) -> io::Result<Self> {
        let (lines, queue) = sync_channel(QUEUE);
        let counts = Arc::new(Counts::default());
        let log = Self { lines, counts: Arc::clone(&counts) };
        thread::Builder::new().name("log".to_owned()).spawn(move || write_all(&queue, &counts))?;
        let level = match options.verbosity {
            0 | 1 => "info",
            2..=4 => "debug",
            _ => "trace",
        };
        // Libraries' traces of every message are of no use to an operator. kube_client logs each failed request as an
        // error; the caller reports it where it matters.
        let quiet = "netlink_proto=warn,netlink_packet_route=error,hyper=info,h2=info,tonic=info,tower=info,rustls=info,\
                     kube_client=off";
        dispatch(EnvFilter::new(format!("{level},{quiet}")), options.format, log.clone()).init();
        Ok(log)
    }

    /// Returns how many lines were dropped, because they were not read in time.
    pub(crate) fn dropped(&self) -> u64 {
        self.counts.dropped.load(Ordering::Relaxed)
    }

    /// Waits up to [`FLUSH`] for queued lines.
    pub(crate) fn flush(&self) {
        let end = Instant::now() + FLUSH;
        while self.counts.written.load(Ordering::Acquire) < self.counts.queued.load(Ordering::Acquire) {
            if Instant::now() > end {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Returns the last line of a program that fails, in the log's format: the log may not have been started.
pub(crate) fn last_line(format: LogFormat, error: &str) -> String {
    match format {
        LogFormat::Text => format!("flanneld: {error}\n"),
        LogFormat::Json => {
            let mut timestamp = String::new();
            // Writing to a String cannot fail.
            let _ = SystemTime.format_time(&mut Writer::new(&mut timestamp));
            let line = serde_json::json!({
                "timestamp": timestamp,
                "level": "ERROR",
                "fields": { "message": error },
                "target": "flannel::agent",
            });
            format!("{}\n", Plain(line))
        }
    }
}

/// Formats traces as lines for `writer`.
fn dispatch<W>(filter: EnvFilter, format: LogFormat, writer: W) -> Dispatch
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // The layer's own error messages would not be escaped.
    let fmt = tracing_subscriber::fmt::layer().with_ansi(false).log_internal_errors(false).with_writer(writer);
    let registry = tracing_subscriber::registry().with(filter);
    match format {
        LogFormat::Text => registry.with(fmt.map_event_format(AsOneLine)).into(),
        LogFormat::Json => registry.with(fmt.json().with_span_list(false).map_event_format(AsOneLine)).into(),
    }
}

/// Escapes and cuts a line while another format writes it, before the layer buffers it.
struct AsOneLine<F>(F);

impl<S, N, F> FormatEvent<S, N> for AsOneLine<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut line = OneLine { text: Escaping(Cut::new(&mut writer, MAX_LINE)), breaks: 0 };
        self.0.format_event(ctx, Writer::new(&mut line), event)?;
        line.text.0.end()?;
        writer.write_char('\n')
    }
}

/// A line without the line breaks at its end; [`AsOneLine`] adds the only one. The escapes are valid in JSON, too.
struct OneLine<W> {
    text: Escaping<W>,
    /// The number of line breaks at the end of the text so far, not yet written.
    breaks: usize,
}

impl<W: fmt::Write> fmt::Write for OneLine<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let shown = text.trim_end_matches('\n');
        if !shown.is_empty() {
            for _ in 0..std::mem::take(&mut self.breaks) {
                self.text.write_char('\n')?;
            }
            self.text.write_str(shown)?;
        }
        self.breaks += text.len() - shown.len();
        Ok(())
    }
}

fn write_all(queue: &Receiver<Vec<u8>>, counts: &Counts) {
    while let Ok(line) = queue.recv() {
        // The agent continues if stderr is closed.
        let _ = io::stderr().write_all(&line);
        counts.written.fetch_add(1, Ordering::Release);
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { log: self, text: Vec::new() }
    }
}

/// One line, queued when it is dropped.
pub(crate) struct Line<'a> {
    log: &'a Log,
    text: Vec<u8>,
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        let counts = &self.log.counts;
        counts.queued.fetch_add(1, Ordering::Release);
        if self.log.lines.try_send(std::mem::take(&mut self.text)).is_err() {
            counts.queued.fetch_sub(1, Ordering::Release);
            counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> (Log, Receiver<Vec<u8>>) {
        let (lines, queue) = sync_channel(QUEUE);
        (Log { lines, counts: Arc::default() }, queue)
    }

    /// Returns the log line of `text` in this format.
    fn logged(format: LogFormat, text: &dyn fmt::Display) -> String {
        let (log, queue) = log();
        let dispatch = dispatch(EnvFilter::new("info"), format, log);
        tracing::dispatcher::with_default(&dispatch, || tracing::info!(%text, "hostile"));
        String::from_utf8(queue.recv().unwrap()).unwrap()
    }

    #[test]
    fn a_line_is_one_line_and_plain_whatever_it_holds() {
        for text in ["\u{1b}[2J\nFAKE WARN\u{202e} line", "\n\n", "at its end\n"] {
            let line = logged(LogFormat::Text, &text);
            // The formatter's own line break cannot be distinguished from those before it.
            let escaped = text
                .trim_end_matches('\n')
                .replace('\n', "\\u000a")
                .replace('\u{1b}', "\\u001b")
                .replace('\u{202e}', "\\u202e");
            assert!(line.ends_with(&format!(" hostile text={escaped}\n")), "{line:?}");
            let line = logged(LogFormat::Json, &text);
            let parsed: serde_json::Value = serde_json::from_str(&line).unwrap();
            assert_eq!(parsed["fields"]["text"], text);
            assert!(line.trim_end_matches('\n').chars().all(flannel_core::text::is_plain), "{line:?}");
        }
    }

    /// A very long text, written in many parts.
    struct Endless(&'static str);

    impl fmt::Display for Endless {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            (0..1 << 20).try_for_each(|_| f.write_str(self.0))
        }
    }

    #[test]
    fn a_line_in_json_has_no_key_twice_and_the_last_one_has_the_same_form() {
        let (log, queue) = log();
        let dispatch = dispatch(EnvFilter::new("info"), LogFormat::Json, log);
        tracing::dispatcher::with_default(&dispatch, || {
            let _span = tracing::info_span!("flannel", overlay = "flannel").entered();
            tracing::info!(target: "flannel::lease", key = %"node", suppressed = None::<u64>, "lease acquired");
        });
        let line = String::from_utf8(queue.recv().unwrap()).unwrap();
        let parsed: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&line).unwrap();
        // A parser keeps one of two equal keys.
        assert_eq!(serde_json::to_string(&parsed).unwrap().len(), line.trim_end().len(), "{line}");
        assert_eq!(parsed["span"], serde_json::json!({"name": "flannel", "overlay": "flannel"}));
        assert_eq!(parsed["fields"], serde_json::json!({"message": "lease acquired", "key": "node"}));
        let last = last_line(LogFormat::Json, "cannot start\n\u{1b}");
        let last: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&last).unwrap();
        assert_eq!(last["fields"], serde_json::json!({"message": "cannot start\n\u{1b}"}));
        assert!(last.keys().all(|key| parsed.contains_key(key)), "{last:?}");
        assert_eq!(last_line(LogFormat::Text, "cannot start"), "flanneld: cannot start\n");
    }

    #[test]
    fn a_line_without_end_is_cut() {
        for format in [LogFormat::Text, LogFormat::Json] {
            let line = logged(format, &Endless("x"));
            assert!(line.len() < MAX_LINE + 40 && line.contains("xx ... (10"), "{}", line.len());
            assert!(line.ends_with(" more bytes)\n"));
        }
    }

    #[test]
    fn a_line_is_cut_between_characters() {
        for first in 0..4 {
            let text = format!("{}{}", "x".repeat(first), "\u{1f980}".repeat(MAX_LINE));
            let line = logged(LogFormat::Text, &text);
            assert!(line.len() < MAX_LINE + 40 && line.contains("\u{1f980} ... ("), "{} bytes", line.len());
        }
    }

    /// Records the largest write, which is the size of the layer's buffer.
    #[derive(Clone, Default)]
    struct Longest(Arc<AtomicU64>);

    impl Write for Longest {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.fetch_max(bytes.len() as u64, Ordering::Relaxed);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn no_more_of_a_line_is_gathered_than_is_written() {
        for format in [LogFormat::Text, LogFormat::Json] {
            let longest = Longest::default();
            let writer = longest.clone();
            let dispatch = dispatch(EnvFilter::new("info"), format, move || writer.clone());
            tracing::dispatcher::with_default(&dispatch, || tracing::info!(text = %Endless("\u{1b}"), "hostile"));
            let longest = longest.0.load(Ordering::Relaxed) as usize;
            assert!((MAX_LINE..MAX_LINE + 40).contains(&longest), "{longest} bytes");
        }
    }

    #[test]
    fn lines_that_nobody_reads_are_dropped_and_counted_and_hold_up_nobody() {
        let (log, queue) = log();
        for _ in 0..QUEUE + 7 {
            log.make_writer().write_all(b"line\n").unwrap();
        }
        assert_eq!(log.dropped(), 7);
        assert_eq!(queue.try_iter().count(), QUEUE);
    }
}
