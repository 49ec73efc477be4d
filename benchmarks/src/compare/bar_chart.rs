//! A bar chart in text: one line per bar, for the Markdown page and the README.
//!
//! Knows values and labels. Does not know what was measured.

use std::fmt;

/// The length of the longest bar, in characters.
const LENGTH_MAX: f64 = 40.0;

/// One value.
#[derive(Clone, Debug)]
pub(crate) struct Bar {
    pub(crate) value: f64,
    /// Written behind the bar.
    pub(crate) label: String,
}

/// One server: a bar for each entry of the legend, `None` where there is no result.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) bars: Vec<Option<Bar>>,
}

#[derive(Clone, Debug)]
pub(crate) struct BarChart {
    pub(crate) title: String,
    /// What the bars of a row are; shown when there are several.
    pub(crate) legend: Vec<String>,
    pub(crate) rows: Vec<Row>,
    pub(crate) logarithmic: bool,
}

impl BarChart {
    fn values(&self) -> impl Iterator<Item = f64> {
        self.rows.iter().flat_map(|row| &row.bars).flatten().map(|bar| bar.value)
    }

    /// The length of a bar relative to the longest. A logarithmic axis begins at the power of ten below all values.
    fn share(&self, value: f64) -> f64 {
        let max = self.values().fold(f64::MIN_POSITIVE, f64::max);
        if !self.logarithmic {
            return value / max;
        }
        let min = self.values().filter(|value| *value > 0.0).fold(max, f64::min);
        let start = (min / 1.5).log10().floor();
        if value > 0.0 { (value.log10() - start) / (max.log10() - start) } else { 0.0 }
    }
}

impl fmt::Display for BarChart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        writeln!(f, "{}\n", self.title)?;
        for row in &self.rows {
            for (index, bar) in row.bars.iter().enumerate() {
                let name = if index == 0 { row.name.as_str() } else { "" };
                write!(f, "{name:<width$}  ")?;
                let Some(bar) = bar else {
                    writeln!(f, "no result")?;
                    continue;
                };
                // A bar of less than one character would be invisible.
                let length = (self.share(bar.value) * LENGTH_MAX).round().max(1.0) as usize;
                write!(f, "{} {}", "█".repeat(length), bar.label)?;
                if self.legend.len() > 1 {
                    write!(f, ", {}", self.legend[index])?;
                }
                writeln!(f)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(logarithmic: bool) -> (Vec<usize>, String) {
        let bar = |value: f64| Some(Bar { value, label: format!("{value} here") });
        let chart = BarChart {
            title: "T".into(),
            legend: vec!["one".into(), "many".into()],
            rows: vec![
                Row { name: "floor".into(), bars: vec![bar(100.0), bar(50.0)] },
                Row { name: "shardcast".into(), bars: vec![bar(0.0), None] },
            ],
            logarithmic,
        };
        let text = chart.to_string();
        (text.lines().skip(2).map(|line| line.matches('█').count()).collect(), text)
    }

    #[test]
    fn a_bar_is_as_long_as_its_value_and_none_is_invisible() {
        let (lengths, text) = lengths(false);
        assert_eq!(lengths, [40, 20, 1, 0]);
        let lines: Vec<&str> = text.lines().skip(2).collect();
        assert!(lines[0].starts_with("floor ") && lines[0].ends_with(" 100 here, one"), "{text}");
        assert!(lines[1].starts_with("   ") && lines[3].ends_with("no result"), "{text}");
    }

    #[test]
    fn a_logarithmic_axis_begins_below_the_least_value() {
        // From 10: 100 is one power of ten above it, 50 is 0.7.
        assert_eq!(lengths(true).0, [40, 28, 1, 0]);
    }
}
