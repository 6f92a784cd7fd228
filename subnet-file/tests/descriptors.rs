//! A process without free file descriptors. A separate test program, because the limit is that of a whole process.

use std::fs::{self, File};
use std::os::fd::AsRawFd;

use flannel_core::lease::LeaseAttrs;
use flannel_core::net::Dual;
use flannel_core::subnet::{NodeIdentity, SubnetError, SubnetManager, Want};
use flannel_subnet_file::{FileSubnets, Options};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Several batches for each of the two threads that read.
const RECORDS: usize = 2000;
/// More descriptors than an acquire needs.
const ENOUGH: u64 = 16;

#[tokio::test]
async fn without_free_descriptors_a_list_ends_with_an_error_and_no_record_counts_as_bad() {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let store = FileSubnets::open(dir.path(), Options::default()).unwrap();
    store.put_config_json(r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#).await.unwrap();
    for n in 0..RECORDS {
        let (high, low) = (n / 256, n % 256);
        let text = format!(r#"{{"PublicIP":"192.0.2.1","Subnet":"10.{high}.{low}.0/24","Created":{n}}}"#);
        fs::write(dir.path().join(format!("leases/node-{n}.json")), text).unwrap();
    }
    // Free only if a record counts as bad.
    let taken = Dual { v4: Some("10.0.5.0/24".parse().unwrap()), v6: None };
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let used = File::open("/dev/null").unwrap().as_raw_fd() as u64;
    let (mut leases, mut errors, mut while_listing) = (0, 0, 0);
    for free in 0..ENOUGH {
        let node = NodeIdentity::new(&format!("new-{free}")).unwrap();
        let attrs = LeaseAttrs::new(Dual { v4: Some("192.0.2.2".parse().unwrap()), v6: None });
        setrlimit(Resource::RLIMIT_NOFILE, used + free, hard).unwrap();
        let acquired = store.acquire(&node, Want::new(attrs).preferring(taken)).await;
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        match acquired {
            Ok(lease) => {
                assert_ne!(lease.subnets, taken);
                leases += 1;
            }
            Err(SubnetError::Unavailable { doing, source }) => {
                assert!(source.to_string().contains("raise the limit of open files"), "{source}");
                errors += 1;
                while_listing += usize::from(doing == "reading a lease");
            }
            Err(error) => panic!("{error:?}"),
        }
    }
    assert!(leases > 0 && errors > 1 && while_listing > 0, "{leases} leases, {errors} errors, {while_listing}");
    assert_eq!(fs::read_dir(dir.path().join("leases")).unwrap().count(), RECORDS + leases);
}
