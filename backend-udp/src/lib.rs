//! UDP backend of flannelkit, compatible with flannel: each IP packet of the overlay travels as the payload of one UDP
//! datagram, without any header of ours.
#![cfg(target_os = "linux")]

#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod path;
