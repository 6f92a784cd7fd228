//! What happens to the hosts.

use flannel_core::lease::{Fence, Json, Lease, LeaseAttrs, LeaseKey, Scalar};
use flannel_core::net::{Dual, Prefix};
use flannel_core::testing::memory_subnets::Fault;

use crate::host::{Host, Virtual, address};
use crate::world::{TTL, World, config, pass};

/// The virtual addresses.
const VIRTUAL: [u8; 3] = [240, 241, 242];
/// The addresses that DHCP gives out: few, so that a host gets what another one had.
const POOL: std::ops::Range<u8> = 10..26;

fn go_key(number: u8) -> LeaseKey {
    LeaseKey::new(&format!("10.42.{number}.0-24"))
}

impl World {
    pub(crate) async fn step(&mut self) {
        let what = self.random.below(21);
        let host = self.some_host();
        let done = match what {
            0..5 => {
                let seconds = self.random.one_of(&[0.02, 0.3, 1.0, 4.0, 10.0, 40.0, 120.0]);
                pass(seconds).await;
                format!("{seconds} s pass")
            }
            5..7 => self.turn(host).await,
            7 | 8 => self.move_virtual(host),
            9 => self.drop_virtual(),
            10 | 11 => self.give_address(host),
            // Whoever starts for the first time amid that can only use what there is.
            12 if self.hosts[host].has_memory() => {
                let seconds = self.random.one_of(&[0.1, 0.5, 2.0]);
                self.hosts[host].remove_own();
                pass(seconds).await;
                self.hosts[host].add_own();
                self.hosts[host].add_default();
                format!("host {host} has no address for {seconds} s")
            }
            13 => {
                let seconds = self.random.one_of(&[0.1, 1.0, 8.0]);
                self.hosts[host].remove_default();
                pass(seconds).await;
                self.hosts[host].add_default();
                format!("host {host} has no default route for {seconds} s")
            }
            14 => {
                // The device goes with it.
                self.leave_gos(self.hosts[host].own);
                self.hosts[host].kernel.delete_link("eth0").unwrap();
                pass(self.random.one_of(&[0.0, 0.5, 6.0])).await;
                self.hosts[host].plug();
                format!("host {host} makes its interface anew")
            }
            15 => {
                self.hosts[host].kernel.link_down("eth0").unwrap();
                pass(self.random.one_of(&[0.1, 6.0])).await;
                self.hosts[host].kernel.link_up("eth0").unwrap();
                self.hosts[host].add_default();
                format!("host {host} takes its interface down and up")
            }
            16 => self.reboot(host).await,
            17 => self.go_flannel(),
            18 => self.store_fault(),
            19 => self.outlast(host).await,
            12 => "nothing".to_owned(),
            _ => {
                let max = self.random.one_of(&[3, 6, 12, 250]);
                self.store.set_config(config(max));
                format!("the pool ends with 10.42.{max}.0")
            }
        };
        self.log.push(done);
    }

    async fn turn(&mut self, host: usize) -> String {
        let Some(agent) = self.hosts[host].agent.take() else {
            self.start(host);
            return format!("host {host} starts its agent");
        };
        if self.random.below(2) == 0 {
            agent.kill().await;
        } else {
            agent.stop().await;
        }
        // Most agents are restarted at once.
        if self.random.below(4) > 0 {
            self.start(host);
        }
        format!("host {host} ends its agent; running: {}", self.hosts[host].agent.is_some())
    }

    fn take_virtual(&mut self, number: u8) {
        for host in &mut self.hosts {
            let Some(place) = host.virtuals.iter().position(|one| one.number == number) else { continue };
            let one = host.virtuals.remove(place);
            host.remove_virtual(one);
        }
    }

    fn move_virtual(&mut self, host: usize) -> String {
        let one = Virtual { number: self.random.one_of(&VIRTUAL), len: self.random.one_of(&[24, 32]) };
        self.take_virtual(one.number);
        self.hosts[host].virtuals.push(one);
        self.hosts[host].add_virtual(one);
        format!("host {host} has virtual address {} now", one.number)
    }

    fn drop_virtual(&mut self) -> String {
        let number = self.random.one_of(&VIRTUAL);
        self.take_virtual(number);
        format!("nobody has virtual address {number} now")
    }

    /// An address that no host has and no agent publishes: perhaps one that another host had before.
    fn free_address(&mut self) -> u8 {
        let uses = |host: &Host, number| {
            let public = host.lease().and_then(|lease| lease.attrs.public_ip.v4);
            host.own == number || public == Some(address(number))
        };
        let is_free = |number: &u8| !self.hosts.iter().any(|host| uses(host, *number)) && !self.is_gos(*number);
        let free: Vec<u8> = POOL.filter(is_free).collect();
        self.random.one_of(&free)
    }

