//! The result as Markdown: the machine, one table per scenario with medians and ratios to the floor, and every run.

use std::fmt;

use super::{
    column::{Column, EVERY_RUN, Show},
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
        header(f, &["server"], columns)?;
        for server in self.0.servers_in(scenario) {
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
        column.show.text(match column.show {
            Show::Median(_) | Show::Percent => runs.median(scenario, server, column.measure),
            Show::Ratio(_) => runs.ratio(scenario, server, column.measure),
            Show::LeastPercent => runs.least(scenario, server, column.measure),
        })
    }

    fn every_run(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        header(f, &["scenario", "round", "server"], &EVERY_RUN)?;
        for Run { round, scenario, server, outcome } in &self.0.runs.0 {
            write!(f, "| {scenario} | {} | {server} |", round + 1)?;
            for column in &EVERY_RUN {
                let value = outcome.report.as_ref().and_then(column.measure);
                write!(f, " {} |", column.show.text(value))?;
            }
            writeln!(f, " {} |", outcome.verdict())?;
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

/// The first two lines of a table: `keys` on the left, a verdict on the right.
fn header(f: &mut fmt::Formatter<'_>, keys: &[&str], columns: &[Column]) -> fmt::Result {
    let titles: Vec<_> = columns.iter().map(|column| column.title).collect();
    writeln!(f, "| {} | {} | verdict |", keys.join(" | "), titles.join(" | "))?;
    writeln!(f, "|{}{}---|", "---|".repeat(keys.len()), "--:|".repeat(columns.len()))
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
        assert!(text.contains("| shardcast | 150 | 0.5 | 1.00 | 1.0 | 2.0 | faultless |"), "{text}");
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
