//! `subnet.env`, and the networks of former runs beside it.

#![no_main]

use flannel_core::net::Family;
use flannel_core::subnet_env::SubnetEnv;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    fuzz::bounded(bytes, || {
        check(&text);
        flannel_core::fuzzing::former_networks(&text);
    });
});

fn check(text: &str) {
    let env = shown(SubnetEnv::parse(text));
    assert_eq!(SubnetEnv::parse(&env.render()), env, "{}", env.render());
}

/// What is shown of the values: a family with both its network and its subnet, whose second address lies in it.
fn shown(mut env: SubnetEnv) -> SubnetEnv {
    for family in Family::BOTH {
        let fits = env.subnets.get(family).is_some_and(|subnet| subnet.len() < family.bits());
        if !fits || env.networks.get(family).is_none() {
            (*env.networks.slot(family), *env.subnets.slot(family)) = (None, None);
        }
    }
    env
}
