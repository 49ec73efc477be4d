//! The columns of the tables: one number of a report each, and how it is shown.
//!
//! The shares of the two cores are columns beside the rates, because a rate says something about the server only where
//! the server, and not the client or another process, was the limit. A number that was not measured is `None`.

use crate::load::report::{Memory, Report, Traffic};

/// Reads one number out of a report.
pub(crate) type Measure = fn(&Report) -> Option<f64>;

/// One number of a server, and how it is shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    pub(crate) title: &'static str,
    pub(crate) measure: Measure,
    pub(crate) show: Show,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Show {
    /// The median, with so many digits.
    Median(usize),
    /// The median of the ratios to the floor, with so many digits.
    Ratio(usize),
    /// The median, in percent.
    Percent,
    /// The least of all rounds, in percent: a loss must not be hidden by a median.
    LeastPercent,
}

const fn column(title: &'static str, measure: Measure, show: Show) -> Column {
    Column { title, measure, show }
}

const DELIVERIES: Column = column("deliveries/s", deliveries, Show::Median(0));
const P50: Column = column("p50 µs", p50, Show::Median(0));
const P99: Column = column("p99 µs", p99, Show::Median(0));
const BYTES_PER_CONNECTION: Column = column("bytes per connection", bytes_per_connection, Show::Median(0));
const COST: Column = column("CPU µs/delivery", cost, Show::Median(3));
const COST_RATIO: Column = column("× floor", cost, Show::Ratio(3));
const SERVER: Column = column("server core", server_share, Show::Percent);
const WAITED: Column = column("waited", waiting_share, Show::Percent);
const CLIENT: Column = column("client core", client_share, Show::Percent);
const DELIVERED: Column = column("delivered", delivered, Show::LeastPercent);

pub(crate) static TRAFFIC: [Column; 10] = [
    DELIVERIES,
    column("× floor", deliveries, Show::Ratio(2)),
    P50,
    P99,
    COST,
    COST_RATIO,
    SERVER,
    WAITED,
    CLIENT,
    DELIVERED,
];

pub(crate) static LATENCY: [Column; 10] = [
    P50,
    column("× floor", p50, Show::Ratio(2)),
    P99,
    column("× floor", p99, Show::Ratio(2)),
    COST,
    COST_RATIO,
    SERVER,
    WAITED,
    CLIENT,
    DELIVERED,
];

pub(crate) static MEMORY: [Column; 5] = [
    BYTES_PER_CONNECTION,
    column("× floor", bytes_per_connection, Show::Ratio(1)),
    column("open files", |report| Some(memory(report)?.descriptors_per_connection), Show::Median(2)),
    column("resident MiB, empty", |report| Some(mib(memory(report)?.empty_bytes)), Show::Median(1)),
    column("full", |report| Some(mib(memory(report)?.full_bytes)), Show::Median(1)),
];

/// Single runs of any scenario.
pub(crate) static EVERY_RUN: [Column; 7] =
    [DELIVERIES, P99, COST, BYTES_PER_CONNECTION, SERVER, WAITED, CLIENT];

impl Show {
    /// A dash where there is no value.
    pub(crate) fn text(self, value: Option<f64>) -> String {
        match (self, value) {
            (_, None) => "–".to_owned(),
            (Self::Median(digits) | Self::Ratio(digits), Some(value)) => format!("{value:.digits$}"),
            (Self::Percent, Some(share)) => format!("{:.0} %", 100.0 * share),
            (Self::LeastPercent, Some(share)) => format!("{:.3} %", 100.0 * share),
        }
    }
}

impl Column {
    /// Whether it is a value and not the ratio of another column's.
    pub(crate) fn is_plain(&self) -> bool {
        !matches!(self.show, Show::Ratio(_))
    }
}

fn traffic(report: &Report) -> Option<&Traffic> {
    report.traffic.as_ref()
}

fn memory(report: &Report) -> Option<&Memory> {
    report.memory.as_ref()
}

pub(crate) fn deliveries(report: &Report) -> Option<f64> {
    Some(traffic(report)?.deliveries_per_second)
}

/// The server's CPU per delivery, in microseconds.
pub(crate) fn cost(report: &Report) -> Option<f64> {
    traffic(report)?.server_cpu_us_per_delivery
}

pub(crate) fn delivered(report: &Report) -> Option<f64> {
    Some(traffic(report)?.delivery_ratio)
}

fn p50(report: &Report) -> Option<f64> {
    Some(traffic(report)?.latency?.p50_us)
}

fn p99(report: &Report) -> Option<f64> {
    Some(traffic(report)?.latency?.p99_us)
}

fn server_share(report: &Report) -> Option<f64> {
    traffic(report)?.server_cpu_share
}

fn waiting_share(report: &Report) -> Option<f64> {
    traffic(report)?.server_waiting_share
}

fn client_share(report: &Report) -> Option<f64> {
    Some(traffic(report)?.client_cpu_share)
}

pub(crate) fn bytes_per_connection(report: &Report) -> Option<f64> {
    Some(memory(report)?.bytes_per_connection)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
