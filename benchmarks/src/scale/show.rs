//! The scaling as Markdown and as charts: one table and one chart for each axis, medians over the rounds.

use std::fmt;

use super::{Scaling, axis::Axis};
use crate::{
    chart::{Frame, Line, LineChart},
    message,
    statistic::{cell, counted, percent},
    trial::{
        Contender, Measure, Outcome,
        measure::{client_share, cost, deliveries, messages, p50, p99, server_share, waiting_share},
    },
};

impl Scaling {
    fn table(&self, f: &mut fmt::Formatter<'_>, axis: Axis) -> fmt::Result {
        writeln!(
            f,
            "| {} | server | deliveries/s | messages/s | p50 µs | p99 µs | CPU µs/delivery | server cores | waited | \
             client core | verdict |",
            axis.unit()
        )?;
        writeln!(f, "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|---|")?;
        for value in self.values(axis) {
            for &server in axis.servers() {
                let median = |measure: Measure| self.median(axis, value, server, measure);
                writeln!(
                    f,
                    "| {value} | {server} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                    cell(median(deliveries), 0),
                    cell(median(messages), 0),
                    cell(median(p50), 0),
                    cell(median(p99), 0),
                    cell(median(cost), 3),
                    percent(median(server_share), 0),
                    percent(median(waiting_share), 0),
                    percent(median(client_share), 0),
                    Outcome::summary(self.outcomes(axis, value, server)),
                )?;
            }
        }
        Ok(())
    }

    /// The chart of one axis.
    pub(super) fn figure(&self, axis: Axis) -> String {
        let values = self.values(axis);
        let point = |value: usize, server: Contender| {
            Some((value as f64, self.median(axis, value, server, deliveries)?))
        };
        let line = |&server: &Contender| Line {
            name: server.to_string(),
            own: server == Contender::Shardcast,
            points: values.iter().filter_map(|&value| point(value, server)).collect(),
        };
        let limited = self
            .runs
            .iter()
            .filter(|run| run.axis == axis && run.outcome.client_was_the_limit())
            .map(|run| format!("{} at {}", run.server, run.value));
        let limited: Vec<_> = limited.collect();
        let mut notes = vec![
            format!(
                "{}. Medians of {} of {} s; {}.",
                capitalized(&axis.held(&self.base)),
                counted(self.base.rounds, "round"),
                self.base.seconds,
                self.placement
            ),
            self.machine.brief(),
        ];
        if !limited.is_empty() {
            notes.push(format!("The client was the limit in {} runs: see scale.md.", limited.len()));
        }
        LineChart {
            frame: Frame {
                title: format!("Deliveries per second by {axis}"),
                subtitle: "Both axes in powers of ten. Higher is better.".to_owned(),
                notes,
            },
            across: axis.unit().to_owned(),
            lines: axis.servers().iter().map(line).collect(),
        }
        .draw()
    }
}

impl fmt::Display for Scaling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { machine, placement, base, .. } = self;
        writeln!(f, "# Scaling\n\n{machine}- {placement}")?;
        writeln!(f, "- medians of {} of {} s", counted(base.rounds, "round"), base.seconds)?;
        writeln!(
            f,
            "- the least message has {} bytes, a JSON object with nothing but its number",
            message::BYTES_MIN
        )?;
        if let Some(cores) = self.server_cores {
            writeln!(f, "- the server has {}, which more shards share", counted(cores, "core"))?;
        }
        for &axis in &self.axes {
            writeln!(f, "\n## {}\n\n{}.\n", capitalized(&axis.to_string()), capitalized(&axis.held(base)))?;
            self.table(f, axis)?;
        }
        Ok(())
    }
}

fn capitalized(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map(|first| first.to_uppercase().chain(characters).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Run, axis::Base},
        *,
    };
    use crate::{
        machine::Machine,
        trial::outcome::tests::{delivered, failed},
    };

    fn scaling() -> Scaling {
        let run = |value, server, outcome| Run { round: 0, axis: Axis::Connections, value, server, outcome };
        Scaling {
            machine: Machine::look(&[]),
            placement: "nowhere".to_owned(),
            server_cores: Some(1),
            base: Base { rounds: 1, seconds: 1.0, warmup_seconds: 0.0, connections: 10, payload_bytes: 64 },
            axes: vec![Axis::Connections],
            runs: vec![
                run(100, Contender::Floor, failed()),
                run(10, Contender::Floor, delivered(1_000.0)),
                run(10, Contender::Shardcast, delivered(20_000.0)),
                run(100, Contender::Shardcast, delivered(3e6)),
            ],
        }
    }

    #[test]
    fn a_table_has_a_line_for_each_value_and_server_in_order() {
        let text = scaling().to_string();
        let lines: Vec<_> = text.lines().filter(|line| line.starts_with("| 1")).collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[0].starts_with("| 10 | floor | 1000 |"));
        assert!(lines[1].starts_with("| 10 | shardcast | 20000 |"));
        assert!(
            lines[2].starts_with("| 100 | floor | – |") && lines[2].ends_with("| **FAILED** in 1 of 1 |")
        );
        assert!(lines[3].starts_with("| 100 | shardcast | 3000000 |"));
    }

    #[test]
    fn a_chart_has_a_point_for_each_value_that_was_measured() {
        let svg = scaling().figure(Axis::Connections);
        assert_eq!((svg.matches("<circle").count(), svg.matches("<polyline").count()), (3, 2));
        assert!(svg.contains(">20 k<") && svg.contains(">3 M<"));
    }
}
