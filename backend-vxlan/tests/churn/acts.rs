//! The acts on the hosts and the store.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::lease::{Json, Lease, LeaseAttrs, LeaseKey, Scalar};
use flannel_core::net::{Dual, Family, Prefix};
use flannel_core::testing::memory_subnets::Fault;

use crate::host::{Host, Virtual};
use crate::network::{LAST, Setting, address, device, subnet};
use crate::world::{TTL, World, pass};

/// The virtual addresses.
const VIRTUAL: [u8; 3] = [240, 241, 242];
/// How long an address that returns stays at least, in seconds: long enough for an agent to read the host. If it were
/// removed sooner, the agent would not detect that it had returned.
const SEEN: f64 = 0.5;
/// The addresses that DHCP assigns: few, so that a host gets one that another host had.
const POOL: std::ops::Range<u8> = 10..26;

impl World {
    pub(crate) async fn step(&mut self) {
        let what = self.random.below(23);
        let host = self.some_host();
        // Logged before it is done, so that a failure during the act shows it too.
        let done = match what {
            0..5 => {
                let seconds = self.random.one_of(&[0.02, 0.3, 1.0, 4.0, 10.0, 40.0, 120.0]);
                pass(seconds).await;
                format!("{seconds} s pass")
            }
            17 => self.go_flannel(),
            18 => self.store_fault(),
            19 => self.reconfigure(),
            // A sleeping host can only wake.
            _ if self.hosts[host].clock.is_asleep() => match self.random.below(3) {
                0 => self.wake(host).await,
                _ => "nothing".to_owned(),
            },
            5..7 => self.turn(host).await,
            7 | 8 => self.move_virtual(host),
            9 => self.drop_virtual(),
            10 | 11 => {
                let families = self.some_families();
                self.give_address(host, &families)
            }
            12 => self.lack_address(host).await,
            13 => {
                let seconds = self.random.one_of(&[0.1, 1.0, 8.0]);
                self.hosts[host].remove_default();
                pass(seconds).await;
                self.hosts[host].add_default();
                format!("host {host} has no default route for {seconds} s")
            }
            14 => {
                // The device is deleted with it.
                self.leave_gos(self.hosts[host].own);
                self.hosts[host].act(|kernel| kernel.delete_link("eth0"));
                pass(self.random.one_of(&[0.0, 0.5, 6.0])).await;
                self.hosts[host].plug();
                pass(SEEN).await;
                format!("host {host} makes its interface anew")
            }
            15 => {
                self.hosts[host].act(|kernel| kernel.link_down("eth0"));
                pass(self.random.one_of(&[0.1, 6.0])).await;
                self.hosts[host].act(|kernel| kernel.link_up("eth0"));
                // The IPv6 addresses were deleted with the link.
                self.hosts[host].put_addresses();
                pass(SEEN).await;
                format!("host {host} takes its interface down and up")
            }
            16 => self.reboot(host).await,
            20 => self.ask(host).await,
            21 => self.outlast(host).await,
            _ => self.sleep(host).await,
        };
        self.log.push(done);
    }

    /// Returns one family of the network, or all of them.
    fn some_families(&mut self) -> Vec<Family> {
        let families = self.setting.families.clone();
        match self.random.below(2) {
            0 => vec![self.random.one_of(&families)],
            _ => families,
        }
    }

    async fn turn(&mut self, host: usize) -> String {
        if self.hosts[host].agent.is_none() {
            self.start(host);
            return format!("host {host} starts its agent");
        }
        let (crash, shared) = (self.random.below(2) == 0, Arc::clone(&self.shared));
        self.hosts[host].end(&shared, crash).await;
        // Most agents are restarted at once.
        if self.random.below(4) > 0 {
            self.start(host);
        }
        format!("host {host} ends its agent, crash: {crash}; running: {}", self.hosts[host].agent.is_some())
    }

    /// A status page queries the agent.
    async fn ask(&mut self, host: usize) -> String {
        let Some(agent) = &self.hosts[host].agent else { return "nothing".to_owned() };
        let (handle, wait) = (agent.running.handle.clone(), Duration::from_millis(100));
        let answered = tokio::time::timeout(wait, handle.plan()).await.is_ok_and(|answer| answer.is_ok());
        format!("host {host} is asked for its plan, answered: {answered}")
    }

    /// Suspends the host, often for as long as its lease lasts, and longer.
    async fn sleep(&mut self, host: usize) -> String {
        if self.hosts[host].agent.is_none() {
            return "nothing".to_owned();
        }
        if self.random.below(3) > 0 {
            self.hosts[host].sleep();
            return format!("host {host} sleeps");
        }
        let seconds = self.random.one_of(&[20.0, 310.0, 450.0, 610.0]);
        let away = self.random.below(4) == 0;
        if away {
            // The host detects that, so nothing wakes its agent with it.
            self.store.outage();
            pass(1.0).await;
        }
        self.hosts[host].sleep();
        pass(seconds).await;
        let woken = self.wake(host).await;
        self.store.recover();
        format!("host {host} sleeps for {seconds} s, the store is away: {away}; {woken}")
    }

