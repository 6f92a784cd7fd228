//! Tests for devices that another program creates.

use super::*;

/// The scope of an overlay on a TUN that another program opens, the wanted state, and the observed TUN.
fn external() -> (Scope, State, Link) {
    let scope = scope_of(LinkKind::External("tun".into()));
    let link = wanted().links[&OWN].clone();
    let mut tun = wanted();
    (tun.fdb, tun.neighbours) = Default::default();
    tun.links.insert(OWN, Link { kind: LinkKind::External("tun".into()), ..link.clone() });
    (scope, tun, Link { kind: LinkKind::Other("tun".into()), ..link })
}

#[test]
fn what_is_wanted_on_an_external_device_is_written_while_it_is_there_and_the_device_never() {
    let (scope, wanted, tun) = external();
    let elsewhere = Link { name: LinkName::new("tun7").unwrap(), mtu: 9000, up: false, alias: None, ..tun };
    let bare = seen_on(elsewhere.clone(), &scope, &State::default());
    let written = plan(&wanted, &bare, &scope, &|_| None);
    let text =
        |plan: &Plan| -> Vec<String> { plan.ops.iter().map(|op| OpText { op, scope: &scope }.to_string()).collect() };
    let verbs: Vec<_> = text(&written).iter().map(|op| op.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!((verbs, &written.conflicts), (vec!["address add".to_owned(), "route add".to_owned()], &Vec::new()));
    let whole = seen_on(elsewhere, &scope, &wanted);
    assert_eq!(plan(&wanted, &whole, &scope, &|_| None), Plan::default());
    let removed = plan(&State::default(), &whole, &scope, &|_| None);
    let verbs: Vec<_> = text(&removed).iter().map(|op| op.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(verbs, ["route delete", "address delete"]);
}

#[test]
fn an_external_device_that_is_not_there_or_not_marked_is_waited_for() {
    let (scope, want, tun) = external();
    let unmarked = Link { group: 0, alias: None, ..tun.clone() };
    let other_kind = Link { kind: LinkKind::Other("wireguard".into()), ..tun.clone() };
    for seen in [
        State::default(),
        seen_on(unmarked, &scope, &want),
        seen_on(other_kind, &scope, &want),
        seen_on(wanted().links[&OWN].clone(), &scope, &State::default()),
    ] {
        let plan_for = |wanted: &State| plan(wanted, &seen, &scope, &|_| None);
        let waiting = plan_for(&want);
        assert!(waiting.ops.iter().all(|op| matches!(op, Op::DeleteLink { .. })), "{:?}", waiting.ops);
        let [conflict] = &waiting.conflicts[..] else { panic!("{:?}", waiting.conflicts) };
        assert_eq!(conflict.object, Object::Link(OWN));
        assert!(conflict.remedy.ends_with("ip link set dev flannel.1 group 0x666ba808"), "{}", conflict.remedy);
    }
}
