use std::net::Ipv4Addr;

use futures_util::{FutureExt, StreamExt};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use proptest::prelude::*;

use super::*;
use crate::kernel::Route;
use crate::net::{Dual, Prefix};
use crate::netlink::test_namespace::in_new_namespace;

fn scope() -> Scope {
    let networks = Dual { v4: Some("10.0.0.0/8".parse().unwrap()), v6: None };
    Scope::new(OverlayName::default(), networks)
}

#[test]
fn notifications_that_do_not_fit_are_a_lost_hint_and_later_ones_are_read() {
    in_new_namespace(|| {
        let (mut writer, mut wire, mut batch) = (Wire::new(), Wire::new(), Batch::default());
        let mut monitor = Monitor::with_receive_buffer(1).unwrap();
        monitor.resync(&mut wire, &mut batch).unwrap();
        let pending = Arc::new(PendingHints::default());
        monitor.watch(scope(), &pending);
        let mut hints = Box::pin(Arc::clone(&pending).hints());
        let mut blackhole = |n: u8| {
            let prefix = Prefix::new([10, 0, n, 0].into(), 24).unwrap();
            let route = Route { protocol: Route::BOOT, ..Route::blackhole(prefix) };
            let mut batch = Batch::default();
            let spread = route::Spread::Protocols;
            route::create(&mut batch, &route::NewRoute { prefix, route: &route, index: None, spread });
            assert_eq!(writer.write(&mut batch, "creating a route").unwrap(), []);
        };
        (0..100).for_each(&mut blackhole);
        monitor.drain(wire.port());
        assert!(monitor.is_stale());
        assert_eq!(hints.next().now_or_never().flatten(), Some(Hint::Lost));
        assert!(hints.next().now_or_never().is_none(), "what was lost covers what was not");
        monitor.resync(&mut wire, &mut batch).unwrap();
        blackhole(200);
        monitor.drain(wire.port());
        assert!(!monitor.is_stale());
        assert_eq!(hints.next().now_or_never().flatten(), Some(Hint::Changed));
    });
}

#[test]
fn a_socket_that_fails_for_ever_is_given_up_and_its_listeners_kept() {
    let mut monitor = Monitor::open().unwrap();
    let pending = Arc::new(PendingHints::default());
    monitor.watch(scope(), &pending);
    monitor.break_socket();
    monitor.drain(0);
    assert!(monitor.is_broken() && monitor.failures == FAILURES, "{} tries", monitor.failures);
    let listeners = monitor.dismiss();
    assert_eq!(listeners.len(), 1);
    pending.raise(Hint::SubscriptionBroken);
    pending.raise(Hint::Lost);
    pending.close();
    let hints: Vec<Hint> = pending.hints().collect().now_or_never().unwrap();
    assert_eq!(hints, [Hint::SubscriptionBroken, Hint::Lost]);
}

/// The subject of a notification, from a small set, so that notifications meet.
#[derive(Debug, Clone)]
enum Heard {
    Link { index: u32, name: u8, kind: u8, up: bool, ours: bool, there: bool },
    Address { index: u32, last: u8, there: bool },
    Fdb { index: u32, last: u8, there: bool },
    Neighbour { index: u32, last: u8, there: bool },
    Route { network: u8, last: u8, index: u32, there: bool },
    Nonsense(Vec<u8>),
}

fn any_heard() -> impl Strategy<Value = Heard> {
    prop_oneof![
        (1u32..6, 0u8..4, 0u8..3, any::<bool>(), any::<bool>(), any::<bool>())
            .prop_map(|(index, name, kind, up, ours, there)| Heard::Link { index, name, kind, up, ours, there }),
        (1u32..6, 0u8..4, any::<bool>()).prop_map(|(index, last, there)| Heard::Address { index, last, there }),
        (1u32..6, 0u8..4, any::<bool>()).prop_map(|(index, last, there)| Heard::Fdb { index, last, there }),
        (1u32..6, 0u8..4, any::<bool>()).prop_map(|(index, last, there)| Heard::Neighbour { index, last, there }),
        (0u8..20, 0u8..4, 1u32..6, any::<bool>()).prop_map(|(network, last, index, there)| Heard::Route {
            network,
            last,
            index,
            there
        }),
        proptest::collection::vec(any::<u8>(), 0..40).prop_map(Heard::Nonsense),
    ]
}

