//! Asks many management sockets at once: a poll loop on each CPU, one deadline.

use std::os::unix::net::UnixStream;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::commands::Dialogue;
use super::management::{Conversation, SocketError, Stage, connect_to};
use super::turns::{Ticket, Turns, Waker};

/// A full backlog cannot be waited for: the connection is tried again after this long.
const RETRY: Duration = Duration::from_millis(20);

/// Without a greeting for this long, a second connection knocks.
///
/// An OpenVPN server on TCP (up to 2.6; on any protocol in 2.7) that finds a connection in its
/// backlog dead accepts the next one and forgets to watch it, since nothing has changed for
/// `man_persist_state` (`manage.c`): it greets only when yet another connection comes. Callers
/// that gave up on a hanging process leave such dead ones.
const KNOCK_AFTER: Duration = Duration::from_millis(200);

/// How often that is looked at.
const TICK: Duration = Duration::from_millis(100);

/// Bytes read from one socket before the next one has its turn: a usual reply at one go.
const READ_SIZE: usize = 64 * 1024;

/// Fewest sockets that a further thread is started for.
const SHARE: usize = 8;

/// Ready sockets served before the clock is looked at again.
const EVENTS: usize = 64;

/// How a conversation ended.
pub(super) struct Outcome<D> {
    pub(super) socket: PathBuf,
    /// Holds what was found out, complete only if `result` is `Ok`.
    pub(super) dialogue: D,
    pub(super) result: Result<(), SocketError>,
}

/// Threads that calls may start beside their own. All calls share them: they are as many as there are
/// other CPUs, and each takes two descriptors for as long as a process hangs.
pub(super) struct Helpers(AtomicUsize);

/// Helpers of one call, given back when dropped.
struct Loan<'a> {
    helpers: &'a Helpers,
    count: usize,
}

impl Helpers {
    /// For a process that may run on that many CPUs.
    pub(super) fn new(cpus: usize) -> Self {
        Self(AtomicUsize::new(cpus.saturating_sub(1)))
    }

    /// As many as are free, at most `wanted`.
    fn borrow(&self, wanted: usize) -> Loan<'_> {
        let rest = |free: usize| Some(free.saturating_sub(wanted));
        let free = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest).unwrap_or(0);
        Loan { helpers: self, count: free.min(wanted) }
    }
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        self.helpers.0.fetch_add(self.count, Ordering::Relaxed);
    }
}

/// Has the conversation `new()` with each socket, all at once, until `deadline`, with the `helpers`
/// that are free. Outcomes have the order of the sockets. Fails only when the system has no
/// descriptors left to wait with.
pub(super) fn ask<D: Dialogue + Send>(
    turns: &Turns,
    sockets: &[PathBuf],
    new: impl Fn() -> D + Sync,
    deadline: Instant,
    helpers: &Helpers,
) -> Result<Vec<Outcome<D>>, Errno> {
    let loan = helpers.borrow(sockets.len().div_ceil(SHARE).saturating_sub(1));
    let (own, others) = sockets.split_at(sockets.len().div_ceil(1 + loan.count));
    let budget = deadline.saturating_duration_since(Instant::now());
    let converse = |share: &[PathBuf]| converse(turns, share, &new, deadline, budget);
    thread::scope(|scope| {
        let others: Vec<_> = others
            .chunks(own.len().max(1))
            .map(|share| {
                let thread = thread::Builder::new().name("openvpn".to_owned());
                (share, thread.spawn_scoped(scope, move || converse(share)))
            })
            .collect();
        let mut outcomes = converse(own)?;
        for (share, thread) in others {
            match thread.map(ScopedJoinHandle::join) {
                Ok(Ok(more)) => outcomes.extend(more?),
                Ok(Err(panic)) => resume_unwind(panic),
                // Out of threads. After the own share little time may be left.
                Err(_) => outcomes.extend(converse(share)?),
            }
        }
        Ok(outcomes)
    })
}

/// Has the conversations of one thread.
fn converse<D: Dialogue>(
    turns: &Turns,
    sockets: &[PathBuf],
    new: impl Fn() -> D,
    deadline: Instant,
    budget: Duration,
) -> Result<Vec<Outcome<D>>, Errno> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let waker = Arc::new(Waker::new()?);
    epoll.add(&*waker, EpollEvent::new(EpollFlags::EPOLLIN, WAKER))?;
    let mut calls: Vec<Call<'_, D>> = sockets
        .iter()
        .enumerate()
        .map(|(index, socket)| Call {
            phase: Phase::Waiting(turns.queue(socket, &waker, index)),
            conversation: Conversation::new(new()),
            socket: socket.clone(),
        })
        .collect();

    let mut scratch = vec![0; READ_SIZE];
    let mut events = [EpollEvent::empty(); EVENTS];
    let mut open = calls.len();
    let mut blocked: Vec<usize> = Vec::new();
    let mut retry_at = Instant::now();
    let mut tick_at = retry_at + TICK;
    loop {
        let mut due = waker.take();
        let now = Instant::now();
        if now >= deadline {
            break;
        }
        if now >= retry_at {
            due.append(&mut blocked);
            retry_at = now + RETRY;
        }
        if now >= tick_at {
            open -= calls.iter_mut().map(|call| usize::from(call.tick(now))).sum::<usize>();
            tick_at = now + TICK;
        }
        for index in due {
            let Some(call) = calls.get_mut(index) else {
                continue;
            };
            match call.connect(&epoll, index) {
                Ok(true) => {}
                Ok(false) => blocked.push(index),
                Err(error) => {
                    call.phase = Phase::Over(Err(error));
                    open -= 1;
                }
            }
        }
        if open == 0 {
            break;
        }
        let until = deadline.min(tick_at);
        let until = if blocked.is_empty() { until } else { until.min(retry_at) };
        let ready = match epoll.wait(&mut events, timeout(until)) {
            Ok(count) => events.get(..count).unwrap_or_default(),
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error),
        };
        for event in ready {
            let call = usize::try_from(event.data()).ok().and_then(|index| calls.get_mut(index));
            if call.is_some_and(|call| call.serve(&epoll, event.data(), &mut scratch)) {
                open -= 1;
            }
        }
    }
    Ok(calls.into_iter().map(|call| call.outcome(budget)).collect())
}

