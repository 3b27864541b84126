//! Errors as the Task API has them.

use ttrpc::{Code, get_status};
use walnut_sandbox::Error;

/// An error with the code containerd's clients expect.
pub(crate) fn fault(error: &Error) -> ttrpc::Error {
    let code = match error {
        Error::NotFound(_) => Code::NOT_FOUND,
        Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
        Error::WrongState(_) => Code::FAILED_PRECONDITION,
        Error::Invalid(_) | Error::Storage(_) => Code::INVALID_ARGUMENT,
        // As runc's shim, so that clients see the program's name in the text.
        Error::ProgramNotFound(_) => Code::OUT_OF_RANGE,
        Error::ProgramDenied(_) => Code::PERMISSION_DENIED,
        Error::Machine(_) => Code::ABORTED,
        _ => Code::UNKNOWN,
    };
    ttrpc::Error::RpcStatus(get_status(code, error.to_string()))
}
