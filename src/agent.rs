//! One thread that alone talks to one backend, the queue of its jobs, and callers with a deadline each.
//!
//! A caller waits for its own deadline and no longer, so that a backend that hangs costs one thread,
//! whoever and however many ask. Callers who wait for a list that has not begun share it.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use log::warn;

use crate::lock;
use crate::logging::warn_seldom;
use crate::threads::Threads;

/// Those of all agents: each has one while it has work, and never two.
static THREADS: LazyLock<Arc<Threads<Work>>> =
    LazyLock::new(|| Threads::new("agent", |work: Work| work()));

type Work = Box<dyn FnOnce() + Send>;

/// How much longer than its deadline a caller waits: what the backend itself says of the time-out, at the
/// deadline, tells more than the caller knows.
const GRACE: Duration = Duration::from_millis(100);

/// How often a thread that starts with a list yields first: on a busy machine, callers who are on their
/// way can still join it.
const YIELDS: usize = 4;

/// Why a backend did not do what it was asked: a sentence that names the device or socket, what is
/// wrong with it and what to do about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Failure {
    /// What the caller asks for cannot be.
    Invalid(String),
    /// The backend refused, failed or spoke nonsense.
    Failed(String),
    /// The backend did not answer in time.
    Timeout(String),
}

impl Failure {
    /// Adds `more` to the sentence.
    pub(crate) fn with(mut self, more: &str) -> Self {
        let (Self::Invalid(sentence) | Self::Failed(sentence) | Self::Timeout(sentence)) =
            &mut self;
        *sentence += more;
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Invalid(sentence) | Self::Failed(sentence) | Self::Timeout(sentence)) = self;
        f.write_str(sentence)
    }
}

/// The owner of one backend. `L` is its list: an [`Arc`] or something as cheap to clone.
pub(crate) struct Agent<L> {
    /// Begins the sentences about it, e.g. "WireGuard device wg0".
    name: String,
    queue: Mutex<Queue<L>>,
}

struct Queue<L> {
    jobs: VecDeque<Job<L>>,
    has_thread: bool,
}

struct Job<L> {
    /// The latest deadline of its callers: then nobody waits for it any more.
    deadline: Instant,
    /// Who shares it, where it is a list.
    callers: Option<Arc<Callers<L>>>,
    work: Box<dyn FnOnce(Instant) + Send>,
}

/// Who waits for a list, and until when.
type Callers<L> = Mutex<Vec<(Instant, Sender<Result<L, Failure>>)>>;

/// What a caller waits for.
pub(crate) struct Answer<T> {
    name: String,
    receiver: Receiver<Result<T, Failure>>,
}

impl<L: Clone + Send + 'static> Agent<L> {
    /// It has a thread while it has jobs.
    pub(crate) fn new(name: impl Into<String>) -> Arc<Self> {
        // Allocated now: allocated during a job, it would lie above the job's memory on the heap and
        // keep the C library from giving that back.
        let queue = Mutex::new(Queue { jobs: VecDeque::with_capacity(16), has_thread: false });
        Arc::new(Self { name: name.into(), queue })
    }

    /// Queues the reading of a list, or joins one that has not begun. `read` is given the deadline of
    /// whoever waits longest.
    ///
    /// # Errors
    /// There is no thread for it.
    pub(crate) fn list(
        self: &Arc<Self>,
        deadline: Instant,
        read: impl FnOnce(Instant) -> Result<L, Failure> + Send + 'static,
    ) -> Result<Answer<L>, Failure> {
        let (sender, receiver) = channel();
        let mut queue = lock(&self.queue);
        let mut lists = queue.jobs.iter_mut().filter_map(|Job { deadline, callers, .. }| {
            callers.as_ref().map(|callers| (deadline, callers))
        });
        if let Some((latest, callers)) = lists.next() {
            let mut callers = lock(callers);
            callers.retain(|(deadline, _)| *deadline > Instant::now());
            callers.push((deadline, sender));
            *latest = deadline.max(*latest);
        } else {
            let callers = Arc::new(Mutex::new(vec![(deadline, sender)]));
            let (name, waiting) = (self.name.clone(), Arc::clone(&callers));
            let work = Box::new(move |deadline| {
                let result = read(deadline);
                let callers = std::mem::take(&mut *lock(&waiting));
                let taken = callers.iter().filter(|(_, to)| to.send(result.clone()).is_ok());
                if taken.count() == 0 {
                    let outcome =
                        result.map_or_else(|failure| failure.to_string(), |_| "whole".into());
                    let text = format!("{name}: its list ended after its time-out: {outcome}");
                    warn_seldom("late list", text);
                }
            });
            self.push(&mut queue, Job { deadline, callers: Some(callers), work })?;
        }
        Ok(Answer { name: self.name.clone(), receiver })
    }

    /// Queues a change. `what` names it and who asked, for the log: a change may end after its
    /// caller's deadline.
    ///
    /// # Errors
    /// There is no thread for it.
    pub(crate) fn change<T: Send + 'static>(
        self: &Arc<Self>,
        deadline: Instant,
        what: String,
        change: impl FnOnce(Instant) -> Result<T, Failure> + Send + 'static,
    ) -> Result<Answer<T>, Failure> {
        let (sender, receiver) = channel();
        let work = Box::new(move |deadline| {
            if let Err(late) = sender.send(change(deadline)) {
                let outcome =
                    late.0.map_or_else(|failure| failure.to_string(), |_| "done".to_owned());
                warn!("{what}: ended after its time-out: {outcome}");
            }
        });
        self.push(&mut lock(&self.queue), Job { deadline, callers: None, work })?;
        Ok(Answer { name: self.name.clone(), receiver })
    }

    fn push(self: &Arc<Self>, queue: &mut Queue<L>, job: Job<L>) -> Result<(), Failure> {
        queue.jobs.retain(|job| job.deadline > Instant::now());
        if !queue.has_thread {
            let (agent, is_list) = (Arc::clone(self), job.callers.is_some());
            let work = move || {
                if is_list {
                    (0..YIELDS).for_each(|_| thread::yield_now());
                }
                agent.work();
            };
            THREADS.run(Box::new(work)).map_err(|(_, error)| {
                Failure::Failed(format!("{} cannot be asked: no thread for it: {error}", self.name))
            })?;
            queue.has_thread = true;
        }
        queue.jobs.push_back(job);
        Ok(())
    }

    fn work(&self) {
        loop {
            let mut queue = lock(&self.queue);
            let Some(job) = queue.jobs.pop_front() else {
                queue.has_thread = false;
                return;
            };
            drop(queue);
            if Instant::now() < job.deadline {
                // The panic is in the log; the callers are told that nothing came.
                let _ = catch_unwind(AssertUnwindSafe(|| (job.work)(job.deadline)));
            }
        }
    }
}

