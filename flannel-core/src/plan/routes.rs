//! Plans the writes of routes. The kernel keeps several routes to one destination, and refuses some combinations.

use std::collections::BTreeMap;
use std::fmt;

use super::{Conflict, Plan, Planner};
use crate::kernel::{LinkId, Object, Op, Route, RouteKey, RouteKind, RouteText, State, owns_route};
use crate::net::{Family, Prefix};

impl Planner<'_> {
    pub(super) fn routes(&mut self, wanted: BTreeMap<RouteKey, Route>, seen: &State) {
        let mut seen = seen.routes.iter().peekable();
        // Consumed, so that its memory is freed while the writes are planned.
        let mut wanted = wanted.into_iter().peekable();
        // Both are sorted by key: iterate over both together, one destination at a time.
        let (mut wants, mut have, mut here) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            let next_seen = seen.peek().map(|(key, _)| key.prefix);
            let next_wanted = wanted.peek().map(|(key, _)| key.prefix);
            let Some(prefix) = [next_seen, next_wanted].into_iter().flatten().min() else { break };
            have.clear();
            while let Some((_, route)) = seen.next_if(|(key, _)| key.prefix == prefix) {
                // Routes that disappear with their device do not count.
                if route.link.is_none_or(|link| !self.fresh.contains(&link)) {
                    have.push(route.clone());
                }
            }
            while let Some((_, want)) = wanted.next_if(|(key, _)| key.prefix == prefix) {
                wants.push(want.normalized(&prefix));
            }
            // The kernel refuses onlink routes while certain others are there, so these come first.
            wants.sort_by_key(|want| !want.onlink);
            self.make_room(prefix, &wants, &mut have);
            let foreign: Vec<Route> = match prefix.family() {
                Family::V4 => Vec::new(),
                Family::V6 => have.iter().filter(|route| !self.owns_route(&prefix, route)).cloned().collect(),
            };
            for want in wants.drain(..) {
                here.clear();
                here.extend(have.extract_if(.., |route| route.slot() == want.slot()));
                let is_there = here.iter().any(|route| route.same(&want));
                let elsewhere = foreign.iter().find(|route| route.slot() != want.slot() && keeps_out(route, &want));
                match elsewhere.filter(|_| !is_there) {
                    Some(foreign) => {
                        self.route_conflict(prefix, foreign);
                        self.unwanted_routes(prefix, &here);
                    }
                    None => self.wanted_route(prefix, want, &here),
                }
            }
            self.unwanted_routes(prefix, &have);
        }
    }

    /// Deletes routes of this overlay that would make the kernel refuse a wanted one, and removes them from `have`.
    fn make_room(&mut self, prefix: Prefix, wants: &[Route], have: &mut Vec<Route>) {
        if prefix.family() == Family::V4 || have.is_empty() {
            return;
        }
        let is_there = |want: &Route| have.iter().any(|route| route.same(want));
        // Deleting the overlay's routes does not help if a foreign route keeps the wanted one out.
        let is_free = |want: &Route| {
            let in_the_way = |route: &&Route| route.slot() == want.slot() || keeps_out(route, want);
            have.iter().filter(in_the_way).all(|route| self.owns_route(&prefix, route))
        };
        let missing: Vec<Route> = wants.iter().filter(|want| !is_there(want) && is_free(want)).cloned().collect();
        let blocked = |link: Option<LinkId>| link.is_some_and(|link| self.blocked.contains(&link));
        let is_in_the_way = |route: &Route| {
            let keeps_out = |want: &Route| keeps_out(route, want) && !blocked(want.link);
            missing.iter().any(keeps_out) && self.owns_route(&prefix, route)
        };
        let cleared: Vec<Route> = have.extract_if(.., |route| is_in_the_way(route)).collect();
        self.ops.route_clears.extend(cleared.into_iter().map(|route| Op::DeleteRoute { prefix, route }));
    }

    fn wanted_route(&mut self, prefix: Prefix, want: Route, have: &[Route]) {
        if want.kind == RouteKind::Blackhole && have.iter().any(|route| !self.owns_route(&prefix, route)) {
            // A blackhole is wanted only where no other program has a route. The kernel appends a bridge's connected
            // route behind it.
            return self.unwanted_routes(prefix, have);
        }
        if want.link.is_some_and(|link| self.blocked.contains(&link)) {
            let leaving = |route: &&Route| route.link.is_some_and(|link| self.leaving.contains(&link));
            return self.unwanted_routes(prefix, &have.iter().filter(leaving).cloned().collect::<Vec<_>>());
        }
        if let Some(place) = have.iter().position(|route| route.same(&want)) {
            for (nth, route) in have.iter().enumerate() {
                match nth.cmp(&place) {
                    std::cmp::Ordering::Equal => {}
                    _ if self.owns_route(&prefix, route) => {
                        self.ops.route_deletes.push(Op::DeleteRoute { prefix, route: route.clone() });
                    }
                    std::cmp::Ordering::Less => self.route_conflict(prefix, route),
                    // A foreign route behind the overlay's own carries no traffic and does no harm.
                    std::cmp::Ordering::Greater => {}
                }
            }
            return;
        }
        match have {
            [] => self.ops.puts.push(Op::CreateRoute { prefix, route: want }),
            [only] if self.owns_route(&prefix, only) => {
                self.ops.puts.push(Op::ReplaceRoute { prefix, change: Box::new((only.clone(), want)) });
            }
            _ => {
                let (ours, foreign): (Vec<_>, Vec<_>) =
                    have.iter().cloned().partition(|route| self.owns_route(&prefix, route));
                for route in ours {
                    self.ops.route_clears.push(Op::DeleteRoute { prefix, route });
                }
                match foreign.first() {
                    Some(foreign) => self.route_conflict(prefix, foreign),
                    None => self.ops.puts.push(Op::CreateRoute { prefix, route: want }),
                }
            }
        }
    }

    fn unwanted_routes(&mut self, prefix: Prefix, have: &[Route]) {
        for route in have {
            if self.owns_route(&prefix, route) {
                self.ops.route_deletes.push(Op::DeleteRoute { prefix, route: route.clone() });
            }
        }
    }

    fn route_conflict(&mut self, prefix: Prefix, foreign: &Route) {
        let is_told = self.conflicts.len() < Plan::MOST_TOLD;
        let text = |text: fmt::Arguments<'_>| if is_told { text.to_string() } else { String::new() };
        self.conflicts.push(Conflict {
            object: Object::Route(prefix),
            found: text(format_args!("{}", RouteText { prefix, route: foreign, scope: self.scope })),
            remedy: text(format_args!("not managed by this overlay: delete it (ip route delete {prefix}) or move it")),
        });
    }

    fn owns_route(&self, prefix: &Prefix, route: &Route) -> bool {
        // On a foreign device only the protocol identifies the overlay's routes: Go flannel's form requires a device of
        // this overlay.
        let blocked = route.link.is_some_and(|link| self.blocked.contains(&link));
        (!blocked || route.has_own_protocol()) && owns_route(prefix, route, self.scope, self.seen_links, self.claims)
    }
}

/// Returns whether the kernel refuses to write the IPv6 route `want` while `have` exists: no route of the main table
/// may lead to an `onlink` next hop through another device, not even the route to replace
/// (`ip6_route_check_nh_onlink`).
fn keeps_out(have: &Route, want: &Route) -> bool {
    want.onlink && have.kind != RouteKind::Blackhole && have.slot().is_in_main_table() && have.link != want.link
}
