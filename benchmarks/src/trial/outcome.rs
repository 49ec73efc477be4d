//! The outcome of a trial, and its description in tables and progress lines.
//!
//! A faulty run counts like the others and is marked; a failed one has no numbers.

use serde::Serialize;

use super::{Subject, TrialError};
use crate::load::report::Report;

/// A report, or why there is none.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    pub(crate) report: Option<Report>,
    pub(crate) error: Option<String>,
}

impl From<Result<Report, TrialError>> for Outcome {
    fn from(result: Result<Report, TrialError>) -> Self {
        match result {
            Ok(report) => Self { report: Some(report), error: None },
            Err(error) => Self { report: None, error: Some(one_line(&error)) },
        }
    }
}

impl Outcome {
    pub(crate) fn is_faultless(&self) -> bool {
        self.report.as_ref().is_some_and(Report::is_faultless)
    }

    /// A failure, or a fault of one of ours. What another library loses is a result.
    pub(crate) fn is_unacceptable(&self, server: Subject) -> bool {
        self.report.is_none() || (server.is_ours() && !self.is_faultless())
    }

    pub(crate) fn client_was_the_limit(&self) -> bool {
        let traffic = self.report.as_ref().and_then(|report| report.traffic.as_ref());
        traffic.is_some_and(|traffic| traffic.client_was_the_limit)
    }

    /// One run, for a table.
    pub(crate) fn verdict(&self) -> String {
        let mut verdict = match &self.report {
            Some(report) if report.is_faultless() => "faultless".to_owned(),
            Some(report) => format!("**FAULTY**: {}", faults(report)),
            None => format!("**FAILED**: {}", self.error.as_deref().unwrap_or("no report")),
        };
        if self.client_was_the_limit() {
            verdict += "; **the client was the limit**";
        }
        verdict
    }

    /// One run, as a line while the others run.
    pub(crate) fn progress(&self) -> String {
        let mut line = self.verdict();
        if let Some(traffic) = self.report.as_ref().and_then(|report| report.traffic.as_ref()) {
            let percent = |share: f64| format!("{:.0} %", 100.0 * share);
            let server = traffic.server_cpu_share.map_or_else(|| "–".to_owned(), percent);
            line += &format!(
                ", {:.0} deliveries/s, {server} of a core for the server, {} for the client",
                traffic.deliveries_per_second,
                percent(traffic.client_cpu_share)
            );
        }
        line
    }

    /// Several runs of one server under one scenario, for a table.
    pub(crate) fn summary<'a>(outcomes: impl Iterator<Item = &'a Self>) -> String {
        let (mut all, mut faulty, mut failed, mut limited) = (0, 0, 0, 0);
        for outcome in outcomes {
            all += 1;
            failed += usize::from(outcome.report.is_none());
            faulty += usize::from(outcome.report.is_some() && !outcome.is_faultless());
            limited += usize::from(outcome.client_was_the_limit());
        }
        let mut words = Vec::new();
        if all > 0 && failed + faulty == 0 {
            words.push("faultless".to_owned());
        }
        for (count, word) in [(failed, "**FAILED**"), (faulty, "**FAULTY**"), (limited, "client the limit")] {
            if count > 0 {
                words.push(format!("{word} in {count} of {all}"));
            }
        }
        words.join(", ")
    }
}

/// An error and its causes, without what would break a line or a cell of a table.
fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text.replace('|', "/").split_whitespace().collect::<Vec<_>>().join(" ")
}

