//! Which core a process runs on.
//!
//! Threads and processes inherit the mask of the thread that starts them, so one call by the main thread at its start
//! pins the whole process. On Linux only; elsewhere there are no cores to choose from.

#[cfg(target_os = "linux")]
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Why a process could not be pinned.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PinError {
    #[error("the kernel refused to pin this thread to cpu {0}")]
    Refused(usize),
}

/// Pins the calling thread, and every thread that it starts later, to `cpu`; `None` does nothing.
pub(crate) fn pin(cpu: Option<usize>) -> Result<(), PinError> {
    match cpu {
        Some(cpu) if !set(cpu) => Err(PinError::Refused(cpu)),
        _ => Ok(()),
    }
}

#[cfg(target_os = "linux")]
fn set(cpu: usize) -> bool {
    let mut own = CpuSet::new();
    if cpu >= CpuSet::MAX_CPU {
        return false;
    }
    own.set(cpu);
    sched_setaffinity(None, &own).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn set(_: usize) -> bool {
    false
}

/// The cores that this process may use.
#[cfg(target_os = "linux")]
fn all() -> Vec<usize> {
    let allowed = sched_getaffinity(None).unwrap_or_default();
    (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect()
}

#[cfg(not(target_os = "linux"))]
fn all() -> Vec<usize> {
    Vec::new()
}

/// One core for the server and another for the client; `None` when this process may use only one.
pub(crate) fn server_and_client() -> Option<(usize, usize)> {
    let cores = all();
    let (first, last) = (*cores.first()?, *cores.last()?);
    (first != last).then_some((first, last))
}
