//! Processes that are kept running, and end with this one.
//!
//! A process is killed with its parent, however that ends, if there is `setpriv`: a program that is killed has no
//! opportunity to end its children. Each is in a process group of its own, so that Ctrl-C in a terminal reaches only
//! the parent, which ends them in order. Does not know what they are.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// After this time a process that has ended is started again.
pub(crate) const RESTART_AFTER: Duration = Duration::from_secs(1);
/// The time from SIGINT to SIGKILL.
const END_WITHIN: Duration = Duration::from_secs(8);

/// True when the processes must end.
pub(crate) type Ending = watch::Receiver<bool>;

/// Tasks that each keep one process running. Fails with the first that cannot.
#[derive(Default)]
pub(crate) struct Processes {
    ending: watch::Sender<bool>,
    tasks: JoinSet<Result<(), String>>,
}

impl Processes {
    pub(crate) fn spawn<F: Future<Output = Result<(), String>> + Send + 'static>(
        &mut self,
        keep_running: impl FnOnce(Ending) -> F,
    ) {
        self.tasks.spawn(keep_running(self.ending.subscribe()));
    }

    /// Waits until one of them cannot be kept running; says why.
    pub(crate) async fn failed(&mut self) -> String {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(error))) => return error,
                Some(Err(error)) => return error.to_string(),
                None => std::future::pending().await,
            }
        }
    }

    /// Ends all of them.
    pub(crate) async fn end(mut self) {
        self.ending.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Starts a program that is killed with this process.
pub(crate) fn start(
    program: &Path,
    arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    stdout: Stdio,
    stderr: Stdio,
) -> Result<Child, String> {
    let mut command = match find("setpriv") {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "KILL", "--"]).arg(program);
            command
        }
        None => Command::new(program),
    };
    command.env("NO_COLOR", "1"); // their output goes into a file or through this process
    command.args(arguments).stdin(Stdio::null()).stdout(stdout).stderr(stderr);
    let child = command.kill_on_drop(true).process_group(0).spawn();
    child.map_err(|error| format!("{} cannot be started: {error}", program.display()))
}

/// Ends it by SIGINT, or by SIGKILL if that is not enough.
pub(crate) async fn end(child: &mut Child) {
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
        let _ = kill_process(pid, Signal::INT); // fails if it has ended
    }
    if tokio::time::timeout(END_WITHIN, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}

/// Where a program is. Debian's servers are in folders that are not on the `PATH` of every user.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}
