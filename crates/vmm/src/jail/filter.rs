//! A thread's filter, made of [`super::calls`].

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::calls::{Call, Thread};
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

    fn compile(calls: impl Iterator<Item = &'static Call>) -> Result<Self, BackendError> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for call in calls {
            rules
                .entry(call.number)
                .or_default()
                .extend(self::rules(call)?);
        }
        let arch = TargetArch::try_from(std::env::consts::ARCH)?;
        let kill = SeccompAction::KillProcess;
        SeccompFilter::new(rules, kill, SeccompAction::Allow, arch)
            .and_then(TryInto::try_into)
            .map(Self)
    }

    /// Installs it on the calling thread, for good.
    pub(crate) fn install(&self) -> Result<(), String> {
        seccompiler::apply_filter(&self.0).map_err(|e| format!("install a filter: {e}"))
    }
}

/// One for each value of its argument; none admits all.
fn rules(call: &Call) -> Result<Vec<SeccompRule>, BackendError> {
    let Some(only) = &call.only else {
        return Ok(Vec::new());
    };
    let equal = |value: u32| {
        SeccompCondition::new(
            only.argument,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::Eq,
            u64::from(value),
        )
        .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    only.values.iter().map(|(_, value)| equal(*value)).collect()
}

#[cfg(test)]
mod tests;
