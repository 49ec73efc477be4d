//! Which core a process runs on.
//!
//! A thread that pins itself before it starts others or processes passes the mask on to them, so one call pins the
//! whole process where the main thread makes it first. Knows nothing of what runs there.

use core_affinity::CoreId;

/// Why a process could not be pinned.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PinError {
    #[error("the kernel refused to pin this thread to cpu {0}")]
    Refused(usize),
}

/// Pins the calling thread, and every thread it starts later, to `cpu`; `None` leaves it free.
pub(crate) fn pin(cpu: Option<usize>) -> Result<(), PinError> {
    match cpu {
        Some(id) if !core_affinity::set_for_current(CoreId { id }) => Err(PinError::Refused(id)),
        _ => Ok(()),
    }
}

/// The cores that this process may use.
pub(crate) fn all() -> Vec<usize> {
    core_affinity::get_core_ids().unwrap_or_default().into_iter().map(|core| core.id).collect()
}

/// One core for the server and another for the client, when this process may use two.
pub(crate) fn server_and_client() -> Option<(usize, usize)> {
    let cores = all();
    let (first, last) = (*cores.first()?, *cores.last()?);
    (first != last).then_some((first, last))
}
