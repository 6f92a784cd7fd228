//! What arrives is what was sent: large datagrams in fragments, streams in segments of the kernel's choice, and either
//! over a network that loses packets.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use flannel_core::net::Family;
use testkit::sabotage::Plane;
use testkit::{Families, Pod, cases, firewall_contract};

use crate::support::{Cluster, families_of};

/// A datagram of so many bytes is fifteen fragments.
const DATAGRAM: usize = 20_000;
const STREAM: usize = 8 << 20;
/// The same where packets are lost: each loss costs a retransmission.
const STREAM_WITH_LOSS: usize = 256 << 10;
/// Until a stream counts as stuck.
const STUCK: Duration = Duration::from_secs(30);

cases! {
    fn fragments_and_streams_arrive_to_the_byte_over_vxlan() = arrive_to_the_byte(Plane::Vxlan);
    fn fragments_and_streams_arrive_to_the_byte_over_host_gw() = arrive_to_the_byte(Plane::HostGw);
    fn fragments_and_streams_arrive_to_the_byte_over_udp() = arrive_to_the_byte(Plane::Udp);
}

fn arrive_to_the_byte(plane: Plane) {
    let cluster = Cluster::start(2, plane, Families::Dual);
    for family in families_of(Families::Dual) {
        cluster.assert_traffic(0, 1);
        datagram(&cluster.pods[0], &cluster.pods[1], family);
        stream(&cluster.pods[0], &cluster.pods[1], family, STREAM);
        stream(&cluster.pods[1], &cluster.pods[0], family, STREAM);
    }
    // One packet in twenty that node 2 receives is lost.
    let rules = "add table inet lossy; add chain inet lossy in { type filter hook prerouting priority -300; }; \
                 add rule inet lossy in iif eth0 meta l4proto { tcp, udp } numgen random mod 20 0 drop";
    firewall_contract::run(cluster.ns(1), "nft", "-f -", rules);
    for family in families_of(Families::Dual) {
        stream(&cluster.pods[0], &cluster.pods[1], family, STREAM_WITH_LOSS);
    }
}

/// Bytes that repeat themselves nowhere.
fn bytes(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()
    };
    std::iter::repeat_with(next).flatten().take(len).collect()
}

fn datagram(from: &Pod, to: &Pod, family: Family) {
    let [source, target] = [from, to].map(|pod| pod.addr(family).unwrap());
    let inbox = to.ns.run(|| UdpSocket::bind((target, 0))).unwrap().unwrap();
    inbox.set_read_timeout(Some(STUCK)).unwrap();
    let outbox = from.ns.run(|| UdpSocket::bind((source, 0))).unwrap().unwrap();
    let (sent, mut received) = (bytes(DATAGRAM), vec![0; DATAGRAM + 1]);
    outbox.send_to(&sent, inbox.local_addr().unwrap()).unwrap();
    let len = inbox.recv(&mut received).unwrap();
    assert!(received[..len] == sent, "{family}: {len} bytes arrived, or other ones");
}

fn stream(from: &Pod, to: &Pod, family: Family, len: usize) {
    let target = to.addr(family).unwrap();
    let listener = to.ns.run(|| TcpListener::bind((target, 0))).unwrap().unwrap();
    let target = listener.local_addr().unwrap();
    let sent = bytes(len);
    let mut outbox = from.ns.run(|| TcpStream::connect_timeout(&target, STUCK)).unwrap().unwrap();
    outbox.set_write_timeout(Some(STUCK)).unwrap();
    let (mut inbox, _) = listener.accept().unwrap();
    inbox.set_read_timeout(Some(STUCK)).unwrap();
    let received = std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut received = Vec::new();
            inbox.read_to_end(&mut received).map(|_| received)
        });
        outbox.write_all(&sent).unwrap();
        drop(outbox);
        reader.join().unwrap().unwrap()
    });
    assert!(received == sent, "{family}: {} of {len} bytes arrived, or other ones", received.len());
}
