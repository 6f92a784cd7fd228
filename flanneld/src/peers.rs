//! The page `/peers`: JSON for programs, a table for people. Both are formatted while they are sent, because there may
//! be a hundred thousand peers.

use std::convert::Infallible;
use std::sync::Arc;

use flannel_core::lease::Lease;
use flannel_core::net::Dual;
use flannel_core::text::Plain;
use futures_util::stream::{self, Stream, StreamExt};

/// The number of peers in one chunk.
const AT_ONCE: usize = 256;

/// Returns the leases as a JSON array, in the format that `flannel_core::serialize` documents.
pub(crate) fn array(peers: Vec<Arc<Lease>>) -> impl Stream<Item = Result<String, Infallible>> {
    let rows = peers.into_iter().enumerate().map(|(nth, lease)| {
        let row = serde_json::json!(*lease);
        format!("{}{row}", if nth == 0 { "" } else { ",\n" })
    });
    gathered("[", rows, "]\n")
}

/// Returns a table with a row for each peer.
pub(crate) fn table(peers: Vec<Arc<Lease>>) -> impl Stream<Item = Result<String, Infallible>> {
    const HEAD: [&str; 3] = ["SUBNETS", "PUBLIC ADDRESSES", "KEY"];
    let width = |column: usize| {
        let cells = peers.iter().map(|lease| cells(lease)[column].len());
        cells.chain([HEAD[column].len()]).max().unwrap_or_default()
    };
    let (subnets, public) = (width(0), width(1));
    let line = move |[one, two, key]: [String; 3]| format!("{one:subnets$}  {two:public$}  {}\n", Plain(key));
    let head = line(HEAD.map(str::to_owned));
    gathered(head, peers.into_iter().map(move |lease| line(cells(&lease))), "")
}

fn cells(lease: &Lease) -> [String; 3] {
    [joined(&lease.subnets), joined(&lease.attrs.public_ip), lease.key.to_string()]
}

fn joined<T: ToString>(values: &Dual<T>) -> String {
    values.iter().map(|(_, value)| value.to_string()).collect::<Vec<_>>().join(",")
}

/// Combines the rows into chunks of [`AT_ONCE`] rows.
fn gathered(
    head: impl Into<String>,
    rows: impl Iterator<Item = String>,
    tail: impl Into<String>,
) -> impl Stream<Item = Result<String, Infallible>> {
    let rows = stream::iter(rows).chunks(AT_ONCE).map(|rows| rows.concat());
    stream::iter([head.into()]).chain(rows).chain(stream::iter([tail.into()])).map(Ok)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flannel_core::lease::LeaseKey;
    use flannel_core::net::Family;
    use flannel_core::testing::samples;
    use futures_util::TryStreamExt;

    #[tokio::test]
    async fn any_number_of_peers_is_an_array_and_a_table_with_a_row_each() {
        for count in [0, 1, 2, AT_ONCE, 3 * AT_ONCE + 1] {
            let peers: Vec<_> = (0..count).map(|_| Arc::new(samples::lease(7, &Family::BOTH, "vxlan"))).collect();
            let text: String = array(peers.clone()).try_collect().await.unwrap();
            let read: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
            assert_eq!(read.len(), count);
            let text: String = table(peers).try_collect().await.unwrap();
            assert_eq!(text.lines().count(), count + 1);
        }
    }

    #[tokio::test]
    async fn what_others_wrote_is_shown_plain_in_columns() {
        let mut short = samples::lease(7, &[Family::V4], "vxlan");
        short.key = LeaseKey::new("a\x1b[2J\nb");
        let long = samples::lease(8, &Family::BOTH, "vxlan");
        let text: String = table(vec![Arc::new(short.clone()), Arc::new(long.clone())]).try_collect().await.unwrap();
        let rows: Vec<_> = text.lines().collect();
        let place = rows[0].find("KEY").unwrap();
        assert_eq!((&rows[1][place..], &rows[2][place..]), ("a\\u001b[2J\\u000ab", long.key.to_string().as_str()));
        assert!(rows[1].starts_with(&joined(&short.subnets)), "{text}");
    }
}
