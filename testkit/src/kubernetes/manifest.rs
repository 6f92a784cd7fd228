//! The manifest that operators apply, read as they would.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::{Context, Error};

/// The objects of `deploy/kubernetes.yaml`, which operators apply.
///
/// # Errors
/// Says where the manifest is not YAML.
pub fn manifest() -> Result<Vec<Value>, Error> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes.yaml");
    let text = fs::read_to_string(&path).context(|| format!("cannot read {}", path.display()))?;
    serde_saphyr::from_multiple(&text).map_err(|error| Error::new(format!("{}: {error}", path.display())))
}

/// The RBAC rules of the manifest's role: what an agent's account may do.
///
/// # Errors
/// As [`manifest`], and where it has no such role.
pub fn rules() -> Result<Value, Error> {
    let role = manifest()?.into_iter().find(|object| object["kind"] == "ClusterRole");
    role.map(|mut role| role["rules"].take()).ok_or_else(|| Error::new("the manifest has no ClusterRole".to_owned()))
}

/// The same without `verb` of `resource`.
///
/// # Errors
/// As [`rules`].
pub fn rules_without(verb: &str, resource: &str) -> Result<Value, Error> {
    let mut rules = rules()?;
    for rule in rules.as_array_mut().into_iter().flatten().filter(|rule| rule["resources"] == json!([resource])) {
        if let Some(verbs) = rule["verbs"].as_array_mut() {
            verbs.retain(|granted| granted != verb);
        }
    }
    // A rule without verbs is none.
    if let Some(rules) = rules.as_array_mut() {
        rules.retain(|rule| rule["verbs"] != json!([]));
    }
    Ok(rules)
}
