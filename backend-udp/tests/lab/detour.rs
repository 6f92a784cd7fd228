//! A bad path between two nodes: it loses, duplicates and reorders datagrams.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use flannel_core::net::Family;

use super::{LINK, Node, Noise, PORT, underlay_address};

/// How many of a hundred datagrams are lost, are sent twice, and are swapped with the next.
const LOST: u64 = 2;
const TWICE: u64 = 2;
const SWAPPED: u64 = 6;
/// How long a datagram to be swapped waits for the next.
const HELD: Duration = Duration::from_millis(5);

/// What the detour did in one direction.
#[derive(Debug, Default)]
pub(crate) struct Done {
    pub(crate) lost: AtomicU64,
    pub(crate) twice: AtomicU64,
    pub(crate) swapped: AtomicU64,
}

/// Carries datagrams between two nodes that use its addresses as their peer's. Ends when dropped.
pub(crate) struct Detour {
    /// From the first node to the second, and back.
    pub(crate) done: [Arc<Done>; 2],
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Detour {
    /// The apparent endpoints of the peer: for the first node, and for the second.
    pub(crate) fn endpoints() -> [SocketAddr; 2] {
        [12, 11].map(|number| (underlay_address(number, Family::V4), PORT).into())
    }

    pub(crate) fn start([one, two]: &[Node; 2]) -> Self {
        let sockets = Self::endpoints().map(|endpoint| {
            two.ns.add_address(LINK, endpoint.ip(), 24).unwrap();
            let socket = two.ns.run(|| UdpSocket::bind(endpoint).unwrap()).unwrap();
            socket.set_read_timeout(Some(HELD)).unwrap();
            socket
        });
        let [of_one, of_two] = &sockets;
        let (stop, done) = (Arc::new(AtomicBool::new(false)), [Arc::default(), Arc::default()]);
        let ways = [(of_one, of_two, two, 1), (of_two, of_one, one, 2)];
        let threads = ways.into_iter().zip(&done).map(|((inbox, outbox, to, seed), done)| {
            let (inbox, outbox) = (inbox.try_clone().unwrap(), outbox.try_clone().unwrap());
            let (to, stop, done) = (to.endpoint(Family::V4), Arc::clone(&stop), Arc::clone(done));
            thread::spawn(move || carry(&inbox, &outbox, to, Noise::new(seed), &done, &stop))
        });
        let threads = threads.collect();
        Self { done, stop, threads }
    }
}

impl Drop for Detour {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

fn carry(inbox: &UdpSocket, outbox: &UdpSocket, to: SocketAddr, mut noise: Noise, done: &Done, stop: &AtomicBool) {
    let mut buffer = vec![0; 1 << 16];
    let mut held: Option<Vec<u8>> = None;
    let send = |datagram: &[u8]| assert_eq!(outbox.send_to(datagram, to).unwrap(), datagram.len());
    while !stop.load(Ordering::Relaxed) {
        let len = match inbox.recv(&mut buffer) {
            Ok(len) => len,
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted), "{error}");
                held.take().iter().for_each(|datagram| send(datagram));
                continue;
            }
        };
        let chance = noise.next() % 100;
        let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        if chance < LOST {
            count(&done.lost);
        } else if chance < LOST + TWICE {
            count(&done.twice);
            (0..2).for_each(|_| send(&buffer[..len]));
        } else if chance < LOST + TWICE + SWAPPED && held.is_none() {
            count(&done.swapped);
            held = Some(buffer[..len].to_vec());
            continue;
        } else {
            send(&buffer[..len]);
        }
        held.take().iter().for_each(|datagram| send(datagram));
    }
}
