//! Decides which of the conflicting records win.
//!
//! A record wins if no winner of lower rank conflicts with it. The winners' subnets are therefore disjoint and their
//! MAC addresses distinct, and a record only has to be compared with the winners next to it, however many records name
//! the same subnet. When a winner is removed, the records that conflict with it are judged in the order of rank,
//! separately for each subnet and address, until one of them wins.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::sync::Arc;

use super::reason::Reason;
use super::table::{Act, OwnedRank, Rank, Table};
use crate::lease::Lease;
use crate::net::{Family, MacAddr, Prefix};

/// What records conflict over: all records that name it conflict with one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ground {
    Subnet(Prefix),
    Mac(Family, MacAddr),
}

/// An entry in the queue.
struct Waiting {
    rank: OwnedRank,
    id: u32,
    /// The ground on which the next entry is judged if this one does not win.
    ground: Option<Ground>,
}

impl Waiting {
    fn order(&self) -> (Rank<'_>, u32) {
        (as_rank(&self.rank), self.id)
    }
}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> Ordering {
        self.order().cmp(&other.order())
    }
}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Waiting {}

fn as_rank((kept, outside, created, key): &OwnedRank) -> Rank<'_> {
    (*kept, *outside, *created, key.as_str())
}

/// Entries to be judged, the lowest rank first.
struct Agenda {
    /// Sorted by rank, the greatest first.
    pending: Vec<u32>,
    waiting: BinaryHeap<Reverse<Waiting>>,
}

impl Table {
    /// Returns the accepted entry with exactly this subnet.
    pub(super) fn holder(&self, subnet: &Prefix) -> Option<&Arc<Lease>> {
        let entry = self.entry(self.winner_around(*subnet)?);
        entry.accepted().filter(|lease| lease.subnets.get(subnet.family()) == Some(subnet))
    }

    /// Returns whether an accepted entry's subnet overlaps `prefix`.
    pub(super) fn is_held(&self, prefix: Prefix) -> bool {
        let around = self.winner_around(prefix).into_iter();
        around.chain(self.winners_inside(prefix)).any(|id| self.visit(id).accepted().is_some())
    }

    /// Returns the conflict that rejected this entry. Considers the first winner that each of the lookups finds, and
    /// returns the one of lowest rank.
    pub(super) fn conflict(&self, id: u32) -> Option<Reason> {
        let entry = self.visit(id);
        let overlap = |family: Family, id: u32| {
            let other = self.entry(id);
            let (subnet, theirs) = (entry.subnet(family)?, other.subnet(family)?);
            Some((other, Reason::Overlap { subnet, other: theirs, with: other.key()?.clone() }))
        };
        let same_mac = |family: Family| {
            let mac = entry.mac(family)?;
            let other = self.entry(self.mac_winner(family, mac)?);
            Some((other, Reason::SameMac { mac, with: other.key()?.clone() }))
        };
        let reasons = self.families.into_iter().flatten().flat_map(|family| {
            let subnet = entry.subnet(family);
            let around = subnet.and_then(|subnet| overlap(family, self.winner_around(subnet)?));
            let inside = subnet.and_then(|subnet| overlap(family, self.winners_inside(subnet).next()?));
            [around, same_mac(family), inside].into_iter().flatten()
        });
        reasons.min_by(|(a, _), (b, _)| a.rank().cmp(&b.rank())).map(|(_, reason)| reason)
    }

    /// Judges all entries marked for it. A verdict depends only on those of lower rank, so one pass in the order of
    /// ranks is enough.
    pub(super) fn settle(&mut self) {
        let mut pending = std::mem::take(&mut self.pending);
        pending.sort_unstable_by(|a, b| self.entry(*b).rank().cmp(&self.entry(*a).rank()));
        let mut agenda = Agenda { pending, waiting: BinaryHeap::new() };
        for (ground, rank) in std::mem::take(&mut self.freed) {
            self.ask_next(&mut agenda, ground, as_rank(&rank));
        }
        while let Some((id, ground)) = self.next(&mut agenda) {
            if !self.entry(id).winner {
                self.judge(&mut agenda, id, ground);
            }
        }
    }

