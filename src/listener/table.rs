//! The connections that are open: who may come in, who must go, who has run out of time.

use std::collections::HashMap;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Newcomers that may be told 503 at the same time, beyond the limit.
const OVER_LIMIT: usize = 16;

/// How often deadlines are looked at while there are connections.
const TICK: Duration = Duration::from_millis(250);

/// How long a connection without a request yet may still send one when the daemon stops.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// For an idle connection that is closed to tell the client so.
const GOODBYE_TIME: Duration = Duration::from_secs(2);

/// What a connection is doing. Only one with a request under way keeps its place when the
/// connection limit is reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Its handshake, head or body is not complete.
    Arriving,
    /// It has had an answer and has not sent a byte since.
    Idle,
    /// A complete request is being answered.
    UnderWay,
}

/// All open connections, at most `limit` and a few that are being refused.
pub(super) struct Table {
    state: Mutex<State>,
    changed: Condvar,
    limit: usize,
}

#[derive(Default)]
struct State {
    slots: HashMap<u64, Slot>,
    next_id: u64,
    stop_at: Option<Instant>,
}

struct Slot {
    stream: Arc<TcpStream>,
    phase: Phase,
    /// Since when it is in this phase: the longest waiting goes first.
    since: Instant,
    deadline: Instant,
    over_limit: bool,
    /// Shut down; its thread has yet to notice.
    closed: bool,
}

impl Slot {
    fn close(&mut self) {
        let how = if self.phase == Phase::Idle && !self.closed {
            // It only reads, and may still say that this is the end.
            self.deadline = Instant::now() + GOODBYE_TIME;
            Shutdown::Read
        } else {
            Shutdown::Both
        };
        self.closed = true;
        // Wakes the connection's thread, whatever it waits for. An error means that the client
        // was faster.
        let _ = self.stream.shutdown(how);
    }

    fn is_waiting(&self) -> bool {
        !self.closed && self.phase != Phase::UnderWay
    }
}

/// The place of one connection in the table; given back when dropped.
pub(super) struct Place {
    table: Arc<Table>,
    id: u64,
    /// Whether there was no place left: the request is to be answered with 503.
    pub(super) over_limit: bool,
}

