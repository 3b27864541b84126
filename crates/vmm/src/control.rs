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
    machine::{Bells, Fds, Machine},
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
    let bells = Bells {
        ended: bell()?,
        gone: bell()?,
        acknowledged: bell()?,
    };
    let waiter = Waiter::new(control, &bells)?;
    loop {
        let news = waiter.wait()?;
        if news.ended {
            let end = machine.as_ref().map_or(End::Stopped, Machine::wind_up);
            // Fails if the supervisor is gone: then nobody asks.
            let _ = control.tell(&Message::Event(Event::Ended(end)));
            return Ok(());
        }
        if news.gone {
            for name in machine.as_ref().map_or_else(Vec::new, Machine::gone) {
                control.tell(&Message::Event(Event::Detached { name }))?;
            }
        }
        if news.acknowledged
            && let Some(machine) = machine
        {
            machine.look_again();
        }
        if !news.request {
            continue;
        }
        let Some(Received { message, fds }) = control.receive::<Request>()? else {
            return Ok(());
        };
        let stop = message == Request::Stop;
        let reply = answer(machine, message, fds, &bells);
        control.tell(&Message::Reply(reply.map_err(|e| e.to_string())))?;
        if stop {
            return Ok(());
        }
    }
}

fn bell() -> Result<EventFd, Error> {
    EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)
        .map_err(|e| Error::Host("make an eventfd", crate::vcpu::errno(&e)))
}

fn copy(bell: &EventFd) -> Result<EventFd, Error> {
    bell.try_clone()
        .map_err(|e| Error::Host("copy an eventfd", crate::vcpu::errno(&e)))
}

/// What there is to see to. Bells are never read.
#[derive(Debug, Clone, Copy, Default)]
struct News {
    ended: bool,
    gone: bool,
    acknowledged: bool,
    request: bool,
}

/// Waits for something to see to.
///
/// By epoll, because poll is gone on with by another call after the process was
/// stopped (restart_syscall), and because an edge-triggered eventfd need not be read.
struct Waiter(Epoll);

const ENDED: u64 = 0;
const REQUEST: u64 = 1;
const GONE: u64 = 2;
const ACKNOWLEDGED: u64 = 3;

impl Waiter {
    fn new(control: &Channel, bells: &Bells) -> Result<Self, Error> {
        use std::os::fd::{AsRawFd, BorrowedFd};
        let fail = |e| Error::Host("watch the control socket", e);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(fail)?;
        // SAFETY: the eventfds outlive the borrows.
        let [ended, gone, acknowledged] = [&bells.ended, &bells.gone, &bells.acknowledged]
            .map(|bell| unsafe { BorrowedFd::borrow_raw(bell.as_raw_fd()) });
        let input = EpollFlags::EPOLLIN;
        let edge = input | EpollFlags::EPOLLET;
        epoll
            .add(ended, EpollEvent::new(input, ENDED))
            .and_then(|()| epoll.add(gone, EpollEvent::new(edge, GONE)))
            .and_then(|()| epoll.add(acknowledged, EpollEvent::new(edge, ACKNOWLEDGED)))
            .and_then(|()| epoll.add(control, EpollEvent::new(input, REQUEST)))
            .map_err(fail)?;
        Ok(Self(epoll))
    }

    fn wait(&self) -> Result<News, Error> {
        let mut events = [EpollEvent::empty(); 4];
        loop {
            match self.0.wait(&mut events, EpollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                Err(e) => return Err(Error::Host("wait for a request", e)),
                Ok(n) => {
                    let came = |token| events.iter().take(n).any(|event| event.data() == token);
                    return Ok(News {
                        ended: came(ENDED),
                        gone: came(GONE),
                        acknowledged: came(ACKNOWLEDGED),
                        request: came(REQUEST),
                    });
                }
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
    let bells = || {
        Ok::<_, Error>(Bells {
            ended: copy(&bells.ended)?,
            gone: copy(&bells.gone)?,
            acknowledged: copy(&bells.acknowledged)?,
        })
    };
    match (request, &machine) {
        (Request::Start(config), None) => {
            let built = Machine::build(&config, fds, bells()?)?;
            built.resume();
            *machine = Some(built);
            Ok(Reply::Done)
        }
        (Request::Restore(restore), None) => {
            let restored = Machine::restore(&restore, fds, bells()?)?;
            if restore.run {
                restored.resume();
            }
            *machine = Some(restored);
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
        (Request::Attach(attachment), Some(machine)) => {
            machine.attach(*attachment, fds).map(|()| Reply::Done)
        }
        (Request::Detach { name }, Some(machine)) => machine.detach(&name).map(|()| Reply::Done),
        (Request::Resize { memory }, Some(machine)) => machine.resize(memory).map(|()| Reply::Done),
        (Request::Stop, Some(machine)) => {
            machine.wind_up();
            Ok(Reply::Done)
        }
    }
}
