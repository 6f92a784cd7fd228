//! Notifications to hints.

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
use crate::kernel::{Hint, HostAddress, HostFacts, KernelError, Link, LinkId, OverlayName, Scope, SeenLink};
use crate::net::{Family, MacAddr, is_automatic};

/// Multicast groups: link, neigh, IPv4 and IPv6 ifaddr and route (`enum rtnetlink_groups`).
const GROUPS: [u32; 6] = [1, 3, 5, 7, 9, 11];

/// Most datagrams read in a row, so that a flood of notifications does not keep requests waiting.
const DRAIN: usize = 16_384;

/// Most own writes waited for: those of some sends, should a drain have been cut short.
const ECHOES: usize = 16 * Batch::MAX;

const DATAGRAM: usize = 32 << 10;

/// So many failed receives in a row are no overrun: the socket is broken.
const FAILURES: u32 = 8;

/// Listens to what happens, and tells each listener what matters and was not its own overlay.
///
/// Our own writes come back. They are no news to the overlay that wrote last; to any other they are. Routes and most
/// neighbour events carry the port of the socket that asked for them (docs/kernel-facts.md, "Echoes of own writes").
/// Forwarding entries, deleted neighbours and links carry none; but the kernel queues a notification before it
/// acknowledges the request, so all echoes of a send are there once its acknowledgement is, and can be matched with
/// what that send wrote. What is left over then will never come. Addresses are compared with what is known of them, our
/// own writes included.
#[derive(Debug)]
pub(crate) struct Monitor {
    socket: Socket,
    buffer: Vec<u8>,
    /// As last heard of, in the order of their indices: those that some change of would be told, but no more than
    /// [`HostFacts::MOST_LINKS`] beside those of scopes.
    links: Vec<SeenLink>,
    /// Whether there were more links since they were read: of those that are not known every change is news.
    links_left_out: bool,
    addresses: Addresses,
    watches: Vec<Watch>,
    /// The overlay whose writes come back now.
    writer: Option<OverlayName>,
    echoes: BTreeMap<Echo, u32>,
    /// A device that we are changing right now: the kernel's own clearing up after that is ours too.
    flux: Option<u32>,
    /// Notifications were lost, so links and addresses have to be read again.
    stale: bool,
    /// A scope is new, so links that only it is about may be missing.
    incomplete: bool,
    receive: Receive,
    /// Receives that failed in a row.
    failures: u32,
}

/// One of our writes whose notification has no port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Echo {
    PutFdb { index: u32, mac: MacAddr, dst: IpAddr },
    DeleteFdb { index: u32, mac: MacAddr, dst: IpAddr },
    DeleteNeighbour { index: u32, addr: IpAddr },
}

/// Who did what is heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Author {
    /// This kernel, for the overlay that wrote last.
    Us,
    /// Anybody else.
    Others,
}

/// The links, as they are read.
#[derive(Debug, Default)]
struct Listed {
    links: Vec<SeenLink>,
    /// Whether there are more than are kept.
    left_out: bool,
}

#[derive(Debug)]
struct Watch {
    scope: Scope,
    ids: BTreeMap<u32, LinkId>,
    listeners: Vec<Weak<PendingHints>>,
}

impl Monitor {
    /// Joins the groups, then reads what there is.
    ///
    /// # Errors
    /// [`KernelError::Lost`] when there is no socket to be had.
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

    /// Whether anybody still listens.
    pub(crate) fn is_wanted(&mut self) -> bool {
        for watch in &mut self.watches {
            watch.listeners.retain(|pending| pending.strong_count() > 0);
        }
        self.watches.retain(|watch| !watch.listeners.is_empty());
        !self.watches.is_empty()
    }

    /// Tells `pending` what concerns `scope`, which replaces an earlier one of the same overlay.
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

    /// Whether links and addresses have to be read again.
    pub(crate) fn is_stale(&self) -> bool {
        self.stale
    }

    /// Whether nothing will be heard through this socket any more.
    pub(crate) fn is_broken(&self) -> bool {
        self.failures >= FAILURES
    }

    /// Who listens, to be told by another monitor from now on.
    pub(crate) fn dismiss(mut self) -> Vec<(Scope, Arc<PendingHints>)> {
        let watches = std::mem::take(&mut self.watches);
        let listeners = watches.into_iter().flat_map(|Watch { scope, listeners, .. }| {
            listeners.into_iter().filter_map(move |pending| Some((scope.clone(), pending.upgrade()?)))
        });
        listeners.collect()
    }

    /// Reads links and addresses, to compare notifications with.
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

