//! The helper's one error: a status for the host and a sentence for people.

use std::error::Error;
use std::fmt::Display;

use walnut_agent::wire::Status;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub(crate) struct Failure {
    /// What the host is told.
    pub(crate) status: Status,
    /// What was attempted, on what, and why it did not work.
    pub(crate) text: String,
}

impl Failure {
    /// A bad spec or request.
    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self {
            status: Status::Invalid,
            text: text.into(),
        }
    }

    /// The state does not allow it.
    pub(crate) fn precondition(text: impl Into<String>) -> Self {
        Self {
            status: Status::Precondition,
            text: text.into(),
        }
    }

    /// `what` failed for the system's reason.
    pub(crate) fn internal(what: impl Display, why: impl Display) -> Self {
        Self {
            status: Status::Internal,
            text: format!("{what}: {why}"),
        }
    }
}

/// An error with its sources, outermost first, repeated words left out.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = source.source();
    }
    text
}
