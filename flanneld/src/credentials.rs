//! Checks the files that etcd's flags name. The store reads them again for every connection, so that they may be
//! rotated; this reports errors at start.

use std::path::Path;

use flannel_subnet_etcd::{ClientCertificate, Config, Password, credential_file};
use rustls::InconsistentKeys;
use rustls::crypto::ring::default_provider;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// A file does not have the content that its flag requires. Correct it, or name another.
#[derive(Debug, thiserror::Error)]
#[error("-{flag} {path}: {problem}")]
pub(crate) struct CredentialError {
    flag: &'static str,
    path: String,
    problem: String,
}

/// Reads and checks all of them. Errors contain nothing of the files' content.
pub(crate) fn check(config: &Config) -> Result<(), CredentialError> {
    if let Some(tls) = &config.tls {
        tls.ca.iter().try_for_each(|path| certificates("etcd-cafile", path).map(drop))?;
        if let Some(client) = &tls.client {
            pair(client)?;
        }
    }
    match config.credentials.as_ref().map(|credentials| &credentials.password) {
        Some(Password::File(path)) => read("etcd-password-file", path, "password").map(drop),
        _ => Ok(()),
    }
}

/// Checks that the key belongs to the certificate. Other errors are left to the handshake.
fn pair(client: &ClientCertificate) -> Result<(), CredentialError> {
    let chain = certificates("etcd-certfile", &client.certificate)?;
    let key = read("etcd-keyfile", &client.key, "private key")?;
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|_| lacks("etcd-keyfile", &client.key, "private key"))?;
    let Ok(chain) = CertificateDer::pem_slice_iter(&chain).collect() else { return Ok(()) };
    match CertifiedKey::from_der(chain, key, &default_provider()) {
        Err(rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {
            let certificate = client.certificate.display();
            let problem = format!("is not the key of -etcd-certfile {certificate}; give the one it was made with");
            Err(CredentialError::new("etcd-keyfile", &client.key, problem))
        }
        _ => Ok(()),
    }
}

/// Returns the content of a file that contains a certificate.
fn certificates(flag: &'static str, path: &Path) -> Result<Vec<u8>, CredentialError> {
    let pem = read(flag, path, "certificate")?;
    match CertificateDer::pem_slice_iter(&pem).next() {
        Some(Ok(_)) => Ok(pem),
        _ => Err(lacks(flag, path, "certificate")),
    }
}

fn read(flag: &'static str, path: &Path, what: &str) -> Result<Vec<u8>, CredentialError> {
    credential_file(path).map_err(|error| {
        let problem = format!("cannot be read: {error}; give a file with a {what} that this user may read");
        CredentialError::new(flag, path, problem)
    })
}

fn lacks(flag: &'static str, path: &Path, what: &str) -> CredentialError {
    CredentialError::new(flag, path, format!("holds no {what}; give a PEM file with one"))
}

impl CredentialError {
    fn new(flag: &'static str, path: &Path, problem: String) -> Self {
        Self { flag, path: path.display().to_string(), problem }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use flannel_subnet_etcd::Tls;

    use super::*;

    #[test]
    fn a_file_that_is_missing_or_holds_something_else_is_named_with_its_flag() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let issued = rcgen::generate_simple_self_signed([String::from("etcd.example")]).unwrap();
        let (pem, key) = (write("pem", &issued.cert.pem()), write("key", &issued.signing_key.serialize_pem()));
        let another = rcgen::generate_simple_self_signed([String::from("etcd.example")]).unwrap();
        let another = write("another", &another.signing_key.serialize_pem());
        let (junk, nowhere) = (write("junk", "junk"), dir.path().join("nowhere"));
        // A certificate, followed by endless data.
        let endless = write("endless", &issued.cert.pem());
        std::fs::OpenOptions::new().append(true).open(&endless).unwrap().set_len(1 << 40).unwrap();
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let checked = |ca: &PathBuf, certificate: &PathBuf, key: &PathBuf| {
            let mut tls = Tls::of_authority(ca);
            tls.client = Some(ClientCertificate { certificate: certificate.clone(), key: key.clone() });
            check(&Config::new(["https://etcd.example:2379"]).with_tls(tls)).map_err(|error| error.to_string())
        };
        assert_eq!(checked(&pem, &pem, &key), Ok(()));
        for (told, parts) in [
            (checked(&nowhere, &pem, &key), ["-etcd-cafile", "nowhere", "cannot be read"]),
            (checked(&junk, &pem, &key), ["-etcd-cafile", "junk", "holds no certificate"]),
            (checked(&pem, &key, &key), ["-etcd-certfile", "key", "holds no certificate"]),
            (checked(&pem, &pem, &pem), ["-etcd-keyfile", "pem", "holds no private key"]),
            (checked(&endless, &pem, &key), ["-etcd-cafile", "endless", "larger than 1048576 bytes"]),
            (checked(&pem, &pipe, &key), ["-etcd-certfile", "pipe", "not a regular file"]),
            (checked(&pem, &pem, &pipe), ["-etcd-keyfile", "pipe", "not a regular file"]),
            (checked(&pem, &pem, &another), ["-etcd-keyfile", "another", "is not the key of -etcd-certfile"]),
        ] {
            let told = told.unwrap_err();
            assert!(parts.iter().all(|part| told.contains(part)), "{told}");
        }
    }
}
