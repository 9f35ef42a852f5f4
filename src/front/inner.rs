//! The way from the front door to tiny_http: a private Unix socket and the connections to it; and the
//! clients that wait for its answers.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::unistd::mkdtemp;

use super::connection::Connection;
use crate::{lock, unix};

/// For tiny_http to take a request.
pub(super) const PASS_TIME: Duration = Duration::from_secs(2);

/// A directory of mode 0700 for the inner socket; removed when dropped, and the socket with it.
pub(crate) struct InnerDirectory(PathBuf);

impl InnerDirectory {
    /// Makes it below `parent`.
    pub(crate) fn below(parent: &Path) -> io::Result<Self> {
        Ok(Self(mkdtemp(&parent.join("vpn-daemon.XXXXXX"))?))
    }

    fn socket(&self) -> PathBuf {
        self.0.join("http.sock")
    }
}

impl Drop for InnerDirectory {
    fn drop(&mut self) {
        // Not `remove_dir_all`, which fails when the process is out of descriptors. Nobody is left
        // to tell of an error.
        let _ = fs::remove_file(self.socket());
        let _ = fs::remove_dir(&self.0);
    }
}

/// Clients whose request is with tiny_http, by the number in its header `X-Vpn-Daemon-Connection`. Whoever
/// has the answer takes them out.
pub(crate) type Waiting = Mutex<HashMap<u64, Connection>>;

/// The inner socket and the connection to it.
pub(crate) struct Inner {
    /// Where tiny_http listens.
    socket: PathBuf,
    pub(crate) waiting: Arc<Waiting>,
    /// For all short requests, one behind the other: tiny_http reads the next one at once.
    shared: Mutex<Option<unix::Stream>>,
    /// Held while a new connection is proven.
    connecting: Mutex<()>,
    gone: Box<dyn Fn(&io::Error) + Send + Sync>,
}

impl Inner {
    /// Listens in the directory. `gone` is called when nobody listens any more: tiny_http's
    /// accepting thread panics when it runs out of descriptors or threads, and tells nobody.
    pub(crate) fn open(
        directory: &InnerDirectory,
        gone: impl Fn(&io::Error) + Send + Sync + 'static,
    ) -> io::Result<(Self, UnixListener)> {
        let inner = Self {
            socket: directory.socket(),
            waiting: Arc::default(),
            shared: Mutex::default(),
            connecting: Mutex::default(),
            gone: Box::new(gone),
        };
        let listener = UnixListener::bind(&inner.socket)?;
        Ok((inner, listener))
    }

    /// Passes on a request that tiny_http reads at once.
    pub(super) fn pass(&self, request: &[u8]) -> io::Result<()> {
        let mut shared = lock(&self.shared);
        let inner = shared.take().map_or_else(|| self.connect(PASS_TIME), Ok)?;
        // With the time-out that the socket has from its first request: none is set anew for each.
        (&inner.stream).write_all(request)?;
        *shared = Some(inner);
        Ok(())
    }

    /// A connection on which tiny_http has answered, within `time`.
    pub(super) fn connect(&self, time: Duration) -> io::Result<unix::Stream> {
        // It counts a thread as free until it has woken up: of connections that come at once some
        // would wait until another one is closed. So one comes at a time.
        let _one = lock(&self.connecting);
        self.prove(time / 2).or_else(|_| self.prove(time / 2))
    }

    fn prove(&self, time: Duration) -> io::Result<unix::Stream> {
        let stream = unix::Stream::connect(&self.socket, Instant::now() + time);
        let mut stream = stream.inspect_err(|error| {
            if error.kind() == io::ErrorKind::ConnectionRefused {
                (self.gone)(error);
            }
        })?;
        stream.write_all(b"HEAD /i/node HTTP/1.1\r\nHost: inner\r\n\r\n")?;
        // Nobody reads the rest, or anything else from it.
        let mut status = [0; 12];
        stream.read_exact(&mut status)?;
        match &status == b"HTTP/1.1 200" {
            true => Ok(stream),
            false => Err(io::Error::other("the HTTP server fails")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn nobody_else_gets_in_and_nothing_stays() {
        let directory = InnerDirectory::below(&std::env::temp_dir()).unwrap();
        let path = directory.0.clone();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o700);
        let _inner = Inner::open(&directory, |_| {}).unwrap();
        drop(directory);
        assert!(!path.exists());
    }
}