fn faults(report: &Report) -> String {
    let disconnections = format!("{} disconnections", report.disconnections);
    match &report.traffic {
        Some(traffic) => format!(
            "{:.3} % delivered, {} duplicates, {} out of order, {} strays, {disconnections}",
            100.0 * traffic.delivery_ratio,
            traffic.duplicates,
            traffic.order_violations,
            traffic.strays,
        ),
        None => disconnections,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::load::report::{Memory, Traffic};

    const REPORT: &str = r#"{"setup":{"mode":"idle","url":"","connections":1,"senders":1,"in_flight":1,"rate":null,
        "payload_bytes":64,"groups":1,"lossy":false},"disconnections":0,"causes":[]}"#;
    const MEMORY: &str = r#"{"empty_bytes":1048576,"full_bytes":2097152,"bytes_per_connection":0,
        "descriptors_per_connection":1,"peak_bytes":2097152}"#;
    const TRAFFIC: &str = r#"{"seconds":1,"deliveries_per_second":0,"messages_per_second":1,"expected":1000,
        "received":1000,"delivery_ratio":1,"duplicates":0,"order_violations":0,"sender_reorders":0,"strays":0,"unseen":0,
        "latency":null,"server_cpu_us_per_delivery":2.5,"server_cpu_share":1,"server_waiting_share":0,
        "client_cpu_share":0.4,"client_waiting_share":0,"client_was_the_limit":false}"#;

    fn outcome() -> Outcome {
        Outcome { report: serde_json::from_str(REPORT).unwrap(), error: None }
    }

    /// A run that measured memory.
    pub(crate) fn memory_outcome(bytes: f64) -> Outcome {
        let mut outcome = outcome();
        let memory: Memory = serde_json::from_str(MEMORY).unwrap();
        outcome.report.as_mut().unwrap().memory = Some(Memory { bytes_per_connection: bytes, ..memory });
        outcome
    }

    /// A run with messages.
    fn traffic_outcome(per_second: f64) -> Outcome {
        let mut outcome = outcome();
        let traffic: Traffic = serde_json::from_str(TRAFFIC).unwrap();
        outcome.report.as_mut().unwrap().traffic =
            Some(Traffic { deliveries_per_second: per_second, ..traffic });
        outcome
    }

    /// The same run, but the server closed connections.
    pub(crate) fn faulty(mut outcome: Outcome) -> Outcome {
        outcome.report.as_mut().unwrap().disconnections = 3;
        outcome
    }

    pub(crate) fn failed() -> Outcome {
        Outcome { report: None, error: Some("it did not start".to_owned()) }
    }

    #[test]
    fn losses_are_shown_and_only_ours_are_unacceptable() {
        let lossy = faulty(memory_outcome(1.0));
        assert!(!lossy.is_faultless() && !lossy.is_unacceptable(Subject::Tutorial));
        assert!(lossy.is_unacceptable(Subject::Shardcast) && lossy.is_unacceptable(Subject::Floor));
        assert_eq!(lossy.verdict(), "**FAULTY**: 3 disconnections");
        let mut short = traffic_outcome(5.0);
        short.report.as_mut().unwrap().traffic.as_mut().unwrap().received = 999;
        assert!(short.verdict().starts_with("**FAULTY**: 100.000 % delivered, 0 duplicates"));
        assert_eq!(Outcome::summary([traffic_outcome(5.0), lossy, short].iter()), "**FAULTY** in 2 of 3");
    }

    #[test]
    fn a_run_without_a_report_is_unacceptable_for_every_server() {
        assert!(failed().is_unacceptable(Subject::Tutorial));
        assert_eq!(failed().verdict(), "**FAILED**: it did not start");
        assert_eq!(Outcome::summary([failed(), memory_outcome(1.0)].iter()), "**FAILED** in 1 of 2");
    }

    #[test]
    fn an_error_of_several_lines_stays_in_its_cell() {
        let error = TrialError::NoReport("no flag\n\nUsage: a | b".to_owned());
        assert_eq!(
            Outcome::from(Err(error)).verdict(),
            "**FAILED**: the load generator printed no report but: no flag Usage: a / b"
        );
    }

    #[test]
    fn a_run_in_which_the_client_was_the_limit_is_marked() {
        let mut limited = traffic_outcome(5.0);
        limited.report.as_mut().unwrap().traffic.as_mut().unwrap().client_was_the_limit = true;
        assert_eq!(limited.verdict(), "faultless; **the client was the limit**");
        assert_eq!(Outcome::summary([limited].iter()), "faultless, client the limit in 1 of 1");
        assert!(
            traffic_outcome(5.0).progress().contains("100 % of a core for the server, 40 % for the client")
        );
    }
}