    /// Judges one entry, and queues the entries whose verdict depends on it.
    fn judge(&mut self, agenda: &mut Agenda, id: u32, ground: Option<Ground>) {
        let mut rivals = Vec::new();
        let on_ground = ground.is_some_and(|ground| self.is_beaten_on(id, ground, &mut rivals));
        let is_beaten = on_ground || self.is_beaten(id, &mut rivals);
        // The rivals have a greater rank and are judged again. Until then they count as losers.
        for rival in rivals {
            // A rival may be in the list twice.
            if !self.entry(rival).winner {
                continue;
            }
            self.touch(rival);
            self.unset_winner(rival);
            self.entries[rival as usize].was_winner = true;
            self.wait(agenda, rival, None);
        }
        let was_winner = std::mem::take(&mut self.entries[id as usize].was_winner);
        if !is_beaten {
            self.touch(id);
            self.set_winner(id);
            return;
        }
        let Some(rank) = self.entry(id).owned_rank() else { return };
        if was_winner {
            let freed: Vec<_> = self.grounds(id).collect();
            freed.into_iter().for_each(|ground| self.ask_next(agenda, ground, as_rank(&rank)));
        }
        // If a record loses because of this very subnet or address, all others that name it lose too.
        if let Some(ground) = ground.filter(|_| !on_ground) {
            self.ask_next(agenda, ground, as_rank(&rank));
        }
    }

    /// Returns whether a winner of lower rank conflicts with an entry. Adds conflicting winners of greater rank to
    /// `rivals`. The checks that need one lookup come first.
    fn is_beaten(&self, id: u32, rivals: &mut Vec<u32>) -> bool {
        let families = || self.families.into_iter().flatten();
        let entry = self.entry(id);
        let around = |family| entry.subnet(family).and_then(|subnet| self.winner_around(subnet));
        let same_mac = |family| entry.mac(family).and_then(|mac| self.mac_winner(family, mac));
        let inside = |family| entry.subnet(family).into_iter().flat_map(|subnet| self.winners_inside(subnet));
        let winners = families().filter_map(around).chain(families().filter_map(same_mac));
        self.any_beats(id, winners.chain(families().flat_map(inside)), rivals)
    }

    fn is_beaten_on(&self, id: u32, ground: Ground, rivals: &mut Vec<u32>) -> bool {
        match ground {
            Ground::Subnet(subnet) => {
                let around = self.winner_around(subnet).into_iter();
                self.any_beats(id, around.chain(self.winners_inside(subnet)), rivals)
            }
            Ground::Mac(family, mac) => self.any_beats(id, self.mac_winner(family, mac).into_iter(), rivals),
        }
    }

    fn any_beats(&self, id: u32, mut winners: impl Iterator<Item = u32>, rivals: &mut Vec<u32>) -> bool {
        let rank = self.entry(id).rank();
        winners.any(|other| {
            let beats = self.visit(other).rank() < rank;
            if !beats {
                rivals.push(other);
            }
            beats
        })
    }

