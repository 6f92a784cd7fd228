//! Logs on stderr. A reader that does not read must not stop the agent, so lines go through a bounded queue.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use flannel_core::text::{Plain, cut};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::options::{LogFormat, LogOptions};

/// Lines that wait for a reader; further ones are dropped and counted.
const QUEUE: usize = 4096;
/// The longest line, in bytes: what is longer is cut, and says so. With the queue this bounds the memory of the log.
const MAX_LINE: usize = 16 * 1024;
/// How long the end waits for lines still queued.
const FLUSH: Duration = Duration::from_millis(200);

/// The way to stderr. Cheap to clone.
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
        // What the libraries below say of every message is of no use to an operator.
        // kube_client calls each failed request an error: those who asked say what it means.
        let quiet = "netlink_proto=warn,netlink_packet_route=error,hyper=info,h2=info,tonic=info,tower=info,rustls=info,\
                     kube_client=off";
        let filter = EnvFilter::new(format!("{level},{quiet}"));
        let fmt = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(log.clone());
        let registry = tracing_subscriber::registry().with(filter);
        match options.format {
            LogFormat::Text => registry.with(fmt).init(),
            LogFormat::Json => registry.with(fmt.json()).init(),
        }
        Ok(log)
    }

    /// Lines that nobody read in time.
    pub(crate) fn dropped(&self) -> u64 {
        self.counts.dropped.load(Ordering::Relaxed)
    }

    /// Waits a little for what is still queued.
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

fn write_all(queue: &Receiver<Vec<u8>>, counts: &Counts) {
    while let Ok(line) = queue.recv() {
        // A closed stderr is no reason to stop.
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

/// One line, queued whole when it is dropped.
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
        // The one line break is ours. An escape is one in JSON too.
        let mut line = Plain(String::from_utf8_lossy(&self.text).trim_end_matches('\n')).to_string();
        cut(&mut line, MAX_LINE);
        line.push('\n');
        counts.queued.fetch_add(1, Ordering::Release);
        if self.log.lines.try_send(line.into_bytes()).is_err() {
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

    #[test]
    fn a_line_is_one_line_and_plain_whatever_it_holds() {
        let (log, queue) = log();
        log.make_writer().write_all("key=\u{1b}[2J\nFAKE WARN\u{202e} line\n".as_bytes()).unwrap();
        let line = String::from_utf8(queue.recv().unwrap()).unwrap();
        assert_eq!(line, "key=\\u001b[2J\\u000aFAKE WARN\\u202e line\n");
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let (log, queue) = log();
        log.make_writer().write_all(&vec![b'x'; 1 << 20]).unwrap();
        let line = String::from_utf8(queue.recv().unwrap()).unwrap();
        assert!(line.len() < MAX_LINE + 40 && line.ends_with("xx ... (1032192 more bytes)\n"), "{}", line.len());
    }

    #[test]
    fn a_line_is_cut_between_characters() {
        for first in 0..4 {
            let (log, queue) = log();
            let text = "x".repeat(first) + &"\u{1f980}".repeat(MAX_LINE);
            log.make_writer().write_all(text.as_bytes()).unwrap();
            let line = String::from_utf8(queue.recv().unwrap()).unwrap();
            assert!(line.len() < MAX_LINE + 40 && !line.contains('\u{fffd}'), "{} bytes", line.len());
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
