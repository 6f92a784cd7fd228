//! A network namespace with an uplink: one thread's own, gone with the thread.

use std::process::Command;

use testkit::Namespace;

use crate::Error;

/// Runs `work` on a thread in a network namespace of its own, which has an `eth0` with 172.16.0.1/12. Programs it
/// starts from that thread are in there too.
pub fn in_bed<T: Send>(work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    Namespace::with_uplink("bed", "eth0", &["172.16.0.1/12"])?.run(|| {
        ip("route add default via 172.31.255.254")?;
        work()
    })?
}

/// Runs one `ip` command.
pub fn ip(line: &str) -> Result<(), Error> {
    run("ip", &line.split(' ').collect::<Vec<_>>())
}

/// Runs a program to its end.
pub fn run(program: &str, args: &[&str]) -> Result<(), Error> {
    output(program, args).map(drop)
}

/// Runs a program to its end; what it printed.
pub fn output(program: &str, args: &[&str]) -> Result<String, Error> {
    let output = Command::new(program).args(args).output().map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{program} {}: {}", args.join(" "), text.trim()).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}