impl Heard {
    /// Returns the type and body, as the kernel sends them.
    fn message(&self) -> (u16, Vec<u8>) {
        let mut batch = Batch::default();
        let kind = match *self {
            Self::Link { index, name, kind, up, ours, there } => {
                let mut message = LinkMessage::default();
                message.header.index = index;
                message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
                let kind = [InfoKind::Veth, InfoKind::Bridge, InfoKind::Tun][usize::from(kind)].clone();
                message.attributes = vec![
                    LinkAttribute::IfName(format!("link{name}")),
                    LinkAttribute::Group(if ours { OverlayName::default().mark() } else { 0 }),
                    LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]),
                ];
                batch.push(RTM_NEWLINK, 0, &message);
                if there { RTM_NEWLINK } else { RTM_DELLINK }
            }
            Self::Address { index, last, there } => {
                let mut message = AddressMessage::default();
                message.header.index = index;
                message.header.prefix_len = 24;
                message.header.family = netlink_packet_route::AddressFamily::Inet;
                message.attributes = vec![AddressAttribute::Local([192, 0, 2, last].into())];
                batch.push(RTM_NEWADDR, 0, &message);
                if there { RTM_NEWADDR } else { RTM_DELADDR }
            }
            Self::Fdb { index, last, there } => {
                neighbour::put_fdb(&mut batch, index, MacAddr([2, 0, 0, 0, 0, last]), [192, 0, 2, last].into());
                if there { RTM_NEWNEIGH } else { RTM_DELNEIGH }
            }
            Self::Neighbour { index, last, there } => {
                neighbour::put(&mut batch, index, [10, 0, 0, last].into(), MacAddr([2, 0, 0, 0, 0, last]));
                if there { RTM_NEWNEIGH } else { RTM_DELNEIGH }
            }
            Self::Route { network, last, index, there } => {
                let prefix = Prefix::new([network, 0, last, 0].into(), 24).unwrap();
                let route = Route { protocol: Route::BOOT, ..Route::overlay(prefix, prefix.addr(), LinkId::Own(0)) };
                let spread = route::Spread::Protocols;
                route::create(&mut batch, &route::NewRoute { prefix, route: &route, index: Some(index), spread });
                if there { RTM_NEWROUTE } else { RTM_DELROUTE }
            }
            Self::Nonsense(ref bytes) => return (RTM_NEWROUTE, bytes.clone()),
        };
        (kind, messages(batch.bytes()).next().unwrap().unwrap().payload.to_vec())
    }
}

proptest! {
    #[test]
    fn whatever_is_heard_memory_is_that_of_what_there_is_and_no_news_is_swallowed(
        storm in proptest::collection::vec((any_heard(), 0u32..3, any::<bool>()), 0..200),
    ) {
        const PORT: u32 = 1;
        let mut monitor = Monitor::open().unwrap();
        let pending = Arc::new(PendingHints::default());
        let sibling = Arc::new(PendingHints::default());
        monitor.watch(scope(), &pending);
        let name = OverlayName::new("sibling").unwrap();
        monitor.watch(Scope { overlay: name, ..scope() }, &sibling);
        monitor.begin(PORT, &OverlayName::default());
        let (mut links, mut news, mut siblings_news) = (BTreeMap::new(), false, false);
        for (heard, port, flux) in &storm {
            monitor.flux = flux.then_some(1);
            monitor.expect(Echo::DeleteNeighbour { index: 1, addr: [10, 0, 0, 0].into() });
            let (kind, payload) = heard.message();
            let message = Message { kind, flags: 0, seq: 0, port: *port, payload: &payload };
            match monitor.read(&message, PORT) {
                // As a drain does with an unreadable message.
                Err(_) => monitor.lost(),
                Ok(()) if kind == RTM_NEWLINK || kind == RTM_DELLINK => {
                    let seen = link::decode(&payload).unwrap().unwrap();
                    if kind == RTM_NEWLINK {
                        links.insert(seen.index, seen);
                    } else {
                        links.remove(&seen.index);
                    }
                }
                Ok(()) => {}
            }
            let in_territory = matches!(heard, Heard::Route { network: 10, .. });
            news |= in_territory && *port != PORT && !flux;
            siblings_news |= in_territory;
        }
        let links: Vec<_> = links.into_values().collect();
        let matters = |seen: &&SeenLink| !seen.link.kind.is_veth() || monitor.is_concerned(seen);
        prop_assert!(links.iter().filter(matters).all(|seen| monitor.link(seen.index) == Some(seen)));
        prop_assert!(monitor.links.iter().all(|seen| links.contains(seen)), "{:?}", monitor.links);
        prop_assert!(monitor.addresses.len() <= 5 * 4 && monitor.echoes.len() <= ECHOES);
        let counts = monitor.addresses.counts();
        prop_assert_eq!(counts.values().sum::<usize>(), monitor.addresses.len());
        prop_assert!(counts.values().all(|count| *count > 0), "{:?}", counts);
        for watch in &monitor.watches {
            prop_assert_eq!(&watch.ids, &watch.scope.identify(&links));
        }
        for (pending, news) in [(pending, news), (sibling, siblings_news)] {
            pending.close();
            let hints: Vec<Hint> = pending.hints().collect().now_or_never().unwrap();
            prop_assert!(hints.len() <= 2, "hints merge: {:?}", hints);
            prop_assert!(!news || hints.contains(&Hint::Changed) || hints.contains(&Hint::Lost), "{:?}", hints);
        }
    }
}

