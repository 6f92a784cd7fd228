//! The peers, as `/peers` gives them and `flanneld peers` prints them.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use flannel_core::lease::Lease;
use flannel_core::text::Plain;
use futures_util::stream::{self, Stream, StreamExt};
use serde::{Deserialize, Serialize};

/// Peers that are written at a time.
const AT_ONCE: usize = 256;

/// An accepted peer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Peer {
    key: String,
    subnets: Vec<String>,
    public: Vec<String>,
    backend_type: String,
}

impl Peer {
    fn of(lease: &Lease) -> Self {
        Self {
            key: lease.key.to_string(),
            subnets: lease.subnets.iter().map(|(_, subnet)| subnet.to_string()).collect(),
            public: lease.attrs.public_ip.iter().map(|(_, addr)| addr.to_string()).collect(),
            backend_type: lease.attrs.backend_type.to_string(),
        }
    }
}

/// The peers as a JSON array, which is made while it is sent: there may be a hundred thousand.
pub(crate) fn array(peers: Vec<Arc<Lease>>) -> impl Stream<Item = Result<String, Infallible>> {
    let rows = peers.into_iter().enumerate().map(|(nth, lease)| {
        let row = serde_json::json!(Peer::of(&lease));
        format!("{}{row}", if nth == 0 { "" } else { ",\n" })
    });
    let rows = stream::iter(rows).chunks(AT_ONCE).map(|rows| rows.concat());
    let parts = stream::iter(["[".to_owned()]).chain(rows).chain(stream::iter(["]\n".to_owned()]));
    parts.map(Ok)
}

/// A table of peers.
pub(crate) struct Table<'a>(pub(crate) &'a [Peer]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.0.iter().map(|peer| [peer.subnets.join(","), peer.public.join(","), peer.key.clone()]);
        let rows: Vec<_> = rows.map(|row| row.map(|cell| Plain(cell).to_string())).collect();
        let head = ["SUBNETS", "PUBLIC ADDRESSES", "KEY"].map(str::to_owned);
        let width = |column: usize| rows.iter().chain([&head]).map(|row| row[column].len()).max().unwrap_or_default();
        let (subnets, public) = (width(0), width(1));
        for [one, two, key] in [&head].into_iter().chain(&rows) {
            writeln!(f, "{one:subnets$}  {two:public$}  {key}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flannel_core::net::Family;
    use flannel_core::testing::samples;
    use futures_util::TryStreamExt;

    #[tokio::test]
    async fn any_number_of_peers_is_an_array_and_a_table_with_a_row_each() {
        for count in [0, 1, 2, AT_ONCE, 3 * AT_ONCE + 1] {
            let peers = (0..count).map(|_| Arc::new(samples::lease(7, &Family::BOTH, "vxlan"))).collect();
            let text: String = array(peers).try_collect().await.unwrap();
            let read: Vec<Peer> = serde_json::from_str(&text).unwrap();
            assert_eq!(read.len(), count);
            assert_eq!(Table(&read).to_string().lines().count(), count + 1);
        }
    }

    #[test]
    fn what_others_wrote_is_shown_plain() {
        let peer = Peer {
            key: "a\x1b[2J\nb".to_owned(),
            subnets: vec!["10.1.0.0/24".to_owned(), "fd00::/64".to_owned()],
            public: vec!["192.0.2.1".to_owned()],
            backend_type: "vxlan".to_owned(),
        };
        let table = Table(&[peer]).to_string();
        assert_eq!(
            table,
            "SUBNETS                PUBLIC ADDRESSES  KEY\n\
             10.1.0.0/24,fd00::/64  192.0.2.1         a\\u001b[2J\\u000ab\n"
        );
    }
}
