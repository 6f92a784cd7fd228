//! Whatever somebody else keeps changing, and whatever the kernel refuses to write: all that does not physically stand
//! on it heals within two seconds, and the status names it.

mod scene;

use std::time::Duration;

use flannel_core::kernel::{LinkPart, Object};
use flannel_core::overlay::{Phase, Status};
use flannel_core::testing::fake_kernel::FakeRoute;
use tokio::time::Instant;

use crate::node::{Agent, Node, pass};
use scene::{BYSTANDER, Plane, RoutePart, Scene, Spot, VICTIM};

/// How often somebody changes what he changes.
const EVERY: Duration = Duration::from_millis(300);
/// The longest that anything may take to heal.
const HEALED: Duration = Duration::from_secs(2);
/// Long enough for ten repairs, after which an object counts as flapping.
const WARM_UP: f64 = 12.0;
/// EINVAL, EPERM, ENOMEM, EBUSY.
const ERRNOS: [i32; 4] = [22, 1, 12, 16];

/// What goes on at a spot, for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Somebody spoils it again and again.
    Fought,
    /// It is spoilt once, and the kernel refuses every write there.
    Refused(i32),
}

#[test]
fn what_somebody_keeps_changing_keeps_nothing_else_from_healing() {
    run_all(Fate::Fought);
}

#[test]
fn what_the_kernel_refuses_keeps_nothing_else_from_healing() {
    std::thread::scope(|scope| {
        for errno in ERRNOS {
            scope.spawn(move || run_all(Fate::Refused(errno)));
        }
    });
}

fn run_all(fate: Fate) {
    let spots = Plane::BOTH.into_iter().flat_map(|plane| plane.spots().into_iter().map(move |spot| (plane, spot)));
    let failures: Vec<String> = spots.flat_map(|(plane, spot)| simulate(plane, spot, fate)).collect();
    assert!(failures.is_empty(), "{fate:?}:\n{}", failures.join("\n"));
}

/// Returns what did not go as it should.
fn simulate(plane: Plane, spot: Spot, fate: Fate) -> Vec<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let node = Node::alone();
        node.join([VICTIM, BYSTANDER]);
        let agent = node.run_as(plane.builder(&node));
        let own = agent.ready().await.lease.as_ref().unwrap().subnets.v4.unwrap();
        pass(1.0).await;
        let scene = Scene { kernel: node.kernel.clone(), own, plane };
        let fight = match fate {
            Fate::Fought => {
                let scene = scene.clone();
                Some(tokio::spawn(async move {
                    for time in 0.. {
                        scene.spoil(spot, VICTIM, time);
                        tokio::time::sleep(EVERY).await;
                    }
                }))
            }
            Fate::Refused(errno) => {
                let object = scene.object(spot, VICTIM);
                node.kernel.refuse_if(move |op| (op.object() == object).then_some(errno));
                scene.spoil(spot, VICTIM, 0);
                None
            }
        };
        pass(WARM_UP).await;
        let mut failures = Vec::new();
        for (harm, number) in harms(&scene, spot) {
            // A device that was made anew is right until it is spoilt again.
            scene.spoil(spot, VICTIM, 0);
            scene.spoil(harm, number, 0);
            if let Err(wrong) = heals(&scene, harm, number, spot).await {
                failures.push(format!("{plane:?} {spot:?}: {harm:?} of peer {number} does not heal: {wrong}"));
            }
            pass(0.5).await;
        }
        scene.spoil(spot, VICTIM, 0);
        pass(0.5).await;
        let status = agent.status();
        if !names(&status, &scene.object(spot, VICTIM)) {
            failures.push(format!("{plane:?} {spot:?} is not named: {status:?}"));
        }
        if let Some(fight) = fight {
            fight.abort();
        }
        node.kernel.obey();
        if spot == Spot::Route(RoutePart::Protocol) {
            // A foreign route is its owner's to delete.
            let _ = scene.kernel.delete_route(&FakeRoute { protocol: 4, ..scene.route(VICTIM) });
        }
        failures
            .extend(aftermath(&scene, &agent).await.map(|wrong| format!("{plane:?} {spot:?}, afterwards: {wrong}")));
        failures
    })
}

