//! A bar chart: a row for each server, one bar or several in it, lying, so that names need no room to turn.

use super::{Anchor, Canvas, Frame, LEADING, MARGIN, WIDTH, span::Span};
use crate::statistic::compact;

const NAMES: f64 = 140.0;
/// Room for the value behind the longest bar.
const VALUES: f64 = 170.0;
const BAR: f64 = 18.0;
const GAP: f64 = 14.0;

/// One value.
#[derive(Clone, Debug)]
pub(crate) struct Bar {
    pub(crate) value: f64,
    /// What stands behind it.
    pub(crate) label: String,
    pub(crate) faulty: bool,
}

/// One name and its values, in the order of the legend.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// Drawn so that it stands out.
    pub(crate) own: bool,
    pub(crate) bars: Vec<Option<Bar>>,
}

/// The whole chart.
#[derive(Clone, Debug)]
pub(crate) struct BarChart {
    pub(crate) frame: Frame,
    /// What the bars of a row are; told when there are several.
    pub(crate) legend: Vec<String>,
    pub(crate) rows: Vec<Row>,
    pub(crate) logarithmic: bool,
}

impl BarChart {
    pub(crate) fn draw(&self) -> String {
        let values = || self.rows.iter().flat_map(|row| &row.bars).flatten().map(|bar| bar.value);
        let span = if self.logarithmic { Span::log(values()) } else { Span::linear(values()) };
        let (left, right) = (MARGIN + NAMES, WIDTH - MARGIN - VALUES);
        let x = |value| left + span.place(value) * (right - left);
        let mut canvas = Canvas::default();
        let mut top = self.frame.top();
        if self.legend.len() > 1 {
            self.draw_legend(&mut canvas, left, top);
            top += LEADING + 8.0;
        }
        let row_height = BAR * self.legend.len().max(1) as f64 + GAP;
        let bottom = top + row_height * self.rows.len() as f64;
        for tick in span.ticks() {
            canvas.grid((x(tick), top), (x(tick), bottom));
            canvas.text(x(tick), bottom + LEADING, Anchor::Middle, "soft", &compact(tick));
        }
        for (index, row) in self.rows.iter().enumerate() {
            let row_top = top + row_height * index as f64 + GAP / 2.0;
            let middle = row_top + (row_height - GAP) / 2.0 + 4.5;
            canvas.text(left - 10.0, middle, Anchor::End, "", &row.name);
            let own = if row.own { " own" } else { "" };
            for (turn, bar) in row.bars.iter().enumerate() {
                let y = row_top + BAR * turn as f64;
                let Some(bar) = bar else {
                    canvas.text(left + 8.0, y + 13.0, Anchor::Start, "soft", "no result");
                    continue;
                };
                let faulty = if bar.faulty { " faulty" } else { "" };
                // A bar that cannot be seen is still there.
                let length = (x(bar.value) - left).max(1.5);
                canvas.rect(left, y + 1.0, length, BAR - 2.0, &format!("s{turn}{own}{faulty}"));
                canvas.text(left + length + 8.0, y + 13.0, Anchor::Start, "", &bar.label);
            }
        }
        self.frame.close(canvas, bottom + LEADING + 4.0)
    }

    /// The same in letters, for where no image can be shown: a line for each bar.
    pub(crate) fn sketch(&self) -> String {
        const LETTERS: f64 = 40.0;
        let values = || self.rows.iter().flat_map(|row| &row.bars).flatten().map(|bar| bar.value);
        let span = if self.logarithmic { Span::log(values()) } else { Span::linear(values()) };
        let longest = values().map(|value| span.place(value)).fold(f64::MIN_POSITIVE, f64::max);
        let width = self.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        let mut sketch = format!("{}\n\n", self.frame.title);
        for row in &self.rows {
            for (turn, bar) in row.bars.iter().enumerate() {
                let name = if turn == 0 { row.name.as_str() } else { "" };
                let line = match bar {
                    // A bar that cannot be seen is still there.
                    Some(bar) => {
                        let letters = (span.place(bar.value) / longest * LETTERS).round().max(1.0);
                        let which = if self.legend.len() > 1 { self.legend.get(turn) } else { None };
                        let which = which.map_or(String::new(), |which| format!(", {which}"));
                        format!("{} {}{which}", "█".repeat(letters as usize), bar.label)
                    }
                    None => "no result".to_owned(),
                };
                sketch += &format!("{name:<width$}  {line}\n");
            }
        }
        sketch
    }

    fn draw_legend(&self, canvas: &mut Canvas, left: f64, top: f64) {
        let mut x = left;
        for (turn, name) in self.legend.iter().enumerate() {
            canvas.rect(x, top + 2.0, 12.0, 12.0, &format!("s{turn}"));
            canvas.rect(x + 14.0, top + 2.0, 12.0, 12.0, &format!("s{turn} own"));
            canvas.text(x + 33.0, top + 13.0, Anchor::Start, "soft", name);
            x += 60.0 + 7.0 * name.chars().count() as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(logarithmic: bool) -> BarChart {
        let bar = |value: f64, faulty| Some(Bar { value, label: format!("{value} here"), faulty });
        BarChart {
            frame: Frame { title: "T".into(), subtitle: "S".into(), notes: vec!["N".into()] },
            legend: vec!["one".into(), "many".into()],
            rows: vec![
                Row { name: "floor".into(), own: false, bars: vec![bar(100.0, false), bar(50.0, true)] },
                Row { name: "shardcast".into(), own: true, bars: vec![bar(0.0, false), None] },
            ],
            logarithmic,
        }
    }

    fn widths(svg: &str) -> Vec<f64> {
        let bars = svg.lines().filter(|line| line.contains("height=\"16.0\""));
        let width = |line: &str| line.split("width=\"").nth(1)?.split('"').next()?.parse().ok();
        bars.map(|line| width(line).unwrap()).collect()
    }

    #[test]
    fn a_linear_bar_is_as_long_as_its_value_and_none_is_invisible() {
        let widths = widths(&chart(false).draw());
        assert_eq!(widths.len(), 3);
        assert!((widths[0] - 2.0 * widths[1]).abs() < 0.2, "{widths:?}");
        assert_eq!(widths[2], 1.5);
    }

    #[test]
    fn a_logarithmic_bar_takes_nothing_for_the_beginning() {
        let widths = widths(&chart(true).draw());
        assert!(widths[0] > widths[1] && widths[1] > widths[2]);
        assert_eq!(widths[2], 1.5);
    }

    #[test]
    fn every_value_its_fault_and_its_absence_is_told() {
        let svg = chart(false).draw();
        for text in
            [">floor<", ">shardcast<", ">100 here<", ">50 here<", ">no result<", ">one<", ">many<", ">N<"]
        {
            assert!(svg.contains(text), "{text} is missing");
        }
        assert_eq!(svg.matches(" faulty\"").count(), 1);
    }

    #[test]
    fn a_sketch_has_a_line_for_each_bar_as_long_as_its_value() {
        let sketch = chart(false).sketch();
        let lines: Vec<&str> = sketch.lines().skip(2).collect();
        let lengths: Vec<usize> = lines.iter().map(|line| line.matches('█').count()).collect();
        assert_eq!(lengths, [40, 20, 1, 0]);
        assert!(lines[0].starts_with("floor ") && lines[0].ends_with(" 100 here, one"), "{sketch}");
        assert!(lines[1].starts_with("   ") && lines[3].ends_with("no result"), "{sketch}");
    }
}
