//! What the programs say: `docs/log.md` lists every line of the log, and no message has words that operators stumbled
//! over.

mod repository;

use std::collections::BTreeSet;

use repository::{files, root};

/// The folders of the programs and libraries whose messages an operator reads.
const SPOKEN: [&str; 11] = [
    "backend-hostgw/",
    "backend-udp/",
    "backend-vxlan/",
    "cni-flannel/",
    "firewall-iptables/",
    "firewall-nft/",
    "flannel-core/",
    "flanneld/",
    "subnet-cached/",
    "subnet-etcd/",
    "subnet-kube/",
];

/// Words that made sense to their author only.
const REFUSED: [&str; 26] = [
    "anew",
    "go by it",
    "mend",
    "stranger",
    "somebody",
    "nobody",
    "of no use",
    "given back",
    "went at once",
    "goes by",
    "go by the",
    "going by",
    "not taken for",
    "unsaid",
    "our own",
    "of ours",
    "is no host's",
    "apart from this host",
    "see to what",
    "stands on",
    "it was told to",
    "looking twice",
    "is meant by",
    "NOT ready",
    "cannot be looked at",
    "is right as long as",
];

/// The code of the sources with messages, without their tests.
fn sources() -> impl Iterator<Item = (String, String)> {
    let is_spoken = |file: &str| SPOKEN.iter().any(|folder| file.starts_with(folder)) && file.contains("/src/");
    let of_tests = ["/testing/", "/tests", "fuzzing.rs", "_contract", "scripted.rs"];
    let found = files("rs").into_iter().filter(move |(file, _)| is_spoken(file));
    let found = found.filter(move |(file, _)| !of_tests.iter().any(|part| file.contains(part)));
    found.map(|(file, text)| {
        let code = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        let code: String =
            code.lines().filter(|line| !line.trim_start().starts_with("//")).map(|line| format!("{line}\n")).collect();
        (file, code)
    })
}

/// Returns the string literals of a text, without their escapes, each with its place.
fn literals(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut chars = code.char_indices().peekable();
    while let Some((place, c)) = chars.next() {
        match c {
            '\'' if code[place..].starts_with("'\"'") || code[place..].starts_with("'\\''") => {
                chars.by_ref().find(|(at, c)| *c == '\'' && *at > place + 1);
            }
            '"' => {
                let mut literal = String::new();
                while let Some((_, c)) = chars.next() {
                    match c {
                        '"' => break,
                        '\\' => match chars.next() {
                            // A literal that goes on in the next line.
                            Some((_, '\n')) => while chars.next_if(|(_, c)| c.is_whitespace()).is_some() {},
                            Some((_, escaped)) => literal.push(escaped),
                            None => {}
                        },
                        c => literal.push(c),
                    }
                }
                found.push((place, literal));
            }
            _ => {}
        }
    }
    found
}

/// Returns the arguments of each call of these macros.
fn calls<'a>(code: &'a str, macros: &'a [&str]) -> impl Iterator<Item = &'a str> + 'a {
    macros.iter().flat_map(move |name| code.match_indices(name)).map(move |(place, name)| {
        let arguments = &code[place + name.len()..];
        let texts = literals(arguments);
        let mut depth = 1;
        let end = arguments.char_indices().find(|(at, c)| {
            let in_text = texts.iter().any(|(from, text)| at > from && *at <= from + text.len());
            depth += match c {
                '(' if !in_text => 1,
                ')' if !in_text => -1,
                _ => 0,
            };
            depth == 0
        });
        &arguments[..end.map_or(arguments.len(), |(at, _)| at)]
    })
}

/// Returns the target and the message of every line at INFO and above.
fn lines() -> BTreeSet<(String, String)> {
    let mut lines = BTreeSet::new();
    for (_, code) in sources() {
        let levels = ["tracing::info!(", "tracing::warn!(", "tracing::error!("];
        for call in calls(&code, &levels) {
            let texts: Vec<_> = literals(call).into_iter().map(|(_, text)| text).collect();
            let has_target = call.trim_start().starts_with("target: \"");
            if let Some(message) = texts.last().filter(|_| has_target) {
                lines.insert((texts[0].clone(), message.clone()));
            }
        }
        // Events: `line!` takes the end of the target first.
        for call in calls(&code, &["line!("]) {
            let texts = literals(call);
            if let [(_, part), .., (_, message)] = &texts[..] {
                lines.insert((format!("flannel::{part}"), message.clone()));
            }
        }
    }
    lines
}

#[test]
fn the_page_about_the_log_lists_every_line() {
    let lines = lines();
    assert!(lines.len() > 60, "{lines:?}");
    let path = root().join("docs/log.md");
    let page = std::fs::read_to_string(&path).unwrap_or_default();
    let (head, _) = page.split_once("| target |").unwrap_or((&page, ""));
    let rows: String = lines.iter().map(|(target, message)| format!("| `{target}` | {message} |\n")).collect();
    let wanted = format!("{head}| target | message |\n|---|---|\n{rows}");
    if std::env::var_os("RECORD_LOG").is_some() {
        std::fs::write(&path, &wanted).unwrap();
    }
    assert_eq!(page, wanted, "write it again with RECORD_LOG=1, and read the new lines aloud");
}

#[test]
fn every_line_of_the_log_names_its_part() {
    for (file, code) in sources() {
        for call in calls(&code, &["tracing::info!(", "tracing::warn!(", "tracing::error!("]) {
            assert!(call.trim_start().starts_with("target: "), "{file}: {call}");
        }
    }
}

#[test]
fn no_message_has_words_that_operators_stumbled_over() {
    let mut count = 0;
    for (file, code) in sources() {
        for (_, text) in literals(&code) {
            count += 1;
            let found = REFUSED.iter().find(|words| {
                let is_word = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
                text.match_indices(*words).any(|(at, _)| {
                    !is_word(text[..at].chars().next_back()) && !is_word(text[at + words.len()..].chars().next())
                })
            });
            assert_eq!(found, None, "{file}: {text:?}");
        }
    }
    assert!(count > 1000, "{count}");
}