    fn give_address(&mut self, host: usize) -> String {
        let number = self.free_address();
        let host = &mut self.hosts[host];
        host.remove_own();
        let old = std::mem::replace(&mut host.own, number);
        host.add_own();
        host.add_default();
        format!("host {} has address {number} instead of {old} now", host.number)
    }

    async fn reboot(&mut self, host: usize) -> String {
        if let Some(agent) = self.hosts[host].agent.take() {
            agent.kill().await;
        }
        if self.random.below(2) == 0 {
            self.hosts[host].own = self.free_address();
        }
        self.leave_gos(self.hosts[host].own);
        self.hosts[host].boot();
        self.hosts[host].published = None;
        self.start(host);
        format!("host {host} is rebooted, with address {}", self.hosts[host].own)
    }

    /// A node of Go flannel joins, renews or leaves. It may publish a virtual address that is elsewhere by now.
    fn go_flannel(&mut self) -> String {
        let number = 100 + self.random.below(6) as u8;
        let key = go_key(number);
        if self.go.remove(&key).is_some() {
            self.store.delete(&key);
            return format!("Go node {number} leaves");
        }
        let published = if self.random.below(3) == 0 { self.random.one_of(&VIRTUAL) } else { number };
        // What another node of ours has published is not published once more.
        let taken = self.store.records().iter().any(|record| {
            record.lease.as_ref().is_ok_and(|lease| lease.attrs.public_ip.v4 == Some(address(published)))
        });
        self.join_go(number, if taken { number } else { published })
    }

    fn join_go(&mut self, number: u8, published: u8) -> String {
        let subnet: Prefix = format!("10.42.{number}.0/24").parse().unwrap();
        let key = go_key(number);
        if self.store.records().iter().any(|record| {
            record.lease.as_ref().is_ok_and(|lease| lease.subnets.v4.is_some_and(|other| other.overlaps(&subnet)))
        }) {
            return "nothing".to_owned();
        }
        let mac = format!("02:60:00:00:00:{number:02x}");
        let data = Json::object(&[("VNI", Scalar::Number(1)), ("VtepMAC", Scalar::Text(&mac))]);
        let lease = Lease {
            key: key.clone(),
            subnets: Dual { v4: Some(subnet), v6: None },
            attrs: LeaseAttrs {
                public_ip: Dual { v4: Some(address(published)), v6: None },
                backend_type: "vxlan".into(),
                backend_data: Dual { v4: Some(data), v6: None },
            },
            expires: None,
            fence: Fence::default(),
        };
        self.store.insert([lease.clone()]);
        self.go.insert(key, lease);
        format!("Go node {number} joins at {published}")
    }

    /// Whether a node of Go flannel publishes the address.
    fn is_gos(&self, number: u8) -> bool {
        self.go.values().any(|lease| lease.attrs.public_ip.v4 == Some(address(number)))
    }

    /// The nodes of Go flannel that publish the address leave. Where no device is left, nothing tells their leases from that
    /// of the host that has the address.
    fn leave_gos(&mut self, number: u8) {
        let published = Some(address(number));
        let left: Vec<_> = self.go.extract_if(.., |_, lease| lease.attrs.public_ip.v4 == published).collect();
        self.store.delete_all(left.iter().map(|(key, _)| key));
    }

    /// A host is down until its lease has run out, and by then a node of Go flannel publishes its address.
    async fn outlast(&mut self, host: usize) -> String {
        let own = self.hosts[host].own;
        let publishes_own = |host: &Host| {
            host.lease().and_then(|lease| lease.attrs.public_ip.v4) == Some(address(own)) && host.has(address(own))
        };
        // Only the device tells afterwards that the other's lease is not its own.
        if !publishes_own(&self.hosts[host]) || self.hosts[host].kernel.link_index("flannel.1").is_none() {
            return "nothing".to_owned();
        }
        if let Some(agent) = self.hosts[host].agent.take() {
            agent.kill().await;
        }
        pass(TTL.as_secs_f64() + 1.0).await;
        let number = 100 + self.random.below(6) as u8;
        let joined = if self.go.contains_key(&go_key(number)) { String::new() } else { self.join_go(number, own) };
        self.start(host);
        format!("host {host} is down until its lease at {own} has run out; {joined}")
    }

    fn store_fault(&mut self) -> String {
        if self.random.below(2) == 0 {
            self.store.cut_watches();
            return "the watches are cut".to_owned();
        }
        let fault = self.random.one_of(&[Fault::Unavailable, Fault::LostReply]);
        let count = 1 + self.random.below(3);
        self.store.fail_next(std::iter::repeat_n(fault, count));
        format!("{count} times {fault:?}")
    }
}
