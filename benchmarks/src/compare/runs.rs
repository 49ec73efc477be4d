//! All runs, and the statistics over the rounds.
//!
//! A ratio is taken within each round before the median, because disturbances of the machine affect both sides.

use serde::Serialize;

use super::{column::Measure, scenario::Scenario};
use crate::{
    statistic::median,
    trial::{Outcome, Subject},
};

/// One run of one server under one scenario.
#[derive(Debug, Serialize)]
pub(crate) struct Run {
    /// From 0.
    pub(crate) round: usize,
    pub(crate) scenario: Scenario,
    pub(crate) server: Subject,
    #[serde(flatten)]
    pub(crate) outcome: Outcome,
}

/// All runs.
#[derive(Debug)]
pub(crate) struct Runs(pub(crate) Vec<Run>);

impl Runs {
    fn of(&self, scenario: Scenario, server: Subject) -> impl Iterator<Item = &Run> {
        self.0.iter().filter(move |run| run.scenario == scenario && run.server == server)
    }

    pub(crate) fn outcomes(&self, scenario: Scenario, server: Subject) -> impl Iterator<Item = &Outcome> {
        self.of(scenario, server).map(|run| &run.outcome)
    }

    /// By round.
    fn values(
        &self,
        scenario: Scenario,
        server: Subject,
        measure: Measure,
    ) -> impl Iterator<Item = (usize, f64)> {
        self.of(scenario, server)
            .filter_map(move |run| Some((run.round, measure(run.outcome.report.as_ref()?)?)))
    }

    pub(crate) fn median(&self, scenario: Scenario, server: Subject, measure: Measure) -> Option<f64> {
        median(self.values(scenario, server, measure).map(|(_, value)| value).collect())
    }

    pub(crate) fn least(&self, scenario: Scenario, server: Subject, measure: Measure) -> Option<f64> {
        self.values(scenario, server, measure).map(|(_, value)| value).reduce(f64::min)
    }

    /// The median of the ratios to the floor of the same round.
    pub(crate) fn ratio(&self, scenario: Scenario, server: Subject, measure: Measure) -> Option<f64> {
        let ratio = |(round, value)| {
            let (_, floor) =
                self.values(scenario, Subject::Floor, measure).find(|(other, _)| *other == round)?;
            (floor > 0.0).then_some(value / floor)
        };
        median(self.values(scenario, server, measure).filter_map(ratio).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{compare::column::bytes_per_connection, trial::outcome::tests::memory_outcome};

    #[test]
    fn a_ratio_is_taken_within_its_round() {
        let run = |round, server, bytes| Run {
            round,
            scenario: Scenario::Idle,
            server,
            outcome: memory_outcome(bytes),
        };
        let runs = Runs(vec![
            run(0, Subject::Floor, 100.0),
            run(0, Subject::Tutorial, 200.0),
            run(1, Subject::Floor, 400.0),
            run(1, Subject::Tutorial, 1600.0),
            run(2, Subject::Tutorial, 7.0),
        ]);
        let tutorial = |statistic: fn(&Runs, Scenario, Subject, Measure) -> Option<f64>, scenario| {
            statistic(&runs, scenario, Subject::Tutorial, bytes_per_connection)
        };
        assert_eq!(tutorial(Runs::ratio, Scenario::Idle), Some(3.0));
        assert_eq!(tutorial(Runs::median, Scenario::Idle), Some(200.0));
        assert_eq!(tutorial(Runs::least, Scenario::Idle), Some(7.0));
        assert_eq!(tutorial(Runs::ratio, Scenario::Echo), None);
    }
}
