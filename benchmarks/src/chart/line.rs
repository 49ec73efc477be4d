//! A line chart: how something grows with something else, both in powers of ten.

use super::{Anchor, Canvas, Frame, LEADING, MARGIN, WIDTH, span::Span};
use crate::statistic::compact;

const SCALE: f64 = 60.0;
const HEIGHT: f64 = 260.0;
const DOT: f64 = 4.0;
/// Between the edge and the first and last point.
const INSET: f64 = 40.0;

/// One server.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) name: String,
    /// Drawn so that it stands out.
    pub(crate) own: bool,
    /// Ascending.
    pub(crate) points: Vec<(f64, f64)>,
}

/// The whole chart.
#[derive(Clone, Debug)]
pub(crate) struct LineChart {
    pub(crate) frame: Frame,
    /// What grows to the right.
    pub(crate) across: String,
    pub(crate) lines: Vec<Line>,
}

impl LineChart {
    pub(crate) fn draw(&self) -> String {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let span = Span::log(points().map(|&(_, y)| y));
        let mut marks: Vec<f64> = points().map(|&(x, _)| x).collect();
        marks.sort_by(f64::total_cmp);
        marks.dedup();
        let (left, right) = (MARGIN + SCALE, WIDTH - MARGIN);
        let top = self.frame.top() + LEADING + 8.0;
        let bottom = top + HEIGHT;
        let logs = (marks.first().map_or(0.0, |x| x.ln()), marks.last().map_or(1.0, |x| x.ln()));
        let x = |value: f64| {
            let share = if logs.1 > logs.0 { (value.ln() - logs.0) / (logs.1 - logs.0) } else { 0.5 };
            left + INSET + share * (right - left - 2.0 * INSET)
        };
        let y = |value: f64| bottom - span.place(value) * HEIGHT;
        let mut canvas = Canvas::default();
        self.draw_legend(&mut canvas, left);
        for tick in span.ticks() {
            canvas.grid((left, y(tick)), (right, y(tick)));
            canvas.text(left - 8.0, y(tick) + 4.0, Anchor::End, "soft", &compact(tick));
        }
        for &mark in &marks {
            canvas.grid((x(mark), bottom), (x(mark), bottom + 5.0));
            canvas.text(x(mark), bottom + LEADING + 2.0, Anchor::Middle, "", &compact(mark));
        }
        canvas.text((left + right) / 2.0, bottom + 2.0 * LEADING + 2.0, Anchor::Middle, "soft", &self.across);
        for line in &self.lines {
            let own = if line.own { " own" } else { "" };
            let path: Vec<_> =
                line.points.iter().map(|&(across, up)| format!("{:.1},{:.1}", x(across), y(up))).collect();
            canvas.add(format_args!("<polyline class=\"path{own}\" points=\"{}\"/>", path.join(" ")));
            for &(across, up) in &line.points {
                let (x, y) = (x(across), y(up));
                canvas
                    .add(format_args!("<circle class=\"s0{own}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{DOT}\"/>"));
                // The highest above its point, the others below theirs, so that close lines stay legible.
                let highest = points().all(|&(other, value)| other != across || value <= up);
                let beside = if highest { y - 10.0 } else { y + 19.0 };
                canvas.text(x, beside, Anchor::Middle, "soft", &compact(up));
            }
        }
        self.frame.close(canvas, bottom + 2.0 * LEADING + 8.0)
    }

    fn draw_legend(&self, canvas: &mut Canvas, left: f64) {
        let (mut x, top) = (left, self.frame.top() - 4.0);
        for line in &self.lines {
            let own = if line.own { " own" } else { "" };
            canvas.rect(x, top + 2.0, 12.0, 12.0, &format!("s0{own}"));
            canvas.text(x + 18.0, top + 13.0, Anchor::Start, "soft", &line.name);
            x += 44.0 + 7.0 * line.name.chars().count() as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: &[(f64, f64)]) -> String {
        LineChart {
            frame: Frame { title: "T".into(), subtitle: "S".into(), notes: Vec::new() },
            across: "connections".into(),
            lines: vec![Line { name: "shardcast".into(), own: true, points: points.to_vec() }],
        }
        .draw()
    }

    #[test]
    fn equal_factors_are_equal_steps_to_the_right() {
        let svg = chart(&[(10.0, 1e3), (100.0, 1e4), (1000.0, 1e5)]);
        let line = svg.lines().find(|line| line.contains("polyline")).unwrap();
        let points = line.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        let across: Vec<f64> =
            points.split(' ').map(|point| point.split(',').next().unwrap().parse().unwrap()).collect();
        assert_eq!(across.len(), 3);
        assert!((across[1] - across[0] - (across[2] - across[1])).abs() < 0.2, "{across:?}");
    }

    #[test]
    fn where_lines_meet_the_numbers_of_the_higher_are_above_and_of_the_lower_below() {
        let line = |name: &str, up| Line { name: name.into(), own: false, points: vec![(10.0, up)] };
        let frame = Frame { title: "T".into(), subtitle: "S".into(), notes: Vec::new() };
        let lines = vec![line("low", 600.0), line("high", 700.0)];
        let svg = LineChart { frame, across: "x".into(), lines }.draw();
        let height = |element: &str, key: &str| -> f64 {
            let line = svg.lines().find(|line| line.contains(element)).unwrap();
            line.split(key).nth(1).unwrap().split('"').next().unwrap().parse().unwrap()
        };
        let dots: Vec<&str> = svg.lines().filter(|line| line.contains("<circle")).collect();
        let dot = |index: usize| -> f64 {
            dots[index].split("cy=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap()
        };
        assert!(height(">600<", " y=\"") > dot(0) && height(">700<", " y=\"") < dot(1));
    }

    #[test]
    fn one_point_or_none_is_a_chart_as_well() {
        assert!(chart(&[(10.0, 5.0)]).contains("<circle"));
        let empty = chart(&[]);
        assert!(!empty.contains("<circle") && !empty.contains("NaN") && !empty.contains("inf"));
    }
}
