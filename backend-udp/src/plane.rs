//! The data plane: devices and their packet paths, behind the kernel trait.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flannel_core::kernel::{DataPlane, Forward, KernelError, Limitation, LinkName, OnChange, Tunnel};
use flannel_core::net::{Dual, Prefix};
use nix::errno::Errno;

use crate::path::{
    Buffers, Counters, Notify, OpenMode, Path, PathError, Settings, SocketError, Table, Tun, TunError, Watch,
    check_sockets, device_name, retry,
};

/// Carries packets between TUN devices and UDP sockets. Attach it to a kernel
/// ([`NetlinkKernel::with_data_plane`](flannel_core::netlink::NetlinkKernel::with_data_plane)). It is idle until a
/// backend wants such a device.
///
/// Each device has one thread that receives and one thread per queue that sends. The threads end when the data plane is
/// dropped.
#[derive(Default)]
pub struct UdpDataPlane {
    carried: BTreeMap<u32, Carried>,
    observer: Observer,
    changed: Option<OnChange>,
}

/// Shows the devices that a [`UdpDataPlane`] carries. Clones show the same data plane. It keeps nothing alive: once the
/// data plane is dropped, it shows no devices.
#[derive(Clone, Default)]
pub struct Observer(Arc<Mutex<BTreeMap<u32, Seen>>>);

/// A carried device: the data plane's side.
struct Carried {
    tunnel: Tunnel,
    path: Path,
}

/// A carried device: the observers' side.
struct Seen {
    name: LinkName,
    watch: Watch,
}

/// A device as shown by [`Observer::devices`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CarriedDevice {
    /// The device's name when it was opened.
    pub name: LinkName,
    /// The number of peers' subnets that it forwards to.
    pub forwards: usize,
    /// The counters since it was opened.
    pub counters: Counters,
    /// What makes it slower than possible.
    pub limitations: Vec<Limitation>,
}

impl Observer {
    /// Returns the devices in the order of their interface indices. Does not wait for traffic or for kernel locks.
    pub fn devices(&self) -> Vec<CarriedDevice> {
        let device = |Seen { name, watch }: &Seen| CarriedDevice {
            name: name.clone(),
            forwards: watch.forwards(),
            counters: watch.counters(),
            limitations: watch.limitations(),
        };
        self.lock().values().map(device).collect()
    }

    /// Held only while the map is read or changed, and not during a kernel call that may block.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.devices()).finish()
    }
}

impl fmt::Debug for UdpDataPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("UdpDataPlane").field(&self.observer).finish()
    }
}

impl UdpDataPlane {
    /// Creates a data plane without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns an observer for status pages and metrics.
    pub fn observer(&self) -> Observer {
        self.observer.clone()
    }

    /// Opens a device and carries its packets.
    fn start(&mut self, name: &LinkName, mode: OpenMode, tunnel: &Tunnel, table: Table) -> Result<u32, KernelError> {
        let queues = tunnel.queues.get().into();
        let tun = open_when_free(name, mode, queues).map_err(|error| open_error(name, error))?;
        let failed = |error| path_error(name, error);
        let notify = self.changed.clone().map_or_else(Notify::default, Notify::call);
        let settings = Settings::default().with_buffers(buffers(tunnel)).with_notify(notify);
        let path = Path::start(tun, settings, table).map_err(failed)?;
        path.set_sockets(sockets(tunnel)).map_err(failed)?;
        let index = path.tun().index();
        if let Some(changed) = self.changed.as_ref().filter(|_| !path.watch().limitations().is_empty()) {
            changed();
        }
        self.observer.lock().insert(index, Seen { name: name.clone(), watch: path.watch() });
        self.carried.insert(index, Carried { tunnel: *tunnel, path });
        Ok(index)
    }

    /// Stops carrying a device.
    fn end(&mut self, index: u32) -> Option<Carried> {
        self.observer.lock().remove(&index);
        self.carried.remove(&index)
    }

    fn get(&self, index: u32) -> Result<&Carried, KernelError> {
        self.carried.get(&index).ok_or_else(|| not_open(index))
    }
}

impl Drop for UdpDataPlane {
    fn drop(&mut self) {
        self.observer.lock().clear();
    }
}

