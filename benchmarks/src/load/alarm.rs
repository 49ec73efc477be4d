//! Ends a wait for readiness at a precise time, where epoll counts in milliseconds.
//!
//! For a client that has no core for itself: one that polls until its next message is due takes the time of the servers
//! and is then made to wait by the scheduler itself. On Linux only, by timerfd; elsewhere it never rings.

use std::{io, time::Duration};

use mio::{Registry, Token};

/// The token of the alarm, which no connection has.
pub(super) const ALARM: Token = Token(usize::MAX);

#[cfg(target_os = "linux")]
#[derive(Debug)]
pub(crate) struct Alarm(std::os::fd::OwnedFd);

#[cfg(target_os = "linux")]
impl Alarm {
    pub(super) fn register(registry: &Registry) -> io::Result<Self> {
        use std::os::fd::AsRawFd;

        use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};

        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        registry.register(&mut mio::unix::SourceFd(&timer.as_raw_fd()), ALARM, mio::Interest::READABLE)?;
        Ok(Self(timer))
    }

    /// Rings once after this time, and not at the time that was set before; false if it cannot.
    pub(crate) fn set(&self, after: Duration) -> bool {
        use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec, timerfd_settime};

        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        // 0 would disarm it.
        let after = after.max(Duration::from_nanos(1));
        let Ok(it_value) = Timespec::try_from(after) else { return false };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: never, it_value })
            .is_ok()
    }
}

#[cfg(not(target_os = "linux"))]
#[derive(Debug)]
pub(crate) struct Alarm;

#[cfg(not(target_os = "linux"))]
impl Alarm {
    pub(super) fn register(_: &Registry) -> io::Result<Self> {
        Ok(Self)
    }

    pub(crate) fn set(&self, _: Duration) -> bool {
        false
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::time::Instant;

    use mio::{Events, Poll};

    use super::*;

    #[test]
    fn a_wait_ends_when_the_alarm_rings_and_each_setting_rings_once() {
        let mut poll = Poll::new().unwrap();
        let mut events = Events::with_capacity(4);
        let alarm = Alarm::register(poll.registry()).unwrap();
        for after in [Duration::from_micros(300), Duration::ZERO, Duration::from_millis(2)] {
            let start = Instant::now();
            assert!(alarm.set(Duration::from_secs(1000)) && alarm.set(after));
            poll.poll(&mut events, None).unwrap();
            assert!(events.iter().all(|event| event.token() == ALARM) && !events.is_empty());
            assert!(start.elapsed() >= after);
            poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
            assert!(events.is_empty());
        }
    }
}
