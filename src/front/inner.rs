//! The way from the front door to tiny_http: a private Unix socket and the connections to it.

use std::fs;
use std::io::{self, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::unistd::mkdtemp;

use super::connection::read_lines;
use crate::lock;

/// No handler takes this long: a wait beyond it is a defect, not a slow backend.
const PATIENCE: Duration = Duration::from_secs(30);

/// For the first answer on a new connection; it needs no backend.
const PROOF_TIME: Duration = Duration::from_secs(1);

/// Connections kept for the next request once the rush is over.
const KEPT: usize = 4;
/// How long the others wait for one.
const SPARE_TIME: Duration = Duration::from_secs(1);

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

/// The inner socket and the connections to it that wait for a request.
pub(crate) struct Inner {
    /// Where tiny_http listens.
    pub(crate) socket: PathBuf,
    /// The last one that had a request is taken first.
    idle: Mutex<Vec<(UnixStream, Instant)>>,
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
            idle: Mutex::default(),
            connecting: Mutex::default(),
            gone: Box::new(gone),
        };
        let listener = UnixListener::bind(&inner.socket)?;
        Ok((inner, listener))
    }

    /// A connection without a request under way.
    pub(super) fn take(&self) -> io::Result<UnixStream> {
        if let Some((stream, _)) = lock(&self.idle).pop() {
            return Ok(stream);
        }
        // tiny_http counts a thread as free until it has woken up: of connections that come at
        // once some would wait until another one is closed. So one comes at a time, and is used
        // when it has been answered once.
        let _one = lock(&self.connecting);
        let stream = self.prove().or_else(|_| self.prove())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// A new connection that has a thread at the other end.
    fn prove(&self) -> io::Result<UnixStream> {
        let mut stream = self.connect()?;
        stream.set_read_timeout(Some(PROOF_TIME))?;
        stream.set_write_timeout(Some(PROOF_TIME))?;
        stream.write_all(b"HEAD / HTTP/1.1\r\nHost: inner\r\n\r\n")?;
        read_lines(&mut BufReader::new(&stream))?;
        Ok(stream)
    }

    fn connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect(&self.socket).inspect_err(|error| {
            if error.kind() == io::ErrorKind::ConnectionRefused {
                (self.gone)(error);
            }
        })
    }

    /// Finds out whether anybody listens: an answer has not come.
    pub(super) fn probe(&self) {
        drop(self.connect());
    }

    /// Takes back a connection whose answer has been read to its last byte.
    pub(super) fn give_back(&self, stream: UnixStream) {
        lock(&self.idle).push((stream, Instant::now()));
    }

    /// Closes all but a few of the connections that nobody has needed for a while.
    pub(super) fn trim(&self) {
        let mut idle = lock(&self.idle);
        let old = idle.iter().take_while(|(_, used)| used.elapsed() > SPARE_TIME).count();
        idle.drain(..old.saturating_sub(KEPT));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
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

    #[test]
    fn what_nobody_needed_is_closed() {
        let directory = InnerDirectory::below(&std::env::temp_dir()).unwrap();
        let (inner, listener) = Inner::open(&directory, |_| {}).unwrap();
        let serve = move || {
            let mut kept = Vec::new();
            while let Ok((mut stream, _)) = listener.accept() {
                let _ = stream.read(&mut [0; 64]);
                let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\n\r\n");
                kept.push(stream);
            }
        };
        std::thread::spawn(serve);
        let take = |count| (0..count).map(|_| inner.take().unwrap()).collect::<Vec<_>>();
        take(20).into_iter().for_each(|stream| inner.give_back(stream));
        inner.trim();
        assert_eq!(lock(&inner.idle).len(), 20, "all were needed a moment ago");
        let held = take(6);
        std::thread::sleep(SPARE_TIME);
        held.into_iter().for_each(|stream| inner.give_back(stream));
        inner.trim();
        assert_eq!(lock(&inner.idle).len(), KEPT + 6);
        std::thread::sleep(SPARE_TIME);
        inner.trim();
        assert_eq!(lock(&inner.idle).len(), KEPT);
    }
}