impl<T> Answer<T> {
    /// Waits until `deadline`, and a moment longer for what the backend says of its own time-out.
    ///
    /// # Errors
    /// What the job says, or that it has not ended.
    pub(crate) fn wait(self, deadline: Instant) -> Result<T, Failure> {
        let left = (deadline + GRACE).saturating_duration_since(Instant::now());
        let result = self.receiver.recv_timeout(left);
        result.unwrap_or_else(|why| match why {
            // A job that is still queued at its deadline is dropped: a time-out as well.
            why if why == RecvTimeoutError::Timeout || Instant::now() >= deadline => {
                Err(Failure::Timeout(format!("{} did not answer in time: try again", self.name)))
            }
            _ => Err(Failure::Failed(format!(
                "{} cannot be asked: internal error; see the daemon's log",
                self.name
            ))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    fn soon(milliseconds: u64) -> Instant {
        Instant::now() + Duration::from_millis(milliseconds)
    }

    #[test]
    fn lists_that_wait_are_one_and_a_hang_costs_its_callers_their_time_alone() {
        let agent: Arc<Agent<u8>> = Agent::new("socket x");
        let (begun, go_on) = (Arc::new(Barrier::new(2)), Arc::new(Barrier::new(2)));
        let (begin, end) = (Arc::clone(&begun), Arc::clone(&go_on));
        let hang = move |_| {
            begin.wait();
            end.wait();
            Ok(7)
        };
        let late = agent.change(soon(60_000), "a change".to_owned(), hang).unwrap();
        begun.wait();
        let first = agent.list(soon(60_000), |_| Ok(1)).unwrap();
        let joined = agent.list(soon(60_000), |_| panic!("a second list")).unwrap();
        let given_up = agent
            .change(soon(20), "b".to_owned(), |_| {
                if true {
                    panic!("begun")
                }
                Ok(())
            })
            .unwrap();
        let deadline = soon(50);
        let failure = agent.list(deadline, |_| Ok(1)).unwrap().wait(deadline).unwrap_err();
        assert!(Instant::now() >= deadline + GRACE);
        let sentence = "socket x did not answer in time: try again";
        assert_eq!(failure, Failure::Timeout(sentence.to_owned()));
        assert!(matches!(late.wait(soon(0)), Err(Failure::Timeout(_))));
        assert!(given_up.wait(soon(0)).is_err());
        go_on.wait();
        assert_eq!((first.wait(soon(60_000)), joined.wait(soon(60_000))), (Ok(1), Ok(1)));
    }

    #[test]
    fn a_panic_is_one_job() {
        let agent: Arc<Agent<u8>> = Agent::new("x");
        let answer = agent.list(soon(60_000), |_| panic!("meant to")).unwrap();
        let failure = answer.wait(soon(60_000)).unwrap_err();
        assert!(matches!(failure, Failure::Failed(why) if why.contains("internal")));
        assert_eq!(agent.list(soon(60_000), |_| Ok(1)).unwrap().wait(soon(60_000)), Ok(1));
    }

    #[test]
    fn who_gave_up_does_not_stay_in_the_queue() {
        let agent: Arc<Agent<u8>> = Agent::new("x");
        let (hung, go_on) = (Arc::new(Barrier::new(2)), Arc::new(Barrier::new(2)));
        let (begin, end) = (Arc::clone(&hung), Arc::clone(&go_on));
        let hang = move |_| {
            begin.wait();
            end.wait();
            Ok(())
        };
        drop(agent.change(soon(60_000), "x".to_owned(), hang).unwrap());
        hung.wait();
        for _ in 0..100 {
            drop(agent.change(soon(0), "x".to_owned(), |_| Ok(())).unwrap());
            drop(agent.list(soon(0), |_| Ok(1)).unwrap());
        }
        let queue = lock(&agent.queue);
        assert!(queue.jobs.len() <= 2);
        let callers = queue.jobs.iter().filter_map(|job| job.callers.as_ref());
        callers.for_each(|callers| assert!(lock(callers).len() <= 2));
        drop(queue);
        // What comes too late is not begun, and that is a time-out.
        let late = agent.change(soon(0), "x".to_owned(), |_| Ok(())).unwrap();
        go_on.wait();
        assert!(matches!(late.wait(soon(0)), Err(Failure::Timeout(_))));
    }
}
