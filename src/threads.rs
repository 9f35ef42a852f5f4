//! Threads of one kind, each kept for the next job when it is done with one.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::lock;

/// A thread ends when it has had nothing to do for this long, and gives back what memory it keeps.
const REST: Duration = Duration::from_secs(2);
/// Rust's default of 2 MiB would only be address space; TLS needs a fraction of this.
const STACK: usize = 512 * 1024;

/// As many threads as there are jobs, and those that rest.
pub(crate) struct Threads<J> {
    name: &'static str,
    work: Box<dyn Fn(J) + Send + Sync>,
    state: Mutex<State<J>>,
    arrived: Condvar,
}

struct State<J> {
    /// Jobs that no thread has taken yet; never more than there are free threads.
    jobs: VecDeque<J>,
    /// Threads that rest, or are about to start.
    free: usize,
}

impl<J: Send + 'static> Threads<J> {
    /// Threads of that name, all of which do `work`.
    pub(crate) fn new(name: &'static str, work: impl Fn(J) + Send + Sync + 'static) -> Arc<Self> {
        let state = Mutex::new(State { jobs: VecDeque::new(), free: 0 });
        Arc::new(Self { name, work: Box::new(work), state, arrived: Condvar::new() })
    }

    /// Gives the job to a thread that rests, or else to a new one.
    ///
    /// # Errors
    /// There is no thread for it: the job comes back.
    pub(crate) fn run(self: &Arc<Self>, job: J) -> Result<(), (J, io::Error)> {
        let mut state = lock(&self.state);
        if state.jobs.len() == state.free {
            let threads = Arc::clone(self);
            let thread = thread::Builder::new().name(self.name.to_owned()).stack_size(STACK);
            if let Err(error) = thread.spawn(move || threads.work()) {
                return Err((job, error));
            }
            state.free += 1;
        }
        state.jobs.push_back(job);
        // Unlocked first: the thread that wakes up takes the lock.
        drop(state);
        self.arrived.notify_one();
        Ok(())
    }

    fn work(&self) {
        while let Some(job) = self.next() {
            // The panic is in the log; it ends one job, not the daemon.
            let _ = catch_unwind(AssertUnwindSafe(|| (self.work)(job)));
            lock(&self.state).free += 1;
        }
    }

    /// The next job, or `None` once the thread has rested long enough.
    fn next(&self) -> Option<J> {
        let state = lock(&self.state);
        let wait = self.arrived.wait_timeout_while(state, REST, |state| state.jobs.is_empty());
        let (mut state, _) = wait.unwrap_or_else(PoisonError::into_inner);
        state.free -= 1;
        state.jobs.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::mpsc;

    #[test]
    fn a_thread_for_each_job_and_the_same_one_for_the_next() {
        let (sender, receiver) = mpsc::channel();
        let threads: Arc<Threads<Arc<Barrier>>> =
            Threads::new("x", move |together: Arc<Barrier>| {
                together.wait();
                sender.send(thread::current().id()).unwrap();
            });
        let together = Arc::new(Barrier::new(4));
        for _ in 0..4 {
            assert!(threads.run(Arc::clone(&together)).is_ok());
        }
        let first: Vec<_> = receiver.iter().take(4).collect();
        while lock(&threads.state).free < 4 {
            thread::yield_now();
        }
        assert!(threads.run(Arc::new(Barrier::new(1))).is_ok());
        assert!(first.contains(&receiver.recv().unwrap()));
    }

    #[test]
    fn a_panic_is_one_job() {
        let (sender, receiver) = mpsc::channel();
        let threads: Arc<Threads<bool>> = Threads::new("x", move |fails: bool| {
            assert!(!fails, "meant to");
            sender.send(()).unwrap();
        });
        assert!(threads.run(true).is_ok() && threads.run(false).is_ok());
        receiver.recv().unwrap();
    }
}
