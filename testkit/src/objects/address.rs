//! Addresses.

use std::net::IpAddr;

use flannel_core::net::Family;
use serde::Deserialize;

use super::number;
use crate::{Error, Namespace};

/// An address on a link.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Address {
    /// The link.
    #[serde(default)]
    pub dev: String,
    /// The address.
    #[serde(rename = "local")]
    pub addr: IpAddr,
    /// The length of its prefix, in bits.
    #[serde(rename = "prefixlen")]
    pub len: u8,
    /// The scope, as for routes.
    #[serde(deserialize_with = "number")]
    pub scope: u8,
}

impl Address {
    /// Whether the kernel created it for the link itself, such as `fe80::1`.
    pub fn is_link_local(&self) -> bool {
        self.scope == super::Route::LINK
    }
}

impl Namespace {
    /// Returns all addresses.
    ///
    /// # Errors
    /// If the kernel refuses the dump.
    pub fn addresses(&self) -> Result<Vec<Address>, Error> {
        #[derive(Deserialize)]
        struct Row {
            #[serde(default)]
            ifname: String,
            #[serde(default)]
            addr_info: Vec<Address>,
        }
        let rows: Vec<Row> = self.list("addr")?;
        let of_row = |row: Row| row.addr_info.into_iter().map(move |it| Address { dev: row.ifname.clone(), ..it });
        Ok(rows.into_iter().flat_map(of_row).collect())
    }

    /// `ip addr add ADDR/LEN dev DEV nodad`: an IPv6 address can be used at once.
    ///
    /// # Errors
    /// The kernel's error; `EEXIST` if it exists.
    pub fn add_address(&self, dev: &str, addr: IpAddr, len: u8) -> Result<(), Error> {
        let more = match Family::of(addr) {
            // A network of one or two addresses has no broadcast address.
            Family::V4 if len < 31 => "brd +",
            Family::V4 => "",
            Family::V6 => "nodad",
        };
        self.ip(&format!("addr add {addr}/{len} dev {dev} scope global {more}")).map(drop)
    }

    /// `ip addr del ADDR/LEN dev DEV`
    ///
    /// # Errors
    /// The kernel's error, also if it does not exist.
    pub fn delete_address(&self, dev: &str, addr: IpAddr, len: u8) -> Result<(), Error> {
        self.ip(&format!("addr del {addr}/{len} dev {dev}")).map(drop)
    }
}