#[test]
fn links_of_pods_are_not_kept_and_of_more_others_than_there_is_room_for_all_is_news() {
    let mut monitor = Monitor::open().unwrap();
    let pending = Arc::new(PendingHints::default());
    monitor.watch(scope(), &pending);
    let mut hints = Box::pin(Arc::clone(&pending).hints());
    let mut hears = |monitor: &mut Monitor, heard: &Heard| {
        let (kind, payload) = heard.message();
        monitor.read(&Message { kind, flags: 0, seq: 0, port: 2, payload: &payload }, 1).unwrap();
        std::iter::from_fn(|| hints.next().now_or_never().flatten()).collect::<Vec<_>>().first().copied()
    };
    let link = |index: u32, kind: u8, up, there| Heard::Link { index, name: 0, kind, up, ours: false, there };
    const MOST: u32 = HostFacts::MOST_LINKS as u32;
    for index in 1..=2 * MOST {
        assert_eq!(hears(&mut monitor, &link(index, 0, true, true)), None);
    }
    assert!(monitor.links.is_empty());
    for index in 1..=MOST + 100 {
        assert_eq!(hears(&mut monitor, &link(index, 1, true, true)), Some(Hint::FactsChanged));
    }
    assert_eq!(monitor.links.len(), HostFacts::MOST_LINKS);
    for (index, up, there, news) in
        [(1, true, true, false), (MOST + 1, true, true, true), (MOST + 1, true, false, true)]
    {
        assert_eq!(hears(&mut monitor, &link(index, 1, up, there)).is_some(), news, "{index}");
    }
    // A link of the overlay is kept nevertheless.
    let ours = Heard::Link { index: 3 * MOST, name: 0, kind: 1, up: true, ours: true, there: true };
    assert!(hears(&mut monitor, &ours).is_some() && monitor.link(3 * MOST).is_some());
    for n in 0..HostFacts::MOST_ADDRESSES as u32 / 4 + 100 {
        for last in 0..4 {
            assert!(hears(&mut monitor, &Heard::Address { index: 1 + n, last, there: true }).is_some());
        }
    }
    assert_eq!(monitor.addresses.len(), HostFacts::MOST_ADDRESSES);
    const BEYOND: u32 = HostFacts::MOST_ADDRESSES as u32 / 4 + 50;
    for (n, there, news) in [(1, true, false), (BEYOND, true, true), (BEYOND, false, true)] {
        assert_eq!(hears(&mut monitor, &Heard::Address { index: n, last: 1, there }).is_some(), news, "{n}");
    }
}

/// A monitor without known state, and a function that returns its listener's hints after each notification.
fn listener() -> (Monitor, impl FnMut(&mut Monitor, &Heard) -> Vec<Hint>) {
    let mut monitor = Monitor::open().unwrap();
    let pending = Arc::new(PendingHints::default());
    monitor.watch(scope(), &pending);
    let mut hints = Box::pin(Arc::clone(&pending).hints());
    let hears = move |monitor: &mut Monitor, heard: &Heard| {
        let (kind, payload) = heard.message();
        monitor.read(&Message { kind, flags: 0, seq: 0, port: 2, payload: &payload }, 1).unwrap();
        std::iter::from_fn(|| hints.next().now_or_never().flatten()).collect()
    };
    (monitor, hears)
}

