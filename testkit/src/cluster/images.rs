//! Archives of images, in the format of `docker save`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::programs::target;
use crate::{Context, Error};

/// Our image in the folder of built programs.
const OURS: &str = "flanneld.tar";
/// The names of the images in Go flannel's manifest.
pub const GO: [&str; 2] =
    ["ghcr.io/flannel-io/flannel:v0.28.9", "ghcr.io/flannel-io/flannel-cni-plugin:v1.9.1-flannel3"];

/// Returns the name of our image, which our manifest has.
pub fn name() -> String {
    format!("registry.example/flanneld:{}", env!("CARGO_PKG_VERSION"))
}

/// Returns the archive of our image.
///
/// # Errors
/// If `testkit/cluster/build` has not built it.
pub fn ours() -> Result<PathBuf, Error> {
    let archive = target().join(OURS);
    match archive.is_file() {
        true => Ok(archive),
        false => Err(Error::new(format!("no image at {}: run testkit/cluster/build target", archive.display()))),
    }
}

/// Writes the images of Go flannel's manifest into `dir`: Go flannel's programs beside what our image has.
///
/// # Errors
/// If a program is missing.
pub fn go_flannel(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let tree = unpacked(&ours()?, dir)?;
    for (program, place) in [
        ("go-flanneld-0.28.9", "opt/bin/flanneld"),
        ("go-install-conf-0.28.9", "opt/bin/install-conf"),
        ("cni-0.9.1/flannel", "flannel"),
    ] {
        let (program, place) = (target().join(program), tree.join(place));
        fs::remove_file(&place).context(|| format!("removing {}", place.display()))?;
        fs::copy(&program, &place).context(|| format!("copying {}", program.display()))?;
    }
    fs::remove_dir_all(tree.join("usr/local/bin")).context(|| "removing our programs".to_owned())?;
    let archives = GO.iter().enumerate().map(|(nth, name)| {
        let archive = dir.join(format!("go-{nth}.tar"));
        write(&tree, name, &json!({ "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] }), &archive)?;
        Ok(archive)
    });
    archives.collect()
}

/// Unpacks the only layer of an image and returns the folder.
fn unpacked(archive: &Path, dir: &Path) -> Result<PathBuf, Error> {
    let manifest = run(Command::new("tar").arg("-xOf").arg(archive).arg("manifest.json"))?;
    let manifest: Value = serde_json::from_str(&manifest).map_err(|error| Error::new(error.to_string()))?;
    let layer = manifest.pointer("/0/Layers/0").and_then(Value::as_str).unwrap_or_default();
    let tree = dir.join("tree");
    fs::create_dir_all(&tree).context(|| format!("creating {}", tree.display()))?;
    run(Command::new("tar").arg("-C").arg(dir).arg("-xf").arg(archive).arg(layer))?;
    run(Command::new("tar").arg("-C").arg(&tree).arg("-xpf").arg(dir.join(layer)))?;
    Ok(tree)
}

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
fn write(tree: &Path, name: &str, config: &Value, archive: &Path) -> Result<(), Error> {
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
