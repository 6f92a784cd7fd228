//! Whether the files that etcd's flags name hold what they should. The store reads them again for every connection, so
//! that they may be rotated; what is wrong at start is told at start.

use std::path::Path;

use flannel_subnet_etcd::{ClientCertificate, Config, Password};
use rustls::InconsistentKeys;
use rustls::crypto::ring::default_provider;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::{Error as PemError, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// A file is not what its flag says. Mend it, or name another.
#[derive(Debug, thiserror::Error)]
#[error("-{flag} {path}: {problem}")]
pub(crate) struct CredentialError {
    flag: &'static str,
    path: String,
    problem: String,
}

/// Reads all of them. Errors hold nothing of what is in there.
pub(crate) fn check(config: &Config) -> Result<(), CredentialError> {
    if let Some(tls) = &config.tls {
        tls.ca.iter().try_for_each(|path| certificates("etcd-cafile", path))?;
        if let Some(client) = &tls.client {
            certificates("etcd-certfile", &client.certificate)?;
            told("etcd-keyfile", &client.key, "private key", PrivateKeyDer::from_pem_file(&client.key).map(drop))?;
            pair(client)?;
        }
    }
    match config.credentials.as_ref().map(|credentials| &credentials.password) {
        Some(Password::File(path)) => {
            told("etcd-password-file", path, "password", std::fs::read(path).map(drop).map_err(PemError::Io))
        }
        _ => Ok(()),
    }
}

/// Whether the key is the certificate's. Of what cannot be told here the handshake will tell.
fn pair(client: &ClientCertificate) -> Result<(), CredentialError> {
    let chain = CertificateDer::pem_file_iter(&client.certificate).and_then(Iterator::collect);
    let (Ok(chain), Ok(key)) = (chain, PrivateKeyDer::from_pem_file(&client.key)) else { return Ok(()) };
    match CertifiedKey::from_der(chain, key, &default_provider()) {
        Err(rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {
            let certificate = client.certificate.display();
            let problem = format!("is not the key of -etcd-certfile {certificate}; give the one it was made with");
            Err(CredentialError { flag: "etcd-keyfile", path: client.key.display().to_string(), problem })
        }
        _ => Ok(()),
    }
}

fn certificates(flag: &'static str, path: &Path) -> Result<(), CredentialError> {
    let read = CertificateDer::pem_file_iter(path).and_then(|mut found| match found.next() {
        Some(first) => first.map(drop),
        None => Err(PemError::NoItemsFound),
    });
    told(flag, path, "certificate", read)
}

fn told(flag: &'static str, path: &Path, what: &str, read: Result<(), PemError>) -> Result<(), CredentialError> {
    let problem = match read {
        Ok(()) => return Ok(()),
        Err(PemError::Io(error)) => {
            format!("cannot be read: {error}; give a file with a {what} that this user may read")
        }
        Err(_) => format!("holds no {what}; give a PEM file with one"),
    };
    Err(CredentialError { flag, path: path.display().to_string(), problem })
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
        let checked = |ca: &PathBuf, certificate: &PathBuf, key: &PathBuf| {
            let client = Some(ClientCertificate { certificate: certificate.clone(), key: key.clone() });
            let tls = Some(Tls { ca: Some(ca.clone()), client, server_name: None });
            check(&Config { tls, ..Config::new(["https://etcd.example:2379"]) }).map_err(|error| error.to_string())
        };
        assert_eq!(checked(&pem, &pem, &key), Ok(()));
        for (told, parts) in [
            (checked(&nowhere, &pem, &key), ["-etcd-cafile", "nowhere", "cannot be read"]),
            (checked(&junk, &pem, &key), ["-etcd-cafile", "junk", "holds no certificate"]),
            (checked(&pem, &key, &key), ["-etcd-certfile", "key", "holds no certificate"]),
            (checked(&pem, &pem, &pem), ["-etcd-keyfile", "pem", "holds no private key"]),
            (checked(&pem, &pem, &another), ["-etcd-keyfile", "another", "is not the key of -etcd-certfile"]),
        ] {
            let told = told.unwrap_err();
            assert!(parts.iter().all(|part| told.contains(part)), "{told}");
        }
    }
}
