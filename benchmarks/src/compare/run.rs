//! One run, and what many runs of a server say together.
//!
//! A ratio is taken within each round first, and its median shown: what disturbs the machine disturbs both sides.
//! Faulty runs count like the others and are marked; a run that failed altogether has nothing to count.

use serde::Serialize;

use super::scenario::Scenario;
use crate::{load::report::Report, statistic::median, trial::Contender};

/// One run of one server under one scenario.
#[derive(Debug, Serialize)]
pub(crate) struct Run {
    /// From 0.
    pub(crate) round: usize,
    pub(crate) scenario: Scenario,
    pub(crate) server: Contender,
    /// Absent when the run failed; then `error` says why.
    pub(crate) report: Option<Report>,
    pub(crate) error: Option<String>,
}

/// What is taken from a report.
pub(crate) type Measure = fn(&Report) -> Option<f64>;

/// All runs.
#[derive(Debug)]
pub(crate) struct Runs(pub(crate) Vec<Run>);

impl Run {
    pub(crate) fn is_faultless(&self) -> bool {
        self.report.as_ref().is_some_and(Report::is_faultless)
    }

    /// A failure, or a loss of one of ours. What a peer loses is a result.
    pub(crate) fn is_unacceptable(&self) -> bool {
        self.report.is_none() || (self.server.is_ours() && !self.is_faultless())
    }

    pub(crate) fn client_was_the_limit(&self) -> bool {
        let traffic = self.report.as_ref().and_then(|report| report.traffic.as_ref());
        traffic.is_some_and(|traffic| traffic.client_was_the_limit)
    }

    pub(crate) fn verdict(&self) -> String {
        let mut verdict = match (&self.report, &self.error) {
            (Some(report), _) if report.is_faultless() => "faultless".to_owned(),
            (Some(report), _) => match &report.traffic {
                Some(traffic) => format!(
                    "**FAULTY**: {:.3} % delivered, {} duplicates, {} out of order, {} disconnections",
                    100.0 * traffic.delivery_ratio,
                    traffic.duplicates,
                    traffic.order_violations,
                    report.disconnections
                ),
                None => format!("**FAULTY**: {} disconnections", report.disconnections),
            },
            (None, error) => format!("**FAILED**: {}", error.as_deref().unwrap_or("no report")),
        };
        if self.client_was_the_limit() {
            verdict += "; **the client was the limit**";
        }
        verdict
    }
}

impl Runs {
    pub(crate) fn of(&self, scenario: Scenario, server: Contender) -> impl Iterator<Item = &Run> {
        self.0.iter().filter(move |run| run.scenario == scenario && run.server == server)
    }

    fn values(&self, scenario: Scenario, server: Contender, measure: Measure) -> Vec<(usize, f64)> {
        self.of(scenario, server)
            .filter_map(|run| Some((run.round, measure(run.report.as_ref()?)?)))
            .collect()
    }

    pub(crate) fn median(&self, scenario: Scenario, server: Contender, measure: Measure) -> Option<f64> {
        median(self.values(scenario, server, measure).into_iter().map(|(_, value)| value).collect())
    }

    pub(crate) fn least(&self, scenario: Scenario, server: Contender, measure: Measure) -> Option<f64> {
        self.values(scenario, server, measure).into_iter().map(|(_, value)| value).reduce(f64::min)
    }

    /// The median of the ratios to the floor of the same round.
    pub(crate) fn ratio(&self, scenario: Scenario, server: Contender, measure: Measure) -> Option<f64> {
        let floor = self.values(scenario, Contender::Floor, measure);
        let ratio = |(round, value): (usize, f64)| {
            let (_, base) = floor.iter().find(|(other, _)| *other == round)?;
            (*base > 0.0).then_some(value / base)
        };
        median(self.values(scenario, server, measure).into_iter().filter_map(ratio).collect())
    }

    /// How many runs there are of which kind, and which kinds are there at all.
    pub(crate) fn verdict(&self, scenario: Scenario, server: Contender) -> String {
        let (mut all, mut faulty, mut failed, mut limited) = (0, 0, 0, 0);
        for run in self.of(scenario, server) {
            all += 1;
            failed += usize::from(run.report.is_none());
            faulty += usize::from(run.report.is_some() && !run.is_faultless());
            limited += usize::from(run.client_was_the_limit());
        }
        let mut words = Vec::new();
        for (count, word) in [(failed, "**FAILED**"), (faulty, "**FAULTY**"), (limited, "client the limit")] {
            if count > 0 {
                words.push(format!("{word} in {count} of {all}"));
            }
        }
        if failed + faulty == 0 && all > 0 {
            words.insert(0, "faultless".to_owned());
        }
        words.join(", ")
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::load::report::Memory;

    /// A run that only weighed connections.
    pub(crate) fn weighed(round: usize, server: Contender, bytes: f64) -> Run {
        let memory = Memory { bytes_per_connection: bytes, ..serde_json::from_str(MEMORY).unwrap() };
        let mut report: Report = serde_json::from_str(REPORT).unwrap();
        report.memory = Some(memory);
        Run { round, scenario: Scenario::Idle, server, report: Some(report), error: None }
    }

    const MEMORY: &str = r#"{"empty_bytes":1048576,"full_bytes":2097152,"bytes_per_connection":0}"#;
    const REPORT: &str = r#"{"setup":{"mode":"idle","url":"","connections":1,"senders":1,"in_flight":1,"rate":null,
        "payload_bytes":64},"traffic":null,"memory":null,"disconnections":0,"causes":[]}"#;

    pub(crate) fn weight(report: &Report) -> Option<f64> {
        Some(report.memory.as_ref()?.bytes_per_connection)
    }

    #[test]
    fn a_ratio_is_taken_within_its_round() {
        let runs = Runs(vec![
            weighed(0, Contender::Floor, 100.0),
            weighed(0, Contender::Tutorial, 200.0),
            weighed(1, Contender::Floor, 400.0),
            weighed(1, Contender::Tutorial, 1600.0),
            weighed(2, Contender::Tutorial, 7.0),
        ]);
        assert_eq!(runs.ratio(Scenario::Idle, Contender::Tutorial, weight), Some(3.0));
        assert_eq!(runs.median(Scenario::Idle, Contender::Tutorial, weight), Some(200.0));
        assert_eq!(runs.ratio(Scenario::Echo, Contender::Tutorial, weight), None);
    }

    #[test]
    fn losses_are_told_and_only_ours_are_unacceptable() {
        let mut lossy = weighed(0, Contender::Tutorial, 1.0);
        lossy.report.as_mut().unwrap().disconnections = 3;
        assert!(!lossy.is_faultless() && !lossy.is_unacceptable());
        assert!(lossy.verdict().contains("FAULTY") && lossy.verdict().contains("3 disconnections"));
        lossy.server = Contender::Shardcast;
        assert!(lossy.is_unacceptable());
        let runs = Runs(vec![weighed(0, Contender::Shardcast, 1.0), lossy]);
        assert_eq!(runs.verdict(Scenario::Idle, Contender::Shardcast), "**FAULTY** in 1 of 2");
    }

    #[test]
    fn a_run_without_a_report_is_unacceptable_whoever_failed() {
        let mut failed = weighed(0, Contender::Tutorial, 1.0);
        failed.report = None;
        assert!(failed.is_unacceptable());
        assert_eq!(Runs(vec![failed]).verdict(Scenario::Idle, Contender::Tutorial), "**FAILED** in 1 of 1");
    }
}