/// What to spoil beside `spot`: everything that does not stand on it.
fn harms(scene: &Scene, spot: Spot) -> Vec<(Spot, u8)> {
    let both = scene.plane.spots().into_iter().flat_map(|harm| [(harm, VICTIM), (harm, BYSTANDER)]);
    let apart = both.filter(|(harm, number)| {
        let of_device = matches!(harm, Spot::Device | Spot::Part(_) | Spot::Address | Spot::Blackhole);
        let once = !of_device || *number == BYSTANDER;
        // A route of another protocol is another's: nothing to heal.
        once && *harm != Spot::Route(RoutePart::Protocol)
            && scene.object(*harm, *number) != scene.object(spot, VICTIM)
            && !stands_on(*harm, *number, spot)
    });
    apart.collect()
}

/// How high an object stands, for those that stand on one another.
fn height(spot: Spot) -> u8 {
    match spot {
        Spot::Blackhole | Spot::ExtraRoute => 0,
        Spot::Device => 1,
        Spot::Part(_) | Spot::Address | Spot::ExtraAddress | Spot::ExtraFdb | Spot::ExtraNeighbour => 2,
        Spot::Fdb | Spot::FdbDestination => 3,
        Spot::Neighbour | Spot::NeighbourMac => 4,
        Spot::Route(_) => 5,
    }
}

/// Whether `harm` to a peer's objects, or the device's, cannot heal while `spot` is wrong.
fn stands_on(harm: Spot, number: u8, spot: Spot) -> bool {
    match spot {
        Spot::Device => height(harm) > 1,
        // The last address takes the routes along.
        Spot::Address => harm == Spot::ExtraAddress,
        // The kernel drops the device's neighbours when its address changes: nobody deletes what is about to go.
        Spot::Part(LinkPart::Mac) => harm == Spot::ExtraNeighbour,
        // It takes routes only while it is up. (A device that is made anew is up.)
        Spot::Part(LinkPart::State) => height(harm) == 5,
        Spot::Fdb | Spot::FdbDestination | Spot::Neighbour | Spot::NeighbourMac => {
            number == VICTIM && height(harm) > height(spot)
        }
        Spot::Part(_)
        | Spot::ExtraAddress
        | Spot::ExtraFdb
        | Spot::ExtraNeighbour
        | Spot::Route(_)
        | Spot::ExtraRoute
        | Spot::Blackhole => false,
    }
}

/// Waits until what was spoilt is right, and the bystander whole.
async fn heals(scene: &Scene, harm: Spot, number: u8, spot: Spot) -> Result<(), String> {
    let deadline = Instant::now() + HEALED;
    let whole = scene
        .plane
        .spots()
        .into_iter()
        .filter(|part| [Spot::Fdb, Spot::Neighbour, Spot::Route(RoutePart::Whole)].contains(part));
    let also = whole.filter(|part| !stands_on(*part, BYSTANDER, spot)).map(|part| (part, BYSTANDER));
    let wanted: Vec<_> = [(harm, number)].into_iter().chain(also).collect();
    loop {
        let Some(wrong) = wanted.iter().find(|(part, number)| !scene.is_right(*part, *number)) else { return Ok(()) };
        if Instant::now() > deadline {
            return Err(format!("{wrong:?} {}", scene.kernel.snapshot()));
        }
        pass(0.02).await;
    }
}

/// What is wrong once nobody makes trouble any more.
async fn aftermath(scene: &Scene, agent: &Agent) -> Option<String> {
    // The longest wait before a flapping object is written again, and before it is forgiven.
    pass(70.0).await;
    let status = agent.status();
    let plan = agent.handle.plan().await.unwrap();
    let wrong = scene.plane.spots().into_iter().find(|spot| !scene.is_right(*spot, VICTIM));
    let well = status.phase == Phase::Ready && plan.plan.is_empty() && plan.held.is_empty() && wrong.is_none();
    (!well).then(|| format!("{wrong:?} {status:?} {plan}"))
}

/// Whether the status says that something is wrong with an object.
fn names(status: &Status, object: &Object) -> bool {
    status.flapping.contains(object)
        || status.refused.contains_key(object)
        || status.conflicts.iter().any(|conflict| conflict.object == *object)
}
