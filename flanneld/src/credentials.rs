//! Checks the files that etcd's flags name. The store reads them again for every connection, so that they may be
//! rotated; this reports errors at start.

use std::path::Path;

use flannel_subnet_etcd::{ClientCertificate, Config, Password, credential_file};
use nix::unistd::geteuid;
use rustls::InconsistentKeys;
use rustls::crypto::ring::default_provider;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::time::ASN1Time;

use crate::certificates::{Fault, Purpose, fault};

/// A file that a flag names cannot be used as it is. Contains nothing of the file's content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("-{flag} {path}: {problem}; {remedy}")]
pub(crate) struct CredentialError {
    flag: &'static str,
    path: String,
    problem: String,
    pub(crate) remedy: String,
    /// Whether no connection can succeed.
    pub(crate) prevents: bool,
}

/// Reads and checks all of them. An error means that no connection can succeed.
pub(crate) fn check(config: &Config) -> Result<(), CredentialError> {
    if let Some(tls) = &config.tls {
        tls.ca.iter().try_for_each(|path| certificates(CA, path).map(drop))?;
        if let Some(client) = &tls.client {
            pair(client)?;
        }
    }
    match config.credentials.as_ref().map(|credentials| &credentials.password) {
        Some(Password::File(path)) => read("etcd-password-file", path, "password").map(drop),
        _ => Ok(()),
    }
}

/// Returns certificates that have expired, soon will or are not valid yet, and those that only etcd rejects. The agent
/// starts nevertheless: with a state file it needs no etcd.
pub(crate) fn warnings(config: &Config) -> Vec<CredentialError> {
    let Some(tls) = &config.tls else { return Vec::new() };
    let authorities = tls.ca.iter().map(|path| (CA, path, Purpose::Authority));
    let client = tls.client.iter().map(|client| (CERTIFICATE, &client.certificate, Purpose::Client));
    let faults = authorities.chain(client).flat_map(|(flag, path, purpose)| {
        let found = certificates(flag, path).unwrap_or_default();
        let judged = match purpose {
            // One good authority may be enough.
            Purpose::Authority => &*found,
            // The others are intermediate authorities.
            Purpose::Client => &found[..found.len().min(1)],
        };
        let faults: Option<Vec<_>> = judged.iter().map(|der| fault(der, purpose, ASN1Time::now())).collect();
        let fault = faults.unwrap_or_default().into_iter().next();
        fault.map(|fault| CredentialError::of_certificate(flag, path, &fault))
    });
    faults.collect()
}

const CA: &str = "etcd-cafile";
const CERTIFICATE: &str = "etcd-certfile";
const KEY: &str = "etcd-keyfile";

/// Checks the client certificate's version, and that the key belongs to it. Other errors are left to the handshake.
fn pair(client: &ClientCertificate) -> Result<(), CredentialError> {
    let chain = certificates(CERTIFICATE, &client.certificate)?;
    let key = read(KEY, &client.key, "private key")?;
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|_| without(KEY, &client.key, "private key"))?;
    if let Some(found @ Fault::Version1) = fault(&chain[0], Purpose::Client, ASN1Time::now()) {
        return Err(CredentialError::of_certificate(CERTIFICATE, &client.certificate, &found));
    }
    match CertifiedKey::from_der(chain, key, &default_provider()) {
        Err(rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {
            let certificate = client.certificate.display();
            let problem = format!("is not the key of -{CERTIFICATE} {certificate}");
            Err(CredentialError::new(KEY, &client.key, problem, "give the key that the certificate was made with"))
        }
        _ => Ok(()),
    }
}

/// Returns the certificates of a file: at least one.
fn certificates(flag: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialError> {
    let pem = read(flag, path, "certificate")?;
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem).map_while(Result::ok).collect();
    if found.is_empty() { Err(without(flag, path, "certificate")) } else { Ok(found) }
}

fn read(flag: &'static str, path: &Path, what: &str) -> Result<Vec<u8>, CredentialError> {
    credential_file(path).map_err(|error| {
        let remedy = format!("give a file with a {what} that this user (uid {}) can read", geteuid());
        CredentialError::new(flag, path, format!("cannot be read: {error}"), remedy)
    })
}

fn without(flag: &'static str, path: &Path, what: &str) -> CredentialError {
    CredentialError::new(flag, path, format!("contains no {what}"), "give a PEM file with one")
}

impl CredentialError {
    fn new(flag: &'static str, path: &Path, problem: String, remedy: impl Into<String>) -> Self {
        Self { flag, path: path.display().to_string(), problem, remedy: remedy.into(), prevents: true }
    }

    fn of_certificate(flag: &'static str, path: &Path, fault: &Fault) -> Self {
        let prevents = fault.prevents_connections();
        Self { prevents, ..Self::new(flag, path, fault.to_string(), fault.remedy(&path.display().to_string())) }
    }

    /// Returns the text without the remedy.
    pub(crate) fn problem(&self) -> String {
        format!("-{} {}: {}", self.flag, self.path, self.problem)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use flannel_subnet_etcd::Tls;

    use super::*;

    #[test]
    fn a_file_that_is_missing_or_has_other_content_is_named_with_its_flag() {
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
        let v1 = |name: &str| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/it/files").join(name);
        assert_eq!(checked(&pem, &pem, &key), Ok(()));
        assert_eq!(checked(&v1("v1.crt"), &pem, &key), Ok(()), "an authority may be of version 1");
        for (told, parts) in [
            (checked(&pem, &v1("v1.crt"), &v1("v1.key")), ["-etcd-certfile", "version 1", "-extfile"]),
            (checked(&nowhere, &pem, &key), ["-etcd-cafile", "nowhere", "cannot be read"]),
            (checked(&junk, &pem, &key), ["-etcd-cafile", "junk", "contains no certificate"]),
            (checked(&pem, &key, &key), ["-etcd-certfile", "key", "contains no certificate"]),
            (checked(&pem, &pem, &pem), ["-etcd-keyfile", "pem", "contains no private key"]),
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
