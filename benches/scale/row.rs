//! A row of the table: rounds in which the daemon and its floor took turns, and what they tell.

use std::fmt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Unit {
    /// Seconds: the daemon may take `limit` times as many as the floor.
    Time,
    /// Per second: the daemon has to do `limit` times as many as the floor.
    Rate,
    /// MiB, of which there may be `limit`; the floor is 1.
    Size,
}

#[derive(Serialize, Deserialize)]
pub struct Row {
    pub unit: Unit,
    pub work: String,
    /// Number of peers, clients or connections; 0 where there are none.
    pub amount: usize,
    pub floor: String,
    pub limit: f64,
    /// Of each round: what was measured of the daemon, and of the floor.
    pub rounds: Vec<(f64, f64)>,
}

pub const HEAD: &str = "\
| work                                        |  amount | the daemon |    floor   | which is                        |  ratio |   limit   | verdict |
| ------------------------------------------- | ------: | ---------: | ---------: | ------------------------------- | -----: | --------: | ------- |";
pub const OVER: &str = "OVER";

impl Row {
    pub fn new(
        unit: Unit,
        work: &str,
        amount: usize,
        floor: &str,
        limit: f64,
        rounds: Vec<(f64, f64)>,
    ) -> Self {
        Self { unit, work: work.to_owned(), amount, floor: floor.to_owned(), limit, rounds }
    }

    /// The medians of the rounds: of the daemon, of the floor.
    pub fn medians(&self) -> (f64, f64) {
        let median = |mut values: Vec<f64>| {
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let (daemon, floor) = self.rounds.iter().copied().unzip();
        (median(daemon), median(floor))
    }

    /// "ok"; "noise" where the ratio of the medians is beyond the limit, but that of less than three
    /// in four rounds is, so that a busy machine may be to blame; or [`OVER`].
    pub fn verdict(&self) -> &'static str {
        let is_beyond = |(daemon, floor): (f64, f64)| match self.unit {
            Unit::Rate => daemon / floor < self.limit,
            _ => daemon / floor > self.limit,
        };
        let beyond = self.rounds.iter().filter(|round| is_beyond(**round)).count();
        match is_beyond(self.medians()) {
            false => "ok",
            true if beyond * 4 < self.rounds.len() * 3 => "noise",
            true => OVER,
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ((daemon, floor), limit) = (self.medians(), self.limit);
        let (ratio, percent) = (daemon / floor, 100.0 * daemon / floor);
        let [daemon, floor, ratio, limit] = match self.unit {
            Unit::Time => {
                [time(daemon), time(floor), format!("{ratio:.2} ×"), format!("≤ {limit} ×")]
            }
            Unit::Rate => [
                format!("{daemon:.0}/s"),
                format!("{floor:.0}/s"),
                format!("{percent:.0} %"),
                format!("≥ {:.0} %", 100.0 * limit),
            ],
            Unit::Size => {
                [format!("{daemon:.1} MiB"), String::new(), String::new(), format!("≤ {limit} MiB")]
            }
        };
        let amount = if self.amount == 0 { String::new() } else { self.amount.to_string() };
        let (work, which, verdict) = (&self.work, &self.floor, self.verdict());
        write!(f, "| {work:43} | {amount:>7} | {daemon:>10} | {floor:>10} | {which:31} ")?;
        write!(f, "| {ratio:>6} | {limit:>9} | {verdict:7} |")
    }
}

/// Measures both, one after the other, `rounds` times; every second round the floor begins.
pub fn turns(
    rounds: usize,
    mut daemon: impl FnMut() -> f64,
    mut floor: impl FnMut() -> f64,
) -> Vec<(f64, f64)> {
    let round = |number| match number % 2 {
        0 => (daemon(), floor()),
        _ => {
            let floor = floor();
            (daemon(), floor)
        }
    };
    (0..rounds).map(round).collect()
}

/// Seconds that `work` takes.
pub fn seconds<T>(work: impl FnOnce() -> T) -> f64 {
    let start = Instant::now();
    drop(work());
    start.elapsed().as_secs_f64()
}

/// Seconds, with a unit that suits them.
pub fn time(seconds: f64) -> String {
    format!("{:.1?}", Duration::from_secs_f64(seconds))
}
