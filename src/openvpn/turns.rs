//! Turns at the management sockets: inside the daemon one conversation per socket at a time,
//! first come, first served.
//!
//! OpenVPN serves one connection, lets two wait and refuses the rest. Without turns, callers
//! would push each other out, and their lists would have holes.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Who waits at which socket. A socket where nobody waits takes no room.
#[derive(Default)]
pub(super) struct Turns {
    queues: Mutex<HashMap<PathBuf, VecDeque<Waiter>>>,
}

/// Wakes one caller's poll loop when it is its turn somewhere.
pub(super) struct Waker {
    /// Readable as long as there are turns.
    event: EventFd,
    turns: Mutex<Vec<usize>>,
}

/// A place in the queue of one socket; dropping it, at any time, lets the next one go on.
pub(super) struct Ticket<'a> {
    turns: &'a Turns,
    socket: PathBuf,
    waiter: Waiter,
}

/// One conversation of one caller.
#[derive(Clone)]
struct Waiter {
    waker: Arc<Waker>,
    index: usize,
}

impl Turns {
    /// Queues up at `socket`. `waker` hears of `index` when it is its turn, perhaps at once;
    /// the two together must be unique.
    pub(super) fn queue(&self, socket: &Path, waker: &Arc<Waker>, index: usize) -> Ticket<'_> {
        let waiter = Waiter { waker: Arc::clone(waker), index };
        let mut queues = locked(&self.queues);
        let queue = queues.entry(socket.to_owned()).or_default();
        queue.push_back(waiter.clone());
        if queue.len() == 1 {
            waiter.wake();
        }
        Ticket { turns: self, socket: socket.to_owned(), waiter }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut queues = locked(&self.turns.queues);
        let Some(queue) = queues.get_mut(&self.socket) else {
            return;
        };
        let had_turn = queue.front().is_some_and(|first| first.is(&self.waiter));
        queue.retain(|waiter| !waiter.is(&self.waiter));
        match queue.front() {
            Some(next) if had_turn => next.wake(),
            Some(_) => {}
            None => drop(queues.remove(&self.socket)),
        }
    }
}

impl Waiter {
    fn is(&self, other: &Self) -> bool {
        self.index == other.index && Arc::ptr_eq(&self.waker, &other.waker)
    }

    fn wake(&self) {
        let mut turns = locked(&self.waker.turns);
        turns.push(self.index);
        if turns.len() == 1 {
            // Nothing that it fails for can happen: the counter is 0.
            let _ = self.waker.event.write(1);
        }
    }
}

impl Waker {
    pub(super) fn new() -> Result<Self, Errno> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self { event: EventFd::from_flags(flags)?, turns: Mutex::default() })
    }

    /// The conversations whose turn has come since the last call.
    pub(super) fn take(&self) -> Vec<usize> {
        let mut turns = locked(&self.turns);
        if !turns.is_empty() {
            let _ = self.event.read();
        }
        std::mem::take(&mut *turns)
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// A panic elsewhere leaves these lists whole: they change in one step.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_come_first_served() {
        let turns = Turns::default();
        let (a, b) = (Path::new("a"), Path::new("b"));
        let [one, two] = [(), ()].map(|()| Arc::new(Waker::new().unwrap()));
        let first = turns.queue(a, &one, 0);
        let other = turns.queue(b, &one, 1);
        assert_eq!(one.take(), [0, 1]);
        let second = turns.queue(a, &two, 0);
        let third = turns.queue(a, &one, 2);
        let fourth = turns.queue(a, &two, 3);
        assert!(one.take().is_empty() && two.take().is_empty());
        // Who leaves without having had a turn wakes nobody.
        drop(third);
        assert!(one.take().is_empty() && two.take().is_empty());
        drop(first);
        assert_eq!(two.take(), [0]);
        drop(second);
        assert_eq!(two.take(), [3]);
        drop((other, fourth));
        assert!(one.take().is_empty() && two.take().is_empty());
        assert!(locked(&turns.queues).is_empty(), "nobody waits anywhere");
    }
}
