//! The server's memory during a run: its resident set, and the kernel's memory for TCP sockets.
//!
//! The kernel counts whole pages for all sockets of the machine (/proc/net/sockstat), so on the loopback both ends
//! are included, and so are all other programs; each core keeps up to 1 MiB in reserve that counts as used. The report
//! has the level before connecting, to subtract it. Where `ss` is installed, it reports the server's sockets alone.

use std::{
    fs,
    time::{Duration, Instant},
};

use super::{report, socket_memory};
use crate::process::{Process, ProcessError};

const SAMPLE_EVERY: Duration = Duration::from_secs(1);

/// Memory at one moment.
#[derive(Clone, Copy, Debug, Default)]
struct Level {
    resident: u64,
    /// The process's open files; 0 in samples.
    descriptors: usize,
    /// `None` where the kernel does not report it.
    kernel: Option<u64>,
    /// Of the server's sockets; `None` without `ss`, and in samples.
    sockets: Option<u64>,
}

/// The levels of one server's memory.
#[derive(Debug)]
pub(crate) struct MemoryMonitor {
    server: Process,
    connections: usize,
    page_bytes: u64,
    /// The server's.
    port: u16,
    empty: Level,
    full: Level,
    peak: Level,
    sample_at: Instant,
}

impl MemoryMonitor {
    /// To be called before the first connection, with a fresh server: one that has held connections before keeps their
    /// memory.
    pub(crate) fn new(server: Process, port: u16, connections: usize) -> Result<Self, ProcessError> {
        let page_bytes = Process::current().page_bytes()?;
        let empty = Level::exact(server, port, page_bytes)?;
        let sample_at = Instant::now();
        Ok(Self { server, connections, page_bytes, port, empty, full: empty, peak: empty, sample_at })
    }

    /// To be called when all are connected.
    pub(crate) fn measure_full(&mut self) -> Result<(), ProcessError> {
        self.full = Level::exact(self.server, self.port, self.page_bytes)?;
        self.peak = self.peak.max(self.full);
        Ok(())
    }

    /// Takes a sample once a second, until the server has ended.
    pub(crate) fn sample(&mut self, now: Instant) {
        if now >= self.sample_at {
            self.sample_at = now + SAMPLE_EVERY;
            if let Ok(resident) = self.server.resident_bytes_roughly() {
                self.peak = self.peak.max(Level {
                    resident,
                    descriptors: 0,
                    kernel: kernel_bytes(self.page_bytes),
                    sockets: None,
                });
            }
        }
    }

    /// To be called at the end of the measurement.
    pub(crate) fn report(&self) -> report::Memory {
        let end = Level::exact(self.server, self.port, self.page_bytes).ok();
        let peak = end.map_or(self.peak, |end| self.peak.max(end));
        let per_connection =
            |full: u64, empty: u64| full.saturating_sub(empty) as f64 / self.connections as f64;
        let kernel = || {
            let (empty, full) = (self.empty.kernel?, self.full.kernel?);
            Some(report::KernelMemory {
                empty_bytes: empty,
                full_bytes: full,
                peak_bytes: peak.kernel?,
                end_bytes: end.and_then(|end| end.kernel),
                bytes_per_connection: per_connection(full, empty),
                peak_bytes_per_connection: per_connection(peak.kernel?, empty),
            })
        };
        report::Memory {
            empty_bytes: self.empty.resident,
            full_bytes: self.full.resident,
            bytes_per_connection: per_connection(self.full.resident, self.empty.resident),
            descriptors_per_connection: per_connection(
                self.full.descriptors as u64,
                self.empty.descriptors as u64,
            ),
            peak_bytes: peak.resident,
            end_bytes: end.map(|end| end.resident),
            kernel: kernel(),
            sockets_full_bytes: self.full.sockets,
            sockets_end_bytes: end.and_then(|end| end.sockets),
        }
    }
}

impl Level {
    fn exact(server: Process, port: u16, page_bytes: u64) -> Result<Self, ProcessError> {
        let resident = server.resident_bytes()?;
        Ok(Self {
            resident,
            descriptors: server.descriptors()?,
            kernel: kernel_bytes(page_bytes),
            sockets: socket_memory::memory_bytes(port),
        })
    }

    fn max(self, other: Self) -> Self {
        Self {
            resident: self.resident.max(other.resident),
            descriptors: self.descriptors.max(other.descriptors),
            kernel: self.kernel.max(other.kernel),
            sockets: self.sockets.max(other.sockets),
        }
    }
}

/// Pages of all TCP sockets, in bytes.
fn kernel_bytes(page_bytes: u64) -> Option<u64> {
    Some(page_bytes * tcp_pages(&fs::read_to_string("/proc/net/sockstat").ok()?)?)
}

fn tcp_pages(sockstat: &str) -> Option<u64> {
    let line = sockstat.lines().find_map(|line| line.strip_prefix("TCP:"))?;
    let mut fields = line.split_whitespace().skip_while(|&field| field != "mem");
    fields.nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pages_of_tcp_are_counted() {
        let text = "sockets: used 28\nTCP: inuse 6 orphan 0 tw 62 alloc 6 mem 43\nUDP: inuse 0 mem 7\n";
        assert_eq!(tcp_pages(text), Some(43));
        assert_eq!(tcp_pages("UDP: inuse 0 mem 7\n"), None);
    }

    #[test]
    fn this_machine_reports_both() {
        assert!(kernel_bytes(Process::current().page_bytes().unwrap()).is_some());
        let (rough, exact) = (
            Process::current().resident_bytes_roughly().unwrap(),
            Process::current().resident_bytes().unwrap(),
        );
        assert!(rough.abs_diff(exact) < exact, "{rough} {exact}");
    }
}
