//! The report of one run, as text and JSON, and the table of all runs: medians of the rounds.
//!
//! A number that was not measured is absent, never zero.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{faults::Faults, ledger::ByNode};
use crate::{
    load::latencies::LatencySummary,
    statistic::{compact, median},
};

/// When an outage begins, as a share of the measured time.
pub(super) const OUTAGE_AFTER: f64 = 0.4;

/// When a node is replaced, likewise.
pub(super) const REPLACE_AFTER: f64 = 0.2;

/// One run. Rates, CPU and latencies are those of the measured time, faults those of the whole run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Report {
    pub(crate) seconds: f64,
    /// Messages that all their receivers have got.
    pub(crate) messages_per_second: f64,
    pub(crate) deliveries_per_second: f64,
    pub(crate) sent: u64,
    /// Until the last client of the node has the message; with one server, until the last client of that half has it.
    pub(crate) latency: ByNode<Option<LatencySummary>>,
    /// Of all nodes together.
    pub(crate) nodes_cpu_us_per_message: Option<f64>,
    pub(crate) broker_cpu_us_per_message: Option<f64>,
    pub(crate) client_cpu_share: Option<f64>,
    pub(crate) faults: Faults,
    pub(crate) disconnections: u64,
    /// The first few causes of disconnections.
    pub(crate) causes: Vec<String>,
    pub(crate) outage: Option<Outage>,
}

/// What an outage of the broker did.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Outage {
    /// From its end by SIGKILL to the start of its process.
    pub(crate) seconds: f64,
    /// From the start of its process to the next message. Absent if there was none.
    pub(crate) first_after_ms: ByNode<Option<f64>>,
    /// The longest time in the measurement in which nobody received a message of a publisher on this or the other node.
    pub(crate) silence_ms: ByNode<f64>,
}

impl Report {
    /// Everything once, in one order, and nobody disconnected.
    pub(crate) fn is_faultless(&self) -> bool {
        self.faults.is_none() && self.disconnections == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  messages/s      {:.0}, {} sent", self.messages_per_second, self.sent)?;
        writeln!(f, "  deliveries/s    {:.0}", self.deliveries_per_second)?;
        for (latency, whose) in [(self.latency.own, "own node"), (self.latency.other, "other node")] {
            if let Some(latency) = latency {
                writeln!(f, "  latency µs      {latency} at the publisher's {whose}")?;
            }
        }
        if let Some(cost) = self.nodes_cpu_us_per_message {
            write!(f, "  CPU             {cost:.1} µs per message for the nodes")?;
            match self.broker_cpu_us_per_message {
                Some(cost) => writeln!(f, ", {cost:.1} µs for the broker")?,
                None => writeln!(f)?,
            }
        }
        if let Some(share) = self.client_cpu_share {
            writeln!(f, "  client CPU      {:.0} % of a core", 100.0 * share)?;
        }
        self.faults.fmt(f)?;
        if let Some(outage) = &self.outage {
            outage.fmt(f)?;
        }
        writeln!(f, "  disconnections  {}", self.disconnections)?;
        for cause in &self.causes {
            writeln!(f, "                  {cause}")?;
        }
        writeln!(f, "  verdict         {}", if self.is_faultless() { "faultless" } else { "FAULTY" })
    }
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seconds, first_after_ms, silence_ms } = self;
        let first = first_after_ms.map(|first| first.map_or("never".to_owned(), |ms| format!("{ms:.0} ms")));
        writeln!(f, "  outage          {seconds:.2} s without the broker's process")?;
        writeln!(
            f,
            "                  first message after its start: {} at the publisher's node, {} at the other",
            first.own, first.other
        )?;
        writeln!(
            f,
            "                  longest silence: {:.0} ms and {:.0} ms",
            silence_ms.own, silence_ms.other
        )
    }
}

/// One line of the table: all rounds of one server.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Rounds {
    pub(crate) name: String,
    /// One node without a broker.
    pub(crate) single: Vec<Report>,
    pub(crate) cluster: Vec<Report>,
}

