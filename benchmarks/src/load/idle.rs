//! What an idle connection weighs: open many, wait until the server's memory rests, divide.
//!
//! No message is sent: buffers that a server keeps after the first one are another question. Give it a fresh
//! server, since one that has held connections before has their memory already.

use std::time::{Duration, Instant};

use super::{
    LoadError, Options, connect::connect, crowd::Crowd, memory::Watch, report::Report, target::Target,
};
use crate::process::Process;

const SAMPLE_EVERY: Duration = Duration::from_millis(200);
/// So many samples in a row must agree.
const SAMPLES_AT_REST: usize = 5;
const REST_BYTES: u64 = 64 * 1024;
const SETTLE_MAX: Duration = Duration::from_secs(15);

/// Connects, waits, and weighs.
pub(crate) fn measure(
    options: &Options,
    target: &Target,
    server: Option<Process>,
) -> Result<Report, LoadError> {
    let server = server.ok_or(LoadError::Options("idle needs --server-pid"))?;
    let mut report = Report::new(options);
    let mut memory = Watch::new(server, target.address.port(), options.connections)?;
    let mut crowd = connect(target, &options.cast(), options.at_once())?;
    rest(&mut crowd, server, &mut memory, &mut report)?;
    memory.fill()?;
    report.memory = Some(memory.report());
    Ok(report)
}

/// Serves the crowd until the server's memory no longer changes.
fn rest(
    crowd: &mut Crowd,
    server: Process,
    memory: &mut Watch,
    report: &mut Report,
) -> Result<(), LoadError> {
    let start = Instant::now();
    let mut level = server.resident_bytes()?;
    let mut agreeing = 0;
    while agreeing < SAMPLES_AT_REST && start.elapsed() < SETTLE_MAX {
        let sample_at = Instant::now() + SAMPLE_EVERY;
        while Instant::now() < sample_at {
            crowd.wait(sample_at.saturating_duration_since(Instant::now()))?;
            while let Some(index) = crowd.next_ready() {
                if let Err(ended) = crowd.read(index, |_| ()) {
                    report.disconnected(index, &ended);
                }
            }
            crowd.flush();
        }
        memory.turn(Instant::now());
        let sample = server.resident_bytes()?;
        agreeing = if sample.abs_diff(level) <= REST_BYTES { agreeing + 1 } else { 0 };
        level = sample;
    }
    Ok(())
}
