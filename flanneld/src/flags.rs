//! Parses flanneld's flags in exactly Go's syntax (docs/compatibility.md, "Command line").

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use crate::command_table::{COMMANDS, Command};
use crate::flag_table::{self, Flag, Kind, find, flags};

/// The parsed command line.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Line {
    /// The flags given.
    pub(crate) values: Values,
    /// The arguments that are not flags.
    pub(crate) words: Vec<String>,
    /// `-h` or `-help` was found; the rest was not read.
    pub(crate) help: bool,
}

/// Checked texts of the given flags, by name. A flag that cannot be repeated has only its last text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Values(BTreeMap<&'static str, Vec<String>>);

/// The command line or the environment is not valid. The message names the flag, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UsageError {
    /// The argument without its value, which may be a secret.
    #[error("bad flag syntax: {0}")]
    Syntax(String),
    #[error("argument {0} is not UTF-8: give text")]
    NotText(usize),
    #[error("flag provided but not defined: -{name}{}", suggestion(near))]
    Unknown { name: String, near: Option<&'static str> },
    #[error("flag needs an argument: -{0}")]
    NoValue(&'static str),
    #[error("invalid value {value:?} for {place}: {problem}")]
    Value { place: String, value: String, problem: String },
    #[error("unknown command {word:?}{}; commands: {}", suggestion(near), names(COMMANDS.iter()))]
    Command { word: String, near: Option<&'static str> },
    #[error("{}", operands(.0))]
    Operands(&'static Command),
    #[error("-{0} takes no value after a space: use -{0} or -{0}={1}")]
    SwitchValue(&'static str, &'static str),
    /// Arguments that exclude or need each other; the text says what to write.
    #[error("{0}")]
    Combination(String),
}

impl UsageError {
    /// The flag `name` has no effect without `other`.
    pub(crate) fn requires(name: &str, other: &str) -> Self {
        Self::Combination(format!("-{name} requires -{other}"))
    }

    /// A value of the right form that is not allowed.
    pub(crate) fn value(name: &str, value: &str, problem: impl ToString) -> Self {
        Self::Value { place: place(name), value: value.to_owned(), problem: problem.to_string() }
    }
}

fn operands(command: &Command) -> String {
    match command.operand {
        "" => format!("{} takes no operands", command.name),
        operand => format!("{} takes one operand: {operand}; see flanneld help {0}", command.name),
    }
}

/// Returns the names of commands, separated by commas.
fn names<'a>(commands: impl Iterator<Item = &'a Command>) -> String {
    commands.map(|command| command.name).collect::<Vec<_>>().join(", ")
}

fn place(name: &str) -> String {
    let variable = find(name).and_then(flag_table::variable);
    variable.map_or_else(|| format!("-{name}"), |variable| format!("-{name} (or {variable})"))
}

/// Returns what an error says about a similar name.
pub(crate) fn suggestion(near: &Option<&'static str>) -> String {
    near.map(|near| format!(" (did you mean {near}?)")).unwrap_or_default()
}

/// Parses arguments as Go's package `flag` does, but continues after the first argument that is not a flag. These
/// arguments are a command and its operands; flags may follow each of them.
pub(crate) fn parse(args: impl IntoIterator<Item = String>) -> Result<Line, UsageError> {
    let mut args = args.into_iter().peekable();
    let mut line = Line::default();
    let mut only_words = false;
    while let Some(arg) = args.next() {
        if only_words || arg.len() < 2 || !arg.starts_with('-') {
            line.words.push(arg);
            continue;
        }
        if arg == "--" {
            only_words = true;
            continue;
        }
        let flag = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')).unwrap_or_default();
        if flag.is_empty() || flag.starts_with(['-', '=']) {
            return Err(UsageError::Syntax(name_of(&arg).to_owned()));
        }
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let Some(flag) = find(name) else {
            if name == "help" || name == "h" {
                line.help = true;
                return Ok(line);
            }
            return Err(UsageError::Unknown { name: name.to_owned(), near: near_flag(name) });
        };
        let value = match (value, flag.kind) {
            (Some(value), _) => value,
            (None, Kind::Bool) => {
                // Without a command before it, such a word cannot be meant as an operand.
                let next = args.peek().filter(|_| line.words.is_empty());
                if let Some(value) = next.and_then(|next| truth(next)) {
                    return Err(UsageError::SwitchValue(flag.name, value));
                }
                "true".to_owned()
            }
            (None, _) => args.next().ok_or(UsageError::NoValue(flag.name))?,
        };
        line.values.set(flag, value, &format!("flag -{}", flag.name))?;
    }
    Ok(line)
}

/// Returns an error if the line has a flag that belongs to other commands than this one.
pub(crate) fn check_command(values: &Values, command: Option<&Command>) -> Result<(), UsageError> {
    let is_taken = |flag: &&Flag| command.is_some_and(|command| command.flags.contains(&flag.name));
    let mut given = flag_table::of_commands().filter(|flag| values.is_given(flag.name));
    let Some(flag) = given.find(|flag| !is_taken(flag)) else { return Ok(()) };
    let takers = names(COMMANDS.iter().filter(|command| command.flags.contains(&flag.name)));
    Err(UsageError::Combination(match command {
        Some(command) => format!("{} does not take -{}: only these commands do: {takers}", command.name, flag.name),
        None => format!("-{} needs one of the commands {takers}", flag.name),
    }))
}

/// Returns the value that a word means for a switch.
fn truth(word: &str) -> Option<&'static str> {
    match word.to_ascii_lowercase().as_str() {
        "true" | "t" | "yes" | "y" | "on" | "1" => Some("true"),
        "false" | "f" | "no" | "n" | "off" | "0" => Some("false"),
        _ => None,
    }
}

/// Returns the arguments as text. The error has only the argument's number, from 1: the text may be a secret.
pub(crate) fn texts(args: impl IntoIterator<Item = OsString>) -> Result<Vec<String>, UsageError> {
    let text = |(index, arg): (usize, OsString)| arg.into_string().map_err(|_| UsageError::NotText(index + 1));
    args.into_iter().enumerate().map(text).collect()
}

/// Returns an argument without its value.
fn name_of(arg: &str) -> &str {
    arg.split_once('=').map_or(arg, |(name, _)| name)
}

impl Values {
    /// Sets `value` if it has the form of the flag's kind. `place` is its origin, for the error.
    pub(crate) fn set(&mut self, flag: &Flag, value: String, place: &str) -> Result<(), UsageError> {
        let problem = match flag.kind {
            Kind::Bool if parse_bool(&value).is_none() => Some("not a boolean: write true or false"),
            Kind::Int(_) if parse_int(&value).is_none() => Some("not a whole number"),
            Kind::Bool | Kind::Int(_) | Kind::Text(_) | Kind::List(_) => None,
        };
        if let Some(problem) = problem {
            return Err(UsageError::Value { place: place.to_owned(), value, problem: problem.to_owned() });
        }
        let texts = self.0.entry(flag.name).or_default();
        if !matches!(flag.kind, Kind::List(_)) {
            texts.clear();
        }
        texts.push(value);
        Ok(())
    }

    /// Returns the given flags in Go's syntax, without passwords.
    pub(crate) fn summary(&self) -> String {
        let shown = |(&name, texts): (&&'static str, &Vec<String>)| {
            // A URL may contain one.
            let hides = |text: &str| name == "etcd-password" || (text.contains("://") && text.contains('@'));
            texts.iter().map(|text| format!("-{name}={}", if hides(text) { "…" } else { text })).collect::<Vec<_>>()
        };
        self.0.iter().flat_map(shown).collect::<Vec<_>>().join(" ")
    }

    /// Whether the flag was given, on the command line or in the environment.
    pub(crate) fn is_given(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Returns the flag's text, or its default.
    pub(crate) fn text(&self, name: &str) -> &str {
        let given = self.0.get(name).and_then(|texts| texts.last()).map(String::as_str);
        given.or_else(|| find(name).map(|flag| flag.default)).unwrap_or_default()
    }

    /// Returns the flag's text, if it is not empty.
    pub(crate) fn non_empty(&self, name: &str) -> Option<&str> {
        Some(self.text(name)).filter(|text| !text.is_empty())
    }

    /// Returns the flag's text as a path, if it is not empty.
    pub(crate) fn path(&self, name: &str) -> Option<PathBuf> {
        self.non_empty(name).map(PathBuf::from)
    }

    /// Returns the texts of a flag that may be repeated.
    pub(crate) fn texts(&self, name: &str) -> &[String] {
        self.0.get(name).map(Vec::as_slice).unwrap_or_default()
    }

    pub(crate) fn bool(&self, name: &str) -> bool {
        // Checked when it was set.
        parse_bool(self.text(name)).unwrap_or_default()
    }

    /// Returns a number, or an error if it is out of range.
    pub(crate) fn number(&self, name: &'static str, least: i64, most: i64) -> Result<u32, UsageError> {
        let text = self.text(name);
        let number = parse_int(text).filter(|number| (least..=most).contains(number));
        let number = number.and_then(|number| u32::try_from(number).ok());
        number.ok_or_else(|| UsageError::value(name, text, format!("must be from {least} to {most}")))
    }
}

fn near_flag(name: &str) -> Option<&'static str> {
    near(name, flags().map(|flag| flag.name))
}

/// Returns the name closest to `word`, if it is close enough to be a likely intention. A single letter is close to
/// none.
pub(crate) fn near(word: &str, names: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    let names = names.filter(|name| name.len() > 1 && word.len() > 1);
    let folded = |text: &str| text.to_ascii_lowercase().replace('_', "-");
    let word = folded(word);
    let (distance, name) = names.map(|name| (distance(&word, &folded(name)), name)).min()?;
    (distance <= 1 + word.len() / 5).then_some(name)
}

/// The number of characters to insert, delete or change (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, cb) in b.iter().enumerate() {
            let changed = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// `strconv.ParseBool`.
fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// `strconv.ParseInt(text, 0, 64)`: a sign, a base prefix, underscores between digits.
fn parse_int(text: &str) -> Option<i64> {
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let lower = digits.to_ascii_lowercase();
    let (base, rest) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, &lower[2..]),
        [b'0', b'b', ..] => (2, &lower[2..]),
        [b'0', b'o', ..] => (8, &lower[2..]),
        [b'0', _, ..] => (8, &lower[1..]),
        _ => (10, lower.as_str()),
    };
    let prefixed = rest.len() != lower.len();
    if rest.ends_with('_') || rest.contains("__") || (!prefixed && rest.starts_with('_')) {
        return None;
    }
    let rest = rest.replace('_', "");
    if !rest.starts_with(|c: char| c.is_ascii_hexdigit()) {
        return None;
    }
    let value = i128::from_str_radix(&rest, base).ok()?;
    i64::try_from(if negative { -value } else { value }).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Result<Line, UsageError> {
        parse(text.split(' ').filter(|word| !word.is_empty()).map(str::to_owned))
    }

    fn texts(text: &str, name: &str) -> Vec<String> {
        line(text).unwrap().values.texts(name).to_vec()
    }

    #[test]
    fn values_are_read_in_every_form_that_go_reads() {
        for text in ["-public-ip 1.2.3.4", "--public-ip 1.2.3.4", "-public-ip=1.2.3.4", "--public-ip=1.2.3.4"] {
            assert_eq!(texts(text, "public-ip"), ["1.2.3.4"], "{text}");
        }
        assert_eq!(texts("-public-ip=a=b", "public-ip"), ["a=b"]);
        assert_eq!(texts("-public-ip=", "public-ip"), [""]);
        // The next argument is the value, even if it looks like a flag.
        assert_eq!(texts("-etcd-prefix -public-ip", "etcd-prefix"), ["-public-ip"]);
        assert_eq!(texts("-etcd-prefix -- -iface x", "etcd-prefix"), ["--"]);
    }

    #[test]
    fn a_boolean_takes_its_value_only_after_an_equals_sign() {
        for (text, value) in [
            ("-ip-masq", true),
            ("--ip-masq=true", true),
            ("-ip-masq=T", true),
            ("-ip-masq=1", true),
            ("-iptables-forward-rules=false", false),
            ("-iptables-forward-rules=F", false),
            ("-iptables-forward-rules=0", false),
        ] {
            let name = text.trim_start_matches('-').split('=').next().unwrap();
            assert_eq!(line(text).unwrap().values.bool(name), value, "{text}");
        }
        for (text, hint) in
            [("-ip-masq yes", "use -ip-masq or -ip-masq=true"), ("-v=2 -ip-masq False", "-ip-masq=false")]
        {
            let error = line(text).unwrap_err().to_string();
            assert!(error.contains(hint), "{text}: {error}");
        }
        // After a command it may be an operand. A switch before a word takes no value, as in Go.
        assert_eq!(line("explain -json no").unwrap().words, ["explain", "no"]);
        assert_eq!(line("-ip-masq status").unwrap().words, ["status"]);
        for text in ["-ip-masq=yes", "-ip-masq=", "-ip-masq=tRUE"] {
            let error = line(text).unwrap_err().to_string();
            assert!(error.contains("flag -ip-masq") && error.contains("boolean"), "{error}");
        }
    }

    #[test]
    fn a_repeated_flag_gathers_and_a_single_one_keeps_the_last() {
        assert_eq!(texts("-iface a --iface=b -iface c", "iface"), ["a", "b", "c"]);
        assert_eq!(texts("-public-ip 1.1.1.1 -public-ip 2.2.2.2", "public-ip"), ["2.2.2.2"]);
    }

    #[test]
    fn numbers_are_read_as_go_reads_them() {
        for (text, value) in [
            ("8081", Some(8081)),
            ("+5", Some(5)),
            ("-5", Some(-5)),
            ("0x1f", Some(31)),
            ("0X1F", Some(31)),
            ("010", Some(8)),
            ("0o10", Some(8)),
            ("0b11", Some(3)),
            ("1_000", Some(1000)),
            ("0x_1", Some(1)),
            ("0", Some(0)),
            ("", None),
            ("-", None),
            ("_1", None),
            ("1_", None),
            ("1__0", None),
            ("08", None),
            ("0x", None),
            ("1.5", None),
            ("5s", None),
            (" 5", None),
            ("++5", None),
            ("9223372036854775807", Some(i64::MAX)),
            ("9223372036854775808", None),
            ("-9223372036854775808", Some(i64::MIN)),
        ] {
            assert_eq!(parse_int(text), value, "{text}");
        }
        let error = line("-healthz-port x").unwrap_err().to_string();
        assert!(error.contains("-healthz-port") && error.contains("\"x\""), "{error}");
    }

    #[test]
    fn reading_stops_at_the_first_word_but_flags_may_follow_a_command() {
        let found = line("-v 2 explain -json 10.5.1.0 -v=3").unwrap();
        assert_eq!(found.words, ["explain", "10.5.1.0"]);
        assert!(found.values.bool("json") && found.values.text("v") == "3");
        assert_eq!(line("-v 2 -- -json").unwrap().words, ["-json"]);
        assert_eq!(line("-").unwrap().words, ["-"]);
    }

    #[test]
    fn bad_flags_are_named_with_a_near_match() {
        for (text, part) in [
            ("-ifcae=eth0", "-ifcae (did you mean iface?)"),
            ("--subnet_file=x", "-subnet_file (did you mean subnet-file?)"),
            ("-Healthz-Port=1", "(did you mean healthz-port?)"),
            ("-quux", "flag provided but not defined: -quux"),
            ("---iface", "bad flag syntax: ---iface"),
            ("---etcd-password=x", "bad flag syntax: ---etcd-password"),
            ("-=x", "bad flag syntax: -"),
            ("--=x", "bad flag syntax: --"),
            ("-iface", "flag needs an argument: -iface"),
        ] {
            let error = line(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
            assert!(!error.contains("=x"), "a value may be a secret: {error}");
        }
        for text in ["-quux", "-x", "-vv"] {
            assert!(!line(text).unwrap_err().to_string().contains("did you mean"), "{text}");
        }
    }

    #[test]
    fn the_summary_names_the_given_flags_and_no_password() {
        let url = line("-kube-api-url=https://u:secret@api").unwrap().values;
        assert_eq!(url.summary(), "-kube-api-url=…");
        let values = line("-iface a -iface b -etcd-password secret -ip-masq").unwrap().values;
        assert_eq!(values.summary(), "-etcd-password=… -iface=a -iface=b -ip-masq=true");
    }

    #[test]
    fn help_ends_the_reading() {
        for text in ["-h", "--help", "-help -quux", "-h=false"] {
            assert!(line(text).unwrap().help, "{text}");
        }
        assert!(line("-quux -h").is_err());
        assert_eq!(line("status -h").unwrap().words, ["status"]);
    }

    #[test]
    fn a_flag_of_commands_is_an_error_where_it_has_no_effect_and_the_error_says_where_it_has_one() {
        let check = |text: &str| {
            let line = line(text).unwrap();
            let command = line.words.first().and_then(|word| crate::command_table::find(word));
            check_command(&line.values, command).map_err(|error| error.to_string())
        };
        assert_eq!(check("status -w -o json -v 2"), Ok(()));
        assert_eq!(check("-ip-masq"), Ok(()));
        assert_eq!(check("plan -w").unwrap_err(), "plan does not take -w: only these commands do: status, peers");
        assert!(check("-o json").unwrap_err().starts_with("-o needs one of the commands status, peers, plan"));
    }

    #[test]
    fn a_number_out_of_range_names_flag_variable_and_range() {
        let values = line("-subnet-lease-renew-margin 1440").unwrap().values;
        let error = values.number("subnet-lease-renew-margin", 1, 1439).unwrap_err().to_string();
        assert!(error.contains("FLANNELD_SUBNET_LEASE_RENEW_MARGIN") && error.contains("from 1 to 1439"), "{error}");
    }
}
