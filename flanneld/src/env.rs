//! Flags from the environment: `FLANNELD_NAME` where the command line does not have `-name` (docs/compatibility.md,
//! "Command line").

use std::ffi::OsString;

use crate::flag_table::{VARIABLE_PREFIX, find, flags, variable};
use crate::flags::{UsageError, Values, near};

/// Returns the variables that are text, and a warning for each variable with flanneld's prefix that is not.
pub(crate) fn texts(variables: impl IntoIterator<Item = (OsString, OsString)>) -> (Vec<(String, String)>, Vec<String>) {
    let (mut texts, mut warnings) = (Vec::new(), Vec::new());
    for (name, value) in variables {
        let shown = name.to_string_lossy().into_owned();
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => texts.push((name, value)),
            _ if shown.starts_with(VARIABLE_PREFIX) => {
                warnings.push(format!("the environment variable {shown} is not UTF-8 and is ignored"));
            }
            _ => {}
        }
    }
    (texts, warnings)
}

/// Sets flags that the command line does not have from variables. Empty variables are ignored; the variable of a flag
/// that may be repeated gives exactly one value. Returns a warning for each variable with flanneld's prefix that has no
/// flag.
pub(crate) fn overlay(
    values: &mut Values,
    variables: impl IntoIterator<Item = (String, String)>,
) -> Result<Vec<String>, UsageError> {
    let mut warnings = Vec::new();
    for (name, value) in variables {
        let Some(rest) = name.strip_prefix(VARIABLE_PREFIX) else { continue };
        let flag = flags().find(|flag| variable(flag).as_ref() == Some(&name));
        let Some(flag) = flag else {
            let near = near(rest, flags().map(|flag| flag.name)).and_then(find).and_then(variable);
            let hint = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
            warnings.push(format!("the environment variable {name} is unknown and ignored{hint}"));
            continue;
        };
        if !value.is_empty() && !values.is_given(flag.name) {
            values.set(flag, value, &format!("environment variable {name}"))?;
        }
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::parse;

    fn with(args: &[&str], variables: &[(&str, &str)]) -> Result<(Values, Vec<String>), UsageError> {
        let mut values = parse(args.iter().map(|arg| (*arg).to_owned())).unwrap().values;
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let warnings = overlay(&mut values, variables)?;
        Ok((values, warnings))
    }

    #[test]
    fn a_variable_counts_only_where_the_flag_is_not_given_and_it_is_not_empty() {
        let (values, _) = with(&[], &[("FLANNELD_ETCD_PREFIX", "/e")]).unwrap();
        assert_eq!(values.text("etcd-prefix"), "/e");
        let (values, _) = with(&["-etcd-prefix=/f"], &[("FLANNELD_ETCD_PREFIX", "/e")]).unwrap();
        assert_eq!(values.text("etcd-prefix"), "/f");
        let (values, _) = with(&["-etcd-prefix="], &[("FLANNELD_ETCD_PREFIX", "/e")]).unwrap();
        assert_eq!(values.text("etcd-prefix"), "");
        let (values, _) = with(&[], &[("FLANNELD_ETCD_PREFIX", "")]).unwrap();
        assert_eq!(values.text("etcd-prefix"), "/coreos.com/network");
    }

    #[test]
    fn a_repeatable_flag_gets_exactly_one_value() {
        let (values, _) = with(&[], &[("FLANNELD_IFACE", "eth0,eth1")]).unwrap();
        assert_eq!(values.texts("iface"), ["eth0,eth1"]);
    }

    #[test]
    fn a_bad_value_names_the_variable_and_an_unknown_one_is_warned_of() {
        let error = with(&[], &[("FLANNELD_IP_MASQ", "ja")]).unwrap_err().to_string();
        assert!(error.contains("FLANNELD_IP_MASQ") && error.contains("\"ja\""), "{error}");
        let (_, warnings) = with(&[], &[("FLANNELD_IPMASQ", "true"), ("HOME", "/")]).unwrap();
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("did you mean FLANNELD_IP_MASQ?"), "{warnings:?}");
    }

    #[test]
    fn version_and_the_flags_of_commands_have_no_variable() {
        for (name, value) in [("VERSION", "0.1.0"), ("WATCH", "true"), ("DRY_RUN", "true"), ("JSON", "true")] {
            let (values, warnings) = with(&[], &[(&format!("FLANNELD_{name}"), value)]).unwrap();
            assert_eq!((values, warnings.len()), (Values::default(), 1), "{name}");
        }
    }
}
