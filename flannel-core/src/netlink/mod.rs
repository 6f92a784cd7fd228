//! The real kernel, over netlink.
