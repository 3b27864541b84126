//! A thread's filter, made of [`super::calls`].

use seccompiler::BpfProgram;

use super::{
    calls::{Call, Thread},
    program::{self, ProgramError},
};
use crate::Error;

/// A thread's filter, compiled.
#[derive(Debug, Clone)]
pub(crate) struct Filter(BpfProgram);

impl Filter {
    /// Admits what a kind of thread calls. Whatever else is called kills the process,
    /// and the kernel's audit log has it.
    pub(crate) fn of(thread: &Thread) -> Result<Self, Error> {
        Self::compile(thread.calls()).map_err(|e| {
            Error::Config(format!(
                "make the filter of the {} thread: {e}",
                thread.name
            ))
        })
    }

    fn compile(calls: impl Iterator<Item = &'static Call>) -> Result<Self, ProgramError> {
        program::compile(calls).map(Self)
    }

    /// Installs it on the calling thread, for good.
    pub(crate) fn install(&self) -> Result<(), String> {
        seccompiler::apply_filter(&self.0).map_err(|e| format!("install a filter: {e}"))
    }
}

#[cfg(test)]
mod tests;
