//! Who may stay, and how long: the connections that are open, and what each of them is doing.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, Ipv6Addr, Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::lock;

/// Connections beyond the limit: newcomers whose request is not complete, that wait for a place, or
/// that are being told 503.
const OVER_LIMIT: usize = 256;
/// How long a complete request waits for a place before it is told 503, at most,
const PLACE_TIME: Duration = Duration::from_millis(900);
/// and while nobody gets one.
const TURN_TIME: Duration = Duration::from_millis(400);
/// How long a connection whose request has not come yet may still send one when the daemon stops.
const STOP_GRACE: Duration = Duration::from_secs(1);
/// For an idle connection that is closed to tell the client so.
const GOODBYE_TIME: Duration = Duration::from_secs(2);

/// What a connection is doing. When the connection limit is reached, one that is idle or stalled
/// makes room for a newcomer, and one that is still arriving for a complete request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Its handshake, head or body is not complete.
    Arriving,
    /// It has had an answer and has not sent a byte since.
    Idle,
    /// A complete request is being answered.
    UnderWay,
    /// Its answer has begun, and the client is not taking the rest.
    Stalled,
}

/// All open connections: at most `limit`, and those over the limit.
pub(super) struct Table {
    state: Mutex<State>,
    /// A connection has gone, or somebody may have its place.
    freed: Condvar,
    limit: usize,
}

#[derive(Default)]
struct State {
    slots: HashMap<u64, Slot>,
    next_id: u64,
    regular: Class,
    over_limit: Class,
    /// Connections of each network, those among them that are closed and have yet to notice it.
    of_network: HashMap<IpAddr, usize>,
    /// Complete requests that wait for a place: the first comer gets the first one.
    queue: BTreeSet<u64>,
    /// When one of them got a place.
    last_turn: Option<Instant>,
    stop_at: Option<Instant>,
}

struct Slot {
    stream: Arc<TcpStream>,
    network: IpAddr,
    phase: Phase,
    /// Since when it is in this phase.
    since: Instant,
    deadline: Instant,
    /// Whether the client has sent a byte.
    heard: bool,
    over_limit: bool,
    /// Shut down; its thread has yet to notice.
    closed: bool,
}

/// Whose turn it is to go, the lowest first; among equals who has waited longest.
type Rank = (Order, Instant, u64);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Order {
    Stalled,
    Idle,
    /// It has not sent a byte.
    Silent,
    Arriving,
}

impl Slot {
    /// `None` while its request is under way.
    fn rank(&self, id: u64) -> Option<Rank> {
        let order = match self.phase {
            Phase::UnderWay => return None,
            Phase::Stalled => Order::Stalled,
            Phase::Idle => Order::Idle,
            Phase::Arriving if self.heard => Order::Arriving,
            Phase::Arriving => Order::Silent,
        };
        Some((order, self.since, id))
    }

    /// Its class and rank while it is open.
    fn standing(&self, id: u64) -> Option<(bool, Option<Rank>)> {
        (!self.closed).then(|| (self.over_limit, self.rank(id)))
    }

    fn enter(&mut self, phase: Phase) {
        if self.phase != phase || phase == Phase::Idle {
            (self.phase, self.since) = (phase, Instant::now());
        }
    }

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
}

/// Connections that share a limit, and the order in which they have to go.
#[derive(Default)]
struct Class {
    open: usize,
    waiting: HashMap<IpAddr, BTreeSet<Rank>>,
    /// The networks by how many of their connections wait; among equals by whose turn it is.
    crowds: BTreeSet<(usize, Reverse<Rank>, IpAddr)>,
}

impl Class {
    /// The largest crowd makes room: who opens connections by the thousand evicts its own.
    fn first_to_go(&self) -> Option<(Order, u64)> {
        self.crowds.last().map(|(_, Reverse((order, _, id)), _)| (*order, *id))
    }

    fn rerank(&mut self, network: IpAddr, change: impl FnOnce(&mut BTreeSet<Rank>)) {
        let crowd = |ranks: &BTreeSet<Rank>| {
            ranks.first().map(|first| (ranks.len(), Reverse(*first), network))
        };
        let ranks = self.waiting.entry(network).or_default();
        if let Some(old) = crowd(ranks) {
            self.crowds.remove(&old);
        }
        change(ranks);
        match crowd(ranks) {
            Some(new) => drop(self.crowds.insert(new)),
            None => drop(self.waiting.remove(&network)),
        }
    }
}

