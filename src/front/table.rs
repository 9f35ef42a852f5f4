//! Who may stay, and how long: the connections that are open, and what each of them is doing.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::{lock, metrics};

/// Most connections beyond the limit: newcomers whose request is not complete, that wait for a
/// place, or that are being told 503.
pub(crate) const OVER_LIMIT: usize = 256;
/// How long a complete request waits for a place before it is told 503. With what the backends may
/// take after it, an answer takes less than 3 s.
const PLACE_TIME: Duration = Duration::from_millis(300);
/// A client that is far away stalls for a moment with each piece of its answer: who has stalled for less
/// than this is evicted last.
const STALL_TIME: Duration = Duration::from_secs(1);
/// How long a connection whose request has not come yet may still send one when the daemon stops: a
/// handshake on a slow machine takes a second.
const STOP_GRACE: Duration = Duration::from_secs(3);
/// How long an idle connection that is closed may take to tell its client so.
const GOODBYE_TIME: Duration = Duration::from_secs(2);

/// What a connection is doing. When the connection limit is reached, one that is stalled or idle
/// makes room for a newcomer, and one that is silent or arriving for a complete request: the first
/// ones here first, and among equals who has waited longest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Phase {
    /// Its answer has begun, and the client is not taking the rest.
    Stalled,
    /// It has had an answer and has not sent a byte since.
    Idle,
    /// It has not sent a byte yet.
    Silent,
    /// Its handshake, head or body is not complete.
    Arriving,
    /// A complete request is being answered.
    UnderWay,
}

/// All open connections: at most `limit`, and at most `over_limit` besides.
pub(super) struct Table {
    state: Mutex<State>,
    /// A connection has gone, or somebody may have its place.
    freed: Condvar,
    limit: usize,
    over_limit: usize,
}

#[derive(Default)]
struct State {
    slots: HashMap<u64, Slot>,
    next_id: u64,
    /// Complete requests that wait for a place.
    queued: usize,
    stop_at: Option<Instant>,
}

struct Slot {
    stream: Arc<TcpStream>,
    network: IpAddr,
    phase: Phase,
    /// Since when it is in this phase.
    since: Instant,
    deadline: Instant,
    over_limit: bool,
    /// Shut down; its thread has yet to notice.
    closed: bool,
}

impl Slot {
    fn enter(&mut self, phase: Phase) {
        if self.phase != phase || phase == Phase::Idle {
            (self.phase, self.since) = (phase, Instant::now());
        }
    }

