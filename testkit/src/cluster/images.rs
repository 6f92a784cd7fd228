//! Archives of images, in the format of `docker save`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::{Context, Error};

/// Writes an image of busybox with this entry point: the sandboxes' one, and the one of pods that wait.
pub(super) fn busybox(root: &Path, name: &str, entry: &[&str], archive: &Path) -> Result<(), Error> {
    let tree = archive.with_extension("tree");
    let bin = tree.join("bin");
    fs::create_dir_all(&bin).context(|| format!("creating {}", bin.display()))?;
    let busybox = bin.join("busybox");
    fs::copy(root.join("bin/busybox"), &busybox).context(|| "copying busybox of the nodes' root".to_owned())?;
    for applet in ["sh", "sleep", "ping", "nc", "ip", "cat", "id", "ls"] {
        symlink("busybox", bin.join(applet)).context(|| format!("linking {applet}"))?;
    }
    write(&tree, name, &json!({ "Entrypoint": entry, "Env": ["PATH=/bin"] }), archive)?;
    fs::remove_dir_all(&tree).context(|| format!("removing {}", tree.display()))
}

/// Writes an archive of one layer, which has the files of `tree`.
pub(super) fn write(tree: &Path, name: &str, config: &Value, archive: &Path) -> Result<(), Error> {
    let parts = archive.with_extension("parts");
    fs::create_dir_all(&parts).context(|| format!("creating {}", parts.display()))?;
    let layer = parts.join("layer.tar");
    run(Command::new("tar").arg("-C").arg(tree).args(["--owner=0", "--group=0", "-cf"]).arg(&layer).arg("."))?;
    let sum = run(Command::new("sha256sum").arg(&layer))?;
    let sum = sum.split_whitespace().next().unwrap_or_default();
    let image = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": config,
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{sum}")] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"] }]);
    for (file, value) in [("config.json", image), ("manifest.json", manifest)] {
        fs::write(parts.join(file), value.to_string()).context(|| format!("writing {file}"))?;
    }
    run(Command::new("tar").arg("-C").arg(&parts).arg("-cf").arg(archive).arg("."))?;
    fs::remove_dir_all(&parts).context(|| format!("removing {}", parts.display()))
}

fn run(command: &mut Command) -> Result<String, Error> {
    let output = command.output().context(|| format!("running {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(Error::new(format!("{command:?}: {}: {said}", output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
