//! host-gw backend of flannelkit, compatible with flannel.
