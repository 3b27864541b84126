//! From an error to one sentence and an exit code.

use walnut_sandbox::Error;

/// Walnut itself failed.
const EXIT_WALNUT: u8 = 125;
/// The command exists and cannot be executed.
const EXIT_DENIED: u8 = 126;
/// The command does not exist.
const EXIT_NOT_FOUND: u8 = 127;

/// What the user sees.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fail {
    pub(crate) message: String,
    pub(crate) code: u8,
}

/// The sentence and the code of an error.
pub(crate) fn classify(error: &anyhow::Error) -> Fail {
    let code = error
        .chain()
        .find_map(|e| match e.downcast_ref::<Error>() {
            Some(Error::ProgramNotFound(_)) => Some(EXIT_NOT_FOUND),
            Some(Error::ProgramDenied(_)) => Some(EXIT_DENIED),
            _ => None,
        })
        .unwrap_or(EXIT_WALNUT);
    Fail {
        message: format!("{error:#}"),
        code,
    }
}
