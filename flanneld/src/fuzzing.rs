//! Checks of private parsers, for fuzz targets and property tests. Each panics if a property fails.

use crate::flag_table::{Kind, flags};
use crate::flags::{UsageError, Values, parse};
use crate::options::Options;

const PASSWORD: &str = "correct-horse-battery";

/// Checks a command line and an environment: given flags read back unchanged, and a password is never shown.
pub fn command_line(args: &[String], variables: &[(String, String)]) {
    let password = ["-etcd-username=u".to_owned(), format!("-etcd-password={PASSWORD}")];
    let is_told = args.iter().chain(variables.iter().map(|(_, value)| value)).any(|text| text.contains(PASSWORD));
    for args in [args.to_vec(), [&password, args].concat()] {
        let shown = match read(args, variables) {
            Ok(options) => format!("{options:?}"),
            Err(error) => format!("{error} {error:?}"),
        };
        assert!(is_told || !shown.contains(PASSWORD), "{shown}");
    }
}

fn read(args: Vec<String>, variables: &[(String, String)]) -> Result<Options, UsageError> {
    let mut values = parse(args)?.values;
    assert_reads_back(&values);
    crate::env::overlay(&mut values, variables.iter().cloned())?;
    assert_reads_back(&values);
    Options::read(&values, |name| (name == "NODE_NAME").then(|| "node-1".to_owned()), "host-1".to_owned())
}

fn assert_reads_back(values: &Values) {
    let mut args = Vec::new();
    for flag in flags().filter(|flag| values.is_given(flag.name)) {
        match flag.kind {
            Kind::List(_) => args.extend(values.texts(flag.name).iter().map(|text| format!("-{}={text}", flag.name))),
            Kind::Bool | Kind::Int(_) | Kind::Text(_) => {
                args.push(format!("--{}={}", flag.name, values.text(flag.name)))
            }
        }
    }
    assert_eq!(parse(args).map(|line| line.values).as_ref(), Ok(values));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn arg() -> impl Strategy<Value = String> {
        let flag = prop::sample::select(flags().collect::<Vec<_>>());
        let value = "(true|f|[0-9]{1,5}|192\\.0\\.2\\.1|2001:db8::1|/x|a:b@c|\\PC{0,9})";
        prop_oneof![
            (flag.clone(), value).prop_map(|(flag, value)| format!("-{}={value}", flag.name)),
            flag.prop_map(|flag| format!("--{}", flag.name)),
            value,
            "\\PC{0,12}",
        ]
    }

    fn from_environment() -> impl Strategy<Value = (String, String)> {
        let name = prop::sample::select(flags().filter_map(crate::flag_table::variable).collect::<Vec<_>>());
        (prop_oneof![name, "FLANNELD_[A-Z_]{0,9}", "\\PC{0,9}"], "(true|[0-9]{1,5}|192\\.0\\.2\\.1|\\PC{0,9})")
    }

    proptest! {
        #[test]
        fn what_is_given_reads_back_and_a_password_is_never_shown(
            args in proptest::collection::vec(arg(), 0..6), variables in proptest::collection::vec(from_environment(), 0..3),
        ) {
            command_line(&args, &variables);
        }
    }
}
