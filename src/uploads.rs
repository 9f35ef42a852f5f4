//! Peer lists that are being read: how much memory they may take in all, and who makes room.
//!
//! A list in memory is at most some three times as long as its text. What counts is what has
//! arrived, so that a client that only promises a long body takes no room from others.

use std::io::{self, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::wireguard::{AllowedIp, PublicKey, WantedBuilder};

/// Bytes of all bodies together: two of the longest.
const LIMIT: usize = 64 << 20;

/// A client that has taken longer has given up itself: its list makes room when others need it.
const PATIENCE: Duration = Duration::from_secs(4);

/// All peer lists that are being read or applied.
#[derive(Debug, Default)]
pub struct Uploads(Mutex<Vec<Arc<Entry>>>);

#[derive(Debug)]
struct Entry {
    since: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What has arrived.
    bytes: usize,
    /// `None` once it is complete, or has made room.
    list: Option<WantedBuilder>,
}

/// One list that is being read; what it takes is free again when this is dropped.
#[derive(Debug)]
pub struct Upload<'a> {
    uploads: &'a Uploads,
    entry: Arc<Entry>,
}

impl Uploads {
    /// A list of which nothing has arrived.
    pub fn begin(&self) -> Upload<'_> {
        let state = State { bytes: 0, list: Some(WantedBuilder::default()) };
        let entry = Arc::new(Entry { since: Instant::now(), state: Mutex::new(state) });
        lock(&self.0).push(Arc::clone(&entry));
        Upload { uploads: self, entry }
    }

    /// Counts what has arrived for one; it has lost its list where there is no room, or where it has
    /// made room before.
    fn count(&self, upload: &Arc<Entry>, bytes: usize) {
        let entries = lock(&self.0);
        lock(&upload.state).bytes += bytes;
        let mut total: usize = entries.iter().map(|entry| lock(&entry.state).bytes).sum();
        // In order of age.
        for entry in entries.iter() {
            if total <= LIMIT || entry.since.elapsed() < PATIENCE {
                break;
            }
            if !Arc::ptr_eq(entry, upload) {
                total -= lock(&entry.state).make_room();
            }
        }
        if total > LIMIT {
            lock(&upload.state).make_room();
        }
    }
}

impl State {
    fn make_room(&mut self) -> usize {
        // A complete list is on its way to the device.
        self.list.take().map_or(0, |_| std::mem::take(&mut self.bytes))
    }
}

impl Upload<'_> {
    /// The body, counted as it is read. It fails when the list has had to make room.
    pub fn metered<'a>(&'a self, body: &'a mut dyn Read) -> impl Read + 'a {
        Metered { body, upload: self }
    }

    /// See [`WantedBuilder::allowed_ip`].
    pub fn allowed_ip(&self, allowed_ip: AllowedIp) {
        if let Some(list) = &mut lock(&self.entry.state).list {
            list.allowed_ip(allowed_ip);
        }
    }

    /// See [`WantedBuilder::peer`].
    pub fn peer(&self, key: PublicKey) {
        if let Some(list) = &mut lock(&self.entry.state).list {
            list.peer(key);
        }
    }

    /// Takes the list, which stays counted; `None` where it has had to make room.
    pub fn finish(&self) -> Option<WantedBuilder> {
        lock(&self.entry.state).list.take()
    }
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        lock(&self.uploads.0).retain(|entry| !Arc::ptr_eq(entry, &self.entry));
    }
}

struct Metered<'a> {
    body: &'a mut dyn Read,
    upload: &'a Upload<'a>,
}

impl Read for Metered<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.body.read(buffer)?;
        self.upload.uploads.count(&self.upload.entry, count);
        match lock(&self.upload.entry.state).list {
            Some(_) => Ok(count),
            None => Err(io::ErrorKind::OutOfMemory.into()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that began longer ago than anyone waits.
    fn begin_long_ago(uploads: &Uploads) -> Upload<'_> {
        let mut upload = uploads.begin();
        let mut entries = lock(&uploads.0);
        entries.pop();
        let state = State { bytes: 0, list: Some(WantedBuilder::default()) };
        let since = Instant::now().checked_sub(PATIENCE).unwrap();
        upload.entry = Arc::new(Entry { since, state: Mutex::new(state) });
        entries.push(Arc::clone(&upload.entry));
        drop(entries);
        upload
    }

    fn arrives(upload: &Upload, bytes: usize) -> bool {
        upload.uploads.count(&upload.entry, bytes);
        lock(&upload.entry.state).list.is_some()
    }

    #[test]
    fn the_slow_make_room_for_the_fast() {
        let uploads = Uploads::default();
        let slow = begin_long_ago(&uploads);
        let slow_too = begin_long_ago(&uploads);
        let fast = uploads.begin();
        assert!(arrives(&slow, LIMIT / 2) && arrives(&slow_too, LIMIT / 2));
        assert!(arrives(&fast, 1));
        assert!(slow.finish().is_none() && !arrives(&slow, 0));
        assert!(arrives(&slow_too, 0));
        drop(slow);

        // Nobody makes room for one that is as young.
        assert!(arrives(&fast, LIMIT / 2 - 1));
        let late = uploads.begin();
        assert!(arrives(&late, 1) && slow_too.finish().is_none());
        assert!(arrives(&late, LIMIT / 2 - 1));
        let last = uploads.begin();
        assert!(!arrives(&last, 1));
        drop(last);

        // A complete list keeps its room until it is done with.
        assert!(late.finish().is_some());
        assert!(!arrives(&uploads.begin(), 1));
        drop(late);
        assert!(arrives(&uploads.begin(), 1) && arrives(&fast, 0));
        drop((fast, slow_too));
        assert!(lock(&uploads.0).is_empty());
    }

    #[test]
    fn reading_ends_without_room() {
        let uploads = Uploads::default();
        let upload = begin_long_ago(&uploads);
        let mut text = &b"abcdef"[..];
        let mut reader = upload.metered(&mut text);
        let mut piece = [0; 3];
        assert_eq!(reader.read(&mut piece).unwrap(), 3);
        assert_eq!(lock(&upload.entry.state).bytes, 3);
        let other = uploads.begin();
        assert!(arrives(&other, LIMIT));
        assert_eq!(reader.read(&mut piece).unwrap_err().kind(), io::ErrorKind::OutOfMemory);
    }
}
