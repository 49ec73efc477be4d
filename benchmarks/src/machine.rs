//! The machine, the tools and the versions of a measurement, without which its numbers mean nothing.
//!
//! What cannot be determined is left out. Reads files of the system and runs `date`, `uname`, `rustc` and `git`.

use std::{env, ffi::OsStr, fmt, fs, process::Command};

use serde::Serialize;

use crate::trial::Subject;

/// The machine, the tools, and the code.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    /// UTC.
    date: Option<String>,
    cpu: Option<String>,
    cores: usize,
    kernel: Option<String>,
    rustc: Option<String>,
    commit: Option<String>,
    /// Whether there were uncommitted changes.
    dirty: Option<bool>,
    /// The crate behind each server, and its version.
    versions: Vec<(Subject, String)>,
}

impl Machine {
    pub(crate) fn inspect(subjects: &[Subject]) -> Self {
        let version = |&subject: &Subject| {
            let (name, version) = subject.crate_version()?;
            Some((subject, format!("{name} {version}")))
        };
        Self {
            date: command_output("date", ["-u", "+%Y-%m-%d %H:%M"]),
            cpu: fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| model(&text)),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: command_output("uname", ["-sr"]),
            rustc: command_output(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()), ["--version"]),
            commit: command_output("git", ["rev-parse", "--short=12", "HEAD"]),
            dirty: command_output("git", ["status", "--porcelain"]).map(|changes| !changes.is_empty()),
            versions: subjects.iter().filter_map(version).collect(),
        }
    }

    fn commit_line(&self) -> Option<String> {
        let dirty = if self.dirty == Some(true) { " with uncommitted changes" } else { "" };
        self.commit.as_ref().map(|commit| format!("commit {commit}{dirty}"))
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cores = self.cores;
        let cpu = self.cpu.as_ref().map(|cpu| format!("{cpu}, {cores} cores for this process"));
        let date = self.date.as_ref().map(|date| format!("{date} UTC"));
        for line in [&cpu, &self.kernel, &self.rustc, &self.commit_line(), &date].into_iter().flatten() {
            writeln!(f, "- {line}")?;
        }
        for (subject, version) in &self.versions {
            writeln!(f, "- {subject}: {version}")?;
        }
        Ok(())
    }
}

/// What a program prints, run in the directory of the sources; `None` when it fails.
fn command_output<const N: usize>(program: impl AsRef<OsStr>, arguments: [&str; N]) -> Option<String> {
    let output =
        Command::new(program).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

fn model(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_the_text_after_the_colon() {
        assert_eq!(
            model("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n").as_deref(),
            Some("Some CPU @ 2 GHz")
        );
        assert_eq!(model("processor\t: 0\n"), None);
    }

    #[test]
    fn what_is_unknown_is_left_out() {
        let machine = Machine {
            date: None,
            cpu: None,
            cores: 2,
            kernel: None,
            rustc: None,
            commit: Some("abc".to_owned()),
            dirty: Some(true),
            versions: vec![(Subject::Tutorial, "axum 1".to_owned())],
        };
        assert_eq!(machine.to_string(), "- commit abc with uncommitted changes\n- tutorial: axum 1\n");
    }
}