    fn close(&mut self, reason: &str) {
        if !self.closed {
            metrics::add("connections_evicted_total", &[("reason", reason)], 1.0);
        }
        let how = if self.phase == Phase::Idle && !self.closed {
            // Its thread waits for a request, and may still tell the client that this is the end.
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
}

impl State {
    fn open(&self, over_limit: bool) -> usize {
        let is_open = |slot: &&Slot| !slot.closed && slot.over_limit == over_limit;
        self.slots.values().filter(is_open).count()
    }

    /// Whose turn it is to go: one of the network that has most connections waiting. Who opens them
    /// by the thousand evicts its own.
    fn first_to_go(&mut self, over_limit: bool) -> Option<&mut Slot> {
        let waits = |slot: &Slot| {
            !slot.closed && slot.over_limit == over_limit && slot.phase != Phase::UnderWay
        };
        let mut crowds = HashMap::new();
        for slot in self.slots.values().filter(|slot| waits(slot)) {
            *crowds.entry(slot.network).or_insert(0) += 1;
        }
        let waiting = self.slots.values_mut().filter(|slot| waits(slot));
        let reads = |slot: &Slot| slot.phase == Phase::Stalled && slot.since.elapsed() < STALL_TIME;
        waiting.min_by_key(|slot| {
            (Reverse(crowds[&slot.network]), reads(slot), slot.phase, slot.since)
        })
    }

    /// Closes the connection whose turn it is. Whether there is one.
    fn evict(&mut self, over_limit: bool, reason: &str) -> bool {
        self.first_to_go(over_limit).map(|slot| slot.close(reason)).is_some()
    }

    /// Frees a place for a request, complete or not. A newcomer does not take that of another one,
    /// but a complete request does: the other is over the limit then.
    fn free_place(&mut self, is_complete: bool) -> bool {
        let Some(slot) = self.first_to_go(false) else { return false };
        if slot.phase <= Phase::Idle {
            slot.close("limit");
        } else {
            slot.over_limit = is_complete;
        }
        slot.closed || slot.over_limit
    }
}

impl Table {
    pub(super) fn new(limit: usize, over_limit: usize) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), freed: Condvar::new(), limit, over_limit })
    }

    /// Gives `stream` a place until `deadline`, if need be that of another connection. `None` when
    /// there are too many whose threads have not noticed yet that they are closed: a handshake
    /// cannot be interrupted while it computes. One network cannot use up all threads.
    pub(super) fn admit(
        self: &Arc<Self>,
        stream: Arc<TcpStream>,
        client: IpAddr,
        deadline: Instant,
    ) -> Option<Place> {
        let network = network(client);
        let mut state = lock(&self.state);
        let most = 2 * (self.limit + self.over_limit);
        let own = state.slots.values().filter(|slot| slot.network == network).count();
        if state.slots.len() >= most || own >= most / 4 * 3 {
            return None;
        }
        let is_full = state.open(false) + state.queued >= self.limit;
        let over_limit = is_full && !(state.queued == 0 && state.free_place(false));
        if over_limit && state.open(true) >= self.over_limit && !state.evict(true, "limit") {
            return None;
        }
        let id = state.next_id;
        state.next_id += 1;
        let (phase, since, closed) = (Phase::Silent, Instant::now(), false);
        let slot = Slot { stream, network, phase, since, deadline, over_limit, closed };
        state.slots.insert(id, slot);
        metrics::add("connections", &[], 1.0);
        Some(Place { table: Arc::clone(self), id })
    }

    /// Closes up to `count` waiting connections and returns how many: the process has run out of
    /// something.
    pub(super) fn shed(&self, count: usize) -> usize {
        let mut state = lock(&self.state);
        let mut evict = |over_limit| state.evict(over_limit, "resources");
        (0..count).take_while(|_| evict(true) || evict(false)).count()
    }

    /// Closes the connections that wait for their next request.
    pub(super) fn close_idle(&self) {
        self.close("reload", |slot| slot.phase == Phase::Idle);
    }

    /// Closes idle connections, and from now on every other one after its answer.
    pub(super) fn begin_stop(&self) {
        lock(&self.state).stop_at = Some(Instant::now() + STOP_GRACE);
        self.close_idle();
    }

    /// Returns when no connection is left, after at most `patience`.
    pub(super) fn wait_until_empty(&self, patience: Duration) {
        let some_are_left = |state: &mut State| !state.slots.is_empty();
        drop(self.freed.wait_timeout_while(lock(&self.state), patience, some_are_left));
    }

    /// Closes connections whose time is over.
    pub(super) fn close_late(&self, now: Instant) {
        let stop_at = lock(&self.state).stop_at;
        self.close("deadline", |slot| {
            let grace_is_over = stop_at.is_some_and(|at| now >= at);
            let has_asked = matches!(slot.phase, Phase::UnderWay | Phase::Stalled);
            now >= slot.deadline || (grace_is_over && !has_asked)
        });
    }

    fn close(&self, reason: &str, which: impl Fn(&Slot) -> bool) {
        let mut state = lock(&self.state);
        state.slots.values_mut().filter(|slot| which(slot)).for_each(|slot| slot.close(reason));
        self.freed.notify_all();
    }
}

/// What one client has at hand: an IPv4 address, or an IPv6 network of 64 bits.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}

/// The place of one connection in the table; given back when dropped.
pub(super) struct Place {
    table: Arc<Table>,
    /// No other connection has had it.
    pub(super) id: u64,
}

impl Place {
    /// Enters `phase`, to be left by `deadline`.
    ///
    /// # Errors
    /// The place is lost: another connection has it, or its time was over.
    pub(super) fn enter(&self, phase: Phase, deadline: Instant) -> io::Result<()> {
        self.change(|slot| {
            slot.enter(phase);
            slot.deadline = deadline;
        })
    }

    /// Whether the client is taking its answer. While it is not, another may have its place.
    ///
    /// # Errors
    /// The place is lost.
    pub(super) fn stall(&self, stalled: bool) -> io::Result<()> {
        self.change(|slot| match (slot.phase, stalled) {
            (Phase::UnderWay, true) => slot.enter(Phase::Stalled),
            (Phase::Stalled, false) => slot.enter(Phase::UnderWay),
            _ => {}
        })
    }

    /// The client has sent its first byte.
    ///
    /// # Errors
    /// The place is lost.
    pub(super) fn hear(&self) -> io::Result<()> {
        self.change(|slot| slot.enter(slot.phase.max(Phase::Arriving)))
    }

