//! A Unix socket with one deadline for connecting, reading and writing.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

/// Longest socket time-out: the kernel rounds those of some seconds up by a quarter of a second. Less
/// than a second.
const SLICE: Duration = Duration::from_millis(500);

/// A connection of which every call ends by `deadline`, with [`ErrorKind::TimedOut`] if need be.
pub(crate) struct Stream {
    stream: UnixStream,
    pub(crate) deadline: Instant,
}

impl Stream {
    /// Connects. `UnixStream::connect` would wait without limit where the backlog is full.
    pub(crate) fn connect(path: &Path, deadline: Instant) -> io::Result<Self> {
        let kind = SockType::Stream;
        let socket = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
        let address = UnixAddr::new(path)?;
        loop {
            let left = time_left(deadline)?.min(SLICE).as_micros();
            let left = TimeVal::new(0, i64::try_from(left).unwrap_or(i64::MAX));
            setsockopt(&socket, sockopt::SendTimeout, &left)?;
            match connect(socket.as_raw_fd(), &address) {
                Ok(()) => break,
                // The backlog is full.
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(true)?;
        Ok(Self { stream, deadline })
    }

    /// Does the operation once the socket is ready for it.
    fn when_ready<T>(
        &mut self,
        event: PollFlags,
        mut operation: impl FnMut(&mut UnixStream) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match operation(&mut self.stream) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => return result,
            }
            let left = time_left(self.deadline)? + Duration::from_millis(1);
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            poll(&mut [PollFd::new(self.stream.as_fd(), event)], left)?;
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        time_left(self.deadline)?;
        self.when_ready(PollFlags::POLLIN, |stream| stream.read(buffer))
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        time_left(self.deadline)?;
        self.when_ready(PollFlags::POLLOUT, |stream| stream.write(buffer))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn time_left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    // A socket time-out below a microsecond would mean none.
    if left < Duration::from_micros(1) { Err(timed_out()) } else { Ok(left) }
}

fn timed_out() -> io::Error {
    io::Error::new(ErrorKind::TimedOut, "no answer in time")
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
