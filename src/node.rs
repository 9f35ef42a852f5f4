//! How the node is: load, CPUs, uptime, maintenance mode. Without `/proc`, of which the service sees
//! its own processes alone.

use std::path::Path;
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::sysinfo::sysinfo;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

/// The operator creates this path to take the node out of service.
pub(crate) const MAINTENANCE_FLAG: &str = "/run/vpn-daemon/maintenance-mode";

/// Load averages over 1, 5 and 15 minutes in hundredths, so that arithmetic on them is exact; empty
/// where the kernel does not say.
pub(crate) fn load_average() -> Vec<u32> {
    let Ok(info) = sysinfo() else { return Vec::new() };
    <[f64; 3]>::from(info.load_average()).map(hundredths).to_vec()
}

/// Rounds as the kernel does for `/proc/loadavg` (fs/proc/loadavg.c), from its own unit.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // times 2048 it is whole, and not negative
fn hundredths(load: f64) -> u32 {
    let fixed_point = (load * 2048.0) as u64 + 2048 / 200;
    (fixed_point * 100 / 2048) as u32
}

/// Whole seconds since boot, as in `/proc/uptime`; sysinfo(2) rounds them up.
pub(crate) fn uptime() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| Duration::from(time).as_secs())
}

/// CPUs that this process may run on: its affinity mask, whatever a cgroup's quota is.
pub(crate) fn cpu_count() -> u64 {
    let Ok(allowed) = sched_getaffinity(Pid::from_raw(0)) else {
        // More CPUs than the mask of nix holds (1024).
        return std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    };
    let count = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).count();
    count.max(1) as u64
}

/// Whether the operator has taken the node out of service.
pub(crate) fn maintenance_mode() -> bool {
    Path::new(MAINTENANCE_FLAG).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_exact_and_rounded_as_in_proc_loadavg() {
        // 2048ths, and what the kernel prints for them.
        for (fixed_point, printed) in [
            (0.0, 0.0),
            (10.0, 0.0),
            (11.0, 0.01),
            (584.0, 0.29),
            (594.0, 0.29),
            (605.0, 0.3),
            (2037.0, 0.99),
            (2038.0, 1.0),
            (24576.0, 12.0),
        ] {
            let printed = (f64::from(hundredths(fixed_point / 2048.0)) / 100.0, printed);
            assert_eq!(printed.0, printed.1, "{fixed_point}");
        }
    }
}
