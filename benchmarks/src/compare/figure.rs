//! The result as charts: deliveries, CPU and memory, a bar for each server.
//!
//! A chart is made of the same medians as the table, and marks what was faulty. Without the scenarios that it shows
//! there is none.

use super::{Comparison, scenario::Scenario};
use crate::{
    chart::{Bar, BarChart, Frame, Row},
    statistic::{compact_in, counted},
    trial::{
        Contender, Measure, Outcome,
        measure::{cost, delivered, deliveries, weight},
    },
};

/// What the bars stand for.
#[derive(Clone, Copy)]
enum Value {
    Median(Measure),
    Ratio(Measure),
}

impl Comparison {
    /// The charts by the names of their files.
    pub(crate) fn figures(&self) -> Vec<(&'static str, BarChart)> {
        let connections = |scenario: Scenario| scenario.connections(&self.extent);
        let crowd = connections(Scenario::FanoutMany);
        let deliveries = self.figure(
            &format!("Deliveries per second, {crowd} connections, 64 messages in flight"),
            "Every message goes to every connection. Longer is better.",
            &[(Scenario::FanoutMany, "64 in flight")],
            Value::Median(deliveries),
            "",
        );
        let cpu = self.figure(
            &format!("Server CPU per delivery, {crowd} connections"),
            "Relative to the floor, a server that only calls send(2) once per delivery. Shorter is better.",
            &[(Scenario::FanoutOne, "1 in flight"), (Scenario::FanoutMany, "64 in flight")],
            Value::Ratio(cost),
            "×",
        );
        let memory = self.figure(
            &format!("Resident memory per idle connection, {} connections", connections(Scenario::Idle)),
            "Bytes in the server's process, each line ten times the one before. Shorter is better.",
            &[(Scenario::Idle, "idle")],
            Value::Median(weight),
            "B",
        );
        let charts = [("deliveries.svg", deliveries), ("cpu.svg", cpu), ("memory.svg", memory)];
        charts.into_iter().filter_map(|(name, chart)| Some((name, chart?))).collect()
    }

    fn figure(
        &self,
        title: &str,
        subtitle: &str,
        scenarios: &[(Scenario, &str)],
        value: Value,
        unit: &str,
    ) -> Option<BarChart> {
        let shown: Vec<_> =
            scenarios.iter().filter(|(scenario, _)| self.scenarios.contains(scenario)).collect();
        if shown.is_empty() {
            return None;
        }
        let row = |&server: &Contender| Row {
            name: server.to_string(),
            own: server == Contender::Shardcast,
            bars: shown.iter().map(|(scenario, _)| self.bar(*scenario, server, value, unit)).collect(),
        };
        Some(BarChart {
            frame: Frame {
                title: title.to_owned(),
                subtitle: subtitle.to_owned(),
                notes: vec![
                    format!(
                        "Medians of {} of {} s, {}-byte JSON messages, one server thread; {}.",
                        counted(self.extent.rounds, "round"),
                        self.extent.seconds,
                        self.extent.payload_bytes,
                        self.placement
                    ),
                    self.machine.brief(),
                ],
            },
            legend: shown.iter().map(|(_, name)| (*name).to_owned()).collect(),
            rows: self.servers.iter().map(row).collect(),
            logarithmic: scenarios.iter().any(|(scenario, _)| *scenario == Scenario::Idle),
        })
    }

    fn bar(&self, scenario: Scenario, server: Contender, value: Value, unit: &str) -> Option<Bar> {
        let value = match value {
            Value::Median(measure) => self.runs.median(scenario, server, measure),
            Value::Ratio(measure) => self.runs.ratio(scenario, server, measure),
        }?;
        let faulty = self.runs.outcomes(scenario, server).any(|outcome| !outcome.is_faultless());
        let limited = self.runs.outcomes(scenario, server).any(Outcome::client_was_the_limit);
        let mut label = compact_in(value, unit);
        if faulty {
            label += match self.runs.least(scenario, server, delivered) {
                Some(ratio) => format!(" (faulty, {:.1} % came)", 100.0 * ratio),
                None => " (faulty)".to_owned(),
            }
            .as_str();
        }
        if limited {
            label += " (client the limit)";
        }
        Some(Bar { value, label, faulty })
    }
}

#[cfg(test)]
mod tests {
    use crate::compare::{scenario::Scenario, tests::comparison};

    #[test]
    fn a_chart_shows_every_server_and_is_only_made_of_what_was_run() {
        let mut comparison = comparison();
        let figures = comparison.figures();
        let [(name, chart)] = &figures[..] else { panic!("only the memory was measured") };
        assert_eq!(*name, "memory.svg");
        let svg = chart.draw();
        for text in [">floor<", ">300 B<", ">150 B<", ">tutorial<", ">40 B (faulty)<", ">no result<"] {
            assert!(svg.contains(text), "{text} is missing in {svg}");
        }
        comparison.scenarios = vec![Scenario::Echo];
        assert!(comparison.figures().is_empty());
    }
}
