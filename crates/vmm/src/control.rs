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
    let bells = Bells {
        ended: bell()?,
        gone: bell()?,
    };
    loop {
        match wait(control, &bells, machine.as_ref())? {
            News::Ended => {
                let end = machine.as_ref().map_or(End::Stopped, Machine::wind_up);
                // Fails if the supervisor is gone: then nobody asks.
                let _ = control.send(&Message::Event(Event::Ended(end)), &[]);
                return Ok(());
            }
            News::Gone => {
                let _ = bells.gone.read();
                for name in machine.as_ref().map_or_else(Vec::new, Machine::gone) {
                    control.send(&Message::Event(Event::Detached { name }), &[])?;
                }
            }
            News::Acknowledged => {
                if let Some(machine) = machine {
                    machine.slots().look_again();
                }
            }
            News::Request => {
                let Some(Received { message, fds }) = control.receive::<Request>()? else {
                    return Ok(());
                };
                let stop = message == Request::Stop;
                let reply = answer(machine, message, fds, &bells);
                control.send(&Message::Reply(reply.map_err(|e| e.to_string())), &[])?;
                if stop {
                    return Ok(());
                }
            }
        }
    }
}

/// What other threads ring.
#[derive(Debug)]
struct Bells {
    /// The guest has ended.
    ended: EventFd,
    /// A device is gone.
    gone: EventFd,
}

fn bell() -> Result<EventFd, Error> {
    EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)
        .map_err(|e| Error::Host("make an eventfd", crate::vcpu::errno(&e)))
}

fn copy(bell: &EventFd) -> Result<EventFd, Error> {
    bell.try_clone()
        .map_err(|e| Error::Host("copy an eventfd", crate::vcpu::errno(&e)))
}

/// What there is to see to, the most important first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum News {
    Ended,
    Gone,
    /// The guest has acknowledged news of its slots.
    Acknowledged,
    Request,
}

/// Waits for something to see to.
fn wait(control: &Channel, bells: &Bells, machine: Option<&Machine>) -> Result<News, Error> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the eventfds outlive the borrows.
    let borrow = |bell: &EventFd| unsafe { BorrowedFd::borrow_raw(bell.as_raw_fd()) };
    let mut bells = vec![
        (borrow(&bells.ended), News::Ended),
        (borrow(&bells.gone), News::Gone),
        (control.as_fd(), News::Request),
    ];
    if let Some(machine) = machine {
        let acknowledged = borrow(machine.slots().acknowledged());
        bells.push((acknowledged, News::Acknowledged));
    }
    let mut fds: Vec<_> = bells
        .iter()
        .map(|(fd, _)| PollFd::new(*fd, PollFlags::POLLIN))
        .collect();
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Err(e) => return Err(Error::Host("wait for a request", e)),
            Ok(_) => {
                let mut rung = fds
                    .iter()
                    .zip(&bells)
                    .filter(|(fd, _)| fd.any() == Some(true));
                // A request that is none says what is wrong by itself.
                return Ok(rung.next().map_or(News::Request, |(_, (_, news))| *news));
            }
        }
    }
}

fn answer(
    machine: &mut Option<Machine>,
    request: Request,
    fds: Vec<OwnedFd>,
    bells: &Bells,
) -> Result<Reply, Error> {
    match (request, &machine) {
        (Request::Start(config), None) => {
            let (ended, gone) = (copy(&bells.ended)?, copy(&bells.gone)?);
            let built = Machine::build(&config, fds, ended, gone)?;
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
        (Request::Stats, Some(machine)) => Ok(Reply::Stats(machine.stats())),
        (Request::Attach(attachment), Some(machine)) => {
            machine.attach(*attachment, fds).map(|()| Reply::Done)
        }
        (Request::Detach { name }, Some(machine)) => machine.detach(&name).map(|()| Reply::Done),
        (Request::Resize { .. } | Request::Snapshot { .. }, Some(_)) => {
            Err(Error::Config("not there yet".into()))
        }
        (Request::Stop, Some(machine)) => {
            machine.wind_up();
            Ok(Reply::Done)
        }
    }
}
