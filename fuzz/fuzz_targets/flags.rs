//! The command line and the environment of flanneld: an argument a line, and `NAME=value` after an empty one.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let (args, variables) = text.split_once("\n\n").unwrap_or((&text, ""));
    let args: Vec<String> = args.lines().map(str::to_owned).collect();
    let variable = |line: &str| line.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    let variables: Vec<_> = variables.lines().filter_map(variable).collect();
    // An expression of the operator's may be compiled into as much as the regular expressions' library allows: 10 MiB,
    // and four times that on the way.
    fuzz::bounded_but_for(64 << 20, bytes, || flanneld::fuzzing::command_line(&args, &variables));
});