impl Rounds {
    fn single(&self, value: impl Fn(&Report) -> Option<f64>) -> Option<f64> {
        median(self.single.iter().filter_map(value).collect())
    }

    fn cluster(&self, value: impl Fn(&Report) -> Option<f64>) -> Option<f64> {
        median(self.cluster.iter().filter_map(value).collect())
    }

    /// The median of the rounds' differences.
    fn added(&self, value: impl Fn(&Report) -> Option<f64>) -> Option<f64> {
        let pairs = self.single.iter().zip(&self.cluster);
        median(pairs.filter_map(|(single, cluster)| Some(value(cluster)? - value(single)?)).collect())
    }

    fn most(&self, value: impl Fn(&Faults) -> u64) -> u64 {
        self.cluster.iter().map(|report| value(&report.faults)).max().unwrap_or(0)
    }
}

/// A column: its title, and its text for a server.
type Column = (&'static str, fn(&Rounds) -> String);

const COLUMNS: &[Column] = &[
    ("messages/s", |rounds| number(rounds.cluster(|report| Some(report.messages_per_second)))),
    ("deliveries/s", |rounds| number(rounds.cluster(|report| Some(report.deliveries_per_second)))),
    ("nodes: CPU µs per message", |rounds| number(rounds.cluster(|report| report.nodes_cpu_us_per_message))),
    ("broker: CPU µs per message", |rounds| {
        number(rounds.cluster(|report| report.broker_cpu_us_per_message))
    }),
];

const FAULT_COLUMNS: &[Column] = &[
    ("lost", |rounds| rounds.most(Faults::lost).to_string()),
    ("duplicates", |rounds| rounds.most(|faults| faults.duplicates).to_string()),
    ("out of order within a publisher", |rounds| rounds.most(|faults| faults.publisher_order).to_string()),
    ("out of order between clients", |rounds| rounds.most(|faults| faults.order).to_string()),
    ("at most, for one client", |rounds| {
        format!(
            "{} of {}",
            rounds.most(|faults| faults.order_worst),
            rounds.most(|faults| faults.received_most)
        )
    }),
];

const LATENCY_COLUMNS: &[Column] = &[
    ("one node p50", |rounds| number(rounds.single(|report| Some(report.latency.own?.p50_us)))),
    ("p99", |rounds| number(rounds.single(|report| Some(report.latency.own?.p99_us)))),
    ("own node p50", |rounds| number(rounds.cluster(|report| Some(report.latency.own?.p50_us)))),
    ("p99", |rounds| number(rounds.cluster(|report| Some(report.latency.own?.p99_us)))),
    ("other node p50", |rounds| number(rounds.cluster(|report| Some(report.latency.other?.p50_us)))),
    ("p99", |rounds| number(rounds.cluster(|report| Some(report.latency.other?.p99_us)))),
    ("max", |rounds| number(rounds.cluster(|report| Some(report.latency.other?.max_us)))),
    ("added, own node, p50", |rounds| number(rounds.added(|report| Some(report.latency.own?.p50_us)))),
    ("p99", |rounds| number(rounds.added(|report| Some(report.latency.own?.p99_us)))),
    ("added, other node, p50", |rounds| number(rounds.added(|report| Some(report.latency.other?.p50_us)))),
    ("p99", |rounds| number(rounds.added(|report| Some(report.latency.other?.p99_us)))),
];

const OUTAGE_COLUMNS: &[Column] = &[
    ("lost for all", |rounds| rounds.most(|faults| faults.lost_everywhere).to_string()),
    ("lost on the other node", |rounds| rounds.most(|faults| faults.lost_elsewhere).to_string()),
    ("in part", |rounds| rounds.most(|faults| faults.lost_in_part).to_string()),
    ("of sent", |rounds| rounds.cluster.iter().map(|report| report.sent).max().unwrap_or(0).to_string()),
    ("first message after the restart, ms", |rounds| first_after(rounds, |first| first.own)),
    ("at the other node", |rounds| first_after(rounds, |first| first.other)),
];

/// The median, unless in some round there was none.
fn first_after(rounds: &Rounds, node: impl Fn(ByNode<Option<f64>>) -> Option<f64>) -> String {
    let first = |report: &Report| node(report.outage?.first_after_ms);
    match rounds.cluster.iter().filter(|report| first(report).is_none()).count() {
        0 => number(rounds.cluster(first)),
        count => format!("never in {count} of {}", rounds.cluster.len()),
    }
}

fn number(value: Option<f64>) -> String {
    value.map_or("–".to_owned(), |value| compact(value, ""))
}

/// The tables of all servers, as Markdown.
#[derive(Debug)]
pub(super) struct Tables<'a>(pub(super) &'a [Rounds]);

