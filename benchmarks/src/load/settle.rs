//! The settling: probes until every receiver has got one, because a server may adopt a connection after its 101.

use std::time::{Duration, Instant};

use super::{LoadError, Mode, crowd::Crowd, report::Report, role::Cast};
use crate::message::{FIRST_SEQ, Template};

/// How long a server may take to adopt everybody after the last handshake.
pub(crate) const SETTLE_MAX: Duration = Duration::from_secs(15);
const PROBE_EVERY: Duration = Duration::from_millis(200);

/// Returns the first number that is no probe.
pub(crate) fn settle(
    crowd: &mut Crowd,
    cast: &Cast,
    template: &Template,
    mode: Mode,
    report: &mut Report,
) -> Result<u64, LoadError> {
    let echo = mode == Mode::Echo;
    // One for each group, which for an echo is each sender.
    let first_members: Vec<usize> = (0..cast.groups()).collect();
    let (probers, mut unseen) =
        if echo { (cast.senders(), cast.senders().len()) } else { (&first_members[..], crowd.len()) };
    let mut seen = vec![false; crowd.len()];
    let mut seq = FIRST_SEQ;
    let deadline = Instant::now() + SETTLE_MAX;
    while unseen > 0 {
        if Instant::now() > deadline {
            return Err(LoadError::Unsettled { unseen, connections: crowd.len() });
        }
        for &prober in probers.iter().filter(|&&prober| !seen[prober] || !echo) {
            crowd.queue(prober, |out| template.write(out, seq));
            seq += 1;
        }
        crowd.flush();
        let probe_at = Instant::now() + PROBE_EVERY;
        while unseen > 0 && Instant::now() < probe_at {
            crowd.wait(probe_at.saturating_duration_since(Instant::now()))?;
            while let Some(index) = crowd.next_ready() {
                let mut got = false;
                let outcome = crowd.read(index, |_| got = true);
                if let Err(ended) = &outcome {
                    report.disconnected(index, ended);
                }
                if (got || outcome.is_err()) && !std::mem::replace(&mut seen[index], true) {
                    unseen = unseen.saturating_sub(1);
                }
            }
            crowd.flush();
        }
    }
    Ok(seq)
}
