//! Rows that compare ours with others.

use bench::report::{median, round};

/// What is promised of a ratio.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Limit {
    Least(f64),
    Most(f64),
}

/// What a row is about.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row<'a> {
    pub(crate) name: &'a str,
    /// What the link takes in one piece, where that is varied.
    pub(crate) link: Option<&'a str>,
    /// Peers.
    pub(crate) n: u32,
    pub(crate) unit: &'a str,
}

impl Row<'_> {
    /// Ours alone; with `most`, what it may be.
    pub(crate) fn print(self, ours: &[f64], most: Option<f64>) {
        self.print_with(ours, most.map(|most| ("most", most)).into_iter().collect());
    }

    /// Ours alone, and what it has to be at least.
    pub(crate) fn least(self, ours: &[f64], least: f64) {
        self.print_with(ours, vec![("least", least)]);
    }

    /// Ours beside another one's, measured in the same rounds. The ratio is the median of the rounds' ratios: a machine
    /// that is slower for a while is so for both.
    pub(crate) fn beside(self, ours: &[f64], other: &str, theirs: &[f64], limit: Option<Limit>) {
        let ratios = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        let mut fields = vec![(other, median(theirs.to_vec())), ("ratio", median(ratios))];
        fields.extend(limit.map(|limit| match limit {
            Limit::Least(least) => ("least_ratio", least),
            Limit::Most(most) => ("most_ratio", most),
        }));
        self.print_with(ours, fields);
    }

    #[expect(clippy::print_stdout, reason = "the rows are what this program is for")]
    fn print_with(self, ours: &[f64], fields: Vec<(&str, f64)>) {
        let Self { name, link, n, unit } = self;
        let value = round(median(ours.to_vec()));
        let mut row = serde_json::json!({ "name": name, "n": n, "value": value, "unit": unit });
        if let Some(row) = row.as_object_mut() {
            row.extend(link.map(|link| ("link".to_owned(), link.into())));
            row.extend(fields.into_iter().map(|(field, value)| (field.to_owned(), round(value).into())));
        }
        println!("{row}");
    }
}
