//! The page `/peers`: JSON for programs, a table for people. Both are formatted while they are sent, because there may
//! be a hundred thousand peers.

use std::convert::Infallible;
use std::sync::Arc;

use flannel_core::clock::BootTime;
use flannel_core::lease::Lease;
use flannel_core::net::{Dual, Family};
use flannel_core::overlay::{PeerList, PeerRow};
use flannel_core::text::Plain;
use futures_util::stream::{self, Stream, StreamExt};
use serde_json::Value;
use tokio::task::yield_now;

use crate::output::duration;

/// The number of rows in one chunk.
const AT_ONCE: usize = 256;
/// The longest text of a peer's data, in characters. Only data of unknown backends is longer.
const MOST_DATA: usize = 40;
/// Stands for what is absent.
const NONE: &str = "-";

/// The columns of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Columns {
    /// Those that fit into 80 columns.
    Few,
    All {
        /// For the time until leases expire.
        now: BootTime,
    },
}

/// Returns the rows as a JSON array, in the format that `flannel_core::serialize` documents.
pub(crate) fn array(peers: PeerList) -> impl Stream<Item = Result<String, Infallible>> {
    let text = |(nth, row): (usize, PeerRow)| {
        let separator = if nth == 0 { "" } else { ",\n" };
        // Serializing texts and numbers cannot fail.
        format!("{separator}{}", serde_json::to_string(&row).unwrap_or_default())
    };
    gathered("[", owned_rows(peers).enumerate().map(text), "]\n")
}

/// Returns a table with a row for each record.
pub(crate) async fn table(peers: PeerList, columns: Columns) -> impl Stream<Item = Result<String, Infallible>> {
    let head = columns.head();
    let mut widths: Vec<_> = head.iter().map(String::len).collect();
    for (nth, row) in peers.rows().enumerate() {
        if nth % AT_ONCE == 0 {
            yield_now().await;
        }
        for (width, cell) in widths.iter_mut().zip(columns.cells(&row)) {
            *width = (*width).max(cell.chars().count());
        }
    }
    // The last column is not padded.
    widths.pop();
    let line = move |cells: Vec<String>| {
        let padded = cells.iter().enumerate().map(|(nth, cell)| match widths.get(nth) {
            Some(width) => format!("{cell:width$}"),
            None => cell.clone(),
        });
        format!("{}\n", padded.collect::<Vec<_>>().join("  ").trim_end())
    };
    let head = line(head);
    gathered(head, owned_rows(peers).map(move |row| line(columns.cells(&row))), "")
}

impl Columns {
    fn head(self) -> Vec<String> {
        let few = ["SUBNET", "NODE", "BACKEND", "STATE"];
        let all = ["KEY", "SUBNET", "NODE", "IPV6 SUBNET", "IPV6 NODE", "BACKEND", "EXPIRES IN", "STATE"];
        let names = match self {
            Self::Few => &few[..],
            Self::All { .. } => &all[..],
        };
        names.iter().chain(&["REASON"]).map(|name| (*name).to_owned()).collect()
    }

    /// Returns the cells of a row, escaped.
    fn cells(self, row: &PeerRow) -> Vec<String> {
        let PeerRow { key, subnets, public_ip, lease, standing, .. } = row;
        let backend = lease.as_deref().map(backend).unwrap_or_else(|| NONE.to_owned());
        let (state, reason) = (standing.kind().to_owned(), standing.to_string());
        let cells = match self {
            Self::Few => vec![first(subnets), first(public_ip), backend, state, reason],
            Self::All { now } => {
                let expires = lease.as_ref().and_then(|lease| lease.expires);
                let left = expires.map(|expires| duration(expires.since(now)));
                vec![
                    shown(key.as_ref()),
                    shown(subnets.get(Family::V4)),
                    shown(public_ip.get(Family::V4)),
                    shown(subnets.get(Family::V6)),
                    shown(public_ip.get(Family::V6)),
                    backend,
                    shown(left.as_ref()),
                    state,
                    reason,
                ]
            }
        };
        cells.into_iter().map(|cell| Plain(cell).to_string()).collect()
    }
}

/// Returns the value of IPv4, else that of IPv6.
fn first<T: ToString>(values: &Dual<T>) -> String {
    shown(values.iter().next().map(|(_, value)| value))
}

fn shown(value: Option<&impl ToString>) -> String {
    value.map_or_else(|| NONE.to_owned(), ToString::to_string)
}

