//! The result as Markdown: one table per scenario, medians over the rounds, ratios to the floor.
//!
//! A ratio is taken within each round first, and its median shown: what disturbs the machine disturbs both sides.
//! The shares of the two cores stand beside the rates, because a rate only tells of the server when the server, and
//! not the client or a neighbour, was the limit.

use std::fmt;

use super::{
    Options,
    contender::Contender,
    scenario::{Scale, Scenario},
};
use crate::load::report::{Report, Traffic};

/// One run of one server under one scenario.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) round: usize,
    pub(crate) scenario: Scenario,
    pub(crate) contender: Contender,
    /// Absent when the run failed.
    pub(crate) report: Option<Report>,
}

/// All runs, to be shown.
#[derive(Debug)]
pub(crate) struct Table<'a> {
    pub(crate) options: &'a Options,
    pub(crate) scale: &'a Scale,
    pub(crate) cores: Option<(usize, usize)>,
    pub(crate) runs: &'a [Run],
}

type Measure = fn(&Report) -> Option<f64>;

impl Run {
    pub(crate) fn is_faultless(&self) -> bool {
        self.report.as_ref().is_some_and(Report::is_faultless)
    }
}

impl Table<'_> {
    fn values(&self, scenario: Scenario, contender: Contender, measure: Measure) -> Vec<(usize, f64)> {
        self.runs
            .iter()
            .filter(|run| run.scenario == scenario && run.contender == contender)
            .filter_map(|run| Some((run.round, measure(run.report.as_ref()?)?)))
            .collect()
    }

    fn median(&self, scenario: Scenario, contender: Contender, measure: Measure) -> Option<f64> {
        median(self.values(scenario, contender, measure).into_iter().map(|(_, value)| value).collect())
    }

    /// The median of the ratios to the floor of the same round.
    fn ratio(&self, scenario: Scenario, contender: Contender, measure: Measure) -> Option<f64> {
        let floor = self.values(scenario, Contender::Floor, measure);
        let ratio = |(round, value): (usize, f64)| {
            let (_, base) = floor.iter().find(|(other, _)| *other == round)?;
            (*base > 0.0).then_some(value / base)
        };
        median(self.values(scenario, contender, measure).into_iter().filter_map(ratio).collect())
    }

    fn verdict(&self, scenario: Scenario, contender: Contender) -> &'static str {
        let mut runs = self.runs.iter().filter(|run| run.scenario == scenario && run.contender == contender);
        if runs.all(Run::is_faultless) { "faultless" } else { "**FAULTY**" }
    }

    fn traffic(&self, f: &mut fmt::Formatter<'_>, scenario: Scenario) -> fmt::Result {
        writeln!(
            f,
            "| server | deliveries/s | × floor | p50 µs | p99 µs | CPU µs/delivery | × floor | server core | \
             waited | client core | delivered | verdict |"
        )?;
        writeln!(f, "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|")?;
        for &contender in &self.options.servers {
            let median = |measure| self.median(scenario, contender, measure);
            let ratio = |measure| self.ratio(scenario, contender, measure);
            let delivered = self
                .values(scenario, contender, |report| Some(report.traffic.as_ref()?.delivery_ratio))
                .into_iter()
                .map(|(_, value)| value)
                .reduce(f64::min);
            writeln!(
                f,
                "| {contender} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                cell(median(deliveries), 0, ""),
                cell(ratio(deliveries), 2, ""),
                cell(median(|report| Some(report.traffic.as_ref()?.latency?.p50_us)), 0, ""),
                cell(median(|report| Some(report.traffic.as_ref()?.latency?.p99_us)), 0, ""),
                cell(median(cost), 3, ""),
                cell(ratio(cost), 3, ""),
                percent(median(|report| report.traffic.as_ref()?.server_cpu_share), 0),
                percent(median(|report| report.traffic.as_ref()?.server_waiting_share), 0),
                percent(median(|report| Some(report.traffic.as_ref()?.client_cpu_share)), 0),
                percent(delivered, 3),
                self.verdict(scenario, contender),
            )?;
        }
        let limited = |run: &&Run| {
            let limited = |traffic: &Traffic| traffic.client_was_the_limit;
            let traffic = run.report.as_ref().and_then(|report| report.traffic.as_ref());
            run.scenario == scenario && traffic.is_some_and(limited)
        };
        for run in self.runs.iter().filter(limited) {
            writeln!(f, "\n{} in round {}: the client was the limit.", run.contender, run.round + 1)?;
        }
        Ok(())
    }

    fn memory(&self, f: &mut fmt::Formatter<'_>, scenario: Scenario) -> fmt::Result {
        writeln!(f, "| server | bytes per connection | × floor | resident MiB, empty | full | verdict |")?;
        writeln!(f, "|---|--:|--:|--:|--:|---|")?;
        for &contender in &self.options.servers {
            let median = |measure| self.median(scenario, contender, measure);
            writeln!(
                f,
                "| {contender} | {} | {} | {} | {} | {} |",
                cell(median(weight), 0, ""),
                cell(self.ratio(scenario, contender, weight), 1, ""),
                cell(median(|report| Some(mib(report.memory.as_ref()?.empty_bytes))), 1, ""),
                cell(median(|report| Some(mib(report.memory.as_ref()?.full_bytes))), 1, ""),
                self.verdict(scenario, contender),
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Scale { seconds, payload, .. } = self.scale;
        write!(
            f,
            "Medians of {} rounds of {seconds} s, {payload}-byte JSON messages; ",
            self.options.rounds
        )?;
        match self.cores {
            Some((server, client)) => writeln!(f, "server on core {server}, client on core {client}.")?,
            None => writeln!(f, "server and client not pinned.")?,
        }
        for &scenario in &self.options.scenarios {
            writeln!(f, "\n### {scenario}, {} connections\n", scenario.connections(self.scale))?;
            match scenario {
                Scenario::Idle => self.memory(f, scenario)?,
                Scenario::FanoutOne | Scenario::FanoutMany | Scenario::Echo => self.traffic(f, scenario)?,
            }
        }
        Ok(())
    }
}

fn deliveries(report: &Report) -> Option<f64> {
    Some(report.traffic.as_ref()?.deliveries_per_second)
}

fn cost(report: &Report) -> Option<f64> {
    report.traffic.as_ref()?.server_cpu_us_per_delivery
}

fn weight(report: &Report) -> Option<f64> {
    Some(report.memory.as_ref()?.bytes_per_connection)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

fn cell(value: Option<f64>, digits: usize, unit: &str) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}{unit}"))
}

fn percent(value: Option<f64>, digits: usize) -> String {
    cell(value.map(|value| 100.0 * value), digits, " %")
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
}
