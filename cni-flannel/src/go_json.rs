//! JSON as Go's `encoding/json` writes it: sorted keys, numbers as 64-bit floats, and escaped HTML characters. Stored
//! configurations equal Go flannel's byte for byte.

use std::fmt::Write as _;

use serde_json::{Map, Number, Value};

/// Returns an object as JSON.
pub(crate) fn object(fields: &Map<String, Value>) -> String {
    let mut text = String::new();
    write_object(fields, &mut text);
    text
}

fn write(value: &Value, out: &mut String) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Number(number) => write_number(number, out),
        Value::String(text) => write_string(text, out),
        Value::Array(values) => {
            out.push('[');
            for (nth, value) in values.iter().enumerate() {
                if nth > 0 {
                    out.push(',');
                }
                write(value, out);
            }
            out.push(']');
        }
        Value::Object(fields) => write_object(fields, out),
    }
}

fn write_object(fields: &Map<String, Value>, out: &mut String) {
    // With serde_json's feature `preserve_order`, which any crate of a build can enable, a map is not sorted.
    let mut fields: Vec<_> = fields.iter().collect();
    fields.sort_by_key(|(key, _)| *key);
    out.push('{');
    for (nth, (key, value)) in fields.into_iter().enumerate() {
        if nth > 0 {
            out.push(',');
        }
        write_string(key, out);
        out.push(':');
        write(value, out);
    }
    out.push('}');
}

/// Go parses a number as a float64 and writes the shortest text that parses to it, with an exponent below 1e-6 and from 1e21.
fn write_number(number: &Number, out: &mut String) {
    // Without the feature `arbitrary_precision` each number is one.
    let value = number.as_f64().unwrap_or_default();
    let size = value.abs();
    let exponent = value != 0.0 && !(1e-6..1e21).contains(&size);
    // Writing to a String cannot fail.
    let _ = if exponent {
        let text = format!("{value:e}");
        write!(out, "{}", if size >= 1.0 { text.replace('e', "e+") } else { text })
    } else {
        write!(out, "{value}")
    };
}

fn write_string(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        // Writing to a String cannot fail.
        let _ = match c {
            '"' => write!(out, "\\\""),
            '\\' => write!(out, "\\\\"),
            '\u{8}' => write!(out, "\\b"),
            '\u{c}' => write!(out, "\\f"),
            '\n' => write!(out, "\\n"),
            '\r' => write!(out, "\\r"),
            '\t' => write!(out, "\\t"),
            '\0'..='\u{1f}' | '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => write!(out, "\\u{:04x}", u32::from(c)),
            c => write!(out, "{c}"),
        };
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn text(value: Value) -> String {
        let mut out = String::new();
        write(&value, &mut out);
        out
    }

    #[test]
    fn numbers_and_strings_are_written_as_by_go() {
        // Printed by encoding/json of Go 1.24 for what it had unmarshalled into an interface{}.
        for (read, written) in [
            ("1", "1"),
            ("1450", "1450"),
            ("-0", "-0"),
            ("0", "0"),
            ("1.50", "1.5"),
            ("12345678901234567890", "12345678901234567000"),
            ("100000000000000000000", "100000000000000000000"),
            ("1e21", "1e+21"),
            ("0.000001", "0.000001"),
            ("0.0000001", "1e-7"),
            ("1.5e-10", "1.5e-10"),
        ] {
            assert_eq!(text(serde_json::from_str(read).unwrap()), written, "{read}");
        }
        let value = json!({"b": [null, true, "<a&b>\u{2028}\u{1}\n\"\\é"], "a": {}});
        assert_eq!(text(value), "{\"a\":{},\"b\":[null,true,\"\\u003ca\\u0026b\\u003e\\u2028\\u0001\\n\\\"\\\\é\"]}");
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            // Of few digits: serde_json reads others to the last bit or the one beside it.
            (any::<i32>(), 0..8_i32).prop_map(|(n, places)| Value::from(f64::from(n) / 10_f64.powi(places))),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(any::<String>(), inner, 0..6)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    /// Go has one kind of number.
    fn floats(value: Value) -> Value {
        match value {
            Value::Number(number) => number.as_f64().map_or(Value::Null, Value::from),
            Value::Array(values) => values.into_iter().map(floats).collect(),
            Value::Object(fields) => {
                Value::Object(fields.into_iter().map(|(key, value)| (key, floats(value))).collect())
            }
            other => other,
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(value in values()) {
            let read: Value = serde_json::from_str(&text(value.clone())).unwrap();
            prop_assert_eq!(floats(read), floats(value));
        }
    }
}
