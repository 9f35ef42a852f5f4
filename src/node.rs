//! How the node is: load, CPUs, uptime, maintenance mode.

use std::fs;
use std::path::Path;

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

/// The operator creates this path to take the node out of service.
pub const MAINTENANCE_FLAG: &str = "/run/vpn-daemon/maintenance-mode";

/// One number of `/proc/loadavg`, kept in hundredths so that arithmetic on it is exact.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Load {
    hundredths: u64,
}

impl Load {
    /// The load as a number, e.g. 0.55.
    #[allow(clippy::cast_precision_loss)] // a load of 2^53 hundredths does not occur
    pub fn value(self) -> f64 {
        self.hundredths as f64 / 100.0
    }

    /// `100 * load / cpu_count`, rounded down.
    pub fn relative(self, cpu_count: u64) -> u64 {
        self.hundredths / cpu_count.max(1)
    }
}

/// CPUs that this process may run on: its affinity mask, whatever a cgroup's quota is.
pub fn cpu_count() -> u64 {
    let Ok(allowed) = sched_getaffinity(Pid::from_raw(0)) else {
        // More CPUs than the mask of nix holds (1024).
        return std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    };
    let count = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).count();
    count.max(1) as u64
}

/// Load averages over 1, 5 and 15 minutes; `None` where `/proc/loadavg` cannot be read.
pub fn load_average() -> Option<[Load; 3]> {
    parse_load_average(&fs::read_to_string("/proc/loadavg").ok()?)
}

/// Whole seconds since boot; 0 where `/proc/uptime` cannot be read.
pub fn uptime() -> u64 {
    fs::read_to_string("/proc/uptime").ok().and_then(|text| parse_uptime(&text)).unwrap_or(0)
}

/// Whether the operator has taken the node out of service.
pub fn maintenance_mode() -> bool {
    Path::new(MAINTENANCE_FLAG).exists()
}

fn parse_load_average(text: &str) -> Option<[Load; 3]> {
    let mut numbers = text.split(' ').map(parse_load);
    Some([numbers.next()??, numbers.next()??, numbers.next()??])
}

/// The kernel prints every load with exactly two decimals (proc_loadavg(5)).
fn parse_load(text: &str) -> Option<Load> {
    let (whole, decimals) = text.split_once('.')?;
    if decimals.len() != 2 || !(whole.bytes().chain(decimals.bytes())).all(|b| b.is_ascii_digit()) {
        return None;
    }
    let whole: u64 = whole.parse().ok()?;
    let decimals: u64 = decimals.parse().ok()?;
    Some(Load { hundredths: whole.checked_mul(100)?.checked_add(decimals)? })
}

fn parse_uptime(text: &str) -> Option<u64> {
    text.split(['.', ' ']).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_exact() {
        let loads = parse_load_average("0.55 0.76 0.75 1/123 4567\n").unwrap();
        assert_eq!(loads.map(Load::value), [0.55, 0.76, 0.75]);
        assert_eq!(loads.map(|load| load.relative(2)), [27, 38, 37]);
        // 0.29 * 100 is 28.999… in floating point.
        assert_eq!(parse_load("0.29").unwrap().relative(1), 29);
        assert_eq!(parse_load("12.00").unwrap().relative(8), 150);
        assert_eq!(parse_load("0.00").unwrap().relative(0), 0);
    }

    #[test]
    fn nonsense_is_no_load() {
        for text in ["", "0.55", "0.55 0.76", "a.bc 0.00 0.00", "0.5 0.7 0.7", "-0.55 0.76 0.75"] {
            assert_eq!(parse_load_average(text), None, "{text:?}");
        }
        assert_eq!(parse_load("99999999999999999999.00"), None);
        assert_eq!(parse_load("184467440737095516.99"), None);
    }

    #[test]
    fn uptime_is_whole_seconds() {
        assert_eq!(parse_uptime("3828.91 7011.02\n"), Some(3828));
        assert_eq!(parse_uptime("0.01 0.00\n"), Some(0));
        assert_eq!(parse_uptime("x"), None);
    }

    #[test]
    fn this_machine_has_cpus() {
        let all = fs::read_to_string("/proc/cpuinfo").unwrap();
        let online = all.lines().filter(|line| line.starts_with("processor")).count() as u64;
        assert!((1..=online).contains(&cpu_count()));
    }
}