    async fn wake(&mut self, host: usize) -> String {
        let rest = Duration::from_millis(self.random.one_of(&[0, 400, 2000, 5000]));
        self.hosts[host].wake(rest);
        let moved = match self.random.below(4) {
            0 => self.give_address(host, &self.setting.families.clone()),
            _ => "nothing else".to_owned(),
        };
        let asked = match self.random.below(2) {
            0 => self.ask(host).await,
            _ => "is not asked".to_owned(),
        };
        format!("host {host} wakes, timers are late by {rest:?}; {moved}; {asked}")
    }

    async fn lack_address(&mut self, host: usize) -> String {
        // A first start during this can only use the present addresses.
        if !self.hosts[host].has_memory() || self.hosts[host].clock.is_drowsy() {
            return "nothing".to_owned();
        }
        let (seconds, families) = (self.random.one_of(&[0.1, 0.5, 2.0]), self.some_families());
        self.hosts[host].remove_own(&families);
        pass(seconds).await;
        self.hosts[host].add_own(&families);
        self.hosts[host].add_default();
        pass(SEEN).await;
        format!("host {host} has no own address of {families:?} for {seconds} s")
    }

    fn take_virtual(&mut self, number: u8) {
        for host in &mut self.hosts {
            let Some(place) = host.virtuals.iter().position(|one| one.number == number) else { continue };
            let one = host.virtuals.remove(place);
            host.remove_virtual(one);
        }
    }

    fn family_of_virtual(&self, number: u8) -> Family {
        let families = &self.setting.families;
        families[usize::from(number) % families.len()]
    }

    fn move_virtual(&mut self, host: usize) -> String {
        let number = self.random.one_of(&VIRTUAL);
        let family = self.family_of_virtual(number);
        // An IPv6 address with a lifetime comes after one without, and only that distinguishes them.
        let alone = family == Family::V6 && self.hosts[host].leased;
        let len = match self.random.below(2) {
            0 if !alone => subnet_len(family),
            _ => family.bits(),
        };
        let one = Virtual { family, number, len };
        self.take_virtual(number);
        self.hosts[host].virtuals.push(one);
        self.hosts[host].add_virtual(one);
        format!("host {host} has virtual address {}/{len} now", address(family, number))
    }

    fn drop_virtual(&mut self) -> String {
        let number = self.random.one_of(&VIRTUAL);
        self.take_virtual(number);
        format!("nobody has virtual address {number} now")
    }

    /// Returns an address that no host has and no agent uses, perhaps a former address of another host. An agent
    /// without a lease uses what it published until the host has settled on another address.
    fn free_address(&mut self, family: Family) -> u8 {
        let uses = |host: &Host, number| {
            let addr = address(family, number);
            let public = host.lease().and_then(|lease| lease.attrs.public_ip.get(family).copied());
            let published = host.published.get(family) == Some(&addr);
            host.own.get(family) == Some(&number) || public == Some(addr) || published
        };
        let is_free =
            |number: &u8| !self.hosts.iter().any(|host| uses(host, *number)) && !self.is_gos(address(family, *number));
        let free: Vec<u8> = POOL.filter(is_free).collect();
        self.random.one_of(&free)
    }

    fn give_address(&mut self, host: usize, families: &[Family]) -> String {
        let mut now = Dual::default();
        for family in families {
            *now.slot(*family) = Some(self.free_address(*family));
        }
        let host = &mut self.hosts[host];
        let old = host.own;
        host.change_own(now);
        format!("host {} has addresses {:?} instead of {old:?} now", host.number, host.own)
    }

    async fn reboot(&mut self, host: usize) -> String {
        let shared = Arc::clone(&self.shared);
        self.hosts[host].end(&shared, true).await;
        if self.random.below(2) == 0 {
            for family in self.setting.families.clone() {
                *self.hosts[host].own.slot(family) = Some(self.free_address(family));
            }
        }
        self.leave_gos(self.hosts[host].own);
        self.hosts[host].boot();
        (self.hosts[host].published, self.hosts[host].used) = (Dual::default(), Dual::default());
        self.start(host);
        format!("host {host} is rebooted, with addresses {:?}", self.hosts[host].own)
    }

    /// A node of Go flannel joins or leaves. It may publish a virtual address that has moved to another host.
    fn go_flannel(&mut self) -> String {
        let number = 100 + self.random.below(6) as u8;
        let key = go_key(&self.go_subnets(number));
        if self.go.remove(&key).is_some() {
            self.store.delete(&key);
            return format!("Go node {number} leaves");
        }
        let mut public_ip = Dual::default();
        if self.random.below(3) == 0 {
            let published = self.random.one_of(&VIRTUAL);
            let family = self.family_of_virtual(published);
            let published = address(family, published);
            // An address that another node of this test has published is not published again.
            let is_taken = |lease: &Lease| lease.attrs.public_ip.get(family) == Some(&published);
            if !self.leases().iter().any(|lease| is_taken(lease)) {
                *public_ip.slot(family) = Some(published);
            }
        }
        self.join_go(number, public_ip)
    }