    /// Returns the subnets and addresses that an entry had as a winner, without those that no other record names.
    pub(super) fn grounds(&self, id: u32) -> impl Iterator<Item = Ground> + '_ {
        let entry = self.entry(id);
        let families = || self.families.into_iter().flatten();
        let subnets = families().filter_map(move |family| entry.subnet(family)).flat_map(|subnet| self.named(subnet));
        let macs = families().filter_map(move |family| Some(Ground::Mac(family, entry.mac(family)?)));
        let rank = entry.rank();
        subnets.map(Ground::Subnet).chain(macs).filter(move |ground| self.first_after(*ground, rank).is_some())
    }

    /// Returns each distinct subnet in the table that overlaps `prefix`.
    fn named(&self, prefix: Prefix) -> impl Iterator<Item = Prefix> + '_ {
        let family = prefix.family();
        let lengths = self.lengths.range((family, 0)..=(family, prefix.len())).map(|((_, len), _)| *len);
        let wider = lengths.filter_map(move |len| Prefix::masked(prefix.addr(), len).ok());
        let next = move |last: &Prefix| {
            let last = *last;
            let id = self.by_subnet[family as usize].from(|id| self.entry(id).subnet(family) <= Some(last)).next()?;
            self.visit(id).subnet(family).filter(|next| prefix.covers(next))
        };
        let narrower = std::iter::successors(Some(prefix), next).skip(1);
        wider.chain(narrower)
    }

    /// Returns the MAC address of an entry that an older entry has too, whichever of them fits the pool: nodes that
    /// started with different pools may disagree on the winner.
    pub(super) fn mac_shared_with_older(&self, id: u32) -> Option<MacAddr> {
        let entry = self.entry(id);
        let shared = |family: &Family| {
            let mac = entry.mac(*family)?;
            // The oldest entry that fits the pool, and the oldest that does not.
            let oldest = |outside| self.first_after(Ground::Mac(*family, mac), (false, outside, 0, ""));
            let mut oldest = [false, true].into_iter().filter_map(oldest);
            oldest.any(|other| self.entry(other).age() < entry.age()).then_some(mac)
        };
        Family::BOTH.iter().find_map(shared)
    }

    /// Returns the first entry on a ground after one of this rank.
    fn first_after(&self, ground: Ground, rank: Rank<'_>) -> Option<u32> {
        match ground {
            Ground::Subnet(subnet) => {
                let family = subnet.family();
                let index = &self.by_subnet[family as usize];
                let key = |id: u32| (self.entry(id).subnet(family), self.entry(id).rank());
                let id = index.from(|id| key(id) <= (Some(subnet), rank)).next()?;
                (self.visit(id).subnet(family) == Some(subnet)).then_some(id)
            }
            Ground::Mac(family, mac) => {
                let index = &self.by_mac[family as usize];
                let key = |id: u32| (self.entry(id).mac(family), self.entry(id).rank());
                let id = index.from(|id| key(id) <= (Some(mac), rank)).next()?;
                (self.visit(id).mac(family) == Some(mac)).then_some(id)
            }
        }
    }

    fn ask_next(&self, agenda: &mut Agenda, ground: Ground, after: Rank<'_>) {
        if let Some(id) = self.first_after(ground, after) {
            self.wait(agenda, id, Some(ground));
        }
    }

    fn wait(&self, agenda: &mut Agenda, id: u32, ground: Option<Ground>) {
        agenda.waiting.extend(self.entry(id).owned_rank().map(|rank| Reverse(Waiting { rank, id, ground })));
    }

    /// Removes and returns the queued entry of lowest rank.
    fn next(&mut self, agenda: &mut Agenda) -> Option<(u32, Option<Ground>)> {
        loop {
            let pending = agenda.pending.last().map(|id| self.entry(*id).rank());
            let waiting = agenda.waiting.peek().map(|Reverse(waiting)| as_rank(&waiting.rank));
            let waits_less = waiting.is_some_and(|waiting| pending.is_none_or(|pending| waiting < pending));
            if waits_less {
                return agenda.waiting.pop().map(|Reverse(waiting)| (waiting.id, waiting.ground));
            }
            let id = agenda.pending.pop()?;
            // Otherwise it was removed since, or is in the list twice.
            if std::mem::take(&mut self.entries[id as usize].queued) {
                return Some((id, None));
            }
        }
    }

    /// Returns the winner whose subnet equals or contains `prefix`.
    fn winner_around(&self, prefix: Prefix) -> Option<u32> {
        let family = prefix.family();
        // A winner between the two would be inside the containing one, but winners are disjoint.
        let id = self.won_subnets[family as usize].last_of(|id| self.entry(id).subnet(family) <= Some(prefix))?;
        self.visit(id).subnet(family).is_some_and(|subnet| subnet.covers(&prefix)).then_some(id)
    }

    /// Returns the winners whose subnets are inside `prefix` and not equal to it.
    fn winners_inside(&self, prefix: Prefix) -> impl Iterator<Item = u32> + '_ {
        let family = prefix.family();
        self.won_subnets[family as usize]
            .from(move |id| self.entry(id).subnet(family) <= Some(prefix))
            .take_while(move |id| self.visit(*id).subnet(family).is_some_and(|subnet| prefix.covers(&subnet)))
    }

    fn mac_winner(&self, family: Family, mac: MacAddr) -> Option<u32> {
        let id = self.won_macs[family as usize].from(|id| self.entry(id).mac(family) < Some(mac)).next()?;
        (self.visit(id).mac(family) == Some(mac)).then_some(id)
    }

    /// Adds an entry to the winners.
    fn set_winner(&mut self, id: u32) {
        self.entries[id as usize].winner = true;
        self.enter(id, Act::Insert);
    }

    /// Removes an entry from the winners.
    pub(super) fn unset_winner(&mut self, id: u32) {
        self.enter(id, Act::Remove);
        self.entries[id as usize].winner = false;
    }

    fn enter(&mut self, id: u32, act: Act) {
        let entries = &self.entries;
        let entry = &entries[id as usize];
        for family in self.families.into_iter().flatten() {
            if let Some(subnet) = entry.subnet(family) {
                let before = |other: u32| entries[other as usize].subnet(family) < Some(subnet);
                act.on(&mut self.won_subnets[family as usize], id, before);
            }
            if let Some(mac) = entry.mac(family) {
                let before = |other: u32| entries[other as usize].mac(family) < Some(mac);
                act.on(&mut self.won_macs[family as usize], id, before);
            }
        }
    }
}
