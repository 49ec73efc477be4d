//! Sends probes until every receiver has got one, because a server may adopt a connection only after its 101.

use std::time::{Duration, Instant};

use super::{LoadError, Mode, client_pool::ClientPool, plan::Plan, report::Report};
use crate::message::{FIRST_SEQ, Template};

/// How long a server may take to adopt all connections after the last handshake.
pub(crate) const SETTLE_MAX: Duration = Duration::from_secs(15);
const PROBE_EVERY: Duration = Duration::from_millis(200);

/// Returns the first sequence number that is not a probe's.
pub(crate) fn settle(
    pool: &mut ClientPool,
    plan: &Plan,
    template: &Template,
    mode: Mode,
    report: &mut Report,
) -> Result<u64, LoadError> {
    let echo = mode == Mode::Echo;
    // One prober for each group; an echo reaches its sender only.
    let first_members: Vec<usize> = (0..plan.groups()).collect();
    let (probers, mut unreached) =
        if echo { (plan.senders(), plan.senders().len()) } else { (&first_members[..], pool.len()) };
    let mut reached = vec![false; pool.len()];
    let mut seq = FIRST_SEQ;
    let deadline = Instant::now() + SETTLE_MAX;
    while unreached > 0 {
        if Instant::now() > deadline {
            return Err(LoadError::Unsettled { unreached, connections: pool.len() });
        }
        for &prober in probers.iter().filter(|&&prober| !reached[prober] || !echo) {
            pool.queue(prober, |out| template.write(out, seq));
            seq += 1;
        }
        pool.flush();
        let probe_at = Instant::now() + PROBE_EVERY;
        while unreached > 0 && Instant::now() < probe_at {
            pool.wait(probe_at.saturating_duration_since(Instant::now()))?;
            while let Some(index) = pool.next_ready() {
                let mut got = false;
                let outcome = pool.read(index, None, |_| got = true);
                if let Err(ended) = &outcome {
                    report.disconnected(index, ended);
                }
                if (got || outcome.is_err()) && !std::mem::replace(&mut reached[index], true) {
                    unreached = unreached.saturating_sub(1);
                }
            }
            pool.flush();
        }
    }
    Ok(seq)
}
