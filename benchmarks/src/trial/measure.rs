//! The numbers that tables and charts take from a report. What was not measured is absent.

use crate::load::report::{Report, Traffic};

/// One number of a report.
pub(crate) type Measure = fn(&Report) -> Option<f64>;

fn traffic(report: &Report) -> Option<&Traffic> {
    report.traffic.as_ref()
}

pub(crate) fn deliveries(report: &Report) -> Option<f64> {
    Some(traffic(report)?.deliveries_per_second)
}

pub(crate) fn messages(report: &Report) -> Option<f64> {
    Some(traffic(report)?.messages_per_second)
}

/// The server's CPU per delivery, in microseconds.
pub(crate) fn cost(report: &Report) -> Option<f64> {
    traffic(report)?.server_cpu_us_per_delivery
}

pub(crate) fn delivered(report: &Report) -> Option<f64> {
    Some(traffic(report)?.delivery_ratio)
}

pub(crate) fn p50(report: &Report) -> Option<f64> {
    Some(traffic(report)?.latency?.p50_us)
}

pub(crate) fn p99(report: &Report) -> Option<f64> {
    Some(traffic(report)?.latency?.p99_us)
}

pub(crate) fn server_share(report: &Report) -> Option<f64> {
    traffic(report)?.server_cpu_share
}

pub(crate) fn waiting_share(report: &Report) -> Option<f64> {
    traffic(report)?.server_waiting_share
}

pub(crate) fn client_share(report: &Report) -> Option<f64> {
    Some(traffic(report)?.client_cpu_share)
}

/// Resident bytes per idle connection.
pub(crate) fn weight(report: &Report) -> Option<f64> {
    Some(report.memory.as_ref()?.bytes_per_connection)
}

pub(crate) fn empty_mib(report: &Report) -> Option<f64> {
    Some(mib(report.memory.as_ref()?.empty_bytes))
}

pub(crate) fn full_mib(report: &Report) -> Option<f64> {
    Some(mib(report.memory.as_ref()?.full_bytes))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
