//! What a process has cost so far: time on a CPU and resident memory, read from /proc.
//!
//! Beside the time on a CPU stands the time spent waiting for one: on a machine that others use, it tells whether a
//! server was slow or was kept from running.
//! schedstat counts nanoseconds where /proc/PID/stat counts ticks of 10 ms. A thread that has ended takes its time
//! with it, so servers are expected to keep their threads. Kernel memory (socket buffers) is not in the resident
//! size. Knows nothing of what the process does.

use std::{
    fs, io,
    path::PathBuf,
    time::{Duration, Instant},
};

/// Why the books of a process could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} does not say {what}")]
    Format { path: PathBuf, what: &'static str },
}

/// Time in the scheduler's books.
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

    /// What was added since `earlier`; nothing where a thread that ended took its time away.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            running: self.running.saturating_sub(earlier.running),
            waiting: self.waiting.saturating_sub(earlier.waiting),
        }
    }
}

/// A process whose cost is measured.
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

    /// What all living threads have used and waited for.
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

    /// Waits until no thread runs or wants to, but at most `within`. Only then are the times exact: those of a thread that
    /// runs on another core stand still between the scheduler's ticks.
    pub(crate) fn await_sleep(self, within: Duration) {
        let end = Instant::now() + within;
        while self.is_running() && Instant::now() < end {
            std::thread::yield_now();
        }
    }

    fn is_running(self) -> bool {
        let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", self.pid)) else { return false };
        tasks.flatten().any(|task| {
            // The state follows the name, which stands in parentheses and may contain any.
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('R'))
        })
    }

    /// The resident set, in bytes, to the page. Walks all of the process's pages: not for a measured moment.
    pub(crate) fn resident_bytes(self) -> Result<u64, ProcessError> {
        Ok(1024 * self.field("smaps_rollup", "Rss:", "kB", "Rss in kB")?)
    }

    /// The resident set, in bytes, from counters that lag by some pages for each thread, at hardly any cost.
    pub(crate) fn resident_bytes_roughly(self) -> Result<u64, ProcessError> {
        Ok(1024 * self.field("status", "VmRSS:", "kB", "VmRSS in kB")?)
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