    /// Takes in a link that is read.
    fn list(&self, listed: &mut Listed, seen: SeenLink) {
        // Those of a scope are found whatever the others are.
        if self.is_concerned(&seen) || (listed.links.len() < HostFacts::MOST_LINKS && self.is_kept(&seen)) {
            listed.links.push(seen);
        } else {
            listed.left_out |= self.is_kept(&seen);
        }
    }

    /// Reads the links that only a new scope is about. The others stay as last heard of: what was not yet read of them is
    /// still to be told.
    pub(crate) fn complete(&mut self, wire: &mut Wire, batch: &mut Batch) -> Result<(), KernelError> {
        if !self.incomplete {
            return Ok(());
        }
        for seen in read_links(wire, batch, |seen| self.is_concerned(seen))? {
            if let Err(place) = self.place(seen.index) {
                self.links.insert(place, seen);
                // A notification that is still to be read may say the same, and is then none.
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

    /// Announces that what is written from now on is `writer`'s.
    pub(crate) fn begin(&mut self, port: u32, writer: &OverlayName) {
        if self.writer.as_ref() != Some(writer) {
            // What is still to be read was written by the one before.
            if !self.drain(port) {
                self.lost();
            }
            self.writer = Some(writer.clone());
        }
    }

    /// Announces a write that is about to be sent.
    pub(crate) fn expect(&mut self, echo: Echo) {
        if self.echoes.len() >= ECHOES {
            self.echoes.clear();
        }
        *self.echoes.entry(echo).or_default() += 1;
    }

    /// Notes an address that we added or deleted. An IPv6 one is announced without a port, and only once duplicate
    /// address detection is through: it is then known already, and no news.
    pub(crate) fn note_address(&mut self, link: u32, addr: IpAddr, len: u8, there: bool) {
        self.read_address(&HostAddress::new(link, addr, len), there, Author::Us);
    }

    /// Reads what came up to now; `port` is that of our requests. Due after each send, once it is acknowledged. False
    /// if there is more.
    pub(crate) fn drain(&mut self, port: u32) -> bool {
        for _ in 0..DRAIN {
            let mut buffer = std::mem::take(&mut self.buffer);
            let received = (self.receive)(&self.socket, &mut buffer);
            self.failures = if received.is_ok() { 0 } else { self.failures + 1 };
            match received {
                Ok(Some(len)) => {
                    for message in messages(&buffer[..len]) {
                        if message.and_then(|message| self.read(&message, port)).is_err() {
                            // What cannot be read may have said anything.
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

    /// After a device was written: whatever happened to it was us, if it now is as `expected` (`None`: gone).
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

    /// Tells everybody to look.
    pub(crate) fn changed(&mut self) {
        self.raise_all(Hint::Changed);
    }

    /// Tells everybody that anything may have changed.
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

    /// Whether the ids of a scope depend on this link.
    fn is_concerned(&self, seen: &SeenLink) -> bool {
        self.watches.iter().any(|watch| watch.scope.concerns(seen))
    }

    /// Whether what becomes of a link may have to be told.
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

    /// What happens to a device that we are changing is the writer's, whoever is named.
    fn author_on(&self, index: Option<u32>, author: Author) -> Author {
        if self.flux.is_some() && index == self.flux { Author::Us } else { author }
    }

    /// Those to whom it is news.
    fn others(&self, author: Author) -> impl Iterator<Item = &Watch> {
        self.watches.iter().filter(move |watch| watch.hears(author, self.writer.as_ref()))
    }

    fn read_link(&mut self, seen: SeenLink, there: bool) {
        let index = seen.index;
        let before = match (self.place(index), there) {
            // Statistics, queues: nothing of that is kept.
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
            // A link that would get no id if it were alone changes nobody's: a storm of such links is cheap.
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
            // The uplink's IPv4 routes go without a word of their own (docs/kernel-facts.md, "Link down").
            let in_scope = touched.iter().any(|id| matches!(id, Some(LinkId::Own(_) | LinkId::Other(_))));
            if in_scope || moved || (is_uplink && goes_down) {
                watch.raise(Hint::Changed);
            }
        }
    }

    /// Only of the uplink it matters whether it has a carrier.
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
        // What the kernel resolves by itself is not permanent and comes without a port.
        let weighty = entry.permanent || !there || (message.port != 0 && entry.table == Table::Neighbours);
        if !weighty {
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
    /// Whether what `author` did is news to this overlay.
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
    // A device going down with thousands of neighbours says so in as many messages (docs/kernel-facts.md, "Notification
    // socket overrun").
    let mut socket = open_socket(receive_buffer)?;
    socket.bind_auto()?;
    for group in GROUPS {
        socket.add_membership(group)?;
    }
    Ok(socket)
}

/// `None` for entries that are nobody's business; `Some(None)` for those that have their port.
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
    /// From now on nothing can be received.
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
