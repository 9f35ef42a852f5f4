//! Turns of the daemon and its floor, and what to make of their figures.

use std::time::{Duration, Instant};

/// The figures of several rounds: the daemon's and its floor's, in pairs.
pub struct Turns(Vec<(f64, f64)>);

impl Turns {
    /// Measures both, one after the other, `rounds` times; every second round the floor begins.
    pub fn take(
        rounds: usize,
        mut daemon: impl FnMut() -> f64,
        mut floor: impl FnMut() -> f64,
    ) -> Self {
        let round = |number| {
            if number % 2 == 0 {
                let daemon = daemon();
                (daemon, floor())
            } else {
                let floor = floor();
                (daemon(), floor)
            }
        };
        Self((0..rounds).map(round).collect())
    }

    pub fn daemon(&self) -> f64 {
        median(self.0.iter().map(|(daemon, _)| *daemon))
    }

    pub fn floor(&self) -> f64 {
        median(self.0.iter().map(|(_, floor)| *floor))
    }

    /// The median of the rounds' own ratios: what slows a whole round slows both.
    pub fn ratio(&self) -> f64 {
        median(self.0.iter().map(|(daemon, floor)| daemon / floor))
    }
}

pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// Seconds that `work` takes.
pub fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Seconds, with a unit that suits them.
pub fn time(seconds: f64) -> String {
    match Duration::try_from_secs_f64(seconds).unwrap_or_default().as_micros() {
        0..100 => format!("{:.1} µs", seconds * 1e6),
        100..1_000 => format!("{:.0} µs", seconds * 1e6),
        1_000..100_000 => format!("{:.1} ms", seconds * 1e3),
        100_000..1_000_000 => format!("{:.0} ms", seconds * 1e3),
        _ => format!("{seconds:.2} s"),
    }
}
