//! Leases of other nodes under this node's address.

use flannel_core::clock::BootTime;
use flannel_core::lease::{LeaseAttrs, LeaseKey};
use flannel_core::net::Dual;
use flannel_core::subnet::{OwnLeases, SubnetError, SubnetManager, Want};

use super::{Bed, held, node, want};
use crate::known::Own;

#[tokio::test(start_paused = true)]
async fn the_files_lease_stands_in_only_where_the_agent_takes_it_for_its_own() {
    let bed = Bed::new();
    let lease = bed.saved().await;
    bed.store.outage();
    let cached = bed.open();
    cached.network_config().await.unwrap();
    let changed = || Want::new(LeaseAttrs::default().with_backend("vxlan", Dual::default()));
    for own in [OwnLeases::Unheld, OwnLeases::Key(LeaseKey::new("b"))] {
        let refused = cached.acquire(&node(), changed().owning(own.clone())).await;
        assert!(matches!(refused, Err(SubnetError::Unavailable { .. })), "{own:?}: {refused:?}");
        let written = cached.acquire(&node(), want().owning(own)).await.unwrap();
        assert_eq!(written.key, lease.key, "what it says is what is wanted");
    }
    let kept = cached.acquire(&node(), changed().owning(OwnLeases::Key(lease.key.clone()))).await.unwrap();
    assert_eq!((&kept.key, kept.attrs), (&lease.key, changed().attrs));
}

#[test]
fn of_several_leases_under_an_address_the_known_one_stays_the_own() {
    let mut known = held(None);
    let Own::Held(_, ours) = known.own.clone() else { unreachable!() };
    let mut theirs = ours.clone();
    theirs.key = LeaseKey::new("another's");
    known.found(&node(), &[theirs.clone(), ours.clone()]);
    assert_eq!(known.own_lease(&node(), BootTime::default()), Some(ours));
    known.found(&node(), std::slice::from_ref(&theirs));
    assert_eq!(known.own_lease(&node(), BootTime::default()), Some(theirs), "until the agent says otherwise");
    known.found(&node(), &[]);
    assert_eq!(known.own_lease(&node(), BootTime::default()), None);
}
