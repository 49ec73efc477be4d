//! Sends probes until every receiver has got one, because a server may adopt a connection only after its 101.

use std::time::{Duration, Instant};

use super::{LoadError, client_pool::ClientPool, connection::Ended};
use crate::message::Template;

/// How long a server may take to adopt all connections after the last handshake.
pub(crate) const SETTLE_MAX: Duration = Duration::from_secs(15);
const PROBE_EVERY: Duration = Duration::from_millis(200);

/// Which connections send probes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Probes<'a> {
    /// One for each group, or for each group on one node; every connection waits for one of them.
    FromEach(&'a [usize]),
    /// Each of these waits for its own.
    Own(&'a [usize]),
}

/// Numbers the probes from `first` on, and returns the first number that is not a probe's. Earlier messages are ignored.
pub(crate) fn settle(
    pool: &mut ClientPool,
    probes: Probes<'_>,
    template: &Template,
    first: u64,
    mut on_end: impl FnMut(usize, &Ended),
) -> Result<u64, LoadError> {
    let (probers, mut unreached, is_echo) = match probes {
        Probes::FromEach(probers) => (probers, pool.len(), false),
        Probes::Own(probers) => (probers, probers.len(), true),
    };
    let mut reached = vec![false; pool.len()];
    let mut seq = first;
    let deadline = Instant::now() + SETTLE_MAX;
    while unreached > 0 {
        if Instant::now() > deadline {
            return Err(LoadError::Unsettled { unreached, connections: pool.len() });
        }
        for &prober in probers.iter().filter(|&&prober| !reached[prober] || !is_echo) {
            pool.queue(prober, |out| template.write(out, seq));
            seq += 1;
        }
        pool.flush();
        let probe_at = Instant::now() + PROBE_EVERY;
        while unreached > 0 && Instant::now() < probe_at {
            pool.wait(probe_at.saturating_duration_since(Instant::now()))?;
            while let Some(index) = pool.next_ready() {
                let mut got = false;
                let outcome = pool.read(index, None, |seq| got |= seq >= first);
                if let Err(ended) = &outcome {
                    on_end(index, ended);
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
