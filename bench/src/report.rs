//! Lines of JSON, and medians.

use crate::Error;

/// Prints one row.
#[expect(clippy::print_stdout, reason = "the rows are what this program is for")]
pub fn row(name: &str, n: u32, value: f64, unit: &str, floor: Option<f64>) {
    let mut row = serde_json::json!({ "name": name, "n": n, "value": round(value), "unit": unit });
    if let (Some(floor), Some(fields)) = (floor, row.as_object_mut()) {
        fields.insert("floor".to_owned(), round(floor).into());
        fields.insert("ratio".to_owned(), round(value / floor).into());
    }
    println!("{row}");
}

/// A figure as it is shown: to four places.
pub fn round(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}

/// The middle of `values`; zero of none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Resident memory of a process now and at its peak, in MiB, out of its `/proc/PID/status` (proc(5)).
pub fn resident(path: &str) -> Result<(f64, f64), Error> {
    let text = std::fs::read_to_string(path)?;
    let field = |name: &str| -> Result<f64, Error> {
        let line = text.lines().find(|line| line.starts_with(name)).ok_or_else(|| format!("no {name} in {path}"))?;
        let kib: f64 = line.split_whitespace().nth(1).ok_or_else(|| format!("no {name} in {path}"))?.parse()?;
        Ok(kib / 1024.0)
    };
    Ok((field("VmRSS:")?, field("VmHWM:")?))
}
