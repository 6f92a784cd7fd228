//! The manifest that operators apply.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::{Context, Error};

/// Returns the objects of `deploy/kubernetes/flannel.yaml`, which operators apply.
///
/// # Errors
/// If the manifest is not valid YAML.
pub fn manifest() -> Result<Vec<Value>, Error> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/flannel.yaml");
    let text = fs::read_to_string(&path).context(|| format!("cannot read {}", path.display()))?;
    serde_saphyr::from_multiple(&text).map_err(|error| Error::new(format!("{}: {error}", path.display())))
}

/// Returns the RBAC rules of the manifest's role: what an agent's account may do.
///
/// # Errors
/// As [`manifest`], and if it has no such role.
pub fn rules() -> Result<Value, Error> {
    let role = manifest()?.into_iter().find(|object| object["kind"] == "ClusterRole");
    role.map(|mut role| role["rules"].take()).ok_or_else(|| Error::new("the manifest has no ClusterRole".to_owned()))
}

/// Returns the rules without `verb` on `resource`.
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
    // Removes rules without verbs.
    if let Some(rules) = rules.as_array_mut() {
        rules.retain(|rule| rule["verbs"] != json!([]));
    }
    Ok(rules)
}
