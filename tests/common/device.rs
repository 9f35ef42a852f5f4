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
    /// One that gives this list, and takes every change.
    pub fn start(list: String) -> Self {
        let (device, listener) = Self::hanging();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, mut request) = (stream.unwrap(), [0; 4096]);
                // A caller that cannot wait goes away.
                let _ = stream.read(&mut request);
                let answer = if request.starts_with(b"get=1") { &list } else { "errno=0\n\n" };
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        device
    }

    /// One whose process says nothing, as long as the listener is kept.
    pub fn hanging() -> (Self, UnixListener) {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vd{}.{number}", std::process::id());
        fs::create_dir_all("/var/run/wireguard").unwrap();
        let socket = PathBuf::from(format!("/var/run/wireguard/{name}.sock"));
        let listener = UnixListener::bind(&socket).unwrap();
        fs::set_permissions(&socket, Permissions::from_mode(0o777)).unwrap();
        (Self { name, socket }, listener)
    }

    /// A socket without a process behind it.
    pub fn stale() -> Self {
        Self::hanging().0
    }
}

impl Drop for FakeDevice {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.socket);
    }
}
