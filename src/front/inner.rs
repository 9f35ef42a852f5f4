//! The way from the front door to tiny_http: a private Unix socket and the connections to it.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use nix::unistd::mkdtemp;

use crate::lock;

/// No handler takes this long: a wait beyond it is a defect, not a slow backend.
const PATIENCE: Duration = Duration::from_secs(30);

/// For the first answer on a new connection; it needs no backend.
const PROOF_TIME: Duration = Duration::from_secs(1);

/// Connections kept for the next request once the rush is over.
const KEPT: usize = 4;

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
    socket: PathBuf,
    idle: Mutex<Idle>,
    /// Held while a new connection is proven.
    connecting: Mutex<()>,
    gone: Box<dyn Fn(&io::Error) + Send + Sync>,
}

#[derive(Default)]
struct Idle {
    streams: Vec<UnixStream>,
    /// Fewest streams that were idle at one time since the last [`Inner::trim`]: nobody needed
    /// these.
    unused: usize,
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

    /// Where tiny_http listens.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// A connection without a request under way.
    pub(super) fn take(&self) -> io::Result<UnixStream> {
        let idle = {
            let mut idle = lock(&self.idle);
            let stream = idle.streams.pop();
            idle.unused = idle.unused.min(idle.streams.len());
            stream
        };
        if let Some(stream) = idle {
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
        let mut answer = Vec::new();
        let mut piece = [0; 512];
        while !answer.ends_with(b"\r\n\r\n") {
            match stream.read(&mut piece)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => answer.extend_from_slice(&piece[..count]),
            }
            if answer.len() > 4 * piece.len() {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
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
        lock(&self.idle).streams.push(stream);
    }

    /// Closes all but a few of the connections that nobody has needed since the last call. Whether
    /// only these few are left.
    pub(super) fn trim(&self) -> bool {
        let mut idle = lock(&self.idle);
        let kept = idle.streams.len() - idle.unused.saturating_sub(KEPT).min(idle.streams.len());
        let surplus = idle.streams.split_off(kept);
        idle.unused = kept;
        drop(idle);
        drop(surplus);
        kept <= KEPT
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
        let streams: Vec<_> = (0..20).map(|_| inner.take().unwrap()).collect();
        streams.into_iter().for_each(|stream| inner.give_back(stream));
        inner.trim();
        assert_eq!(lock(&inner.idle).streams.len(), 20, "all were needed a moment ago");
        let needed: Vec<_> = (0..10).map(|_| inner.take().unwrap()).collect();
        needed.into_iter().for_each(|stream| inner.give_back(stream));
        inner.trim();
        assert_eq!(lock(&inner.idle).streams.len(), 10 + KEPT);
        inner.trim();
        assert_eq!(lock(&inner.idle).streams.len(), KEPT);
    }
}
