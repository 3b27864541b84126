//! The supervisor's requests, one after the other, and the guest's end.

use std::os::fd::OwnedFd;

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};
use vmm_sys_util::eventfd::EventFd;
use walnut_vmm_api::{Channel, End, Event, Message, Received, Reply, Request};

use crate::{
    Error,
    machine::{Fds, Machine},
};

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
    let waiter = Waiter::new(control, &ended)?;
    loop {
        if waiter.wait()? {
            let end = machine.as_ref().map_or(End::Stopped, Machine::wind_up);
            // Fails if the supervisor is gone: then nobody asks.
            let _ = control.tell(&Message::Event(Event::Ended(end)));
            return Ok(());
        }
        let Some(Received { message, fds }) = control.receive::<Request>()? else {
            return Ok(());
        };
        let stop = message == Request::Stop;
        let reply = answer(machine, message, fds, &ended);
        control.tell(&Message::Reply(reply.map_err(|e| e.to_string())))?;
        if stop {
            return Ok(());
        }
    }
}

/// Waits for a request and for the guest's end.
///
/// By epoll, because poll is gone on with by another call after the process was
/// stopped (restart_syscall), and because `ended` is never read.
struct Waiter(Epoll);

const ENDED: u64 = 0;
const REQUEST: u64 = 1;

impl Waiter {
    fn new(control: &Channel, ended: &EventFd) -> Result<Self, Error> {
        let fail = |e| Error::Host("watch the control socket", e);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(fail)?;
        // SAFETY: the eventfd outlives the borrow.
        let ended =
            unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(ended)) };
        let input = EpollFlags::EPOLLIN;
        epoll
            .add(ended, EpollEvent::new(input, ENDED))
            .and_then(|()| epoll.add(control, EpollEvent::new(input, REQUEST)))
            .map_err(fail)?;
        Ok(Self(epoll))
    }

    /// Waits for either; true when the guest has ended.
    fn wait(&self) -> Result<bool, Error> {
        let mut events = [EpollEvent::empty(); 2];
        loop {
            match self.0.wait(&mut events, EpollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                Err(e) => return Err(Error::Host("wait for a request", e)),
                Ok(n) => return Ok(events.iter().take(n).any(|event| event.data() == ENDED)),
            }
        }
    }
}

fn answer(
    machine: &mut Option<Machine>,
    request: Request,
    fds: Vec<OwnedFd>,
    ended: &EventFd,
) -> Result<Reply, Error> {
    let copy = || {
        ended
            .try_clone()
            .map_err(|e| Error::Host("copy an eventfd", crate::vcpu::errno(&e)))
    };
    match (request, &machine) {
        (Request::Start(config), None) => {
            let built = Machine::build(&config, fds, copy()?)?;
            built.resume();
            *machine = Some(built);
            Ok(Reply::Done)
        }
        (Request::Restore(restore), None) => {
            *machine = Some(Machine::restore(&restore, fds, copy()?)?);
            Ok(Reply::Done)
        }
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
        (Request::Snapshot { state, memory }, Some(machine)) => {
            let mut fds = Fds::new(fds);
            let (state, memory) = (fds.take(state)?, fds.take(memory)?);
            machine.save(state, memory).map(|()| Reply::Done)
        }
        (Request::Attach(_) | Request::Detach { .. } | Request::Resize { .. }, Some(_)) => {
            Err(Error::Config("not there yet".into()))
        }
        (Request::Stop, Some(machine)) => {
            machine.wind_up();
            Ok(Reply::Done)
        }
    }
}
