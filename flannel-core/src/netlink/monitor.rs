//! Converts notifications to hints.

mod addresses;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};

use netlink_sys::Socket;
use nix::libc::{
    RTM_DELADDR, RTM_DELLINK, RTM_DELNEIGH, RTM_DELROUTE, RTM_NEWADDR, RTM_NEWLINK, RTM_NEWNEIGH, RTM_NEWROUTE,
};

use addresses::Addresses;

use super::codec::neighbour::Table;
use super::codec::{Batch, Message, Unreadable, address, link, messages, neighbour, route};
use super::observe::read_links;
use super::pending_hints::PendingHints;
use super::wire::{RECEIVE_BUFFER, Receive, Wire, open_socket, receive};
use crate::kernel::{Hint, HostAddress, HostFacts, KernelError, Link, LinkId, LinkKind, OverlayName, Scope, SeenLink};
use crate::net::{Family, MacAddr, is_automatic};

/// Multicast groups: link, neigh, IPv4 and IPv6 ifaddr and route (`enum rtnetlink_groups`).
const GROUPS: [u32; 6] = [1, 3, 5, 7, 9, 11];

/// The most datagrams read in a row, so that a flood of notifications does not delay requests.
const DRAIN: usize = 16_384;

/// The most of this kernel's writes to match: those of several sends, in case a drain was interrupted.
const ECHOES: usize = 16 * Batch::MAX;

const DATAGRAM: usize = 32 << 10;

/// After this many failed receives in a row, the cause is not an overrun: the socket is broken.
const FAILURES: u32 = 8;

/// Receives notifications, and sends each listener hints about relevant changes that its own overlay did not make.
///
/// Notifications of this kernel's writes are ignored for the overlay that wrote last, and reported to all others.
/// Notifications of routes and most neighbours contain the port of the requesting socket (docs/kernel-facts.md, "Echoes
/// of own writes"). Those of FDB entries, deleted neighbours and links do not. But the kernel queues a notification
/// before it acknowledges the request, so all echoes of a send have arrived once it is acknowledged, and can be matched
/// with the writes of that send. Unmatched writes are dropped then, because their echoes will never come. Addresses are
/// compared with the known addresses, including its own writes.
#[derive(Debug)]
pub(crate) struct Monitor {
    socket: Socket,
    buffer: Vec<u8>,
    /// The last known state of the links, in the order of their indexes: those whose changes may cause a hint, but at
    /// most [`HostFacts::MOST_LINKS`] in addition to those of scopes.
    links: Vec<SeenLink>,
    /// Whether links were left out since the last full read: then every change of an unknown link causes a hint.
    links_left_out: bool,
    addresses: Addresses,
    watches: Vec<Watch>,
    /// The overlay whose echoes are expected now.
    writer: Option<OverlayName>,
    echoes: BTreeMap<Echo, u32>,
    /// The device that is being changed: the kernel's follow-up changes are attributed to the writer.
    flux: Option<u32>,
    /// Notifications were lost, so links and addresses have to be read again.
    stale: bool,
    /// There is a new scope, so links that only this scope concerns may be missing.
    incomplete: bool,
    receive: Receive,
    /// The number of failed receives in a row.
    failures: u32,
}

/// A write of this kernel whose notification has no port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Echo {
    PutFdb { index: u32, mac: MacAddr, dst: IpAddr },
    DeleteFdb { index: u32, mac: MacAddr, dst: IpAddr },
    DeleteNeighbour { index: u32, addr: IpAddr },
}

/// The cause of a notification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Author {
    /// This kernel, for the overlay that wrote last.
    Us,
    /// Any other process or the kernel itself.
    Others,
}

/// The links read so far.
#[derive(Debug, Default)]
struct Listed {
    links: Vec<SeenLink>,
    /// Whether links were left out.
    left_out: bool,
}

#[derive(Debug)]
struct Watch {
    scope: Scope,
    ids: BTreeMap<u32, LinkId>,
    listeners: Vec<Weak<PendingHints>>,
}

impl Monitor {
    /// Opens the socket and joins the groups. The current state is read later.
    ///
    /// # Errors
    /// [`KernelError::Lost`] when the socket cannot be opened.
    pub(crate) fn open() -> Result<Self, KernelError> {
        Self::with_receive_buffer(RECEIVE_BUFFER)
    }

