//! Rows of two programs.

use bench::report::{median, round};

use bench::agent::Program;

/// What a row is about.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) n: u32,
    pub(crate) unit: &'static str,
    /// What ours may be at most.
    pub(crate) most: Option<f64>,
    /// What ours may be at most for each of Go flannel's.
    pub(crate) most_ratio: Option<f64>,
}

#[expect(clippy::print_stdout, reason = "the rows are what this program is for")]
/// Prints a row: the median of ours beside that of Go flannel in the same run.
pub(crate) fn print<R>(measured: &[(Program, R)], row: Row, value: &dyn Fn(&R) -> Vec<f64>) {
    let of = |program: Program| {
        let runs = measured.iter().filter(|(whose, _)| *whose == program);
        let values: Vec<f64> = runs.flat_map(|(_, run)| value(run)).collect();
        (!values.is_empty()).then(|| median(values))
    };
    let Some(ours) = of(Program::Ours) else { return };
    let go = of(Program::Go);
    let Row { name, n, unit, most, most_ratio } = row;
    let mut row = serde_json::json!({ "name": name, "n": n, "value": round(ours), "unit": unit });
    let ratio = go.map(|go| ours / go);
    if let Some(fields) = row.as_object_mut() {
        for (field, value) in [("most", most), ("go", go), ("ratio", ratio), ("most_ratio", most_ratio)] {
            fields.extend(value.map(|value| (field.to_owned(), round(value).into())));
        }
    }
    println!("{row}");
}
