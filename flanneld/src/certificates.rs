//! What is wrong with a certificate, before a handshake fails with the TLS library's own words.

use std::fmt;
use std::time::Duration;

use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;
use x509_parser::time::ASN1Time;
use x509_parser::x509::X509Version;

/// How long before its end a certificate is reported.
const SOON: Duration = Duration::from_secs(14 * 24 * 3600);

/// What a certificate is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Authority,
    Client,
}

/// A fault of a certificate. Times are shown in UTC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// X.509 version 1, which the TLS library does not accept from a client.
    Version1,
    NotForClients,
    Expired(ASN1Time),
    NotYetValid(ASN1Time),
    ExpiresSoon(ASN1Time),
}

/// Returns the fault of a certificate in DER. What cannot be parsed is left to the TLS library.
pub(crate) fn fault(der: &[u8], purpose: Purpose, now: ASN1Time) -> Option<Fault> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let validity = certificate.validity();
    let usage = certificate.extended_key_usage().ok().flatten();
    let is_for_clients = usage.is_none_or(|usage| usage.value.client_auth || usage.value.any);
    match purpose {
        // As an authority, version 1 is accepted.
        Purpose::Client if certificate.version() == X509Version::V1 => return Some(Fault::Version1),
        Purpose::Client if !is_for_clients => return Some(Fault::NotForClients),
        Purpose::Authority | Purpose::Client => {}
    }
    let left = validity.not_after.timestamp() - now.timestamp();
    match () {
        () if now < validity.not_before => Some(Fault::NotYetValid(validity.not_before)),
        () if left < 0 => Some(Fault::Expired(validity.not_after)),
        () if left < SOON.as_secs() as i64 => Some(Fault::ExpiresSoon(validity.not_after)),
        () => None,
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version1 => f.write_str(
                "is of X.509 version 1, which this program's TLS library does not accept from a client (Go flannel's does)",
            ),
            Self::NotForClients => {
                f.write_str("is not for clients: its extendedKeyUsage lacks clientAuth; an etcd that checks the certificates of clients rejects it")
            }
            Self::Expired(end) => write!(f, "expired at {end}, so the connection to etcd fails"),
            Self::NotYetValid(start) => write!(f, "is not valid before {start}, so the connection to etcd fails"),
            Self::ExpiresSoon(end) => write!(f, "expires at {end}; after that the connection to etcd fails"),
        }
    }
}

impl Fault {
    /// Whether a connection cannot work.
    pub(crate) fn prevents_connections(&self) -> bool {
        match self {
            // etcd rejects it only if it checks the certificates of clients.
            Self::NotForClients | Self::ExpiresSoon(_) => false,
            Self::Version1 | Self::Expired(_) | Self::NotYetValid(_) => true,
        }
    }

    /// Returns what to do about the certificate in the file `path`.
    pub(crate) fn remedy(&self, path: &str) -> String {
        let look = format!("look at it: openssl x509 -in {path} -noout -text");
        match self {
            Self::Version1 | Self::NotForClients => format!(
                "reissue it with extensions, which makes it version 3: printf \
                 'basicConstraints=CA:FALSE\\nextendedKeyUsage=clientAuth\\n' >v3.ext; openssl x509 -req -in CLIENT.csr -CA \
                 CA.crt -CAkey CA.key -CAcreateserial -days 365 -extfile v3.ext -out {path}; {look}"
            ),
            Self::Expired(_) | Self::ExpiresSoon(_) => format!("reissue it; {look}"),
            Self::NotYetValid(_) => format!("correct this machine's clock (timedatectl), or reissue it; {look}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, KeyPair, date_time_ymd};
    use rustls_pki_types::CertificateDer;
    use rustls_pki_types::pem::PemObject;

    use super::*;

    fn issue(usage: &[ExtendedKeyUsagePurpose]) -> Vec<u8> {
        let mut params = CertificateParams::new(["node".to_owned()]).unwrap();
        params.extended_key_usages = usage.to_vec();
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2030, 1, 1));
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn version_use_and_time_are_judged() {
        use ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
        let at = |days: i64| ASN1Time::from_timestamp(1_577_836_800 + days * 86_400).unwrap();
        let both = issue(&[ServerAuth, ClientAuth]);
        let words = |der: &[u8], purpose, now| fault(der, purpose, now).map(|fault| fault.to_string());
        let client = |der: &[u8], days| words(der, Purpose::Client, at(days)).unwrap_or_default();
        assert_eq!((client(&both, 1), client(&issue(&[]), 1)), (String::new(), String::new()));
        assert!(client(&both, -1).contains("not valid before"));
        assert!(client(&both, 3_654).contains("expired at"));
        assert!(client(&both, 3_645).contains("expires at"));
        let server = issue(&[ServerAuth]);
        assert!(client(&server, 1).contains("clientAuth"));
        assert_eq!(words(&server, Purpose::Authority, at(1)), None);
        let v1 = CertificateDer::from_pem_slice(include_bytes!("../tests/it/files/v1.crt")).unwrap();
        assert!(client(&v1, 1).contains("version 1"));
        assert_eq!(fault(&v1, Purpose::Authority, at(10_000)), None);
        assert_eq!(fault(b"junk", Purpose::Client, at(1)), None);
    }
}
