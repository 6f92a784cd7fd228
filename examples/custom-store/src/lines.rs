//! Splits the body of a watch into lines.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Body;
use tokio::time::timeout;

use crate::http::Fault;
use crate::server::HEARTBEAT;
use crate::wire::{Line, MAX_BODY};

/// The time limit for the next line: three heartbeats.
const SILENCE: Duration = Duration::from_secs(3 * HEARTBEAT.as_secs());

/// The lines of a response's body.
pub(crate) struct Lines<B> {
    body: B,
    rest: BytesMut,
}

impl<B> Lines<B>
where
    B: Body<Data = Bytes> + Unpin,
    Fault: From<B::Error>,
{
    pub(crate) fn new(body: B) -> Self {
        Self { body, rest: BytesMut::new() }
    }

    /// Returns the next line, or `None` at the end of the body.
    pub(crate) async fn next(&mut self) -> Result<Option<Line>, Fault> {
        timeout(SILENCE, self.whole_line()).await.unwrap_or(Err(Fault::Late(SILENCE)))
    }

    async fn whole_line(&mut self) -> Result<Option<Line>, Fault> {
        loop {
            let end = self.rest.iter().position(|byte| *byte == b'\n');
            if end.unwrap_or(self.rest.len()) > MAX_BODY {
                return Err(Fault::TooLong);
            }
            if let Some(end) = end {
                return Ok(Some(serde_json::from_slice(&self.rest.split_to(end + 1))?));
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            if let Ok(data) = frame?.into_data() {
                self.rest.extend_from_slice(&data);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{StreamExt, stream};
    use http_body_util::StreamBody;
    use hyper::body::Frame;

    fn lines(parts: &[&str]) -> Lines<impl Body<Data = Bytes, Error = hyper::Error> + Unpin + use<>> {
        let parts: Vec<_> = parts.iter().map(|part| Ok(Frame::data(Bytes::from((*part).to_owned())))).collect();
        // A dead hub sends nothing more, and does not close the connection.
        Lines::new(StreamBody::new(stream::iter(parts).chain(stream::pending())))
    }

    #[tokio::test(start_paused = true)]
    async fn lines_are_reassembled_from_chunks_and_a_silent_hub_times_out() {
        let mut lines = lines(&["\"be", "at\"\n\"listed\"\n", "{\"gone\":\"a\"}\n\"be"]);
        for expected in ["Beat", "Listed", "Gone(\"a\")"] {
            let line = lines.next().await.unwrap().unwrap();
            assert_eq!(format!("{line:?}"), expected);
        }
        let before = tokio::time::Instant::now();
        assert!(matches!(lines.next().await, Err(Fault::Late(_))));
        assert_eq!(before.elapsed(), SILENCE);
    }

    #[tokio::test(start_paused = true)]
    async fn an_invalid_line_is_a_fault() {
        let long = "x".repeat(MAX_BODY + 1);
        assert!(matches!(lines(&[&long]).next().await, Err(Fault::TooLong)));
        for text in ["\n", "null\n", "{}\n", "\"beat\" 1\n", "{\"put\":{\"node\":1}}\n", "\u{feff}\"beat\"\n"] {
            assert!(matches!(lines(&[text]).next().await, Err(Fault::Malformed(_))), "{text:?}");
        }
    }
}
