//! The medians as bar charts: deliveries, CPU and memory.
//!
//! Shows the same numbers as the tables and marks what was faulty. A chart whose scenarios were not run is left out.

use super::{
    bar_chart::{Bar, BarChart, Row},
    column::{Measure, bytes_per_connection, cost, delivered, deliveries},
    comparison::Comparison,
    scenario::Scenario,
};
use crate::{
    statistic::compact,
    trial::{Outcome, Subject},
};

/// What the bars show.
#[derive(Clone, Copy)]
enum Value {
    Median(Measure),
    /// To the floor of the same round.
    Ratio(Measure),
}

pub(crate) fn charts(comparison: &Comparison) -> Vec<BarChart> {
    let connections = |scenario: Scenario| scenario.connections(&comparison.extent);
    let fanout = connections(Scenario::FanoutMany);
    let charts = [
        comparison.chart(
            format!("Deliveries per second, {fanout} connections, 64 messages in flight"),
            &[(Scenario::FanoutMany, "64 in flight")],
            Value::Median(deliveries),
            "",
        ),
        comparison.chart(
            format!("Server CPU per delivery, {fanout} connections"),
            &[(Scenario::FanoutOne, "1 in flight"), (Scenario::FanoutMany, "64 in flight")],
            Value::Ratio(cost),
            "×",
        ),
        comparison.chart(
            format!("Resident memory per idle connection, {} connections", connections(Scenario::Idle)),
            &[(Scenario::Idle, "idle")],
            Value::Median(bytes_per_connection),
            "B",
        ),
    ];
    charts.into_iter().flatten().collect()
}

impl Comparison {
    fn chart(
        &self,
        title: String,
        scenarios: &[(Scenario, &str)],
        value: Value,
        unit: &str,
    ) -> Option<BarChart> {
        let shown: Vec<_> =
            scenarios.iter().filter(|(scenario, _)| self.scenarios.contains(scenario)).collect();
        let row = |&server: &Subject| Row {
            name: server.to_string(),
            bars: shown.iter().map(|(scenario, _)| self.bar(*scenario, server, value, unit)).collect(),
        };
        let takes_part = |server: &&Subject| shown.iter().any(|(scenario, _)| scenario.includes(**server));
        (!shown.is_empty()).then(|| BarChart {
            title,
            legend: shown.iter().map(|(_, name)| (*name).to_owned()).collect(),
            rows: self.servers.iter().filter(takes_part).map(row).collect(),
            // From a hundred bytes to a hundred thousand.
            logarithmic: scenarios.iter().any(|(scenario, _)| *scenario == Scenario::Idle),
        })
    }

    fn bar(&self, scenario: Scenario, server: Subject, value: Value, unit: &str) -> Option<Bar> {
        let value = match value {
            Value::Median(measure) => self.runs.median(scenario, server, measure),
            Value::Ratio(measure) => self.runs.ratio(scenario, server, measure),
        }?;
        let mut label = compact(value, unit);
        if self.runs.outcomes(scenario, server).any(|outcome| !outcome.is_faultless()) {
            label += &match self.runs.least(scenario, server, delivered) {
                Some(ratio) => format!(" (faulty, {:.1} % delivered)", 100.0 * ratio),
                None => " (faulty)".to_owned(),
            };
        }
        if self.runs.outcomes(scenario, server).any(Outcome::client_was_the_limit) {
            label += " (client the limit)";
        }
        Some(Bar { value, label })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::comparison::tests::comparison;

    #[test]
    fn a_chart_shows_every_server_and_only_what_was_run() {
        let mut comparison = comparison();
        let [memory] = &charts(&comparison)[..] else { panic!("only the memory was measured") };
        let text = memory.to_string();
        for part in ["floor", "█ 300 B\n", "█ 150 B\n", "tutorial", "█ 40 B (faulty)\n", "no result\n"]
        {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
        comparison.scenarios = vec![Scenario::Echo];
        assert!(charts(&comparison).is_empty());
    }
}
