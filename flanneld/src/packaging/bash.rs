//! The completion for bash. It needs no library of completions.

use std::fmt::Write as _;

use super::{Values, command_names, common_flags, own_flags};
use crate::command_table::COMMANDS;
use crate::flag_table::{Flag, flags};

/// Returns the script.
pub(super) fn script() -> String {
    let mut script = format!("# {}\n\n_flanneld() {{\n", super::HEADER);
    script += r#"    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD - 1]}" word command=
    # The shell splits -name=value into three words.
    if [[ $current == = ]]; then
        current=
    elif [[ $previous == = ]]; then
        previous="${COMP_WORDS[COMP_CWORD - 2]}"
    fi
    COMPREPLY=()
    case "${previous/#--/-}" in
"#;
    offer(
        |values| matches!(values, Values::Files),
        "compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- \"$current\")",
        &mut script,
    );
    offer(
        |values| matches!(values, Values::Directories),
        "compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- \"$current\")",
        &mut script,
    );
    for flag in flags() {
        if let Values::Choices(choices) = Values::of(flag) {
            let words = choices.join(" ");
            let _ = writeln!(
                script,
                "        -{}) COMPREPLY=($(compgen -W \"{words}\" -- \"$current\")); return ;;",
                flag.name
            );
        }
    }
    offer(|values| matches!(values, Values::Any), ":", &mut script);
    let _ = write!(
        script,
        "        help) COMPREPLY=($(compgen -W \"{0}\" -- \"$current\")); return ;;
    esac
    for word in \"${{COMP_WORDS[@]:1:COMP_CWORD - 1}}\"; do
        case \"$word\" in
            {1}) command=\"$word\"; break ;;
        esac
    done
    if [[ $current != -* ]]; then
        [[ -n $command ]] || COMPREPLY=($(compgen -W \"{0}\" -- \"$current\"))
        return
    fi
    local flags=\"{2}\"
    case \"$command\" in
",
        command_names(),
        command_names().replace(' ', "|"),
        common_flags().map(|flag| format!("-{}", flag.name)).collect::<Vec<_>>().join(" "),
    );
    for command in COMMANDS.iter().filter(|command| !command.flags.is_empty()) {
        let _ = writeln!(script, "        {}) flags+=\" {}\" ;;", command.name, own_flags(command).join(" "));
    }
    script
        + "    esac
    COMPREPLY=($(compgen -W \"$flags\" -- \"$current\"))
}

complete -F _flanneld flanneld
"
}

/// Writes what is offered for flags with such values.
fn offer(is_such: impl Fn(&Values<'_>) -> bool, action: &str, script: &mut String) {
    let with_such = flags().filter(|flag: &&Flag| is_such(&Values::of(flag)));
    let names: Vec<_> = with_such.map(|flag| format!("-{}", flag.name)).collect();
    if !names.is_empty() {
        // Writing to a String cannot fail.
        let _ = writeln!(script, "        {}) {action}; return ;;", names.join("|"));
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Returns what bash offers for the last of the words.
    fn offered(words: &[&str]) -> Vec<String> {
        let quoted: Vec<_> = words.iter().map(|word| format!("'{word}'")).collect();
        let program = format!(
            "{}\ncompopt() {{ :; }}\nCOMP_WORDS=(flanneld {}); COMP_CWORD={}; _flanneld; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            script(),
            quoted.join(" "),
            words.len(),
        );
        let output = Command::new("bash").args(["--norc", "-euc", &program]).current_dir("/").output().unwrap();
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    #[test]
    fn bash_offers_commands_flags_and_their_values() {
        assert_eq!(offered(&["st"]), ["status"]);
        assert_eq!(offered(&["help", "pe"]), ["peers"]);
        assert_eq!(offered(&["-etcd-pre"]), ["-etcd-prefix"]);
        assert_eq!(offered(&["-on-lease-loss", "re"]), ["reacquire"]);
        assert_eq!(offered(&["status", "-o", "=", ""]), ["table", "wide", "json"]);
        assert_eq!(offered(&["status", "-wa"]), ["-watch"]);
        assert_eq!(offered(&["plan", "-wa"]), [""; 0]);
        assert_eq!(offered(&["-ip-masq", "st"]), ["status"]);
        assert_eq!(offered(&["-etcd-prefix", "st"]), [""; 0]);
        assert!(offered(&["-etcd-cafile", "/etc/passw"]).contains(&"/etc/passwd".to_owned()));
        assert!(offered(&["-subnet-dir", "/et"]).contains(&"/etc".to_owned()));
        assert_eq!(offered(&[""]).len(), COMMANDS.len());
    }
}
