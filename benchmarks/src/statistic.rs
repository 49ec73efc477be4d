//! What is made of many runs: the middle one, and numbers that a person can read.

/// The value in the middle, or between the two in the middle; `None` of nothing.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// Three digits that count, with k or M.
pub(crate) fn compact(value: f64) -> String {
    let (scaled, unit) = match value.abs() {
        // What would be rounded to 1,000 belongs to the next unit.
        large if large >= 999_500.0 => (value / 1e6, " M"),
        medium if medium >= 9_995.0 => (value / 1e3, " k"),
        _ => (value, ""),
    };
    let digits = match scaled.abs() {
        0.0 => 0,
        tiny if tiny < 0.1 => 3,
        small if small < 10.0 => 2,
        middle if middle < 100.0 => 1,
        _ => 0,
    };
    // 1.50 says no more than 1.5.
    let text = format!("{scaled:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{unit}")
}

/// The same with a unit, which a letter like k joins: `292 B`, `292 kB`, `0.5 ×`.
pub(crate) fn compact_in(value: f64, unit: &str) -> String {
    let number = compact(value);
    let joined = unit.is_empty() || number.ends_with(char::is_alphabetic);
    format!("{number}{}{unit}", if joined { "" } else { " " })
}

/// How many of what: `1 round`, `5 rounds`.
pub(crate) fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// A number in a table; a dash for none.
pub(crate) fn cell(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"))
}

/// A share in a table, of a hundred; a dash for none.
pub(crate) fn percent(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{:.digits$} %", 100.0 * value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_or_between_the_two_middles() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn units_and_plurals_read_as_they_are_spoken() {
        assert_eq!([compact_in(292.0, "B"), compact_in(15_700.0, "B")], ["292 B", "15.7 kB"]);
        assert_eq!([compact_in(0.5, "×"), compact_in(2e6, "")], ["0.5 ×", "2 M"]);
        assert_eq!([counted(1, "round"), counted(5, "round")], ["1 round", "5 rounds"]);
    }

    #[test]
    fn a_compact_number_keeps_what_counts() {
        let compacted =
            [0.0, 0.0213, 0.58, 1.0, 12.34, 320.4, 9_994.0, 9_999.0, 291_830.0, 999_999.0, 14_812_345.0];
        let texts = ["0", "0.021", "0.58", "1", "12.3", "320", "9994", "10 k", "292 k", "1 M", "14.8 M"];
        assert_eq!(compacted.map(compact), texts);
    }
}