/// Opens a device, also one that was just closed.
fn open_when_free(name: &LinkName, mode: OpenMode, queues: usize) -> Result<Tun, TunError> {
    retry(|| Tun::open(name.as_str(), mode, queues), |error| matches!(error, TunError::Busy { .. }))
}

/// Whether a device was deleted.
fn is_gone(index: u32) -> bool {
    device_name(index).is_err_and(is_no_device)
}

/// Whether this error of `device_name` means that no device has the index. Other errors say nothing about devices:
/// the process may be out of descriptors.
fn is_no_device(errno: Errno) -> bool {
    matches!(errno, Errno::ENXIO | Errno::ENODEV)
}

/// Returns a device's present name.
fn present_name(index: u32) -> Result<LinkName, KernelError> {
    let name = device_name(index).map_err(|errno| match errno {
        errno if is_no_device(errno) => not_open(index),
        errno => refused("reading the name of a TUN device", errno, errno),
    })?;
    name.to_str().ok().and_then(|name| LinkName::new(name).ok()).ok_or_else(|| not_open(index))
}

fn sockets(tunnel: &Tunnel) -> Dual<SocketAddr> {
    tunnel.local.map(|_, addr| SocketAddr::new(*addr, tunnel.port))
}

fn buffers(tunnel: &Tunnel) -> Buffers {
    let size = |bytes: u32| usize::try_from(bytes).unwrap_or(usize::MAX);
    tunnel.socket_buffer.map_or_else(Buffers::default, |bytes| Buffers::new(size(bytes), size(bytes)))
}

impl DataPlane for UdpDataPlane {
    fn on_change(&mut self, changed: OnChange) {
        self.changed = Some(changed);
    }

    fn probe(&mut self) -> Result<(), KernelError> {
        Tun::probe().map_err(|error| tun_error("making TUN devices", error))
    }

    fn open(&mut self, name: &LinkName, index: Option<u32>, tunnel: &Tunnel) -> Result<u32, KernelError> {
        // The path of a lost device still holds its port.
        let is_lost =
            |(index, device): (&u32, &Carried)| (!device.path.is_healthy() || is_gone(*index)).then_some(*index);
        for lost in self.carried.iter().filter_map(is_lost).collect::<Vec<_>>() {
            self.end(lost);
        }
        let Some(index) = index else {
            // Checked before the device is created, so that a device is not created and deleted in vain.
            let checked = retry(|| check_sockets(sockets(tunnel)), SocketError::is_in_use);
            checked.map_err(|error| path_error(name, error.into()))?;
            return self.start(name, OpenMode::Create, tunnel, Table::new(tunnel.subnets));
        };
        let threads = |tunnel: &Tunnel| (tunnel.queues, tunnel.socket_buffer);
        if let Some(device) = self.carried.get_mut(&index)
            && threads(&device.tunnel) == threads(tunnel)
        {
            device.path.set_sockets(sockets(tunnel)).map_err(|error| path_error(name, error))?;
            device.path.set_own(tunnel.subnets);
            device.tunnel = *tunnel;
            return Ok(index);
        }
        // A device that could not be renamed is opened under its present name.
        let present = present_name(index)?;
        // Its queues have to be closed before they can be opened again; the table is reused.
        let table = self.end(index).map(|device| Table::with_own(&device.path.table(), tunnel.subnets));
        let opened =
            self.start(&present, OpenMode::Attach, tunnel, table.unwrap_or_else(|| Table::new(tunnel.subnets)))?;
        if opened != index {
            // Another process replaced the device.
            self.end(opened);
            return Err(not_open(index));
        }
        Ok(index)
    }

    fn keep(&mut self, index: u32) -> Result<(), KernelError> {
        let tun = self.get(index)?.path.tun();
        tun.keep().map_err(|error| tun_error(&format!("keeping the TUN device {}", tun.name()), error))
    }

    fn held(&self, index: u32) -> Option<Tunnel> {
        let device = self.carried.get(&index).filter(|device| device.path.is_healthy())?;
        // A broken socket was closed.
        (device.path.sockets() == sockets(&device.tunnel)).then_some(device.tunnel)
    }