impl fmt::Display for Tables<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let has_outage = self.0.iter().flat_map(|rounds| &rounds.cluster).any(|run| run.outage.is_some());
        let titled: &[(&str, &[Column])] = if has_outage {
            &[
                ("Outage of the broker, the most of all rounds", OUTAGE_COLUMNS),
                ("Faults, the most of all rounds", FAULT_COLUMNS),
            ]
        } else {
            &[
                ("Throughput and CPU, medians", COLUMNS),
                ("Latency, in µs, medians", LATENCY_COLUMNS),
                ("Faults, the most of all rounds", FAULT_COLUMNS),
            ]
        };
        for (title, columns) in titled {
            let titles: Vec<&str> = columns.iter().map(|(title, _)| *title).collect();
            writeln!(f, "\n{title}:\n\n| server | {} |", titles.join(" | "))?;
            writeln!(f, "|---|{}", "--:|".repeat(columns.len()))?;
            for rounds in self.0 {
                let cells: Vec<String> = columns.iter().map(|(_, text)| text(rounds)).collect();
                writeln!(f, "| {} | {} |", rounds.name, cells.join(" | "))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(p50_us: f64, order: u64) -> Report {
        let latency = Some(LatencySummary { p50_us, p99_us: 2.0 * p50_us, max_us: 9.0 * p50_us });
        Report {
            seconds: 1.0,
            messages_per_second: 1000.0,
            deliveries_per_second: 2000.0,
            sent: 1000,
            latency: ByNode { own: latency, other: latency },
            nodes_cpu_us_per_message: Some(20.0),
            broker_cpu_us_per_message: None,
            client_cpu_share: None,
            faults: Faults { order, ..Faults::default() },
            disconnections: 0,
            causes: Vec::new(),
            outage: None,
        }
    }

    #[test]
    fn what_is_added_is_the_median_of_the_differences_and_faults_are_the_most() {
        let rounds = Rounds {
            name: "a".to_owned(),
            single: [100.0, 500.0, 100.0].map(|p50| report(p50, 0)).into(),
            cluster: vec![report(300.0, 3), report(600.0, 7), report(250.0, 0)],
        };
        assert_eq!(rounds.added(|report| Some(report.latency.own?.p50_us)), Some(150.0));
        let text = Tables(std::slice::from_ref(&rounds)).to_string();
        assert!(text.contains("| a | 0 | 0 | 0 | 7 | 0 of 0 |"), "{text}");
        assert!(text.contains("| a | 1000 | 2000 | 20 | – |"), "{text}");
        for table in text.split("\n\n") {
            let columns: Vec<usize> = table.lines().map(|line| line.matches('|').count()).collect();
            assert!(columns.windows(2).all(|pair| pair[0] == pair[1]), "{table}");
        }
    }

    #[test]
    fn a_run_is_faultless_without_faults_and_disconnections() {
        assert!(report(1.0, 0).is_faultless() && !report(1.0, 1).is_faultless());
        assert!(!Report { disconnections: 1, ..report(1.0, 0) }.is_faultless());
    }
}