    /// A node of Go flannel joins, with its own address in each family that `published` leaves out.
    fn join_go(&mut self, number: u8, published: Dual<IpAddr>) -> String {
        let subnets = self.go_subnets(number);
        let overlaps = |lease: &Lease| {
            subnets.iter().any(|(family, own)| lease.subnets.get(family).is_some_and(|other| other.overlaps(own)))
        };
        if self.leases().iter().any(|lease| overlaps(lease)) {
            return "nothing".to_owned();
        }
        let public_ip = subnets.map(|family, _| published.get(family).copied().unwrap_or(address(family, number)));
        let backend_data = subnets.map(|family, _| {
            let mac = format!("02:6{}:00:00:00:{number:02x}", u8::from(family == Family::V6));
            Json::object(&[("VNI", Scalar::Number(1)), ("VtepMAC", Scalar::Text(&mac))])
        });
        let (key, attrs) = (go_key(&subnets), LeaseAttrs::new(public_ip).with_backend("vxlan", backend_data));
        let lease = Lease::new(key.clone(), subnets, attrs);
        self.store.insert([lease.clone()]);
        self.go.insert(key, lease);
        format!("Go node {number} joins at {public_ip:?}")
    }

    fn go_subnets(&self, number: u8) -> Dual<Prefix> {
        let mut subnets = Dual::default();
        for family in &self.setting.families {
            *subnets.slot(*family) = Some(subnet(*family, number));
        }
        subnets
    }

    fn leases(&self) -> Vec<Arc<Lease>> {
        self.store.records().into_iter().filter_map(|record| record.lease.ok()).collect()
    }

    /// Whether a node of Go flannel publishes the address.
    fn is_gos(&self, addr: IpAddr) -> bool {
        self.go.values().any(|lease| lease.attrs.public_ip.iter().any(|(_, public)| *public == addr))
    }

    /// The nodes of Go flannel that publish one of the addresses leave. Without a device, their leases cannot be
    /// distinguished from that of the host that has the address.
    fn leave_gos(&mut self, numbers: Dual<u8>) {
        let publishes = |lease: &Lease| {
            numbers.iter().any(|(family, number)| lease.attrs.public_ip.get(family) == Some(&address(family, *number)))
        };
        self.store.delete_all(self.go.iter().filter(|(_, lease)| publishes(lease)).map(|(key, _)| key));
        self.go.retain(|_, lease| !publishes(lease));
    }

    /// A host is down until its lease has expired; meanwhile a node of Go flannel publishes its addresses.
    async fn outlast(&mut self, host: usize) -> String {
        let own = self.hosts[host].own.map(|family, number| address(family, *number));
        let it = &self.hosts[host];
        let published = it.lease().map(|lease| lease.attrs.public_ip);
        // Only the devices show afterwards that the other lease is not its own.
        let has_devices = it.families.iter().all(|family| it.kernel.link_index(device(*family)).is_some());
        if published != Some(own) || !own.iter().all(|(_, addr)| it.has(*addr)) || !has_devices {
            return "nothing".to_owned();
        }
        let shared = Arc::clone(&self.shared);
        self.hosts[host].end(&shared, true).await;
        pass(TTL.as_secs_f64() + 1.0).await;
        let number = 100 + self.random.below(6) as u8;
        let is_there = self.go.contains_key(&go_key(&self.go_subnets(number)));
        let joined = if is_there { "nothing else".to_owned() } else { self.join_go(number, own) };
        self.start(host);
        format!("host {host} is down until its lease at {own:?} has run out; {joined}")
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

    /// Changes the pool, makes subnets longer, or widens the network, which happens once.
    fn reconfigure(&mut self) -> String {
        let before = self.setting.clone();
        let setting = Setting {
            wide: before.wide || self.random.below(8) == 0,
            upper: self.random.below(4) == 0,
            min: self.random.one_of(&[1, 1, 2, 3]),
            max: self.random.one_of(&[3, 6, 12, LAST]),
            longer: self.random.one_of(&[0, 0, 0, 0, 1, 2, 4]),
            ..before
        };
        let text = format!("the configuration changes: {setting:?}");
        self.configure(setting);
        text
    }
}

fn go_key(subnets: &Dual<Prefix>) -> LeaseKey {
    let parts: Vec<_> = subnets.iter().map(|(_, subnet)| subnet.to_string().replace('/', "-")).collect();
    LeaseKey::new(&parts.join("&"))
}

fn subnet_len(family: Family) -> u8 {
    match family {
        Family::V4 => 24,
        Family::V6 => 64,
    }
}
