//! The results directory: where the figures of a run are put.
//!
//! Knows names and text. Does not know what they say.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Serialize;

/// Why results are not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResultsError {
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("the results do not become JSON")]
    Json(#[from] serde_json::Error),
}

/// A directory that exists.
#[derive(Debug)]
pub(crate) struct Results {
    directory: PathBuf,
}

impl Results {
    /// Opens `chosen`, or the one beside the sources; a brief run has a place of its own there, since its numbers mean
    /// nothing and must not replace any that do.
    pub(crate) fn open(chosen: Option<&Path>, brief: bool) -> Result<Self, ResultsError> {
        let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
        let directory = match chosen {
            Some(chosen) => chosen.to_owned(),
            None if brief => beside.join("brief"),
            None => beside,
        };
        fs::create_dir_all(&directory)
            .map_err(|source| ResultsError::Write { path: directory.clone(), source })?;
        Ok(Self { directory })
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> Result<(), ResultsError> {
        let path = self.directory.join(name);
        fs::write(&path, text).map_err(|source| ResultsError::Write { path, source })
    }

    pub(crate) fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), ResultsError> {
        self.write(name, &(serde_json::to_string_pretty(value)? + "\n"))
    }
}
