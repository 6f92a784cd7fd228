//! Checks whether devices can be created, without creating one.

use netlink_packet_route::link::InfoKind;
use nix::errno::Errno;

use super::codec::{Batch, link};
use super::plane::Plane;
use super::wire::{Wire, refusal};
use crate::kernel::{Device, KernelError, LinkKind};

/// Sends a request that every kernel refuses. Without privilege the kernel reports that first, without the driver that
/// next; with both it rejects the request itself. Without a device, the request changes a device that cannot exist.
pub(crate) fn probe(
    wire: &mut Wire,
    batch: &mut Batch,
    plane: &mut Plane,
    devices: &[Device],
) -> Result<(), KernelError> {
    match devices.iter().find(|device| !matches!(device.kind, LinkKind::External(_))) {
        None => ask(wire, batch, "writing routes", |batch| link::change(batch, 0, &link::Change::default())),
        Some(Device { kind: LinkKind::Vxlan(_), .. }) => ask_for(wire, batch, InfoKind::Vxlan),
        Some(Device { kind: LinkKind::Tun(_), name }) => {
            plane.probe(name)?;
            probe(wire, batch, plane, &[])
        }
        Some(Device { name, .. }) => Err(KernelError::Unsupported {
            what: format!("making the device {name}"),
            hint: "only VXLAN and TUN devices are created here; want others as LinkKind::External".to_owned(),
        }),
    }
}

/// Converts a refused creation to the error about a missing driver, if that is the cause.
pub(crate) fn without_driver(error: KernelError) -> KernelError {
    match error {
        KernelError::Refused { errno, message, .. }
            if errno == Errno::EOPNOTSUPP as i32 && (message.is_empty() || message.contains("Unknown device type")) =>
        {
            KernelError::Unsupported {
                what: "a vxlan device".to_owned(),
                hint: "load the driver (modprobe vxlan) or choose a backend without it".to_owned(),
            }
        }
        error => error,
    }
}

fn ask_for(wire: &mut Wire, batch: &mut Batch, kind: InfoKind) -> Result<(), KernelError> {
    ask(wire, batch, "making network devices", |batch| link::probe(batch, kind))
}

fn ask(wire: &mut Wire, batch: &mut Batch, doing: &str, question: impl FnOnce(&mut Batch)) -> Result<(), KernelError> {
    question(batch);
    let refused = wire.write(batch, doing)?;
    let Some((_, verdict)) = refused.into_iter().next() else { return Ok(()) };
    match without_driver(refusal(doing.to_owned(), verdict)) {
        // The kernel checked the request itself. The creation will report any other error.
        KernelError::Refused { .. } => Ok(()),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::test_namespace::in_new_namespace;

    #[test]
    fn a_kernel_without_the_driver_is_told_from_one_that_refuses() {
        let refused = |errno: Errno, message: &str| {
            without_driver(KernelError::Refused {
                doing: String::new(),
                errno: errno as i32,
                message: message.to_owned(),
            })
        };
        for text in ["", "Unknown device type"] {
            let error = refused(Errno::EOPNOTSUPP, text);
            assert!(
                matches!(&error, KernelError::Unsupported { hint, .. } if hint.contains("modprobe vxlan")),
                "{error}"
            );
        }
        assert!(matches!(refused(Errno::EOPNOTSUPP, "Cannot do that"), KernelError::Refused { .. }));
        assert!(matches!(refused(Errno::EEXIST, ""), KernelError::Refused { .. }));
    }

    #[test]
    fn a_kind_that_the_kernel_does_not_have_is_unsupported_and_one_it_has_is_not_made() {
        in_new_namespace(|| {
            let (wire, batch) = (&mut Wire::new(), &mut Batch::default());
            let links =
                |wire: &mut Wire, batch: &mut Batch| super::super::observe::read_links(wire, batch, |_| true).unwrap();
            let before = links(wire, batch);
            let answer = ask_for(wire, batch, InfoKind::Other("flannelkit-none".to_owned()));
            assert!(matches!(answer, Err(KernelError::Unsupported { .. })), "{answer:?}");
            assert_eq!(ask_for(wire, batch, InfoKind::Vxlan), Ok(()), "this test needs a kernel with VXLAN");
            assert_eq!(probe(wire, batch, &mut Plane::default(), &[]), Ok(()));
            assert_eq!(links(wire, batch), before);
        });
    }
}
