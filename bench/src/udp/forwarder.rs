//! What one would write today: tun-rs and quinn-udp, each with its offloads on, and as little as possible in between.
//! It knows one peer, looks nothing up and checks nothing.

use std::io::{ErrorKind, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{setsockopt, sockopt};
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use tun_rs::{DeviceBuilder, GROTable, IDEAL_BATCH_SIZE, SyncDevice, VIRTIO_NET_HDR_LEN};

use bench::Error;
use bench::peers::NETWORK;

use crate::udp::pair::{Host, Pair};

const DEVICE: &str = "tun0";
const PORT: u16 = 8285;
/// The most that one send takes, and a read gives.
const MOST: usize = 65_507;
/// What the sockets hold, as ours do.
const RECEIVE: usize = 8 << 20;
const SEND: usize = 4 << 20;
/// Datagrams, or runs of them, received in one call.
const SLOTS: usize = 8;

/// A running forwarder. Its threads end when it is dropped.
#[derive(Debug)]
pub(crate) struct Forwarder {
    stop: Arc<EventFd>,
    threads: Vec<JoinHandle<Result<Result<(), Error>, testkit::Error>>>,
}

impl Forwarder {
    /// One on each host.
    pub(crate) fn both(pair: &Pair, mtu: u32) -> Result<[Self; 2], Error> {
        let [one, two] = &pair.hosts;
        Ok([Self::start(one, two, mtu)?, Self::start(two, one, mtu)?])
    }

    fn start(host: &Host, peer: &Host, mtu: u32) -> Result<Self, Error> {
        let (device, socket) = host.ns.run(|| -> Result<_, Error> {
            let device = DeviceBuilder::new().name(DEVICE).offload(true).build_sync()?;
            device.set_nonblocking(true)?;
            let socket = UdpSocket::bind((host.public(), PORT))?;
            setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE)
                .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &RECEIVE))?;
            setsockopt(&socket, sockopt::SndBufForce, &SEND)
                .or_else(|_| setsockopt(&socket, sockopt::SndBuf, &SEND))?;
            Ok((device, socket))
        })??;
        host.ns.ip(&format!("link set {DEVICE} mtu {mtu} up"))?;
        host.ns.add_address(DEVICE, host.inner().into(), 32)?;
        host.ns.ip(&format!("route add {NETWORK} dev {DEVICE}"))?;
        let ends = Arc::new(Ends {
            state: UdpSocketState::new((&socket).into())?,
            device,
            socket,
            peer: (peer.public(), PORT).into(),
            stop: Arc::new(EventFd::new()?),
        });
        let (sender, receiver) = (Arc::clone(&ends), Arc::clone(&ends));
        let threads = vec![host.ns.spawn(move || sender.send())?, host.ns.spawn(move || receiver.receive())?];
        Ok(Self { stop: Arc::clone(&ends.stop), threads })
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        // Nobody reads it, so it wakes both threads.
        let _ = self.stop.write(1);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

struct Ends {
    device: SyncDevice,
    socket: UdpSocket,
    state: UdpSocketState,
    peer: SocketAddr,
    stop: Arc<EventFd>,
}

impl Ends {
    /// From the device to the peer: runs of packets of one size leave in one call.
    fn send(&self) -> Result<(), Error> {
        let mut read = vec![0; VIRTIO_NET_HDR_LEN + 65_535];
        let mut packets = vec![vec![0; 2048]; IDEAL_BATCH_SIZE];
        let mut sizes = vec![0; IDEAL_BATCH_SIZE];
        let mut run = Vec::with_capacity(MOST);
        let most = self.state.max_gso_segments();
        loop {
            let count = match self.device.recv_multiple(&mut read, &mut packets, &mut sizes, 0) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    match self.wait(&self.device, PollFlags::POLLIN)? {
                        true => continue,
                        false => return Ok(()),
                    }
                }
                Err(error) => return Err(error.into()),
            };
            let (mut size, mut segments) = (0, 0);
            for packet in packets.iter().zip(&sizes).take(count).filter_map(|(packet, size)| packet.get(..*size)) {
                let ended = run.len() != size * segments;
                if ended || packet.len() > size || segments == most || run.len() + packet.len() > MOST {
                    self.flush(&mut run, size)?;
                    (size, segments) = (packet.len(), 0);
                }
                run.extend_from_slice(packet);
                segments += 1;
            }
            self.flush(&mut run, size)?;
        }
    }

    fn flush(&self, run: &mut Vec<u8>, size: usize) -> Result<(), Error> {
        if run.is_empty() {
            return Ok(());
        }
        let segment_size = (run.len() > size).then_some(size);
        let transmit = Transmit { destination: self.peer, ecn: None, contents: run, segment_size, src_ip: None };
        while let Err(error) = self.state.try_send((&self.socket).into(), &transmit) {
            // What else the kernel refuses is lost, as any packet may be.
            if error.kind() != ErrorKind::WouldBlock || !self.wait(&self.socket, PollFlags::POLLOUT)? {
                break;
            }
        }
        run.clear();
        Ok(())
    }

    /// From the peer to the device, which merges what belongs together.
    fn receive(&self) -> Result<(), Error> {
        let mut buffers = vec![vec![0; 65_535]; SLOTS];
        let mut metas = vec![RecvMeta::default(); SLOTS];
        let mut packets: Vec<Vec<u8>> = Vec::new();
        let mut table = GROTable::default();
        loop {
            let mut slices: Vec<_> = buffers.iter_mut().map(|buffer| IoSliceMut::new(buffer)).collect();
            let count = match self.state.recv((&self.socket).into(), &mut slices, &mut metas) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    match self.wait(&self.socket, PollFlags::POLLIN)? {
                        true => continue,
                        false => return Ok(()),
                    }
                }
                Err(error) => return Err(error.into()),
            };
            let received = buffers.iter().zip(&metas).take(count);
            let datagrams = received
                .flat_map(|(buffer, meta)| buffer.get(..meta.len).unwrap_or_default().chunks(meta.stride.max(1)));
            let mut filled = 0;
            for datagram in datagrams {
                if filled == packets.len() {
                    packets.push(Vec::with_capacity(VIRTIO_NET_HDR_LEN + MOST));
                }
                let Some(packet) = packets.get_mut(filled) else { break };
                packet.clear();
                packet.resize(VIRTIO_NET_HDR_LEN, 0);
                packet.extend_from_slice(datagram);
                filled += 1;
            }
            for batch in packets.get_mut(..filled).unwrap_or_default().chunks_mut(IDEAL_BATCH_SIZE) {
                // A packet that the device does not take is lost.
                let _ = self.device.send_multiple(&mut table, batch, VIRTIO_NET_HDR_LEN);
            }
        }
    }

    /// Waits until something can be read or written; not, once the forwarder is to end.
    fn wait(&self, what: impl AsFd, events: PollFlags) -> Result<bool, Error> {
        let mut polled = [PollFd::new(what.as_fd(), events), PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::NONE)?;
        let [_, stop] = polled;
        Ok(!stop.any().unwrap_or(false))
    }
}
