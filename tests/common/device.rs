//! A scripted WireGuard device of user space.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test target uses its part

use std::fs::{self, Permissions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// Its socket is removed when dropped.
pub struct FakeDevice {
    pub name: String,
    pub socket: PathBuf,
}

impl FakeDevice {
    /// One that answers every request with the same.
    pub fn start(answer: String) -> Self {
        let device = Self::stale();
        fs::remove_file(&device.socket).unwrap();
        let listener = UnixListener::bind(&device.socket).unwrap();
        fs::set_permissions(&device.socket, Permissions::from_mode(0o777)).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                // A caller that cannot wait goes away.
                let _ = stream.read_exact(&mut [0; b"get=1\n\n".len()]);
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        device
    }

    /// A socket without a process behind it.
    pub fn stale() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vd{}.{number}", std::process::id());
        fs::create_dir_all("/var/run/wireguard").unwrap();
        let socket = PathBuf::from(format!("/var/run/wireguard/{name}.sock"));
        drop(UnixListener::bind(&socket).unwrap());
        Self { name, socket }
    }
}

impl Drop for FakeDevice {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.socket);
    }
}