    fn with_receive_buffer(bytes: usize) -> Result<Self, KernelError> {
        let socket = join(bytes).map_err(|error| KernelError::Lost {
            doing: "subscribing to notifications".to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Self {
            socket,
            buffer: vec![0; DATAGRAM],
            links: Vec::new(),
            links_left_out: false,
            addresses: Addresses::default(),
            watches: Vec::new(),
            writer: None,
            echoes: BTreeMap::new(),
            flux: None,
            stale: true,
            incomplete: false,
            receive,
            failures: 0,
        })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Returns whether there are listeners.
    pub(crate) fn is_wanted(&mut self) -> bool {
        for watch in &mut self.watches {
            watch.listeners.retain(|pending| pending.strong_count() > 0);
        }
        self.watches.retain(|watch| !watch.listeners.is_empty());
        !self.watches.is_empty()
    }

    /// Sends `pending` hints about `scope`, which replaces an earlier scope of the same overlay.
    pub(crate) fn watch(&mut self, scope: Scope, pending: &Arc<PendingHints>) {
        let known = self.watches.iter().position(|watch| watch.scope.overlay == scope.overlay);
        self.incomplete |= !self.watches.iter().any(|watch| watch.scope == scope);
        let ids = scope.identify(&self.links);
        match known.and_then(|place| self.watches.get_mut(place)) {
            Some(watch) => {
                watch.scope = scope;
                watch.ids = ids;
                watch.listeners.push(Arc::downgrade(pending));
            }
            None => self.watches.push(Watch { scope, ids, listeners: vec![Arc::downgrade(pending)] }),
        }
    }

    /// Returns whether links and addresses have to be read again.
    pub(crate) fn is_stale(&self) -> bool {
        self.stale
    }

    /// Returns whether the socket is broken.
    pub(crate) fn is_broken(&self) -> bool {
        self.failures >= FAILURES
    }

    /// Returns the listeners, to be moved to another monitor.
    pub(crate) fn dismiss(mut self) -> Vec<(Scope, Arc<PendingHints>)> {
        let watches = std::mem::take(&mut self.watches);
        let listeners = watches.into_iter().flat_map(|Watch { scope, listeners, .. }| {
            listeners.into_iter().filter_map(move |pending| Some((scope.clone(), pending.upgrade()?)))
        });
        listeners.collect()
    }

    /// Reads links and addresses, to compare notifications with them.
    pub(crate) fn resync(&mut self, wire: &mut Wire, batch: &mut Batch) -> Result<(), KernelError> {
        let mut addresses = Addresses::default();
        for family in Family::BOTH {
            address::dump(batch, family, 0);
            addresses = wire.fold(
                batch,
                "reading addresses",
                || addresses.clone(),
                |addresses, message| {
                    if let Some(seen) = address::decode(message.payload)? {
                        addresses.is_news(&seen, true);
                    }
                    Ok(())
                },
            )?;
        }
        self.addresses = addresses;
        link::dump(batch);
        let take = |listed: &mut Listed, message: &Message<'_>| {
            link::decode(message.payload)?.into_iter().for_each(|seen| self.list(listed, seen));
            Ok(())
        };
        let mut listed = wire.fold(batch, "reading links", Listed::default, take)?;
        listed.links.sort_by_key(|seen| seen.index);
        (self.links, self.links_left_out) = (listed.links, listed.left_out);
        (self.stale, self.incomplete) = (false, false);
        self.identify();
        Ok(())
    }

    /// Adds a link to the list.
    fn list(&self, listed: &mut Listed, seen: SeenLink) {
        // Links of a scope are kept regardless of the number of others.
        if self.is_concerned(&seen) || (listed.links.len() < HostFacts::MOST_LINKS && self.is_kept(&seen)) {
            listed.links.push(seen);
        } else {
            listed.left_out |= self.is_kept(&seen);
        }
    }

    /// Reads the links that only a new scope concerns. The others keep their last known state, because their unread
    /// notifications still have to cause hints.
    pub(crate) fn complete(&mut self, wire: &mut Wire, batch: &mut Batch) -> Result<(), KernelError> {
        if !self.incomplete {
            return Ok(());
        }
        for seen in read_links(wire, batch, |seen| self.is_concerned(seen))? {
            if let Err(place) = self.place(seen.index) {
                self.links.insert(place, seen);
                // An unread notification may report the same state, and is then ignored.
                self.raise_all(Hint::FactsChanged);
                self.changed();
            }
        }
        self.incomplete = false;
        self.identify();
        Ok(())
    }

    fn identify(&mut self) {
        for watch in &mut self.watches {
            watch.ids = watch.scope.identify(&self.links);
        }
    }

    fn place(&self, index: u32) -> Result<usize, usize> {
        self.links.binary_search_by_key(&index, |known| known.index)
    }

    /// Sets the overlay whose writes follow.
    pub(crate) fn begin(&mut self, port: u32, writer: &OverlayName) {
        if self.writer.as_ref() != Some(writer) {
            // Unread notifications belong to the previous writer.
            if !self.drain(port) {
                self.lost();
            }
            self.writer = Some(writer.clone());
        }
    }

    /// Records a write that is about to be sent.
    pub(crate) fn expect(&mut self, echo: Echo) {
        if self.echoes.len() >= ECHOES {
            self.echoes.clear();
        }
        *self.echoes.entry(echo).or_default() += 1;
    }

    /// Records an address that was added or deleted. The notification of an IPv6 address has no port and arrives only
    /// after duplicate address detection: by then the address is known, and no hint is sent.
    pub(crate) fn note_address(&mut self, link: u32, addr: IpAddr, len: u8, there: bool) {
        self.read_address(&HostAddress::new(link, addr, len), there, Author::Us);
    }

    /// Reads all notifications received so far; `port` is that of the request socket. Call it after each send, once the
    /// send is acknowledged. Returns false if there are more.
    pub(crate) fn drain(&mut self, port: u32) -> bool {
        for _ in 0..DRAIN {
            let mut buffer = std::mem::take(&mut self.buffer);
            let received = (self.receive)(&self.socket, &mut buffer);
            self.failures = if received.is_ok() { 0 } else { self.failures + 1 };
            match received {
                Ok(Some(len)) => {
                    for message in messages(&buffer[..len]) {
                        if message.and_then(|message| self.read(&message, port)).is_err() {
                            // An unreadable message may have reported any change.
                            self.raise_all(Hint::Lost);
                        }
                    }
                }
                Ok(None) => {
                    self.buffer = buffer;
                    self.echoes.clear();
                    return true;
                }
                Err(errno) => {
                    tracing::debug!(%errno, "kernel notifications were lost");
                    self.stale = true;
                    self.raise_all(Hint::Lost);
                    if self.is_broken() {
                        self.buffer = buffer;
                        return true;
                    }
                }
            }
            self.buffer = buffer;
        }
        false
    }

    /// Call this after a write to a device. All its changes are attributed to the writer if it is now as `expected`
    /// (`None`: deleted).
    pub(crate) fn settle_link(&mut self, port: u32, index: u32, expected: Option<&Link>) {
        self.flux = Some(index);
        self.drain(port);
        self.flux = None;
        let as_expected = match (self.link(index), expected) {
            (None, None) => true,
            (Some(seen), Some(expected)) => {
                seen.link.name == expected.name
                    && (expected.mac.is_none() || seen.link.mac == expected.mac)
                    && seen.link.mtu == expected.mtu
                    && seen.link.up == expected.up
                    && seen.link.group == expected.group
                    && seen.link.alias == expected.alias
            }
            _ => false,
        };
        if !as_expected {
            self.changed();
        }
    }

    /// Sends all listeners [`Hint::Changed`].
    pub(crate) fn changed(&mut self) {
        self.raise_all(Hint::Changed);
    }

    /// Sends all listeners [`Hint::Lost`].
    pub(crate) fn lost(&mut self) {
        self.raise_all(Hint::Lost);
    }

    fn raise_all(&self, hint: Hint) {
        for watch in &self.watches {
            watch.raise(hint);
        }
    }

    pub(crate) fn link(&self, index: u32) -> Option<&SeenLink> {
        self.place(index).ok().and_then(|place| self.links.get(place))
    }

    /// Returns whether this is a VXLAN device that learns FDB entries from packets.
    fn learns(&self, index: u32) -> bool {
        self.link(index).is_some_and(|seen| matches!(&seen.link.kind, LinkKind::Vxlan(vxlan) if vxlan.learning))
    }

    /// Returns whether the IDs of a scope depend on this link.
    fn is_concerned(&self, seen: &SeenLink) -> bool {
        self.watches.iter().any(|watch| watch.scope.concerns(seen))
    }

    /// Returns whether a change of a link may cause a hint.
    fn is_kept(&self, seen: &SeenLink) -> bool {
        Hint::tells_of(&seen.link.kind, self.addresses.of(seen.index)) || self.is_concerned(seen)
    }

    fn read(&mut self, message: &Message<'_>, port: u32) -> Result<(), Unreadable> {
        let author = if message.port != 0 && message.port == port { Author::Us } else { Author::Others };
        match message.kind {
            RTM_NEWLINK | RTM_DELLINK => {
                if let Some(seen) = link::decode(message.payload)? {
                    self.read_link(seen, message.kind == RTM_NEWLINK);
                }
            }
            RTM_NEWADDR | RTM_DELADDR => {
                if let Some(seen) = address::decode(message.payload)? {
                    self.read_address(&seen, message.kind == RTM_NEWADDR, author);
                }
            }
            RTM_NEWNEIGH | RTM_DELNEIGH => {
                if let Some(entry) = neighbour::decode(message.payload)? {
                    self.read_neighbour(&entry, message, author);
                }
            }
            RTM_NEWROUTE | RTM_DELROUTE => {
                if let Some(seen) = route::decode(message.payload)? {
                    self.read_route(&seen, author);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Attributes changes of the device being changed to the writer, whatever the notification says.
    fn author_on(&self, index: Option<u32>, author: Author) -> Author {
        if self.flux.is_some() && index == self.flux { Author::Us } else { author }
    }

    /// Returns the watches to which a change by `author` is relevant.
    fn others(&self, author: Author) -> impl Iterator<Item = &Watch> {
        self.watches.iter().filter(move |watch| watch.hears(author, self.writer.as_ref()))
    }

    fn read_link(&mut self, seen: SeenLink, there: bool) {
        let index = seen.index;
        let before = match (self.place(index), there) {
            // Changes of statistics and queues, which are not kept.
            (Ok(place), true) if self.links[place] == seen => return,
            (Ok(place), true) if self.links[place].link == seen.link => {
                self.links[place] = seen;
                return self.carrier_changed(index);
            }
            (Ok(place), true) => Some(std::mem::replace(&mut self.links[place], seen.clone())),
            (Err(_), true) if !self.is_kept(&seen) => return,
            (Err(place), true) => {
                if self.links.len() < HostFacts::MOST_LINKS || self.is_concerned(&seen) {
                    self.links.insert(place, seen.clone());
                } else {
                    self.links_left_out = true;
                }
                None
            }
            (Ok(place), false) => Some(self.links.remove(place)),
            (Err(_), false) if !self.links_left_out => return,
            (Err(_), false) => None,
        };
        let was_up = before.as_ref().is_some_and(|known| known.link.up);
        let goes_down = was_up && !(there && seen.link.up);
        let is_news = Hint::tells_of(&seen.link.kind, self.addresses.of(index));
        if !there {
            self.addresses.forget(index);
        }
        let author = self.author_on(Some(index), Author::Others);
        let after = there.then_some(&seen);
        for watch in &mut self.watches {
            let hears = watch.hears(author, self.writer.as_ref());
            // A link that would get no ID on its own does not change any other ID: many such links cost little.
            let concerned = before.iter().chain(after).any(|link| watch.scope.concerns(link));
            let mut touched = [None, None];
            let mut moved = false;
            if concerned {
                let ids = watch.scope.identify(&self.links);
                let former = std::mem::replace(&mut watch.ids, ids);
                touched = [former.get(&index).copied(), watch.ids.get(&index).copied()];
                moved = former != watch.ids;
            }
            if !hears {
                continue;
            }
            let is_uplink = touched.contains(&Some(LinkId::Uplink));
            if is_news || is_uplink {
                watch.raise(Hint::FactsChanged);
            }
            // The uplink's IPv4 routes disappear without their own notifications (docs/kernel-facts.md, "Link down").
            let in_scope = touched.iter().any(|id| matches!(id, Some(LinkId::Own(_) | LinkId::Other(_))));
            if in_scope || moved || (is_uplink && goes_down) {
                watch.raise(Hint::Changed);
            }
        }
    }

    /// Reports a changed carrier, which matters only for the uplink.
    fn carrier_changed(&self, index: u32) {
        for watch in self.others(self.author_on(Some(index), Author::Others)) {
            if watch.ids.get(&index) == Some(&LinkId::Uplink) {
                watch.raise(Hint::FactsChanged);
            }
        }
    }

    fn read_address(&mut self, seen: &HostAddress, there: bool, author: Author) {
        if !self.addresses.is_news(seen, there) {
            return;
        }
        for watch in self.others(self.author_on(Some(seen.link), author)) {
            let is_own = matches!(watch.ids.get(&seen.link), Some(LinkId::Own(_)));
            Hint::of_address(seen.addr, there, is_own).for_each(|hint| watch.raise(hint));
        }
    }

    fn read_neighbour(&mut self, entry: &neighbour::Entry, message: &Message<'_>, author: Author) {
        let there = message.kind == RTM_NEWNEIGH;
        let Some(echo) = echo_of(entry, there) else { return };
        let is_by_others = match entry.table {
            // A device that learns adds and ages out entries itself.
            Table::Fdb => entry.permanent || !self.learns(entry.index),
            // Neighbours that the kernel resolves itself are not permanent and have no port.
            Table::Neighbours => entry.permanent || !there || message.port != 0,
        };
        if !is_by_others {
            return;
        }
        let author = match echo {
            Some(echo) if author == Author::Others && self.take_echo(echo) => Author::Us,
            _ => self.author_on(Some(entry.index), author),
        };
        for watch in self.others(author) {
            if let Some(LinkId::Own(_)) = watch.ids.get(&entry.index) {
                watch.raise(Hint::Changed);
            }
        }
    }

    fn take_echo(&mut self, echo: Echo) -> bool {
        let Some(count) = self.echoes.get_mut(&echo) else { return false };
        *count -= 1;
        if *count == 0 {
            self.echoes.remove(&echo);
        }
        true
    }

    fn read_route(&mut self, seen: &route::SeenRoute, author: Author) {
        let local = is_automatic(seen.prefix.addr()) || seen.prefix.addr().is_multicast();
        let host = seen.forwards && !seen.has_own_protocol() && !local;
        let direct = seen.gateway.is_none() && seen.hops.is_empty();
        let is_news =
            host && seen.in_main_table() && (seen.prefix.len() == 0 || direct || self.addresses.connect(&seen.prefix));
        for watch in self.others(self.author_on(seen.index, author)) {
            if seen.in_territory(&watch.scope) {
                watch.raise(Hint::Changed);
            }
            let on_own = seen.index.is_some_and(|index| matches!(watch.ids.get(&index), Some(LinkId::Own(_))));
            if is_news && !on_own {
                watch.raise(Hint::FactsChanged);
            }
        }
    }
}

impl Watch {
    /// Returns whether a change by `author` is relevant to this overlay.
    fn hears(&self, author: Author, writer: Option<&OverlayName>) -> bool {
        match author {
            Author::Others => true,
            Author::Us => Some(&self.scope.overlay) != writer,
        }
    }

    fn raise(&self, hint: Hint) {
        for pending in self.listeners.iter().filter_map(Weak::upgrade) {
            pending.raise(hint);
        }
    }
}

fn join(receive_buffer: usize) -> io::Result<Socket> {
    // A device that goes down with thousands of neighbours causes as many messages (docs/kernel-facts.md, "Notification
    // socket overrun").
    let mut socket = open_socket(receive_buffer)?;
    socket.bind_auto()?;
    for group in GROUPS {
        socket.add_membership(group)?;
    }
    Ok(socket)
}

/// Returns `None` for irrelevant entries, and `Some(None)` for entries whose notifications have a port.
fn echo_of(entry: &neighbour::Entry, there: bool) -> Option<Option<Echo>> {
    let index = entry.index;
    match entry.table {
        Table::Fdb => {
            let (mac, dst) = (entry.mac?, entry.addr?);
            Some(Some(if there { Echo::PutFdb { index, mac, dst } } else { Echo::DeleteFdb { index, mac, dst } }))
        }
        Table::Neighbours => {
            let addr = entry.addr.filter(|addr| !addr.is_multicast() && !is_automatic(*addr))?;
            Some((!there).then_some(Echo::DeleteNeighbour { index, addr }))
        }
    }
}

#[cfg(test)]
impl Monitor {
    /// Makes all further receives fail.
    pub(crate) fn break_socket(&mut self) {
        self.receive = |_, _| Err(nix::errno::Errno::EIO);
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        for pending in self.watches.iter().flat_map(|watch| &watch.listeners).filter_map(Weak::upgrade) {
            pending.close();
        }
    }
}

#[cfg(test)]
mod tests;
