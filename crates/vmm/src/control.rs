//! The supervisor's requests, one after the other, and the guest's end.

use std::os::fd::{AsFd, OwnedFd};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use vmm_sys_util::eventfd::EventFd;
use walnut_vmm_api::{Channel, End, Event, Message, Received, Reply, Request};

use crate::{Error, machine::Machine};

/// Serves until the guest has ended or the supervisor is gone.
pub(crate) fn serve(control: Channel) -> Result<(), Error> {
    let mut machine = None;
    let result = converse(&control, &mut machine);
    // The process ends now. To take a machine apart takes system calls that a
    // jailed process need not have.
    std::mem::forget(machine);
    result
}

fn converse(control: &Channel, machine: &mut Option<Machine>) -> Result<(), Error> {
    let ended = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)
        .map_err(|e| Error::Host("make an eventfd", crate::vcpu::errno(&e)))?;
    loop {
        if wait(control, &ended)? {
            let end = machine.as_ref().map_or(End::Stopped, Machine::wind_up);
            // Fails if the supervisor is gone: then nobody asks.
            let _ = control.send(&Message::Event(Event::Ended(end)), &[]);
            return Ok(());
        }
        let Some(Received { message, fds }) = control.receive::<Request>()? else {
            return Ok(());
        };
        let stop = message == Request::Stop;
        let reply = answer(machine, message, fds, &ended);
        control.send(&Message::Reply(reply.map_err(|e| e.to_string())), &[])?;
        if stop {
            return Ok(());
        }
    }
}

/// Waits for either; true when the guest has ended.
fn wait(control: &Channel, ended: &EventFd) -> Result<bool, Error> {
    loop {
        // SAFETY: the eventfd outlives the borrow.
        let ended =
            unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(ended)) };
        let mut fds = [
            PollFd::new(ended, PollFlags::POLLIN),
            PollFd::new(control.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Err(e) => return Err(Error::Host("wait for a request", e)),
            Ok(_) => return Ok(fds[0].any() == Some(true)),
        }
    }
}

fn answer(
    machine: &mut Option<Machine>,
    request: Request,
    fds: Vec<OwnedFd>,
    ended: &EventFd,
) -> Result<Reply, Error> {
    match (request, &machine) {
        (Request::Start(config), None) => {
            let ended = ended
                .try_clone()
                .map_err(|e| Error::Host("copy an eventfd", crate::vcpu::errno(&e)))?;
            let built = Machine::build(&config, fds, ended)?;
            built.resume();
            *machine = Some(built);
            Ok(Reply::Done)
        }
        (Request::Restore(_), None) => Err(Error::Config("not there yet".into())),
        (Request::Start(_) | Request::Restore(_), Some(_)) => {
            Err(Error::Config("the machine has been started".into()))
        }
        (Request::Stop, None) => Ok(Reply::Done),
        (_, None) => Err(Error::Config("no machine has been started".into())),
        (Request::Pause, Some(machine)) => machine.pause().map(|()| Reply::Done),
        (Request::Resume, Some(machine)) => {
            machine.resume();
            Ok(Reply::Done)
        }
        (Request::Resize { memory }, Some(machine)) => machine.resize(memory).map(|()| Reply::Done),
        (Request::Stats, Some(machine)) => Ok(Reply::Stats(machine.stats())),
        (Request::Attach(_) | Request::Detach { .. } | Request::Snapshot { .. }, Some(_)) => {
            Err(Error::Config("not there yet".into()))
        }
        (Request::Stop, Some(machine)) => {
            machine.wind_up();
            Ok(Reply::Done)
        }
    }
}