    fn write(&mut self, index: u32, changes: &[(Prefix, Option<Forward>)]) -> Result<(), KernelError> {
        let device = self.get(index)?;
        if changes.iter().any(|(_, forward)| forward.is_some_and(|forward| forward.key.is_some())) {
            return Err(refused("writing forwards", Errno::EOPNOTSUPP, "packets are not encrypted here"));
        }
        let endpoint = |forward: &Option<Forward>| forward.map(|forward| forward.endpoint);
        let changes: Vec<_> = changes.iter().map(|(prefix, forward)| (*prefix, endpoint(forward))).collect();
        device.path.change(&changes);
        Ok(())
    }

    fn forwards(&self, index: u32) -> Vec<(Prefix, Forward)> {
        let table = self.carried.get(&index).map(|device| device.path.table());
        table.iter().flat_map(|table| table.iter()).map(|(prefix, addr)| (prefix, Forward::to(addr))).collect()
    }

    fn limitations(&self, index: u32) -> Vec<Limitation> {
        self.carried.get(&index).map(|device| device.path.watch().limitations()).unwrap_or_default()
    }

    fn close(&mut self, index: u32) {
        self.end(index);
    }
}

fn refused(doing: impl Into<String>, errno: Errno, message: impl ToString) -> KernelError {
    KernelError::Refused { doing: doing.into(), errno: errno as i32, message: message.to_string() }
}

fn not_open(index: u32) -> KernelError {
    refused("using a TUN device", Errno::ENODEV, format!("the device with index {index} is not open"))
}

fn open_error(name: &LinkName, error: TunError) -> KernelError {
    tun_error(&format!("opening the TUN device {name}"), error)
}

fn tun_error(doing: &str, error: TunError) -> KernelError {
    let errno = match &error {
        TunError::Denied { .. } => {
            return KernelError::Denied { doing: doing.to_owned(), hint: "CAP_NET_ADMIN is needed".to_owned() };
        }
        TunError::Driver(source) if source.kind() == io::ErrorKind::PermissionDenied => {
            let hint = "/dev/net/tun has to be readable and writable for this program".to_owned();
            return KernelError::Denied { doing: doing.to_owned(), hint };
        }
        TunError::Driver(source) if has_no_driver(source) => {
            let hint =
                "load the module (modprobe tun), give the container /dev/net/tun, or choose a backend without it";
            return KernelError::Unsupported { what: "a TUN device".to_owned(), hint: hint.to_owned() };
        }
        TunError::Exists { .. } => Errno::EEXIST,
        TunError::Missing { .. } => Errno::ENODEV,
        TunError::Busy { .. } => Errno::EBUSY,
        TunError::Refused { source, .. } | TunError::Driver(source) => {
            Errno::from_raw(source.raw_os_error().unwrap_or(libc::EIO))
        }
        _ => Errno::EINVAL,
    };
    refused(doing, errno, error)
}

fn has_no_driver(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO))
}

fn path_error(name: &LinkName, error: PathError) -> KernelError {
    let errno = match &error {
        PathError::Socket(SocketError::NotHere { .. }) => Errno::EADDRNOTAVAIL,
        PathError::Socket(SocketError::InUse { .. }) => Errno::EADDRINUSE,
        PathError::Socket(SocketError::Refused { source, .. }) | PathError::Start(source) => {
            Errno::from_raw(source.raw_os_error().unwrap_or(libc::EIO))
        }
        _ => Errno::EIO,
    };
    refused(format!("carrying the packets of {name}"), errno, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_gone_only_if_the_kernel_knows_no_device_of_its_index() {
        assert_eq!([Errno::ENXIO, Errno::ENODEV].map(is_no_device), [true; 2]);
        let others = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::ENOBUFS, Errno::EPERM];
        assert_eq!(others.map(is_no_device), [false; 5]);
        // The loopback device is the first in every network namespace.
        assert_eq!([1, i32::MAX as u32].map(is_gone), [false, true]);
        assert!(present_name(1).is_ok_and(|name| name.as_str() == "lo"));
        assert!(matches!(
            present_name(i32::MAX as u32),
            Err(KernelError::Refused { errno, .. }) if errno == Errno::ENODEV as i32
        ));
    }
}
