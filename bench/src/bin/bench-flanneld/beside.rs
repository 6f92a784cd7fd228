//! Rows of two programs.

use bench::report::round;

/// A row of ours beside Go flannel's.
pub(crate) struct Beside {
    pub(crate) name: &'static str,
    pub(crate) n: u32,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// What it may be at most.
    pub(crate) most: Option<f64>,
    /// Go flannel's, in the same run.
    pub(crate) go: Option<f64>,
}

impl Beside {
    #[expect(clippy::print_stdout, reason = "the rows are what this program is for")]
    /// Prints it.
    pub(crate) fn print(&self) {
        let Self { name, n, value, unit, most, go } = *self;
        let mut row = serde_json::json!({ "name": name, "n": n, "value": round(value), "unit": unit });
        if let Some(fields) = row.as_object_mut() {
            if let Some(most) = most {
                fields.insert("most".to_owned(), most.into());
            }
            if let Some(go) = go {
                fields.insert("go".to_owned(), round(go).into());
                fields.insert("ratio".to_owned(), round(value / go).into());
            }
        }
        println!("{row}");
    }
}
