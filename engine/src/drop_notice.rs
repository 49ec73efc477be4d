//! Drop notices: the dropped frames that must still be reported to a handler.
//!
//! One list for each connection that has lost frames, owned by its shard. Bounded, because the list of a busy
//! handler must not grow with the number of groups. Does not know connections or handlers.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::tally::DropCause;

/// Notices that are kept separately for each group, per connection. Above it a drop is added to a notice of
/// the same cause that names no group.
const KEPT_APART: usize = 16;

/// Frames for one connection that its policy dropped, for the same cause and published to the same group.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DropNotice {
    /// The number of frames, at least 1.
    pub frames: u64,
    /// Why.
    pub cause: DropCause,
    /// The group that they were published to. None for frames to everyone, to several groups or to this
    /// connection alone, and for drops beyond 16 groups while the handler was busy.
    pub group: Option<Arc<str>>,
}

/// The drops that were not yet reported to one handler, oldest first.
#[derive(Debug, Default)]
pub(crate) struct DropNotices {
    list: VecDeque<DropNotice>,
    /// Nobody must be notified any more.
    is_stopped: bool,
}

impl DropNotices {
    pub(crate) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(crate) fn add(&mut self, frames: u64, cause: DropCause, group: Option<&Arc<str>>) {
        if self.is_stopped {
            return;
        }
        let group = group.filter(|_| self.list.len() < KEPT_APART || self.find(cause, group).is_some());
        match self.find(cause, group) {
            Some(index) => self.list[index].frames += frames,
            None => self.list.push_back(DropNotice { frames, cause, group: group.cloned() }),
        }
    }

    /// Forgets the notices, and those to come.
    pub(crate) fn stop(&mut self) {
        *self = Self { list: VecDeque::new(), is_stopped: true };
    }

    pub(crate) fn take_first(&mut self) -> Option<DropNotice> {
        self.list.pop_front()
    }

    #[cfg(feature = "audit")]
    pub(crate) fn frames(&self) -> u64 {
        self.list.iter().map(|notice| notice.frames).sum()
    }

    fn find(&self, cause: DropCause, group: Option<&Arc<str>>) -> Option<usize> {
        self.list.iter().position(|notice| notice.cause == cause && notice.group.as_ref() == group)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_kept_separately_by_cause_and_group_in_a_bounded_list() {
        let mut notices = DropNotices::default();
        let names: Vec<Arc<str>> = (0..1000).map(|number| number.to_string().into()).collect();
        for name in names.iter().chain(&names) {
            notices.add(1, DropCause::Overflow, Some(name));
            notices.add(1, DropCause::Timeout, None);
        }
        let first = notices.take_first();
        assert_eq!(
            first,
            Some(DropNotice { frames: 2, cause: DropCause::Overflow, group: Some("0".into()) })
        );
        assert_eq!(notices.take_first().map(|notice| (notice.frames, notice.group)), Some((2000, None)));
        let rest: Vec<_> = std::iter::from_fn(|| notices.take_first()).collect();
        assert!(rest.len() <= KEPT_APART);
        assert_eq!(rest.iter().map(|notice| notice.frames).sum::<u64>(), 2000 - 2);
    }
}