#[test]
fn what_was_left_out_is_news_when_it_goes_though_there_is_room_by_then() {
    let (mut monitor, mut hears) = listener();
    let link = |index: u32, there| Heard::Link { index, name: 0, kind: 1, up: true, ours: false, there };
    const LINKS: u32 = HostFacts::MOST_LINKS as u32;
    (1..=LINKS + 1).for_each(|index| drop(hears(&mut monitor, &link(index, true))));
    hears(&mut monitor, &link(1, false));
    assert_eq!(hears(&mut monitor, &link(LINKS + 1, false)), [Hint::FactsChanged]);
    let address = |n: u32, there| Heard::Address { index: 1 + n / 4, last: (n % 4) as u8, there };
    const ADDRESSES: u32 = HostFacts::MOST_ADDRESSES as u32;
    (0..=ADDRESSES).for_each(|n| drop(hears(&mut monitor, &address(n, true))));
    hears(&mut monitor, &address(0, false));
    assert_eq!(hears(&mut monitor, &address(ADDRESSES, false)), [Hint::FactsChanged, Hint::Changed]);
    monitor.resync(&mut Wire::new(), &mut Batch::default()).unwrap();
    for heard in [link(LINKS + 1, false), address(ADDRESSES, false)] {
        assert_eq!(hears(&mut monitor, &heard), [], "all was read: nobody knew of it");
    }
}

#[test]
fn of_a_list_of_links_no_more_are_kept_than_there_is_room_for_but_all_of_scopes() {
    let (monitor, _) = listener();
    let seen = |index: u32, ours: bool| {
        let heard = Heard::Link { index, name: 0, kind: 1, up: true, ours, there: true };
        link::decode(&heard.message().1).unwrap().unwrap()
    };
    const MOST: u32 = HostFacts::MOST_LINKS as u32;
    let mut listed = Listed::default();
    (0..MOST).for_each(|index| monitor.list(&mut listed, seen(index, false)));
    assert!(!listed.left_out);
    (MOST..3 * MOST).for_each(|index| monitor.list(&mut listed, seen(index, index == 2 * MOST)));
    assert!(listed.left_out && listed.links.last() == Some(&seen(2 * MOST, true)));
    assert_eq!(listed.links.len(), HostFacts::MOST_LINKS + 1);
}

#[test]
fn a_link_that_only_a_new_scope_is_about_is_news_once_it_is_read() {
    let (mut monitor, _) = listener();
    let (mut wire, mut batch) = (Wire::new(), Batch::default());
    monitor.resync(&mut wire, &mut batch).unwrap();
    // As if the loopback device were a pod's.
    monitor.links.retain(|seen| seen.index != 1);
    let pending = Arc::new(PendingHints::default());
    let heard = || {
        let mut hints = Box::pin(Arc::clone(&pending).hints());
        std::iter::from_fn(|| hints.next().now_or_never().flatten()).collect::<Vec<_>>()
    };
    monitor.watch(Scope { uplink: Some(1), ..scope() }, &pending);
    monitor.complete(&mut wire, &mut batch).unwrap();
    assert!(monitor.link(1).is_some());
    assert_eq!(heard(), [Hint::FactsChanged, Hint::Changed]);
    monitor.complete(&mut wire, &mut batch).unwrap();
    assert_eq!(heard(), [], "nothing was read");
}

#[test]
fn the_addresses_of_one_link_take_no_others_place() {
    let (mut monitor, mut hears) = listener();
    let seen = |link: u32, n: u32| HostAddress::new(link, Ipv4Addr::from(n).into(), 32);
    (0..10_000).for_each(|n| monitor.read_address(&seen(1, n), true, Author::Others));
    assert_eq!(monitor.addresses.len(), HostFacts::MOST_OF_A_LINK);
    let another = Heard::Address { index: 2, last: 1, there: true };
    assert!(!hears(&mut monitor, &another).is_empty());
    assert_eq!(hears(&mut monitor, &another), [], "it is known");
}

#[test]
fn echoes_that_never_come_are_forgotten() {
    let mut monitor = Monitor::open().unwrap();
    for n in 0..3 * ECHOES as u32 {
        monitor.expect(Echo::DeleteNeighbour { index: 1, addr: Ipv4Addr::from(n).into() });
        assert!(monitor.echoes.len() <= ECHOES);
    }
    monitor.drain(0);
    assert!(monitor.echoes.is_empty(), "after a send nothing is waited for");
}
