//! Where and with what something was measured: a number without this is worth nothing.
//!
//! What cannot be found out is left out. Knows the system's files and three programs; measures nothing.

use std::{env, ffi::OsStr, fmt, fs, process::Command};

use serde::Serialize;

use crate::trial::Contender;

/// The machine, the tools, and the code.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    /// Universal time.
    date: Option<String>,
    cpu: Option<String>,
    cores: usize,
    kernel: Option<String>,
    rustc: Option<String>,
    commit: Option<String>,
    /// Whether there were changes that are in no commit.
    dirty: Option<bool>,
    /// The crate behind each server, and its version.
    versions: Vec<(Contender, String)>,
}

impl Machine {
    /// Looks around, and at the versions of `contenders`.
    pub(crate) fn look(contenders: &[Contender]) -> Self {
        let version = |&contender: &Contender| {
            let (name, version) = contender.subject()?;
            Some((contender, format!("{name} {version}")))
        };
        Self {
            date: said("date", ["-u", "+%Y-%m-%d %H:%M"]),
            cpu: fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| model(&text)),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: said("uname", ["-sr"]),
            rustc: said(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()), ["--version"]),
            commit: said("git", ["rev-parse", "--short=12", "HEAD"]),
            dirty: said("git", ["status", "--porcelain"]).map(|changes| !changes.is_empty()),
            versions: contenders.iter().filter_map(version).collect(),
        }
    }

    /// One line for the foot of a chart.
    pub(crate) fn brief(&self) -> String {
        let commit = self.commit_in_words();
        let parts = [&self.cpu, &self.kernel, &commit, &self.date];
        parts.into_iter().flatten().map(String::as_str).collect::<Vec<_>>().join(" · ")
    }

    fn commit_in_words(&self) -> Option<String> {
        let dirty = if self.dirty == Some(true) { " with uncommitted changes" } else { "" };
        self.commit.as_ref().map(|commit| format!("commit {commit}{dirty}"))
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cores = self.cores;
        let cpu = self.cpu.as_ref().map(|cpu| format!("{cpu}, {cores} cores for this process"));
        let date = self.date.as_ref().map(|date| format!("{date} UTC"));
        for line in [&cpu, &self.kernel, &self.rustc, &self.commit_in_words(), &date].into_iter().flatten() {
            writeln!(f, "- {line}")?;
        }
        for (contender, version) in &self.versions {
            writeln!(f, "- {contender}: {version}")?;
        }
        Ok(())
    }
}

/// What a program says, in the directory of the sources.
fn said<const N: usize>(program: impl AsRef<OsStr>, arguments: [&str; N]) -> Option<String> {
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
    fn the_model_is_the_name_behind_the_colon() {
        assert_eq!(
            model("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n").as_deref(),
            Some("Some CPU @ 2 GHz")
        );
        assert_eq!(model("processor\t: 0\n"), None);
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let nothing = Machine {
            date: None,
            cpu: None,
            cores: 2,
            kernel: None,
            rustc: None,
            commit: Some("abc".to_owned()),
            dirty: Some(true),
            versions: vec![(Contender::Tutorial, "axum 1".to_owned())],
        };
        assert_eq!(nothing.to_string(), "- commit abc with uncommitted changes\n- tutorial: axum 1\n");
        assert_eq!(nothing.brief(), "commit abc with uncommitted changes");
    }
}
