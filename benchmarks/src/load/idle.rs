//! The memory of an idle connection: open many, wait until the server's memory no longer changes, divide.
//!
//! No message is sent, so buffers that a server allocates for the first one are not included. Needs a fresh server:
//! one that has held connections before keeps their memory.

use std::time::{Duration, Instant};

use super::{
    LoadError, Options, client_pool::ClientPool, connect::connect, memory_monitor::MemoryMonitor,
    report::Report, target::Target,
};
use crate::process::Process;

const SAMPLE_EVERY: Duration = Duration::from_millis(200);
/// So many consecutive samples must differ by at most `STABLE_BYTES`.
const STABLE_SAMPLES: usize = 5;
const STABLE_BYTES: u64 = 64 * 1024;
const SETTLE_MAX: Duration = Duration::from_secs(15);

/// Connects, waits, and measures.
pub(crate) fn measure(
    options: &Options,
    target: &Target,
    server: Option<Process>,
) -> Result<Report, LoadError> {
    let server = server.ok_or(LoadError::Options("idle mode needs --server-pid"))?;
    let mut report = Report::new(options);
    let mut memory = MemoryMonitor::new(server, target.address.port(), options.connections)?;
    let (mut pool, handshakes) = connect(std::slice::from_ref(target), &options.plan(), options.at_once())?;
    report.handshakes = Some(handshakes);
    await_stable_memory(&mut pool, server, &mut memory, &mut report)?;
    memory.measure_full()?;
    report.memory = Some(memory.report());
    Ok(report)
}

/// Answers pings until the server's memory no longer changes.
fn await_stable_memory(
    pool: &mut ClientPool,
    server: Process,
    memory: &mut MemoryMonitor,
    report: &mut Report,
) -> Result<(), LoadError> {
    let start = Instant::now();
    let mut level = server.resident_bytes()?;
    let mut stable = 0;
    while stable < STABLE_SAMPLES && start.elapsed() < SETTLE_MAX {
        let sample_at = Instant::now() + SAMPLE_EVERY;
        while Instant::now() < sample_at {
            pool.wait(sample_at.saturating_duration_since(Instant::now()))?;
            while let Some(index) = pool.next_ready() {
                if let Err(ended) = pool.read(index, None, |_| ()) {
                    report.disconnected(index, &ended);
                }
            }
            pool.flush();
        }
        memory.sample(Instant::now());
        let sample = server.resident_bytes()?;
        stable = if sample.abs_diff(level) <= STABLE_BYTES { stable + 1 } else { 0 };
        level = sample;
    }
    Ok(())
}