impl State {
    /// Changes a connection that is open. `None` if it is not.
    fn change<T>(&mut self, id: u64, change: impl FnOnce(&mut Slot) -> T) -> Option<T> {
        let slot = self.slots.get_mut(&id).filter(|slot| !slot.closed)?;
        let (network, before) = (slot.network, slot.standing(id));
        let result = change(slot);
        let after = slot.standing(id);
        if before != after {
            self.tally(network, before, false);
            self.tally(network, after, true);
        }
        Some(result)
    }

    /// An open connection joins its class, or leaves it.
    fn tally(&mut self, network: IpAddr, standing: Option<(bool, Option<Rank>)>, joins: bool) {
        let Some((over_limit, rank)) = standing else { return };
        let class = self.class(over_limit);
        class.open = if joins { class.open + 1 } else { class.open - 1 };
        if let Some(rank) = rank {
            class.rerank(network, |ranks| match joins {
                true => drop(ranks.insert(rank)),
                false => drop(ranks.remove(&rank)),
            });
        }
    }

    fn class(&mut self, over_limit: bool) -> &mut Class {
        if over_limit { &mut self.over_limit } else { &mut self.regular }
    }

    /// Closes the connection whose turn it is. Whether there is one.
    fn evict(&mut self, over_limit: bool) -> bool {
        let first = self.class(over_limit).first_to_go();
        first.is_some_and(|(_, id)| self.change(id, Slot::close).is_some())
    }

    /// Frees a place for a request, complete or not. A newcomer does not take that of another one,
    /// but a complete request does: the other is over the limit then.
    fn free_place(&mut self, is_complete: bool) -> bool {
        match self.regular.first_to_go() {
            Some((Order::Stalled | Order::Idle, id)) => self.change(id, Slot::close).is_some(),
            Some((_, id)) if is_complete => {
                self.change(id, |slot| slot.over_limit = true).is_some()
            }
            _ => false,
        }
    }
}

impl Table {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), freed: Condvar::new(), limit })
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
        let most = 2 * (self.limit + OVER_LIMIT);
        let own = state.of_network.get(&network).copied().unwrap_or(0);
        if state.slots.len() >= most || own >= most / 4 * 3 {
            return None;
        }
        let is_full = state.regular.open + state.queue.len() >= self.limit;
        let over_limit = is_full && !(state.queue.is_empty() && state.free_place(false));
        if over_limit && state.over_limit.open >= OVER_LIMIT {
            // Those in the queue are told 503 now.
            self.freed.notify_all();
            if !state.evict(true) {
                return None;
            }
        }
        let (id, since, phase) = (state.next_id, Instant::now(), Phase::Arriving);
        let (heard, closed) = (false, false);
        let slot = Slot { stream, network, phase, since, deadline, heard, over_limit, closed };
        state.next_id += 1;
        state.tally(network, slot.standing(id), true);
        state.slots.insert(id, slot);
        *state.of_network.entry(network).or_default() += 1;
        Some(Place { table: Arc::clone(self), id })
    }

    /// Closes up to `count` waiting connections and returns how many: the process has run out of
    /// something.
    pub(super) fn shed(&self, count: usize) -> usize {
        let mut state = lock(&self.state);
        (0..count).take_while(|_| state.evict(true) || state.evict(false)).count()
    }

    /// Closes the connections that wait for their next request.
    pub(super) fn close_idle(&self) {
        self.close(|slot| slot.phase == Phase::Idle);
    }

    /// Closes idle connections, and from now on every other one after its answer.
    pub(super) fn begin_stop(&self) {
        lock(&self.state).stop_at = Some(Instant::now() + STOP_GRACE);
        self.close_idle();
    }

    /// Returns when no connection is left, after at most `patience`.
    pub(super) fn wait_until_empty(&self, patience: Duration) {
        let state = lock(&self.state);
        let some_are_left = |state: &mut State| !state.slots.is_empty();
        drop(self.freed.wait_timeout_while(state, patience, some_are_left));
    }

    /// Closes connections whose time is over.
    pub(super) fn close_late(&self, now: Instant) {
        let stop_at = lock(&self.state).stop_at;
        self.close(|slot| {
            let grace_is_over = stop_at.is_some_and(|at| now >= at);
            let is_waiting = matches!(slot.phase, Phase::Arriving | Phase::Idle);
            now >= slot.deadline || (grace_is_over && is_waiting)
        });
    }

    fn close(&self, which: impl Fn(&Slot) -> bool) {
        let mut state = lock(&self.state);
        let mut ids = Vec::new();
        for (id, slot) in state.slots.iter_mut().filter(|(_, slot)| which(slot)) {
            match slot.closed {
                true => slot.close(),
                false => ids.push(*id),
            }
        }
        for id in ids {
            state.change(id, Slot::close);
        }
        self.freed.notify_all();
    }
}

