//! Agents that share a real etcd, which runs on the switch.

use std::process::{Child, Command, Stdio};

use flannel_subnet_etcd::{Config, EtcdSubnets};
use nix::sys::signal::Signal;

use crate::harness::{Agent, Site, owned, read, routes};

const VXLAN: &str = r#"{"Network":"10.244.0.0/16","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;
const ENDPOINT: &str = "http://10.89.0.1:2379";

/// A member. Killed when dropped.
struct Member(Child);

impl Member {
    fn start(site: &Site) -> Self {
        let spawn = || {
            let mut command = Command::new("/usr/bin/etcd");
            command.arg("--data-dir").arg(site.path("etcd")).args(["--listen-client-urls", "http://0.0.0.0:2379"]);
            command.args(["--advertise-client-urls", ENDPOINT]).stdout(Stdio::null()).stderr(Stdio::null());
            command.spawn().expect("this test needs etcd: apt-get install etcd-server")
        };
        let member = Self(site.underlay.switch().run(spawn).unwrap());
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let put = || {
            runtime().block_on(async {
                let store = EtcdSubnets::new(Config::new([ENDPOINT])).unwrap();
                store.put_config_json(VXLAN).await.is_ok()
            })
        };
        testkit::wait_until("etcd", crate::harness::PATIENCE, || site.underlay.switch().run(put)).unwrap();
        member
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn args(site: &Site, nth: usize) -> Vec<String> {
    let file = site.subnet_file(nth).display().to_string();
    owned(&["--etcd-endpoints", ENDPOINT, "-subnet-file", &file, "--healthz-port=8081"])
}

#[test]
fn agents_share_etcd_survive_its_death_and_keep_their_leases() {
    let site = Site::new(2, "{}");
    let start = |nth: usize| Agent::start(site.ns(nth), &args(&site, nth), site.path(&format!("log{nth}")));
    let member = Member::start(&site);
    let agents = [start(1), start(2)];
    agents.iter().for_each(Agent::until_ready);
    let env = [1, 2].map(|nth| read(&site.subnet_file(nth)));
    assert_ne!(env[0], env[1]);
    agents[0].until("told of its peer", || routes(site.ns(1)).contains("10.244."));
    let before = routes(site.ns(1));

    drop(member);
    let lost = || agents[0].get(9472, "/status").is_some_and(|(_, status)| status.contains("\"contact\":\"lost\""));
    agents[0].until("told that etcd is away", lost);
    assert_eq!(agents[0].get(8081, "/readyz").map(|(code, _)| code), Some(200));
    assert_eq!(routes(site.ns(1)), before);
    let doctor = crate::harness::run(site.ns(1), &[args(&site, 1), owned(&["doctor"])].concat());
    assert!(doctor.out.contains("ERROR    store"), "{}", doctor.out);
    let [one, two] = agents;
    let (code, took) = one.end(Signal::SIGTERM);
    assert_eq!((code, took.as_secs() < 2), (Some(0), true), "{took:?}");
    two.end(Signal::SIGKILL);
    assert_eq!(routes(site.ns(1)), before);

    let waiting = start(1);
    waiting.until("waiting for etcd", || waiting.log().contains("waiting for the lease store"));
    let _member = Member::start(&site);
    waiting.until_ready();
    let two = start(2);
    two.until_ready();
    assert_eq!([1, 2].map(|nth| read(&site.subnet_file(nth))), env);
    assert_eq!(routes(site.ns(1)), before);
}
