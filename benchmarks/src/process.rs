//! The CPU time, resident memory and open files of a process, read from /proc.
//!
//! Also the time spent waiting for a CPU: it shows whether a server was slow or was kept from running by other
//! programs. schedstat counts nanoseconds, where /proc/PID/stat counts ticks of 10 ms. The time of a thread is lost when
//! the thread ends, so servers must keep their threads. Kernel memory such as socket buffers is not in the resident
//! size. Does not know what the process does.

use std::{
    fs, io,
    path::PathBuf,
    time::{Duration, Instant},
};

/// Why the figures of a process could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} does not contain {what}")]
    Format { path: PathBuf, what: &'static str },
}

/// Times as the scheduler counts them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuTime {
    /// On a CPU.
    pub(crate) running: Duration,
    /// Ready to run, but without a CPU.
    pub(crate) waiting: Duration,
}

impl CpuTime {
    pub(crate) fn and(self, other: Self) -> Self {
        Self { running: self.running + other.running, waiting: self.waiting + other.waiting }
    }

    /// The difference to `earlier`; 0 where the time of an ended thread is missing.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            running: self.running.saturating_sub(earlier.running),
            waiting: self.waiting.saturating_sub(earlier.waiting),
        }
    }
}

/// A process that is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Process {
    pid: u32,
}

impl Process {
    pub(crate) fn new(pid: u32) -> Self {
        Self { pid }
    }

    pub(crate) fn current() -> Self {
        Self::new(std::process::id())
    }

    /// The sum over all threads that have not ended.
    pub(crate) fn cpu_time(self) -> Result<CpuTime, ProcessError> {
        let tasks = PathBuf::from(format!("/proc/{}/task", self.pid));
        let listing =
            fs::read_dir(&tasks).map_err(|source| ProcessError::Read { path: tasks.clone(), source })?;
        let (mut running, mut waiting) = (0, 0);
        for task in listing.flatten() {
            let path = task.path().join("schedstat");
            // A thread may end between the listing and the reading.
            let Ok(text) = fs::read_to_string(&path) else { continue };
            let mut fields = text.split_whitespace().map(str::parse::<u64>);
            let (Some(Ok(ran)), Some(Ok(waited))) = (fields.next(), fields.next()) else {
                return Err(ProcessError::Format { path, what: "nanoseconds on and off a cpu" });
            };
            running += ran;
            waiting += waited;
        }
        Ok(CpuTime { running: Duration::from_nanos(running), waiting: Duration::from_nanos(waiting) })
    }

    /// Waits until no thread runs or is ready to, but at most `within`. Only then are the times exact: those of a running
    /// thread are updated at the scheduler's ticks only.
    pub(crate) fn await_sleep(self, within: Duration) {
        let end = Instant::now() + within;
        while self.is_running() && Instant::now() < end {
            std::thread::yield_now();
        }
    }

    fn is_running(self) -> bool {
        let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", self.pid)) else { return false };
        tasks.flatten().any(|task| {
            // The state follows the name, which is in parentheses and may contain some itself.
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('R'))
        })
    }

    /// The exact resident set, in bytes. The kernel walks all of the process's pages: not while something is measured.
    pub(crate) fn resident_bytes(self) -> Result<u64, ProcessError> {
        Ok(1024 * self.field("smaps_rollup", "Rss:", "kB", "Rss in kB")?)
    }

    /// The resident set, in bytes, from counters that may be wrong by some pages for each thread; cheap.
    pub(crate) fn resident_bytes_roughly(self) -> Result<u64, ProcessError> {
        Ok(1024 * self.field("status", "VmRSS:", "kB", "VmRSS in kB")?)
    }

    /// How many files and sockets it has open.
    pub(crate) fn descriptors(self) -> Result<usize, ProcessError> {
        let path = PathBuf::from(format!("/proc/{}/fd", self.pid));
        match fs::read_dir(&path) {
            Ok(listing) => Ok(listing.count()),
            Err(source) => Err(ProcessError::Read { path, source }),
        }
    }

    /// The size of a page of memory, in bytes.
    pub(crate) fn page_bytes(self) -> Result<u64, ProcessError> {
        Ok(1024 * self.field("smaps", "KernelPageSize:", "kB", "KernelPageSize in kB")?)
    }

    /// The number between `name` and `unit` in one of the process's files.
    fn field(self, file: &str, name: &str, unit: &str, what: &'static str) -> Result<u64, ProcessError> {
        let path = PathBuf::from(format!("/proc/{}/{file}", self.pid));
        let text =
            fs::read_to_string(&path).map_err(|source| ProcessError::Read { path: path.clone(), source })?;
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|rest| rest.trim().strip_suffix(unit))
            .and_then(|number| number.trim().parse().ok())
            .ok_or(ProcessError::Format { path, what })
    }
}
