//! Turns: a lock that is given in the order of asking, with a deadline for those who wait.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// A queue of which the first has the turn.
#[derive(Default)]
pub(super) struct Turns {
    queue: Mutex<Queue>,
    moved: Condvar,
}

#[derive(Default)]
struct Queue {
    tickets: VecDeque<u64>,
    next_ticket: u64,
}

/// The turn; the next in the queue has it when this is dropped, on whatever thread.
pub(super) struct Turn(Arc<Turns>);

impl Turns {
    /// Waits for the turn until the deadline.
    pub(super) fn take(self: &Arc<Self>, deadline: Instant) -> Option<Turn> {
        let mut queue = self.lock();
        let ticket = queue.next_ticket;
        queue.next_ticket += 1;
        queue.tickets.push_back(ticket);
        while queue.tickets.front() != Some(&ticket) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                queue.tickets.retain(|other| *other != ticket);
                return None;
            }
            let waited = self.moved.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Some(Turn(Arc::clone(self)))
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.lock().tickets.pop_front();
        self.0.moved.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn one_at_a_time_in_order() {
        let turns = Arc::new(Turns::default());
        let far = Instant::now() + Duration::from_secs(60);
        let first = turns.take(far).unwrap();
        assert!(turns.take(Instant::now()).is_none());
        let order = Arc::new(Mutex::new(Vec::new()));
        let waiting: Vec<_> = (0..4)
            .map(|n| {
                while turns.lock().tickets.len() != n + 1 {
                    thread::yield_now();
                }
                let (turns, order) = (Arc::clone(&turns), Arc::clone(&order));
                thread::spawn(move || {
                    let _turn = turns.take(far).unwrap();
                    order.lock().unwrap().push(n);
                })
            })
            .collect();
        while turns.lock().tickets.len() != 5 {
            thread::yield_now();
        }
        assert!(turns.take(Instant::now()).is_none());
        // The turn may end on another thread.
        thread::spawn(move || drop(first)).join().unwrap();
        for thread in waiting {
            thread.join().unwrap();
        }
        assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3]);
        assert!(turns.take(Instant::now()).is_some());
    }
}
