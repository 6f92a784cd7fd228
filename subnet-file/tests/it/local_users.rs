//! What another user of the host can do to a store.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use flannel_core::subnet::SubnetManager;
use flannel_subnet_file::{FileSubnets, Options};

use super::{CONFIG, acquire, lease_path};

/// Runs a program as the user nobody. Returns whether it succeeded.
fn as_nobody(words: &[&str]) -> bool {
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    let output = Command::new("setpriv").args(nobody).args(words).output().expect("setpriv is installed");
    output.status.success()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Marks a process without a umask.
const UNMASKED: &str = "SUBNET_FILE_UNMASKED";

/// Runs a test of this binary in a process without a umask, as under a careless service manager.
fn unmasked(test: &str) {
    let mut command = Command::new("sh");
    command.args(["-c", "umask 0; exec \"$0\" \"$@\""]).arg(std::env::current_exe().unwrap());
    let output = command.args(["--exact", test]).env(UNMASKED, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[tokio::test]
async fn nobody_else_can_hold_the_lock_or_write_what_is_in_the_store() {
    if std::env::var_os(UNMASKED).is_none() {
        return unmasked("local_users::nobody_else_can_hold_the_lock_or_write_what_is_in_the_store");
    }
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), Permissions::from_mode(0o755)).unwrap();
    let dir = place.path().join("store");
    let store = FileSubnets::create(&dir, Options::default()).unwrap();
    store.put_config_json(CONFIG).await.unwrap();
    let lock = dir.join("lock");
    let locked = |lock: &Path| as_nobody(&["flock", "--nonblock", &lock.display().to_string(), "true"]);
    // A lock file of a former version.
    fs::set_permissions(&lock, Permissions::from_mode(0o644)).unwrap();
    assert!(locked(&lock), "anybody who may read a file may lock it");
    let lease = acquire(&store, "a").await;
    assert!(!locked(&lock));
    store.renew(&lease).await.unwrap();
    let record = lease_path(&dir, "a");
    let modes = [&dir, &dir.join("leases"), &record, &dir.join("config.json"), &lock].map(|path| mode(path));
    assert_eq!(modes.map(|mode| format!("{mode:o}")), ["755", "755", "644", "644", "600"]);
    for path in [&record, &dir.join("config.json"), &lock] {
        let path = path.display().to_string();
        assert!(!as_nobody(&["truncate", "--size=0", &path]), "{path}");
        assert!(!as_nobody(&["rm", "--force", &path]), "{path}");
    }
    assert!(!as_nobody(&["touch", &dir.join("leases/.tmp-new").display().to_string()]));
    assert!(as_nobody(&["cat", &record.display().to_string()]), "what is no secret may be read");
}

#[tokio::test]
async fn a_new_store_is_made_with_its_directories_and_an_old_one_is_kept() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("var/lib/overlay");
    let store = FileSubnets::create(&dir, Options::default()).unwrap();
    store.put_config_json(CONFIG).await.unwrap();
    let lease = acquire(&store, "a").await;
    let again = FileSubnets::create(&dir, Options::default()).unwrap();
    assert_eq!(again.renew(&lease).await.unwrap().subnets, lease.subnets);
}