    /// Makes a change. Who is idle then makes room if a request waits for a place.
    fn change(&self, change: impl FnOnce(&mut Slot)) -> io::Result<()> {
        let mut state = lock(&self.table.state);
        let (wanted, stopping) = (state.queued > 0, state.stop_at.is_some());
        if wanted {
            self.table.freed.notify_all();
        }
        let slot = state.slots.get_mut(&self.id).filter(|slot| !slot.closed).ok_or_else(lost)?;
        change(slot);
        if (wanted || stopping) && slot.phase == Phase::Idle {
            slot.close("limit");
            return Err(lost());
        }
        Ok(())
    }

    /// The request is complete: whether there is a place to answer it from, until `deadline`. One
    /// that is over the limit waits for it.
    ///
    /// # Errors
    /// The place is lost.
    pub(super) fn begin(&self, deadline: Instant) -> io::Result<bool> {
        self.enter(Phase::UnderWay, deadline)?;
        let table = &self.table;
        let has_none = |state: &mut State| {
            let is_free = state.open(false) < table.limit || state.free_place(true);
            // Nobody waits where others could not even be told.
            !is_free && state.open(true) < table.over_limit
        };
        let mut state = lock(&table.state);
        if !state.slots[&self.id].over_limit {
            return Ok(true);
        }
        state.queued += 1;
        let wait = table.freed.wait_timeout_while(state, PLACE_TIME, has_none);
        let (mut state, _) = wait.unwrap_or_else(PoisonError::into_inner);
        state.queued -= 1;
        let has_place = state.open(false) < table.limit;
        state.slots.entry(self.id).and_modify(|slot| slot.over_limit = !has_place);
        Ok(has_place)
    }

    /// Whether the connection may be kept after its answer.
    pub(super) fn is_kept(&self) -> bool {
        let state = lock(&self.table.state);
        state.stop_at.is_none() && state.queued == 0
    }
}

