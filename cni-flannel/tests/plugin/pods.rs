//! Pods on a node, by way of the real `bridge` and `host-local`.

use std::fs::{self, File};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use testkit::Namespace;
use testkit::probe;

use crate::lab::{Answer, Call, Place, SUBNET_ENV, built};

const PATIENCE: Duration = Duration::from_secs(10);

/// A pod's network namespace, which a plug-in finds by its path.
pub(crate) struct Pod {
    pub(crate) ns: Namespace,
    handle: File,
}

impl Pod {
    pub(crate) fn new(name: &str) -> Self {
        let ns = Namespace::new(name).unwrap();
        let handle = ns.run(|| File::open("/proc/thread-self/ns/net").unwrap()).unwrap();
        Self { ns, handle }
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.handle.as_raw_fd())
    }
}

/// A node and its pods.
pub(crate) struct Node {
    pub(crate) ns: Namespace,
    pub(crate) place: Place,
    /// More members of the configuration.
    pub(crate) more: String,
}

impl Node {
    pub(crate) fn new() -> Self {
        let place = Place::new();
        for name in ["bridge", "host-local"] {
            let program = built("cni-1.9.1").join(name);
            std::os::unix::fs::symlink(program, place.path("bin").join(name)).unwrap();
        }
        Self { ns: Namespace::new("node").unwrap(), place, more: String::new() }
    }

    fn conf(&self) -> String {
        let addresses = self.place.path("addresses");
        format!(
            r#"{{"cniVersion":"1.1.0","name":"cbr0","type":"flannel","ipam":{{"dataDir":"{}"}},
                "delegate":{{"hairpinMode":true,"isDefaultGateway":true}},{}{}}}"#,
            addresses.display(),
            self.place.members(),
            self.more,
        )
    }

    pub(crate) fn call(&self, command: &str, id: &str, pod: &Pod) -> Call {
        self.place.call(command).set("CNI_CONTAINERID", id).set("CNI_NETNS", &pod.path()).stdin(self.conf())
    }

    pub(crate) fn make(&self, call: &Call) -> Answer {
        self.ns.run(|| call.make()).unwrap()
    }

    /// The addresses that are handed out.
    pub(crate) fn taken(&self) -> Vec<String> {
        let entries = fs::read_dir(self.place.path("addresses/cbr0")).into_iter().flatten();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut taken: Vec<_> = names.filter(|name| name.parse::<IpAddr>().is_ok()).collect();
        taken.sort();
        taken
    }
}

fn address(added: &Answer, nth: usize) -> IpAddr {
    let result = added.json();
    let text = result["ips"][nth]["address"].as_str().unwrap_or_else(|| panic!("{result}")).to_owned();
    text.split('/').next().unwrap().parse().unwrap()
}

#[test]
fn pods_are_attached_checked_and_detached_in_both_families() {
    let mut node = Node::new();
    let dual = format!("{SUBNET_ENV}FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00:0:0:7::1/64\n");
    node.place.write("subnet.env", &dual);
    let pods = ["one", "two"].map(Pod::new);
    let added = [("c1", &pods[0]), ("c2", &pods[1])].map(|(id, pod)| node.make(&node.call("ADD", id, pod)).ok());
    assert_eq!(node.place.stored(), ["c1", "c2"]);
    for nth in [0, 1] {
        probe::until_reply(&pods[0].ns, address(&added[1], nth), PATIENCE).unwrap();
        probe::until_reply(&node.ns, address(&added[0], nth), PATIENCE).unwrap();
    }
    assert_eq!(pods[0].ns.link("eth0").unwrap().mtu, 1450);
    let routes = pods[0].ns.ip("-o route show 10.1.0.0/16").unwrap();
    assert!(routes.contains("via 10.1.17.1"), "{routes}");

    node.more = format!(",\"prevResult\":{}", added[0].json());
    node.make(&node.call("CHECK", "c1", &pods[0])).ok();
    pods[0].ns.ip("address flush dev eth0").unwrap();
    assert!(!node.make(&node.call("CHECK", "c1", &pods[0])).succeeded, "its address is gone");
    node.more.clear();

    node.make(&node.call("DEL", "c1", &pods[0])).ok();
    assert!(pods[0].ns.link("eth0").is_err());
    assert_eq!((node.place.stored(), node.taken().len()), (vec!["c2".to_owned()], 2));
    // Its namespace may be gone before.
    node.make(&node.call("DEL", "c2", &pods[1]).set("CNI_NETNS", "")).ok();
    assert!(node.place.stored().is_empty() && node.taken().is_empty());
}

#[test]
fn gc_gives_back_the_addresses_of_containers_that_are_gone() {
    let mut node = Node::new();
    let pods = ["one", "two"].map(Pod::new);
    for (id, pod) in [("c1", &pods[0]), ("c2", &pods[1])] {
        node.make(&node.call("ADD", id, pod)).ok();
    }
    node.make(&node.call("STATUS", "c1", &pods[0])).ok();
    let before = node.taken();
    node.more = r#","cni.dev/valid-attachments":[{"containerID":"c2","ifname":"eth0"}]"#.to_owned();
    node.make(&node.call("GC", "c1", &pods[0])).ok();
    assert_eq!((node.place.stored(), node.taken()), (vec!["c2".to_owned()], before[1..].to_vec()));
}

#[test]
fn a_node_whose_addresses_are_all_taken_says_so() {
    let node = Node::new();
    node.place.write("subnet.env", &SUBNET_ENV.replace("17.1/24", "17.1/30"));
    let pods = ["one", "two"].map(Pod::new);
    node.make(&node.call("ADD", "c1", &pods[0])).ok();
    let refused = node.make(&node.call("ADD", "c2", &pods[1]));
    assert!(!refused.succeeded && refused.stdout.contains("no IP addresses available"), "{refused:?}");
    node.make(&node.call("DEL", "c2", &pods[1])).ok();
    assert_eq!(node.place.stored(), ["c1"]);
    assert!(Path::new(&node.place.path("data/c1")).exists());
}
