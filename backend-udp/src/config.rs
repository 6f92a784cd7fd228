//! The keys of the `Backend` object.

use std::num::NonZeroU8;

use flannel_core::config::{ConfigError, NetworkConfig};

/// The settings of the UDP backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// `Port`: the UDP port, the same on all nodes. Default: 8285.
    pub port: u16,
    /// `Queues`: how many packets this node can send at the same time, 1 to 16. Each queue has one thread; one more
    /// thread receives. Default: 1. Go flannel ignores this key.
    pub queues: NonZeroU8,
    /// `SocketBuffer`: the buffer size of each socket in each direction, in bytes, 65536 to 268435456. Default: 8 MiB
    /// to receive, 4 MiB to send. Go flannel ignores this key.
    pub socket_buffer: Option<u32>,
}

const DEFAULT_PORT: u16 = 8285;
const MAX_QUEUES: u64 = 16;
/// From the size of a full super-packet to 256 MiB, which is far more than a link fills. The kernel grants twice what
/// `SO_RCVBUFFORCE` asks for, so that it is asked for half.
const SOCKET_BUFFER: std::ops::RangeInclusive<u64> = 65_536..=268_435_456;

impl Config {
    /// The keys of the `Backend` object besides `Type`.
    pub const KEYS: [&str; 3] = ["Port", "Queues", "SocketBuffer"];

    pub(crate) fn read(network: &NetworkConfig) -> Result<Self, ConfigError> {
        let settings = &network.backend.settings;
        let range =
            |key: &str, problem: String, remedy: String| ConfigError::new(settings.path_of(key), problem, remedy);
        let port = settings.u64("Port")?.unwrap_or(DEFAULT_PORT.into());
        let port = u16::try_from(port).ok().filter(|port| *port > 0).ok_or_else(|| {
            range(
                "Port",
                format!("{port} is not a UDP port"),
                format!("write 1 to 65535, or leave it out for {DEFAULT_PORT}"),
            )
        })?;
        let queues = settings.u64("Queues")?.unwrap_or(1);
        let number = u8::try_from(queues).ok().filter(|queues| u64::from(*queues) <= MAX_QUEUES);
        let queues = number
            .and_then(NonZeroU8::new)
            .ok_or_else(|| range("Queues", format!("{queues} is out of range"), format!("write 1 to {MAX_QUEUES}")))?;
        let socket_buffer = settings.u64("SocketBuffer")?;
        if let Some(bytes) = socket_buffer.filter(|bytes| !SOCKET_BUFFER.contains(bytes)) {
            let remedy = format!("write {} to {} bytes", SOCKET_BUFFER.start(), SOCKET_BUFFER.end());
            return Err(range("SocketBuffer", format!("{bytes} is out of range"), remedy));
        }
        Ok(Self { port, queues, socket_buffer: socket_buffer.map(|bytes| bytes as u32) })
    }
}
