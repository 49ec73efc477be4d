//! The result as Markdown: the machine, one table per scenario with medians and ratios to the floor, and every run.

use std::fmt;

use super::{
    column::{
        Column, Measure, Show, bytes_per_connection, client_share, cost, deliveries, p99, server_share,
        waiting_share,
    },
    comparison::{Comparison, SLICE},
    runs::Run,
    scenario::Scenario,
};
use crate::{
    statistic::counted,
    trial::{Outcome, Subject},
};

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

    fn cell(&self, scenario: Scenario, server: Subject, column: &Column) -> String {
        let runs = &self.0.runs;
        match column.show {
            Show::Median(digits) => number(runs.median(scenario, server, column.measure), digits),
            Show::Ratio(digits) => number(runs.ratio(scenario, server, column.measure), digits),
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
                number(value(deliveries), 0),
                number(value(p99), 0),
                number(value(cost), 3),
                number(value(bytes_per_connection), 0),
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
                writeln!(f, "All servers at once, in turns of {} ms.\n", SLICE.as_millis())?;
            }
            self.scenario(f, scenario)?;
        }
        writeln!(f, "\n## Every run\n")?;
        self.every_run(f)
    }
}

/// A dash where there is no value.
fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"))
}

/// A dash where there is no value.
fn percent(share: Option<f64>, digits: usize) -> String {
    share.map_or_else(|| "–".to_owned(), |share| format!("{:.digits$} %", 100.0 * share))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::comparison::tests::comparison;

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