/// What one client has at hand: an IPv4 address, or an IPv6 network of 64 bits.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into()
        }
        address => address,
    }
}

/// The place of one connection in the table; given back when dropped.
pub(super) struct Place {
    table: Arc<Table>,
    id: u64,
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

    /// The client has sent something.
    ///
    /// # Errors
    /// The place is lost.
    pub(super) fn hear(&self) -> io::Result<()> {
        self.change(|slot| slot.heard = true)
    }

    /// Makes a change. Who is idle or stalled then makes room if a request waits for a place.
    fn change(&self, change: impl FnOnce(&mut Slot)) -> io::Result<()> {
        let mut state = lock(&self.table.state);
        let (wanted, stopping) = (!state.queue.is_empty(), state.stop_at.is_some());
        let kept = state.change(self.id, |slot| {
            change(slot);
            let yields = match slot.phase {
                Phase::Idle => wanted || stopping,
                Phase::Stalled => wanted,
                Phase::Arriving | Phase::UnderWay => false,
            };
            if yields {
                slot.close();
            }
            !slot.closed
        });
        if wanted {
            self.table.freed.notify_all();
        }
        if kept == Some(true) { Ok(()) } else { Err(lost()) }
    }

    /// The request is complete: whether there is a place to answer it from, until `deadline`. One
    /// that is over the limit waits for it.
    ///
    /// # Errors
    /// The place is lost.
    pub(super) fn begin(&self, deadline: Instant) -> io::Result<bool> {
        let start = Instant::now();
        let (id, limit) = (self.id, self.table.limit);
        let mut state = lock(&self.table.state);
        let under_way = |slot: &mut Slot| {
            slot.enter(Phase::UnderWay);
            slot.deadline = deadline;
            slot.over_limit
        };
        if !state.change(id, under_way).ok_or_else(lost)? {
            return Ok(true);
        }
        state.queue.insert(id);
        let has_place = loop {
            let is_first = state.queue.first() == Some(&id);
            if is_first && (state.regular.open < limit || state.free_place(true)) {
                state.last_turn = Some(Instant::now());
                break true;
            }
            let turn = state.last_turn.map_or(start, |at| at.max(start));
            let patience = (start + PLACE_TIME).min(turn + TURN_TIME);
            let left = patience.saturating_duration_since(Instant::now());
            // Nobody waits where others could not even be told.
            if left.is_zero() || state.over_limit.open >= OVER_LIMIT {
                break false;
            }
            let wait = self.table.freed.wait_timeout(state, left);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        };
        state.queue.remove(&id);
        self.table.freed.notify_all();
        state.change(id, |slot| slot.over_limit = !has_place).map(|()| has_place).ok_or_else(lost)
    }

    /// Whether the connection may be kept after its answer.
    pub(super) fn is_kept(&self) -> bool {
        let state = lock(&self.table.state);
        state.stop_at.is_none() && state.queue.is_empty()
    }
}

fn lost() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "another connection has its place")
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = lock(&self.table.state);
        state.change(self.id, |slot| slot.closed = true);
        let slot = state.slots.remove(&self.id);
        if let Some(slot) = slot
            && let Some(count) = state.of_network.get_mut(&slot.network)
        {
            *count -= 1;
            if *count == 0 {
                state.of_network.remove(&slot.network);
            }
        }
        if !state.queue.is_empty() || state.stop_at.is_some() {
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
            Self { listener, table: Table::new(limit), later }
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
            while lock(&site.table.state).queue.is_empty() {
                thread::yield_now();
            }
            assert!(!only.place.is_kept());
            assert!(only.place.enter(Phase::Idle, site.later).is_err(), "another one needs it");
            assert!(waits.join().unwrap().unwrap());
        });
        assert!(later.place.is_kept());
        // One that is not taking its answer goes at once.
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
        site.table.begin_stop();
        assert!(idle.has_lost_its_place() && !idle.is_closed());
        assert!(!silent.has_lost_its_place(), "it may be about to ask");
        site.table.close_late(Instant::now() + STOP_GRACE);
        assert!(silent.has_lost_its_place() && !busy.has_lost_its_place());
        site.table.close_late(Instant::now() + GOODBYE_TIME);
        assert!(idle.is_closed(), "closed although its thread hangs");
        assert!(busy.place.enter(Phase::Idle, site.later).is_err(), "nobody is kept");
        drop((idle, silent));
        site.table.wait_until_empty(Duration::ZERO);
        drop(busy);
        site.table.wait_until_empty(Duration::from_secs(3600));
        assert!(lock(&site.table.state).of_network.is_empty());
    }
}
