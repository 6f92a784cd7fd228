//! The names of a Node's annotations.

use std::fmt;

use flannel_core::net::Family;

/// The prefix of every annotation's name.
///
/// Read as flannel reads its flag: `/` is appended if there is none, then `-` unless it ends in one of the two. The
/// part before the slash is a DNS name with at least one dot (docs/compatibility.md, "Kubernetes").
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnnotationPrefix(String);

/// The text is not a valid prefix of an annotation's name. Final for this input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "annotation prefix {0:?} must be a DNS name with a dot, then optionally a slash and a name, of a-z, 0-9, '_' and '-': \
     flannel.alpha.coreos.com"
)]
pub struct AnnotationPrefixError(String);

impl AnnotationPrefix {
    /// Checks `text` and appends missing characters.
    ///
    /// # Errors
    /// [`AnnotationPrefixError`]. Final for this input.
    pub fn new(text: &str) -> Result<Self, AnnotationPrefixError> {
        let refused = || AnnotationPrefixError(text.chars().take(64).collect());
        let mut whole = text.to_owned();
        if !whole.contains('/') {
            whole.push('/');
        }
        if !whole.ends_with(['/', '-']) {
            whole.push('-');
        }
        let is_word =
            |word: &str| !word.is_empty() && word.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'));
        let (domain, name) = whole.split_once('/').ok_or_else(refused)?;
        let is_domain = domain.contains('.') && domain.split('.').all(is_word) && domain.len() <= 253;
        // Kubernetes accepts names of up to 63 characters, and the longest suffix has 25.
        let is_name = name.is_empty() || (is_word(name) && name.len() > 1 && name.len() <= 38);
        if is_domain && is_name { Ok(Self(whole)) } else { Err(refused()) }
    }
}

impl Default for AnnotationPrefix {
    /// `flannel.alpha.coreos.com/`.
    fn default() -> Self {
        Self("flannel.alpha.coreos.com/".to_owned())
    }
}

impl fmt::Display for AnnotationPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An annotation that flannel uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Key {
    Managed,
    BackendType,
    BackendData,
    BackendV6Data,
    PublicIp,
    PublicIpv6,
    PublicIpOverwrite,
    PublicIpv6Overwrite,
    NodePublicIp,
    NodePublicIpv6,
}

impl Key {
    pub(crate) const ALL: [Self; 10] = [
        Self::Managed,
        Self::BackendType,
        Self::BackendData,
        Self::BackendV6Data,
        Self::PublicIp,
        Self::PublicIpv6,
        Self::PublicIpOverwrite,
        Self::PublicIpv6Overwrite,
        Self::NodePublicIp,
        Self::NodePublicIpv6,
    ];

    /// The annotations that nodes write about themselves.
    pub(crate) const WRITTEN: [Self; 6] =
        [Self::Managed, Self::BackendType, Self::BackendData, Self::BackendV6Data, Self::PublicIp, Self::PublicIpv6];

    /// The annotations that an operator writes for a node.
    pub(crate) const SET_BY_OPERATORS: [Self; 4] =
        [Self::PublicIpOverwrite, Self::PublicIpv6Overwrite, Self::NodePublicIp, Self::NodePublicIpv6];

    fn suffix(self) -> &'static str {
        match self {
            Self::Managed => "kube-subnet-manager",
            Self::BackendType => "backend-type",
            Self::BackendData => "backend-data",
            Self::BackendV6Data => "backend-v6-data",
            Self::PublicIp => "public-ip",
            Self::PublicIpv6 => "public-ipv6",
            Self::PublicIpOverwrite => "public-ip-overwrite",
            Self::PublicIpv6Overwrite => "public-ipv6-overwrite",
            Self::NodePublicIp => "node-public-ip",
            Self::NodePublicIpv6 => "node-public-ipv6",
        }
    }

    pub(crate) fn public_ip(family: Family) -> Self {
        match family {
            Family::V4 => Self::PublicIp,
            Family::V6 => Self::PublicIpv6,
        }
    }

    pub(crate) fn backend_data(family: Family) -> Self {
        match family {
            Family::V4 => Self::BackendData,
            Family::V6 => Self::BackendV6Data,
        }
    }

    /// The annotation that replaces the published public IP.
    pub(crate) fn overwrite(family: Family) -> Self {
        match family {
            Family::V4 => Self::PublicIpOverwrite,
            Family::V6 => Self::PublicIpv6Overwrite,
        }
    }

    /// The annotation with the public IP that the node should use.
    pub(crate) fn node_public_ip(family: Family) -> Self {
        match family {
            Family::V4 => Self::NodePublicIp,
            Family::V6 => Self::NodePublicIpv6,
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.suffix())
    }
}

/// The names of all annotations under one prefix.
#[derive(Debug, Clone)]
pub(crate) struct Keys {
    prefix: AnnotationPrefix,
}

impl Keys {
    pub(crate) fn new(prefix: AnnotationPrefix) -> Self {
        Self { prefix }
    }

    pub(crate) fn name(&self, key: Key) -> String {
        format!("{}{}", self.prefix, key.suffix())
    }

    /// Returns the annotation of this name.
    pub(crate) fn find(&self, name: &str) -> Option<Key> {
        let suffix = name.strip_prefix(&self.prefix.0)?;
        Key::ALL.into_iter().find(|key| key.suffix() == suffix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_completed_as_go_flannel_does() {
        for (text, first) in [
            ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/backend-type"),
            ("flannel.alpha.coreos.com/", "flannel.alpha.coreos.com/backend-type"),
            ("org.com/9", "org.com/9-backend-type"),
            ("org.com/9-", "org.com/9-backend-type"),
            ("a_b.c-d/e_f", "a_b.c-d/e_f-backend-type"),
        ] {
            let keys = Keys::new(AnnotationPrefix::new(text).unwrap());
            assert_eq!(keys.name(Key::BackendType), first);
            assert_eq!(keys.find(first), Some(Key::BackendType));
            assert_eq!(keys.find("other.com/backend-type"), None);
        }
        for text in ["", "org", "org/", "/x", "a..b/", "org.com/a/b", "Org.com", "org.com/-", "org.com/ä", ".com"] {
            let error = AnnotationPrefix::new(text).unwrap_err();
            assert!(error.to_string().contains("flannel.alpha.coreos.com"), "{text}: {error}");
        }
    }
}
