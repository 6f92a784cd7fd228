//! VXLAN backend of flannelkit, compatible with flannel.
