//! The attached data plane, if any.

use std::collections::BTreeMap;

use nix::errno::Errno;

use crate::kernel::{DataPlane, Forward, ForwardKey, KernelError, LinkId, LinkKind, LinkName, State, Tunnel};
use crate::net::Prefix;

/// The data plane, if attached. Otherwise every call returns an error that says how to attach one.
#[derive(Default)]
pub(crate) struct Plane(Option<Box<dyn DataPlane>>);

impl Plane {
    pub(crate) fn attach(&mut self, plane: Box<dyn DataPlane>) {
        self.0 = Some(plane);
    }

    pub(crate) fn probe(&mut self, name: &LinkName) -> Result<(), KernelError> {
        self.attached(name)?.probe()
    }

    pub(crate) fn open(&mut self, name: &LinkName, index: Option<u32>, tunnel: &Tunnel) -> Result<u32, KernelError> {
        self.attached(name)?.open(name, index, tunnel)
    }

    pub(crate) fn keep(&mut self, index: u32) -> Result<(), KernelError> {
        self.0.as_mut().map_or_else(|| Err(not_open()), |plane| plane.keep(index))
    }

    pub(crate) fn write(&mut self, index: u32, changes: &[(Prefix, Option<Forward>)]) -> Result<(), KernelError> {
        self.0.as_mut().map_or_else(|| Err(not_open()), |plane| plane.write(index, changes))
    }

    pub(crate) fn close(&mut self, index: u32) {
        if let Some(plane) = &mut self.0 {
            plane.close(index);
        }
    }

    /// Adds tunnels, forwards and limitations, which netlink does not report, to a state that was read over netlink.
    pub(crate) fn observe(&self, state: &mut State, indices: &BTreeMap<LinkId, u32>) {
        let Some(plane) = &self.0 else { return };
        for (id, link) in &mut state.links {
            let (LinkKind::Tun(tun), Some(index)) = (&mut link.kind, indices.get(id)) else { continue };
            tun.tunnel = plane.held(*index);
            if tun.tunnel.is_some() {
                let forwards = plane.forwards(*index).into_iter();
                state.forwards.extend(forwards.map(|(prefix, forward)| (ForwardKey { link: *id, prefix }, forward)));
                let limitations = plane.limitations(*index);
                if !limitations.is_empty() {
                    state.limitations.insert(*id, limitations);
                }
            }
        }
    }

    fn attached(&mut self, name: &LinkName) -> Result<&mut Box<dyn DataPlane>, KernelError> {
        self.0.as_mut().ok_or_else(|| KernelError::Unsupported {
            what: format!("the device {name}"),
            hint: "its packets are carried by a data plane: attach one with NetlinkKernel::with_data_plane".to_owned(),
        })
    }
}

fn not_open() -> KernelError {
    KernelError::Refused {
        doing: "writing forwards".to_owned(),
        errno: Errno::ENODEV as i32,
        message: "no data plane is attached".to_owned(),
    }
}