impl Table {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), changed: Condvar::new(), limit })
    }

    /// Gives `stream` a place until `deadline`, if need be that of the connection that has been
    /// waiting longest without a request under way.
    pub(super) fn admit(self: &Arc<Self>, stream: Arc<TcpStream>, deadline: Instant) -> Place {
        let mut state = self.lock();
        // Closed connections have a thread until they notice: bound these as well.
        while state.slots.len() >= 2 * self.limit + OVER_LIMIT {
            let (guard, wait) =
                self.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner);
            state = guard;
            if wait.timed_out() {
                state.close_longest_waiting(|_| true);
            }
        }
        let open = |over| move |slot: &&Slot| !slot.closed && slot.over_limit == over;
        let full = state.slots.values().filter(open(false)).count() >= self.limit;
        let over_limit = full && !state.close_longest_waiting(|slot| !slot.over_limit);
        if over_limit && state.slots.values().filter(open(true)).count() >= OVER_LIMIT {
            state.close_longest_waiting(|slot| slot.over_limit);
        }
        let (id, since) = (state.next_id, Instant::now());
        state.next_id += 1;
        let phase = Phase::Arriving;
        let slot = Slot { stream, phase, since, deadline, over_limit, closed: false };
        state.slots.insert(id, slot);
        self.changed.notify_all();
        Place { table: Arc::clone(self), id, over_limit }
    }

    /// Closes up to `count` waiting connections, the longest waiting first, and returns how many:
    /// the process has run out of something.
    pub(super) fn shed(&self, count: usize) -> usize {
        let mut state = self.lock();
        (0..count).take_while(|_| state.close_longest_waiting(|_| true)).count()
    }

    /// Closes idle connections, and from now on every other one after its answer.
    pub(super) fn begin_stop(&self) {
        let mut state = self.lock();
        state.stop_at = Some(Instant::now());
        for slot in state.slots.values_mut().filter(|slot| slot.phase == Phase::Idle) {
            slot.close();
        }
        self.changed.notify_all();
    }

    /// Whether [`Table::begin_stop`] has been called.
    pub(super) fn is_stopping(&self) -> bool {
        self.lock().stop_at.is_some()
    }

    /// Returns when no connection is left, after at most `patience`.
    pub(super) fn wait_until_empty(&self, patience: Duration) {
        let end = Instant::now() + patience;
        let mut state = self.lock();
        while !state.slots.is_empty() {
            let Some(left) = end.checked_duration_since(Instant::now()) else { return };
            let wait = self.changed.wait_timeout(state, left);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Closes connections whose time is over. Runs for the life of the process. `tidy` is called
    /// now and then, and must return `true` before the thread rests for want of connections.
    pub(super) fn watch_deadlines(&self, tidy: impl Fn() -> bool) -> ! {
        loop {
            let mut state = self.lock();
            // Under the lock: what a connection leaves behind is there before it goes.
            if tidy() && state.slots.is_empty() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let now = Instant::now();
            let grace_is_over = state.stop_at.is_some_and(|at| now >= at + STOP_GRACE);
            for slot in state.slots.values_mut() {
                if now >= slot.deadline || (grace_is_over && slot.is_waiting()) {
                    slot.close();
                }
            }
            drop(state);
            std::thread::sleep(TICK);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn close_longest_waiting(&mut self, which: impl Fn(&Slot) -> bool) -> bool {
        let waiting = self.slots.values_mut().filter(|slot| slot.is_waiting() && which(slot));
        match waiting.min_by_key(|slot| slot.since) {
            Some(slot) => {
                slot.close();
                true
            }
            None => false,
        }
    }
}

impl Place {
    /// Whether the daemon is stopping: no connection is kept after its answer.
    pub(super) fn is_stopping(&self) -> bool {
        self.table.is_stopping()
    }

    /// Enters `phase`, to be left by `deadline`. `false` when the place is lost: another
    /// connection has it.
    pub(super) fn enter(&self, phase: Phase, deadline: Instant) -> bool {
        let mut state = self.table.lock();
        let stopping = state.stop_at.is_some();
        let Some(slot) = state.slots.get_mut(&self.id).filter(|slot| !slot.closed) else {
            return false;
        };
        if slot.phase != phase || phase == Phase::Idle {
            slot.since = Instant::now();
        }
        (slot.phase, slot.deadline) = (phase, deadline);
        if stopping && phase == Phase::Idle {
            slot.close();
            return false;
        }
        true
    }

    #[cfg(test)]
    pub(super) fn deadline(&self) -> Instant {
        self.table.lock().slots[&self.id].deadline
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.table.lock().slots.remove(&self.id);
        self.table.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;

    struct Pairs(TcpListener);

    impl Pairs {
        fn new() -> Self {
            Self(TcpListener::bind("127.0.0.1:0").unwrap())
        }

        fn next(&self) -> (TcpStream, Arc<TcpStream>) {
            let client = TcpStream::connect(self.0.local_addr().unwrap()).unwrap();
            (client, Arc::new(self.0.accept().unwrap().0))
        }
    }

    fn is_closed(client: &mut TcpStream) -> bool {
        client.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        matches!(client.read(&mut [0]), Ok(0))
    }

    #[test]
    fn a_newcomer_takes_the_place_of_the_longest_waiting() {
        let (pairs, table) = (Pairs::new(), Table::new(3));
        let later = Instant::now() + Duration::from_secs(60);
        let (mut clients, places): (Vec<_>, Vec<_>) = (0..3)
            .map(|_| pairs.next())
            .map(|(client, server)| (client, table.admit(server, later)))
            .unzip();
        assert!(places[0].enter(Phase::UnderWay, later));
        assert!(places[1].enter(Phase::Idle, later));
        let (_fourth, server) = pairs.next();
        let fourth = table.admit(server, later);
        assert!(!fourth.over_limit);
        assert!(is_closed(&mut clients[2]), "it has been waiting longest");
        assert!(!is_closed(&mut clients[0]) && !is_closed(&mut clients[1]));
        assert!(!places[2].enter(Phase::UnderWay, later), "its place is lost");
        drop(places);
        assert!(fourth.enter(Phase::UnderWay, later));
    }

    #[test]
    fn over_the_limit_only_when_every_request_is_under_way() {
        let (pairs, table) = (Pairs::new(), Table::new(2));
        let later = Instant::now() + Duration::from_secs(60);
        let mut kept = Vec::new();
        for _ in 0..2 {
            let (client, server) = pairs.next();
            let place = table.admit(server, later);
            assert!(!place.over_limit && place.enter(Phase::UnderWay, later));
            kept.push((client, place));
        }
        let mut refused: Vec<_> = (0..OVER_LIMIT + 1)
            .map(|_| pairs.next())
            .map(|(client, server)| (client, table.admit(server, later)))
            .collect();
        assert!(refused.iter().all(|(_, place)| place.over_limit));
        assert!(is_closed(&mut refused[0].0), "those told 503 are bounded as well");
        assert!(!is_closed(&mut refused[1].0));
        kept.pop();
        let (_client, server) = pairs.next();
        assert!(!table.admit(server, later).over_limit);
    }

    #[test]
    fn stopping_closes_the_idle_and_waits_for_the_others() {
        let (pairs, table) = (Pairs::new(), Table::new(9));
        let later = Instant::now() + Duration::from_secs(60);
        let (mut idle_client, idle_server) = pairs.next();
        let idle = table.admit(Arc::clone(&idle_server), later);
        assert!(idle.enter(Phase::Idle, later));
        let (mut busy_client, server) = pairs.next();
        let busy = table.admit(server, later);
        assert!(busy.enter(Phase::UnderWay, later));
        table.begin_stop();
        assert_eq!(idle_server.as_ref().read(&mut [0]).unwrap(), 0, "its thread is woken");
        assert!(!is_closed(&mut idle_client) && !is_closed(&mut busy_client));
        let watched = Arc::clone(&table);
        std::thread::spawn(move || watched.watch_deadlines(|| true));
        idle_client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        assert_eq!(idle_client.read(&mut [0]).unwrap(), 0, "closed although its thread hangs");
        drop(idle);
        assert!(!busy.enter(Phase::Idle, later), "nobody is kept after the answer");
        table.wait_until_empty(Duration::ZERO);
        drop(busy);
        table.wait_until_empty(Duration::from_secs(3600));
    }
}