fn lost() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "another connection has its place")
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = lock(&self.table.state);
        state.slots.remove(&self.id);
        metrics::add("connections", &[], -1.0);
        if state.queued > 0 || state.stop_at.is_some() {
            self.table.freed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;
    use std::thread;

    const NEAR: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    struct Site {
        listener: TcpListener,
        table: Arc<Table>,
        later: Instant,
    }

    /// A client and its place.
    struct Guest {
        client: TcpStream,
        server: Arc<TcpStream>,
        place: Place,
    }

    impl Site {
        fn new(limit: usize) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let later = Instant::now() + Duration::from_secs(60);
            Self { listener, table: Table::new(limit, OVER_LIMIT), later }
        }

        fn try_admit(&self, from: IpAddr) -> Option<Guest> {
            let client = TcpStream::connect(self.listener.local_addr().unwrap()).unwrap();
            let server = Arc::new(self.listener.accept().unwrap().0);
            let place = self.table.admit(Arc::clone(&server), from, self.later)?;
            Some(Guest { client, server, place })
        }

        fn admit(&self, from: impl Into<IpAddr>) -> Guest {
            self.try_admit(from.into()).unwrap()
        }
    }

    impl Guest {
        fn is_closed(&self) -> bool {
            self.client.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            matches!((&self.client).read(&mut [0]), Ok(0))
        }

        /// Its thread is told, whatever its client hears.
        fn has_lost_its_place(&self) -> bool {
            lock(&self.place.table.state).slots[&self.place.id].closed
        }

        fn is_over_limit(&self) -> bool {
            lock(&self.place.table.state).slots[&self.place.id].over_limit
        }

        fn enter(&self, phase: Phase) {
            self.place.enter(phase, Instant::now() + Duration::from_secs(60)).unwrap();
        }
    }

    #[test]
    fn whose_turn_it_is_to_go() {
        let site = Site::new(7);
        let guests: Vec<_> = (0..7).map(|_| site.admit(NEAR)).collect();
        for spoke in [0, 1, 4, 5, 6] {
            guests[spoke].place.hear().unwrap();
        }
        guests[6].enter(Phase::Idle);
        guests[0].enter(Phase::Idle);
        guests[4].enter(Phase::UnderWay);
        guests[5].enter(Phase::UnderWay);
        guests[5].place.stall(true).unwrap();
        // For longer than a client that reads.
        lock(&site.table.state).slots.get_mut(&guests[5].place.id).unwrap().since -= STALL_TIME;
        // Who takes no answer, then who is idle, the one first that is so longest.
        let mut newcomers = Vec::new();
        for goes in [5, 6, 0] {
            assert!(!guests[goes].has_lost_its_place(), "{goes} goes too early");
            newcomers.push(site.admit(NEAR));
            newcomers.last().unwrap().enter(Phase::UnderWay);
            assert!(guests[goes].has_lost_its_place(), "{goes} is to go");
        }
        assert!(guests[5].is_closed() && !guests[0].is_closed(), "who is idle may still be told");
        assert_eq!(guests[0].server.as_ref().read(&mut [0]).unwrap(), 0, "its thread is woken");
        // A complete request takes the place of the silent, the older one first, and of those whose
        // request is not complete, but of nobody with a request under way.
        for moves in [2, 3, 1] {
            let newcomer = site.admit(NEAR);
            assert!(!guests[moves].is_over_limit(), "{moves} moves too early");
            assert!(newcomer.place.begin(site.later).unwrap());
            assert!(guests[moves].is_over_limit() && !guests[moves].has_lost_its_place());
            newcomers.push(newcomer);
        }
        assert!(!site.admit(NEAR).place.begin(site.later).unwrap());
        assert!(!guests[4].has_lost_its_place() && !guests[4].is_over_limit());
    }

    #[test]
    fn a_client_that_is_taking_its_answer_goes_last() {
        let site = Site::new(2);
        let (reads, silent) = (site.admit(NEAR), site.admit(NEAR));
        reads.enter(Phase::UnderWay);
        reads.place.stall(true).unwrap();
        let newcomer = site.admit(NEAR);
        assert!(newcomer.place.begin(site.later).unwrap());
        assert!(silent.is_over_limit() && !reads.has_lost_its_place());
        // It has taken a piece of its answer, and nobody may have its place.
        reads.place.stall(false).unwrap();
        let busy = site.admit(NEAR);
        busy.enter(Phase::UnderWay);
        assert!(busy.is_over_limit() && !reads.has_lost_its_place());
    }

    #[test]
    fn who_sends_a_byte_at_a_time_has_waited_from_the_first() {
        let site = Site::new(2);
        let guests = [site.admit(NEAR), site.admit(NEAR)];
        for speaks in [0, 1, 0] {
            guests[speaks].place.hear().unwrap();
        }
        assert!(site.admit(NEAR).place.begin(site.later).unwrap());
        assert!(guests[0].is_over_limit() && !guests[1].is_over_limit());
    }

    #[test]
    fn while_a_place_is_free_nobody_makes_room() {
        let site = Site::new(2);
        let (busy, silent) = (site.admit(NEAR), site.admit(NEAR));
        busy.enter(Phase::UnderWay);
        let newcomer = site.admit(NEAR);
        assert!(newcomer.is_over_limit());
        drop(busy);
        assert!(newcomer.place.begin(site.later).unwrap());
        assert!(!silent.is_over_limit());
    }

    #[test]
    fn a_network_is_what_one_client_has_at_hand() {
        let of = |address: &str| network(address.parse().unwrap()).to_string();
        for (address, expected) in [
            ("192.0.2.1", "192.0.2.1"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
            ("2001:db8:1:3::1", "2001:db8:1:3::"),
        ] {
            assert_eq!(of(address), expected);
        }
    }

    #[test]
    fn out_of_resources_the_waiting_go() {
        let site = Site::new(2);
        let guests: Vec<_> = (0..4).map(|_| site.admit(NEAR)).collect();
        guests[1].enter(Phase::UnderWay);
        guests[2].enter(Phase::UnderWay);
        assert_eq!(site.table.shed(1), 1);
        assert!(guests[3].has_lost_its_place(), "over the limit");
        assert_eq!(site.table.shed(9), 1);
        assert!(guests[0].has_lost_its_place());
        assert!(!guests[1].has_lost_its_place() && !guests[2].has_lost_its_place());
    }

    #[test]
    fn the_largest_crowd_makes_room() {
        let site = Site::new(2);
        let host = |host| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, host, 0, 0, 1);
        let mut crowd = vec![site.admit(host(1)), site.admit(host(2))];
        let first = site.admit(NEAR);
        crowd.push(site.admit(host(3)));
        crowd[2].place.hear().unwrap();
        for _ in 0..2 * OVER_LIMIT {
            crowd.push(site.admit(host(4)));
            crowd.retain(|guest| !guest.has_lost_its_place());
        }
        assert_eq!(crowd.len() + 1, 2 + OVER_LIMIT);
        assert!(!first.has_lost_its_place(), "it is alone, though it has waited longest");
        let kept: Vec<_> = crowd.iter().map(|guest| guest.place.id).collect();
        // Those with a place, the one that has spoken, and the last ones.
        assert_eq!(kept[..3], [0, 1, 3]);
        assert_eq!(*kept.last().unwrap(), 3 + 2 * OVER_LIMIT as u64);
        assert!(first.place.begin(site.later).unwrap());
        assert!(crowd[0].is_over_limit());
    }

    #[test]
    fn closed_connections_that_hold_their_threads_are_bounded() {
        let site = Site::new(2);
        let most = 2 * (2 + OVER_LIMIT);
        let far: IpAddr = "192.0.2.1".parse().unwrap();
        // Their places are held: the threads have not noticed that they are closed.
        let mut held: Vec<_> = std::iter::from_fn(|| site.try_admit(far)).take(most).collect();
        assert_eq!(held.len(), most / 4 * 3, "one network leaves some for others");
        let mine = site.admit(NEAR);
        assert!(!mine.has_lost_its_place());
        held.pop();
        held.push(site.admit(far));
        let others = (0..=255).map(|last| [198, 51, 100, last].into());
        held.extend(others.map_while(|from| site.try_admit(from)));
        assert_eq!(held.len() + 1, most);
    }

    #[test]
    fn over_the_limit_a_request_waits_for_a_place() {
        let site = Site::new(1);
        let only = site.admit(NEAR);
        assert!(only.place.begin(site.later).unwrap());
        let (late, later) = (site.admit(NEAR), site.admit(NEAR));
        assert!(!late.place.begin(site.later).unwrap(), "nothing has become free");
        thread::scope(|scope| {
            let waits = scope.spawn(|| later.place.begin(site.later));
            while lock(&site.table.state).queued == 0 {
                thread::yield_now();
            }
            assert!(!only.place.is_kept());
            assert!(site.admit(NEAR).is_over_limit(), "the next place is not for newcomers");
            assert!(only.place.enter(Phase::Idle, site.later).is_err(), "another one needs it");
            assert!(waits.join().unwrap().unwrap());
        });
        assert!(later.place.is_kept());
        // One that is not taking its answer goes.
        thread::scope(|scope| {
            let last = site.admit(NEAR);
            later.place.stall(true).unwrap();
            let waits = scope.spawn(move || last.place.begin(site.later));
            assert!(waits.join().unwrap().unwrap());
            assert!(later.place.stall(false).is_err());
        });
    }

    #[test]
    fn those_told_503_are_bounded() {
        let site = Site::new(1);
        let only = site.admit(NEAR);
        assert!(only.place.begin(site.later).unwrap());
        let mut over: Vec<_> = (0..OVER_LIMIT).map(|_| site.admit(NEAR)).collect();
        let started = Instant::now();
        assert!(!over[0].place.begin(site.later).unwrap(), "too many wait behind it");
        assert!(started.elapsed() < PLACE_TIME);
        let newcomer = site.admit(NEAR);
        assert!(over[1].is_closed(), "it has sent nothing yet");
        assert!(!over[0].has_lost_its_place(), "it is being told");
        over.push(newcomer);
        for guest in over.iter().filter(|guest| !guest.has_lost_its_place()) {
            guest.enter(Phase::UnderWay);
        }
        assert!(site.try_admit(NEAR).is_none());
    }

    #[test]
    fn stopping_closes_the_idle_and_waits_for_the_others() {
        let site = Site::new(9);
        let (idle, busy, silent) = (site.admit(NEAR), site.admit(NEAR), site.admit(NEAR));
        idle.enter(Phase::Idle);
        busy.enter(Phase::UnderWay);
        let now = Instant::now();
        site.table.begin_stop();
        site.table.close_late(now);
        assert!(idle.has_lost_its_place() && !idle.is_closed());
        assert!(!silent.has_lost_its_place(), "it may be about to ask");
        site.table.close_late(Instant::now() + STOP_GRACE);
        assert!(silent.has_lost_its_place() && !busy.has_lost_its_place());
        site.table.close_late(Instant::now() + GOODBYE_TIME);
        assert!(idle.is_closed(), "closed although its thread hangs");
        assert!(busy.place.enter(Phase::Idle, site.later).is_err(), "nobody is kept");
        drop((idle, silent));
        site.table.wait_until_empty(Duration::ZERO);
        thread::scope(|scope| {
            let table = Arc::clone(&site.table);
            let waits = scope.spawn(move || table.wait_until_empty(Duration::from_secs(3600)));
            thread::sleep(Duration::from_millis(50));
            assert!(!waits.is_finished());
            drop(busy);
        });
        assert!(lock(&site.table.state).slots.is_empty());
    }
}
