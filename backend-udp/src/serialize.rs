//! serde representations (feature `serde`), for status pages. Names and shapes are stable, like those of
//! `flannel_core::serialize`:
//!
//! ```json
//! {"device": "flannel0", "forwards": 2, "sent": {"packets": 1, "bytes": 84}, "received": {"packets": 1, "bytes": 84},
//!  "unbatched": 0, "answered": 0, "dropped": {"no_peer": 3}, "limitations": [{"what": "…", "cause": "…"}]}
//! ```
//!
//! `dropped` omits reasons with a count of zero. `no_room` counts messages that the kernel dropped because a socket
//! buffer was full, the checksum was wrong, or a socket filter refused them; each is a datagram or a run of up to 64.

use std::collections::BTreeMap;

use flannel_core::kernel::{Limitation, LinkName};
use serde::{Serialize, Serializer};

use crate::CarriedDevice;
use crate::path::{Counters, Reason, Traffic};

#[derive(Serialize)]
struct Volume {
    packets: u64,
    bytes: u64,
}

impl From<&Traffic> for Volume {
    fn from(traffic: &Traffic) -> Self {
        Self { packets: traffic.packets, bytes: traffic.bytes }
    }
}

#[derive(Serialize)]
struct Device<'a> {
    device: &'a LinkName,
    forwards: usize,
    sent: Volume,
    received: Volume,
    unbatched: u64,
    answered: u64,
    dropped: BTreeMap<&'static str, u64>,
    limitations: &'a [Limitation],
}

impl Serialize for CarriedDevice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { name, forwards, counters, limitations } = self;
        let device = Device {
            device: name,
            forwards: *forwards,
            sent: (&counters.sent).into(),
            received: (&counters.received).into(),
            unbatched: counters.unbatched,
            answered: counters.answered,
            dropped: dropped(counters),
            limitations,
        };
        device.serialize(serializer)
    }
}

fn dropped(counters: &Counters) -> BTreeMap<&'static str, u64> {
    let by_reason = Reason::ALL.map(|reason| (reason.name(), counters.dropped(reason)));
    let all = by_reason.into_iter().chain([(Counters::OVERFLOWED, counters.overflowed)]);
    all.filter(|(_, count)| *count > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_device() {
        let mut counters = Counters::default();
        (counters.sent.packets, counters.sent.bytes, counters.overflowed) = (2, 168, 3);
        let device = CarriedDevice {
            name: LinkName::new("flannel0").unwrap(),
            forwards: 1,
            counters,
            limitations: vec![Limitation::new("segmentation", "the kernel has none")],
        };
        let expected = json!({
            "device": "flannel0", "forwards": 1, "unbatched": 0, "answered": 0,
            "sent": {"packets": 2, "bytes": 168}, "received": {"packets": 0, "bytes": 0},
            "dropped": {"no_room": 3}, "limitations": [{"what": "segmentation", "cause": "the kernel has none"}],
        });
        assert_eq!(serde_json::to_value(device).unwrap(), expected);
    }
}