/// The event of the waker; those of the sockets are their indices.
const WAKER: u64 = u64::MAX;

/// One socket's part of the loop.
struct Call<'a, D> {
    socket: PathBuf,
    conversation: Conversation<D>,
    phase: Phase<'a>,
}

enum Phase<'a> {
    /// Another request is being served.
    Waiting(Ticket<'a>),
    /// It is our turn, but the backlog is full.
    Blocked(Ticket<'a>),
    /// Connected. The stream goes before the ticket, or the next caller would find it in its way.
    Talking {
        stream: UnixStream,
        since: Instant,
        knock: Option<UnixStream>,
        ticket: Ticket<'a>,
    },
    /// All is said, but the process has yet to take the connection that knocked: left dead in
    /// its backlog, that would be the next caller's trouble.
    Leaving {
        _knock: UnixStream,
        since: Instant,
        _ticket: Ticket<'a>,
    },
    Over(Result<(), SocketError>),
}

impl<D: Dialogue> Call<'_, D> {
    /// It is our turn: connects. `false` when that has to be tried again.
    fn connect(&mut self, epoll: &Epoll, index: usize) -> Result<bool, SocketError> {
        let stream = connect_to(&self.socket)?;
        let (Phase::Waiting(ticket) | Phase::Blocked(ticket)) =
            std::mem::replace(&mut self.phase, Phase::Over(Ok(())))
        else {
            return Ok(true);
        };
        let Some(stream) = stream else {
            self.phase = Phase::Blocked(ticket);
            return Ok(false);
        };
        let token = u64::try_from(index).unwrap_or(WAKER);
        let watched = epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, token));
        self.phase = Phase::Talking { stream, since: Instant::now(), knock: None, ticket };
        watched.map_err(|error| SocketError::System("could not be watched", error))?;
        Ok(true)
    }

    /// Looks at the clock: knocks if the greeting is overdue, and does not wait for ever for
    /// the knock to be answered. Whether the call is over with it.
    fn tick(&mut self, now: Instant) -> bool {
        let overdue = |since: Instant| now.saturating_duration_since(since) >= KNOCK_AFTER;
        match &mut self.phase {
            Phase::Talking { since, knock: knock @ None, .. }
                if self.conversation.stage() == Stage::Greeting && overdue(*since) =>
            {
                // A full backlog: others are knocking.
                *knock = connect_to(&self.socket).unwrap_or_default();
                false
            }
            Phase::Leaving { since, .. } if overdue(*since) => {
                self.phase = Phase::Over(Ok(()));
                true
            }
            _ => false,
        }
    }

    /// The socket has something to read. Whether the call is over with it.
    fn serve(&mut self, epoll: &Epoll, token: u64, scratch: &mut [u8]) -> bool {
        let result = match &mut self.phase {
            Phase::Talking { stream, .. } => match self.conversation.pump(stream, scratch) {
                Ok(false) => return false,
                Ok(true) => Ok(()),
                Err(error) => Err(error),
            },
            Phase::Leaving { .. } => Ok(()),
            Phase::Waiting(_) | Phase::Blocked(_) | Phase::Over(_) => return false,
        };
        let success = result.is_ok();
        let phase = std::mem::replace(&mut self.phase, Phase::Over(result));
        if let Phase::Talking { knock: Some(knock), ticket, .. } = phase
            && success
            && epoll.add(&knock, EpollEvent::new(EpollFlags::EPOLLIN, token)).is_ok()
        {
            self.phase = Phase::Leaving { _knock: knock, since: Instant::now(), _ticket: ticket };
            return false;
        }
        true
    }

    fn outcome(self, budget: Duration) -> Outcome<D> {
        let no_answer = |stage| Err(SocketError::NoAnswer { budget, stage });
        Outcome {
            result: match self.phase {
                Phase::Waiting(_) => no_answer(Stage::Turn),
                Phase::Blocked(_) => no_answer(Stage::Connect),
                Phase::Talking { .. } => no_answer(self.conversation.stage()),
                Phase::Leaving { .. } => Ok(()),
                Phase::Over(result) => result,
            },
            socket: self.socket,
            dialogue: self.conversation.dialogue,
        }
    }
}

/// Rounded up, so that the loop does not spin through the last millisecond.
fn timeout(until: Instant) -> EpollTimeout {
    let left = until.saturating_duration_since(Instant::now());
    EpollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(EpollTimeout::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_calls_share_the_helpers() {
        let helpers = Helpers::new(4);
        let one = helpers.borrow(2);
        let two = helpers.borrow(usize::MAX);
        assert_eq!((one.count, two.count, helpers.borrow(1).count), (2, 1, 0));
        drop(one);
        assert_eq!(helpers.borrow(0).count, 0);
        assert_eq!(helpers.borrow(9).count, 2);
        drop(two);
        assert_eq!(helpers.borrow(9).count, 3);
        assert_eq!(Helpers::new(1).borrow(9).count, 0);
    }
}
