//! What the container's first process would hear, and this process hears in its place.

use std::{
    fs::File,
    os::fd::AsRawFd,
    sync::{Arc, Weak},
};

use tokio::signal::unix::{SignalKind, signal};
use tracing::{debug, warn};
use walnut_sandbox::Sandbox;

/// Signals that are passed on. The rest end this process, or are nobody's business.
const PASSED: [SignalKind; 6] = [
    SignalKind::hangup(),
    SignalKind::interrupt(),
    SignalKind::quit(),
    SignalKind::terminate(),
    SignalKind::user_defined1(),
    SignalKind::user_defined2(),
];

/// Passes signals on for as long as the sandbox lives; real-time ones too, for init systems
/// are halted by them.
pub(super) fn forward(sandbox: &Arc<Sandbox>, id: &str) {
    let real_time = (libc::SIGRTMIN()..=libc::SIGRTMAX()).map(SignalKind::from_raw);
    for kind in PASSED.into_iter().chain(real_time) {
        let mut stream = match signal(kind) {
            Ok(stream) => stream,
            Err(e) => {
                warn!("wait for signals: {e}");
                continue;
            }
        };
        let number = kind.as_raw_value().unsigned_abs();
        let (sandbox, id) = (Arc::downgrade(sandbox), id.to_owned());
        tokio::spawn(async move {
            while let (Some(()), Some(sandbox)) = (stream.recv().await, sandbox.upgrade()) {
                // It may have ended this moment.
                if let Err(e) = sandbox.kill(&id, "", number, false).await {
                    debug!("pass signal {number} on: {e}");
                }
            }
        });
    }
}

/// Gives the process's terminal the size of the one outside, now and whenever that
/// changes: it is this process's controlling terminal.
pub(super) fn follow_window(sandbox: &Arc<Sandbox>, id: &str, terminal: &File) {
    let (mut changes, terminal) = match (signal(SignalKind::window_change()), terminal.try_clone())
    {
        (Ok(changes), Ok(terminal)) => (changes, terminal),
        (Err(e), _) | (_, Err(e)) => return warn!("follow the terminal's size: {e}"),
    };
    let (sandbox, id) = (Arc::downgrade(sandbox), id.to_owned());
    tokio::spawn(async move {
        resize(&sandbox, &id, &terminal).await;
        while changes.recv().await.is_some() {
            resize(&sandbox, &id, &terminal).await;
        }
    });
}

async fn resize(sandbox: &Weak<Sandbox>, id: &str, terminal: &File) {
    let (Some(sandbox), Some((columns, rows))) = (sandbox.upgrade(), size(terminal)) else {
        return;
    };
    if let Err(e) = sandbox.resize(id, "", columns, rows).await {
        debug!("resize the terminal: {e}");
    }
}

/// Columns and rows, if somebody has said.
fn size(terminal: &File) -> Option<(u32, u32)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one winsize to the pointer, which is valid.
    let got = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &mut size) };
    (got == 0 && size.ws_col > 0 && size.ws_row > 0)
        .then(|| (size.ws_col.into(), size.ws_row.into()))
}
