//! The result as Markdown: the machine, one table per scenario with medians and ratios to the floor, and every run.
//!
//! The shares of the two cores stand beside the rates, because a rate only tells of the server when the server, and
//! not the client or a neighbour, was the limit.

use std::fmt;

use super::{Comparison, run::Run, scenario::Scenario};
use crate::{
    statistic::{cell, counted, percent},
    trial::{
        Contender, Measure, Outcome,
        measure::{
            client_share, cost, delivered, deliveries, empty_mib, full_mib, p50, p99, server_share,
            waiting_share, weight,
        },
    },
};

/// One number of a server, and how it is shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    pub(crate) title: &'static str,
    pub(crate) measure: Measure,
    show: Show,
}

#[derive(Clone, Copy, Debug)]
enum Show {
    /// The median, with so many digits.
    Median(usize),
    /// The median of the ratios to the floor.
    Ratio(usize),
    /// The median, of a hundred.
    Percent,
    /// The least of all rounds, of a hundred: a loss must not hide behind a median.
    LeastPercent,
}

const fn column(title: &'static str, measure: Measure, show: Show) -> Column {
    Column { title, measure, show }
}

const COST: Column = column("CPU µs/delivery", cost, Show::Median(3));
const COST_RATIO: Column = column("× floor", cost, Show::Ratio(3));
const SERVER: Column = column("server core", server_share, Show::Percent);
const WAITED: Column = column("waited", waiting_share, Show::Percent);
const CLIENT: Column = column("client core", client_share, Show::Percent);
const DELIVERED: Column = column("delivered", delivered, Show::LeastPercent);

pub(crate) static TRAFFIC: [Column; 10] = [
    column("deliveries/s", deliveries, Show::Median(0)),
    column("× floor", deliveries, Show::Ratio(2)),
    column("p50 µs", p50, Show::Median(0)),
    column("p99 µs", p99, Show::Median(0)),
    COST,
    COST_RATIO,
    SERVER,
    WAITED,
    CLIENT,
    DELIVERED,
];

pub(crate) static LATENCY: [Column; 10] = [
    column("p50 µs", p50, Show::Median(0)),
    column("× floor", p50, Show::Ratio(2)),
    column("p99 µs", p99, Show::Median(0)),
    column("× floor", p99, Show::Ratio(2)),
    COST,
    COST_RATIO,
    SERVER,
    WAITED,
    CLIENT,
    DELIVERED,
];

pub(crate) static MEMORY: [Column; 4] = [
    column("bytes per connection", weight, Show::Median(0)),
    column("× floor", weight, Show::Ratio(1)),
    column("resident MiB, empty", empty_mib, Show::Median(1)),
    column("full", full_mib, Show::Median(1)),
];

impl Column {
    /// Whether it is a value of its own, and not another's set against the floor.
    pub(crate) fn is_plain(&self) -> bool {
        !matches!(self.show, Show::Ratio(_))
    }
}

/// Shows a comparison.
#[derive(Debug)]
pub(crate) struct Table<'a>(pub(crate) &'a Comparison);

impl Table<'_> {
    fn scenario(&self, f: &mut fmt::Formatter<'_>, scenario: Scenario) -> fmt::Result {
        let columns = scenario.columns();
        write!(f, "| server |")?;
        columns.iter().try_for_each(|column| write!(f, " {} |", column.title))?;
        write!(f, " verdict |\n|---|")?;
        columns.iter().try_for_each(|_| write!(f, "--:|"))?;
        writeln!(f, "---|")?;
        for &server in &self.0.servers {
            write!(f, "| {server} |")?;
            for column in columns {
                write!(f, " {} |", self.cell(scenario, server, column))?;
            }
            writeln!(f, " {} |", Outcome::summary(self.0.runs.outcomes(scenario, server)))?;
        }
        Ok(())
    }

    fn cell(&self, scenario: Scenario, server: Contender, column: &Column) -> String {
        let runs = &self.0.runs;
        match column.show {
            Show::Median(digits) => cell(runs.median(scenario, server, column.measure), digits),
            Show::Ratio(digits) => cell(runs.ratio(scenario, server, column.measure), digits),
            Show::Percent => percent(runs.median(scenario, server, column.measure), 0),
            Show::LeastPercent => percent(runs.least(scenario, server, column.measure), 3),
        }
    }

    fn every_run(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| scenario | round | server | deliveries/s | p99 µs | CPU µs/delivery | bytes per connection | \
             server core | waited | client core | verdict |"
        )?;
        writeln!(f, "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|---|")?;
        for run in &self.0.runs.0 {
            let Run { round, scenario, server, outcome } = run;
            let value = |measure: Measure| outcome.report.as_ref().and_then(measure);
            writeln!(
                f,
                "| {scenario} | {} | {server} | {} | {} | {} | {} | {} | {} | {} | {} |",
                round + 1,
                cell(value(deliveries), 0),
                cell(value(p99), 0),
                cell(value(cost), 3),
                cell(value(weight), 0),
                percent(value(server_share), 0),
                percent(value(waiting_share), 0),
                percent(value(client_share), 0),
                outcome.verdict(),
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Comparison { machine, placement, extent, scenarios, .. } = self.0;
        writeln!(f, "# Comparison\n\n{machine}- {placement}")?;
        writeln!(
            f,
            "- medians of {} of {} s, {}-byte JSON messages; a server has one thread, a ratio is to the \
             floor of the same round",
            counted(extent.rounds, "round"),
            extent.seconds,
            extent.payload_bytes
        )?;
        for &scenario in scenarios {
            writeln!(f, "\n## {scenario}, {} connections\n", scenario.connections(extent))?;
            if scenario.is_in_turns() {
                writeln!(f, "All servers at once, in turns of {} ms.\n", super::SLICE.as_millis())?;
            }
            self.scenario(f, scenario)?;
        }
        writeln!(f, "\n## Every run\n")?;
        self.every_run(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::tests::comparison;

    #[test]
    fn every_server_has_a_line_in_every_table_and_every_run_has_one() {
        let comparison = comparison();
        let text = Table(&comparison).to_string();
        let lines = |start: &str| text.lines().filter(|line| line.starts_with(start)).count();
        for server in &comparison.servers {
            assert_eq!(lines(&format!("| {server} |")), comparison.scenarios.len(), "{server}");
        }
        assert_eq!(lines("| idle memory |"), comparison.runs.0.len());
        assert!(text.contains("| shardcast | 150 | 0.5 | 1.0 | 2.0 | faultless |"), "{text}");
        assert!(
            text.contains("**FAULTY**: 3 disconnections") && text.contains("**FAILED**: it did not start")
        );
    }

    #[test]
    fn all_lines_of_a_table_have_the_same_columns() {
        let text = Table(&comparison()).to_string();
        let mut columns = None;
        for line in text.lines() {
            let count = line.matches('|').count();
            match columns {
                Some(columns) if count > 0 => assert_eq!(count, columns, "{line}"),
                _ => columns = (count > 0).then_some(count),
            }
        }
    }
}
