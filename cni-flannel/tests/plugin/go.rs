//! Beside flannel's plug-in in Go: the last one of CNI's own plug-ins, 0.9.1.

use crate::lab::{Call, Place, SUBNET_ENV, built};
use crate::pods::{Node, Pod};

fn go(call: &Call) -> Call {
    call.clone().under(&[built("cni-0.9.1/flannel").to_str().unwrap()])
}

/// As that plug-in wants it: it knows no later version.
fn conf(node: &Node) -> String {
    format!(
        r#"{{"cniVersion":"0.4.0","name":"cbr0","type":"flannel","ipam":{{"dataDir":"{}"}},"delegate":{{"isDefaultGateway":true}},{}}}"#,
        node.place.path("addresses").display(),
        node.place.members(),
    )
}

#[test]
fn each_detaches_what_the_other_attached() {
    let node = Node::new();
    for ours_first in [true, false] {
        let pod = Pod::new("pod");
        let call = |command: &str| node.call(command, "c1", &pod).stdin(conf(&node));
        let (add, del) = match ours_first {
            true => (call("ADD"), go(&call("DEL"))),
            false => (go(&call("ADD")), call("DEL")),
        };
        node.make(&add).ok();
        assert_eq!((node.place.stored().len(), node.taken().len()), (1, 1));
        assert!(pod.ns.link("eth0").is_ok());
        node.make(&del).ok();
        assert_eq!((node.place.stored().len(), node.taken().len()), (0, 0), "ours first: {ours_first}");
        assert!(pod.ns.link("eth0").is_err());
    }
}

#[test]
fn both_store_the_same_to_the_byte() {
    let more = [
        "",
        r#","ipam":{"routes":[{"dst":"10.7.1.2/16","gw":"10.1.17.9"},{"gw":"fc00::1","dst":"fd00::/8"}]}"#,
        r#","delegate":{"type":"script","mtu":1400,"ipMasq":true,"x":[1.50,"<&>",null]}"#,
        r#","delegate":{"type":"script"},"ipam":{"type":"other","y":1e3}"#,
        r#","delegate":{"type":"script"},"runtimeConfig":{"portMappings":[{"hostPort":80}]}"#,
    ];
    for env in [SUBNET_ENV.to_owned(), SUBNET_ENV.replace("=true", "=false")] {
        for more in more {
            let stored = |is_go: bool| {
                let place = Place::new();
                place.write("subnet.env", &env);
                place.add_plugin("bridge", "#!/bin/sh\ncat >/dev/null; echo '{\"cniVersion\":\"0.4.0\",\"ips\":[]}'\n");
                let members = place.members();
                let call = place
                    .call("ADD")
                    .stdin(format!(r#"{{"cniVersion":"0.4.0","name":"cbr0","type":"flannel",{members}{more}}}"#));
                if is_go { go(&call) } else { call }.make().ok();
                place.read("data/c1")
            };
            assert_eq!(stored(false), stored(true));
        }
    }
}
