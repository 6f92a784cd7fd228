//! The manifest that operators apply.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::ApiServer;
use crate::{Context, Error};

/// The namespace of the manifest's objects.
const NAMESPACE: &str = "flannelkit";

/// The service account of its agents.
const ACCOUNT: &str = "flanneld";

/// Returns the objects of `deploy/kubernetes/flannel.yaml`, which operators apply.
///
/// # Errors
/// If the manifest is not valid YAML.
pub fn manifest() -> Result<Vec<Value>, Error> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/flannel.yaml");
    let text = fs::read_to_string(&path).context(|| format!("cannot read {}", path.display()))?;
    objects(&text).map_err(|error| Error::new(format!("{}: {error}", path.display())))
}

/// Returns the objects of a text in YAML.
///
/// # Errors
/// If it is not valid YAML.
pub fn objects(text: &str) -> Result<Vec<Value>, Error> {
    serde_saphyr::from_multiple(text).map_err(|error| Error::new(error.to_string()))
}

/// Returns what an agent's account may do: the RBAC rules of the manifest's role, and the one that is needed besides to
/// find the Node by its Pod, which the manifest's agents need not.
///
/// # Errors
/// As [`manifest`], and if it has no such role.
pub fn rules() -> Result<Value, Error> {
    let role = manifest()?.into_iter().find(|object| object["kind"] == "ClusterRole");
    let rules = role.and_then(|mut role| role["rules"].as_array_mut().map(std::mem::take));
    let mut rules = rules.ok_or_else(|| Error::new("the manifest has no ClusterRole with rules".to_owned()))?;
    rules.push(json!({ "apiGroups": [""], "resources": ["pods"], "verbs": ["get"] }));
    Ok(rules.into())
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

impl ApiServer {
    /// Creates the manifest's objects. A field that the server does not know is an error.
    ///
    /// # Errors
    /// The server's error.
    pub async fn install(&self) -> Result<(), Error> {
        for object in manifest()? {
            let path = format!("{}?fieldValidation=Strict", collection(&object)?);
            self.create(&path, &object).await?;
        }
        Ok(())
    }

    /// Returns a token of the installed manifest's account: that of a Pod on this Node, which is created, as kubelet
    /// requests it; without `node` one that is bound to no Pod.
    ///
    /// # Errors
    /// The server's error.
    pub async fn agent_token(&self, node: Option<&str>) -> Result<String, Error> {
        let within = format!("/api/v1/namespaces/{NAMESPACE}");
        let mut spec = json!({});
        if let Some(node) = node {
            let containers = json!([{ "name": "agent", "image": "example.com/agent" }]);
            let pod = json!({
                "metadata": { "name": format!("agent-of-{node}") },
                "spec": { "nodeName": node, "serviceAccountName": ACCOUNT, "containers": containers },
            });
            let pod = self.create(&format!("{within}/pods"), &pod).await?;
            let (name, uid) = (&pod["metadata"]["name"], &pod["metadata"]["uid"]);
            spec["boundObjectRef"] = json!({ "apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid });
        }
        let path = format!("{within}/serviceaccounts/{ACCOUNT}/token");
        let token = self.create(&path, &json!({ "spec": spec })).await?;
        let text = token.pointer("/status/token").and_then(Value::as_str);
        text.map(str::to_owned).ok_or_else(|| Error::new(format!("no token in {token}")))
    }
}

/// Returns the path at which objects of this object's kind are created.
fn collection(object: &Value) -> Result<String, Error> {
    let kind = object["kind"].as_str().unwrap_or_default();
    let (resource, has_namespace) = match kind {
        "Namespace" => ("namespaces", false),
        "ClusterRole" => ("clusterroles", false),
        "ClusterRoleBinding" => ("clusterrolebindings", false),
        "ValidatingAdmissionPolicy" => ("validatingadmissionpolicies", false),
        "ValidatingAdmissionPolicyBinding" => ("validatingadmissionpolicybindings", false),
        "ServiceAccount" => ("serviceaccounts", true),
        "ConfigMap" => ("configmaps", true),
        "DaemonSet" => ("daemonsets", true),
        _ => return Err(Error::new(format!("objects of kind {kind:?} are new in the manifest"))),
    };
    let version = object["apiVersion"].as_str().unwrap_or_default();
    let root = if version.contains('/') { "apis" } else { "api" };
    match object["metadata"]["namespace"].as_str().filter(|_| has_namespace) {
        Some(namespace) => Ok(format!("/{root}/{version}/namespaces/{namespace}/{resource}")),
        None => Ok(format!("/{root}/{version}/{resource}")),
    }
}
