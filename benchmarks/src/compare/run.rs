//! One run, and what many runs of a server say together.
//!
//! A ratio is taken within each round first, and its median shown: what disturbs the machine disturbs both sides.

use serde::Serialize;

use super::scenario::Scenario;
use crate::{
    statistic::median,
    trial::{Contender, Measure, Outcome},
};

/// One run of one server under one scenario.
#[derive(Debug, Serialize)]
pub(crate) struct Run {
    /// From 0.
    pub(crate) round: usize,
    pub(crate) scenario: Scenario,
    pub(crate) server: Contender,
    #[serde(flatten)]
    pub(crate) outcome: Outcome,
}

/// All runs.
#[derive(Debug)]
pub(crate) struct Runs(pub(crate) Vec<Run>);

impl Runs {
    pub(crate) fn of(&self, scenario: Scenario, server: Contender) -> impl Iterator<Item = &Run> {
        self.0.iter().filter(move |run| run.scenario == scenario && run.server == server)
    }

    pub(crate) fn outcomes(&self, scenario: Scenario, server: Contender) -> impl Iterator<Item = &Outcome> {
        self.of(scenario, server).map(|run| &run.outcome)
    }

    fn values(&self, scenario: Scenario, server: Contender, measure: Measure) -> Vec<(usize, f64)> {
        self.of(scenario, server)
            .filter_map(|run| Some((run.round, measure(run.outcome.report.as_ref()?)?)))
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trial::{measure::weight, outcome::tests::weighed};

    #[test]
    fn a_ratio_is_taken_within_its_round() {
        let run =
            |round, server, bytes| Run { round, scenario: Scenario::Idle, server, outcome: weighed(bytes) };
        let runs = Runs(vec![
            run(0, Contender::Floor, 100.0),
            run(0, Contender::Tutorial, 200.0),
            run(1, Contender::Floor, 400.0),
            run(1, Contender::Tutorial, 1600.0),
            run(2, Contender::Tutorial, 7.0),
        ]);
        assert_eq!(runs.ratio(Scenario::Idle, Contender::Tutorial, weight), Some(3.0));
        assert_eq!(runs.median(Scenario::Idle, Contender::Tutorial, weight), Some(200.0));
        assert_eq!(runs.least(Scenario::Idle, Contender::Tutorial, weight), Some(7.0));
        assert_eq!(runs.ratio(Scenario::Echo, Contender::Tutorial, weight), None);
    }
}
