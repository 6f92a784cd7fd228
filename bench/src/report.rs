//! Lines of JSON, and medians.

/// Prints one row.
#[expect(clippy::print_stdout, reason = "the rows are what this program is for")]
pub(crate) fn row(name: &str, n: u16, value: f64, unit: &str, floor: Option<f64>) {
    let mut row = serde_json::json!({ "name": name, "n": n, "value": round(value), "unit": unit });
    if let (Some(floor), Some(fields)) = (floor, row.as_object_mut()) {
        fields.insert("floor".to_owned(), round(floor).into());
        fields.insert("ratio".to_owned(), round(value / floor).into());
    }
    println!("{row}");
}

fn round(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}

/// The middle of `values`; zero of none.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}