/// Returns the backend with what the peer publishes for it, such as `vxlan 02:00:00:00:00:01`.
fn backend(lease: &Lease) -> String {
    let data = lease.attrs.backend_data.iter().next().map(|(_, data)| data.as_str());
    let parsed = data.and_then(|data| serde_json::from_str::<Value>(data).ok());
    let mac = parsed.as_ref().and_then(|data| data.get("VtepMAC")).and_then(Value::as_str);
    let data = mac.or(data.filter(|data| *data != "null")).unwrap_or_default();
    let data: String = data.chars().take(MOST_DATA).collect();
    // What the type is left out for (docs/compatibility.md, "Lease attributes").
    let kind = Some(&*lease.attrs.backend_type).filter(|kind| !kind.is_empty()).unwrap_or("udp or alloc");
    format!("{kind} {data}").trim_end().to_owned()
}

fn owned_rows(peers: PeerList) -> impl Iterator<Item = PeerRow> {
    let peers = Arc::new(peers);
    (0..peers.len()).filter_map(move |nth| peers.row(nth))
}

/// Combines the rows into chunks of [`AT_ONCE`] rows. Between chunks the agent's other tasks get their turn.
fn gathered(
    head: impl Into<String>,
    rows: impl Iterator<Item = String>,
    tail: impl Into<String>,
) -> impl Stream<Item = Result<String, Infallible>> {
    let rows = stream::iter(rows).chunks(AT_ONCE).then(async |rows| {
        yield_now().await;
        rows.concat()
    });
    stream::iter([head.into()]).chain(rows).chain(stream::iter([tail.into()])).map(Ok)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use flannel_core::lease::{Json, LeaseKey};
    use flannel_core::testing::samples;
    use futures_util::TryStreamExt;

    async fn shown(peers: PeerList, columns: Columns) -> String {
        table(peers, columns).await.try_collect().await.unwrap()
    }

    #[tokio::test]
    async fn any_number_of_peers_is_an_array_and_a_table_with_a_row_each() {
        for count in [0, 1, 2, AT_ONCE, 3 * AT_ONCE + 1] {
            let peers: PeerList = (0..count).map(|_| Arc::new(samples::lease(7, &Family::BOTH, "vxlan"))).collect();
            let text: String = array(peers.clone()).try_collect().await.unwrap();
            let read: Vec<Value> = serde_json::from_str(&text).unwrap();
            assert_eq!(read.len(), count);
            assert_eq!(shown(peers, Columns::Few).await.lines().count(), count + 1);
        }
    }

    #[tokio::test]
    async fn other_tasks_run_while_a_table_is_made() {
        let turns = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&turns);
        tokio::spawn(async move {
            loop {
                counted.fetch_add(1, Ordering::Relaxed);
                yield_now().await;
            }
        });
        let peers: PeerList = (0..3 * AT_ONCE).map(|_| Arc::new(samples::lease(7, &Family::BOTH, "vxlan"))).collect();
        shown(peers, Columns::Few).await;
        // Three chunks are measured, then formatted.
        assert!(turns.load(Ordering::Relaxed) >= 6, "{turns:?}");
    }

    #[tokio::test]
    async fn a_table_has_the_backends_data_the_state_and_when_it_is_wide_everything() {
        let mut lease = samples::lease(7, &Family::BOTH, "vxlan").expiring(Some(samples::at(86_400)));
        lease.attrs.backend_data.v4 = Some(Json::parse(r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:07"}"#).unwrap());
        let peers: PeerList = [Arc::new(lease.clone())].into_iter().collect();
        let text = shown(peers.clone(), Columns::Few).await;
        assert!(text.starts_with("SUBNET  ") && text.contains("  vxlan 02:00:00:00:00:07  programmed\n"), "{text}");
        let text = shown(peers, Columns::All { now: samples::at(60) }).await;
        for part in [lease.key.as_str(), &samples::node_subnet(Family::V6, 7).to_string(), "  23h59m  "] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }

    #[tokio::test]
    async fn what_others_wrote_is_shown_plain_in_columns() {
        let mut short = samples::lease(7, &[Family::V4], "vxlan");
        short.key = LeaseKey::new("a\x1b[2J\nb");
        let long = samples::lease(8, &Family::BOTH, "vxlan");
        let peers: PeerList = [Arc::new(short), Arc::new(long)].into_iter().collect();
        let text = shown(peers, Columns::All { now: samples::at(0) }).await;
        let rows: Vec<_> = text.lines().collect();
        assert!(rows.len() == 3 && rows[1].starts_with("a\\u001b[2J\\u000ab  "), "{text}");
        let column = |row: &str| row.find("programmed");
        assert_eq!(column(rows[1]), column(rows[2]), "{text}");
    }
}
