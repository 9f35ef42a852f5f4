//! A Unix socket with one deadline for connecting, reading and writing.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

/// Longest socket time-out: the kernel rounds those of some seconds up by as much as a quarter of a
/// second. Below a second, since `connect` sets its microseconds alone.
const SLICE: Duration = Duration::from_millis(500);

/// A connection of which every call ends by `deadline`, with [`ErrorKind::TimedOut`] if need be.
pub(crate) struct Stream {
    pub(crate) stream: UnixStream,
    pub(crate) deadline: Instant,
}

impl Stream {
    /// Connects. `UnixStream::connect` would wait without limit where the backlog is full.
    pub(crate) fn connect(path: &Path, deadline: Instant) -> io::Result<Self> {
        let kind = SockType::Stream;
        let socket = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
        let address = UnixAddr::new(path)?;
        until(deadline, |left| {
            let left = TimeVal::new(0, left.subsec_micros().into());
            setsockopt(&socket, sockopt::SendTimeout, &left)?;
            connect(socket.as_raw_fd(), &address).map_err(Errno::into)
        })?;
        Ok(Self { stream: socket.into(), deadline })
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        until(self.deadline, |left| {
            self.stream.set_read_timeout(Some(left))?;
            self.stream.read(buffer)
        })
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        until(self.deadline, |left| {
            self.stream.set_write_timeout(Some(left))?;
            self.stream.write(buffer)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tries again, each time with the time-out that it is given.
fn until<T>(
    deadline: Instant,
    mut attempt: impl FnMut(Duration) -> io::Result<T>,
) -> io::Result<T> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).min(SLICE);
        // A socket time-out below a microsecond would mean none.
        if left < Duration::from_micros(1) {
            return Err(io::Error::new(ErrorKind::TimedOut, "no answer in time"));
        }
        match attempt(left) {
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread;

    #[test]
    fn every_wait_has_an_end() {
        let path = std::env::temp_dir().join(format!("unix-{}.sock", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let soon = || Instant::now() + Duration::from_millis(50);
        // Nobody accepts: at the end the backlog is full.
        let mut held = Vec::new();
        let full = loop {
            match Stream::connect(&path, soon()) {
                Ok(stream) => held.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), ErrorKind::TimedOut);
        let first = held.first_mut().unwrap();
        first.deadline = soon();
        assert_eq!(first.read(&mut [0]).unwrap_err().kind(), ErrorKind::TimedOut);
        first.deadline = soon();
        let error = loop {
            if let Err(error) = first.write(&[0; 4096]) {
                break error;
            }
        };
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        // A drip does not move the deadline.
        let mut dripping = listener.accept().unwrap().0;
        let drip = thread::spawn(move || {
            while dripping.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });
        first.deadline = soon();
        assert_eq!(first.read_to_end(&mut Vec::new()).unwrap_err().kind(), ErrorKind::TimedOut);
        drop((held, listener));
        drip.join().unwrap();
        let stale = Stream::connect(&path, soon()).map(|_| ()).unwrap_err();
        assert_eq!(stale.kind(), ErrorKind::ConnectionRefused);
        std::fs::remove_file(path).unwrap();
    }
}
