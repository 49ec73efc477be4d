//! The median, and numbers in a form that people read.

/// The value in the middle, or between the two in the middle; `None` without values.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// Three significant digits with k or M and a unit: `292 B`, `292 kB`, `0.5 ×`, `2 M`.
pub(crate) fn compact(value: f64, unit: &str) -> String {
    let (scaled, prefix) = match value.abs() {
        // What would be rounded to 1,000 gets the next prefix.
        large if large >= 999_500.0 => (value / 1e6, "M"),
        medium if medium >= 9_995.0 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let digits = match scaled.abs() {
        0.0 => 0,
        tiny if tiny < 0.1 => 3,
        small if small < 10.0 => 2,
        middle if middle < 100.0 => 1,
        _ => 0,
    };
    let number = format!("{scaled:.digits$}");
    let number =
        if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { &number };
    format!("{number} {prefix}{unit}").trim_end().to_owned()
}

/// `1 round`, `5 rounds`.
pub(crate) fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
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
    fn a_compact_number_has_three_significant_digits_and_one_prefix() {
        let values =
            [0.0, 0.0213, 0.58, 1.0, 12.34, 320.4, 9_994.0, 9_999.0, 291_830.0, 999_999.0, 14_812_345.0];
        let texts = ["0", "0.021", "0.58", "1", "12.3", "320", "9994", "10 k", "292 k", "1 M", "14.8 M"];
        assert_eq!(values.map(|value| compact(value, "")), texts);
        assert_eq!([compact(292.0, "B"), compact(15_700.0, "B")], ["292 B", "15.7 kB"]);
        assert_eq!([compact(0.5, "×"), compact(2e6, "")], ["0.5 ×", "2 M"]);
    }
}
