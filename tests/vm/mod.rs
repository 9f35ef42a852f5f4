//! A throw-away Linux machine in QEMU: Debian's kernel, an initramfs of programs from this host,
//! the console as a stream of lines. It needs neither root nor KVM nor a network.
//!
//! `tests/install-deps` puts the kernel under `target/kernel`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(dead_code, reason = "each test or bench that includes this file uses a part of it")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// What `init` prints before the exit status of the command that it ran.
const END_MARKER: &str = "guest ended with status ";

/// The directory that cargo builds into.
pub fn target_dir() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().to_owned()
}

/// A kernel image, and the tree of its modules with `modules.dep`.
pub struct Kernel {
    image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// The kernel that `tests/install-deps` unpacked, or the one that `make test-versions` names.
    pub fn find() -> Self {
        let named = std::env::var_os("KERNEL").map(PathBuf::from);
        let root = named.unwrap_or_else(|| target_dir().join("kernel"));
        let only = |dir: &str, prefix: &str| {
            let dir = root.join(dir);
            let entries = fs::read_dir(&dir).unwrap_or_else(|e| {
                panic!("{}: {e}; run tests/install-deps, it fetches a kernel", dir.display())
            });
            entries
                .map(|entry| entry.unwrap().path())
                .find(|path| path.file_name().unwrap().to_string_lossy().starts_with(prefix))
                .unwrap_or_else(|| panic!("{} holds no {prefix}*", dir.display()))
        };
        Self { image: only("boot", "vmlinuz"), modules: only("lib/modules", "") }
    }

    /// The files of these modules and of all that they depend on, in an order that loads.
    /// A module that is built into the kernel has no file.
    fn module_files(&self, names: &[&str]) -> Vec<PathBuf> {
        let read = |file: &str| fs::read_to_string(self.modules.join(file)).unwrap();
        let (dependencies, builtin) = (read("modules.dep"), read("modules.builtin"));
        let mut files = Vec::new();
        for name in names {
            let file = format!("/{name}.ko");
            if builtin.lines().any(|line| line.ends_with(&file)) {
                continue;
            }
            // "module: dependency dependency …", the deepest dependency last.
            let (module, needed) = dependencies
                .lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(module, _)| module.ends_with(&file))
                .unwrap_or_else(|| panic!("{} has no module {name}", self.modules.display()));
            for file in needed.split_whitespace().rev().chain([module]) {
                let file = self.modules.join(file);
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
        files
    }
}

/// The machine's root file system: files at the paths that they have on the host, so that
/// compiled-in paths hold in both. Written as a cpio archive ("newc", see the kernel's
/// `Documentation/driver-api/early-userspace/buffer-format.rst`).
#[derive(Default)]
pub struct Initramfs {
    entries: BTreeMap<PathBuf, (u32, Vec<u8>)>,
}

impl Initramfs {
    const DIRECTORY: u32 = 0o040_755;
    const EXECUTABLE: u32 = 0o100_755;

    /// Busybox, these modules (loaded at boot with what they depend on), and an `init` that runs
    /// `command` (a line of shell), prints its exit status and powers off.
    pub fn new(kernel: &Kernel, modules: &[&str], command: &str) -> Self {
        let mut initramfs = Self::default();
        for directory in ["/dev", "/proc", "/sys", "/run", "/tmp", "/var/run", "/bin", "/sbin"] {
            initramfs.add(directory.into(), Self::DIRECTORY, Vec::new());
        }
        let busybox = fs::read(which("busybox")).unwrap();
        initramfs.add("/bin/busybox".into(), Self::EXECUTABLE, busybox);
        let mut load = String::new();
        for (number, file) in kernel.module_files(modules).iter().enumerate() {
            let path = format!("/modules/{number}.ko");
            load += &format!("insmod {path} || echo 'cannot load {}'\n", file.display());
            initramfs.add(path.into(), Self::EXECUTABLE, fs::read(file).unwrap());
        }
        // Newer kernels make a thread for each WireGuard peer (napi), more than 1 GiB allows.
        let init = format!(
            "#!/bin/busybox sh\n\
             /bin/busybox --install -s /bin\n\
             export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n\
             mount -t proc proc /proc\n\
             echo 50000 >/proc/sys/kernel/threads-max\n\
             mount -t sysfs sys /sys\n\
             mount -t devtmpfs dev /dev\n\
             ln -s /proc/self/fd /dev/fd; ln -s fd/0 /dev/stdin; ln -s fd/1 /dev/stdout\n\
             {load}\
             ({command})\n\
             echo \"{END_MARKER}$?\"\n\
             poweroff -f\n"
        );
        initramfs.add("/init".into(), Self::EXECUTABLE, init.into_bytes());
        initramfs
    }

    /// Adds a program of the host with its shared libraries and its loader.
    pub fn program(&mut self, path: &Path) {
        let ldd = Command::new("ldd").arg(path).output().expect("ldd is part of the C library");
        // "name => /path (address)", or "/path (address)" for the loader.
        for word in String::from_utf8_lossy(&ldd.stdout).split_whitespace() {
            if word.starts_with('/') && !word.ends_with(':') {
                self.add(word.into(), Self::EXECUTABLE, fs::read(word).unwrap());
            }
        }
        self.add(path.to_owned(), Self::EXECUTABLE, fs::read(path).unwrap());
    }

    fn add(&mut self, path: PathBuf, mode: u32, contents: Vec<u8>) {
        for parent in path.ancestors().skip(1).filter(|parent| *parent != Path::new("/")) {
            self.entries.entry(parent.to_owned()).or_insert_with(|| (Self::DIRECTORY, Vec::new()));
        }
        self.entries.insert(path, (mode, contents));
    }

    /// Writes the archive into the target directory.
    pub fn write(&self) -> Image {
        let name = format!("initramfs-{}.cpio", std::process::id());
        let image = Image(Path::new(env!("CARGO_TARGET_TMPDIR")).join(name));
        let mut archive = Vec::new();
        let trailer = (PathBuf::from("/TRAILER!!!"), (0, Vec::new()));
        // The map's order puts each directory before what is in it.
        let entries = self.entries.iter().chain([(&trailer.0, &trailer.1)]);
        for (inode, (path, (mode, contents))) in (1..).zip(entries) {
            let name = path.strip_prefix("/").unwrap().to_str().unwrap();
            let (size, name_size) = (contents.len(), name.len() + 1);
            write!(archive, "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}", 0, 1)
                .unwrap();
            write!(archive, "{size:08x}{0:08x}{0:08x}{0:08x}{0:08x}{name_size:08x}{0:08x}", 0)
                .unwrap();
            for part in [format!("{name}\0").as_bytes(), contents] {
                archive.extend_from_slice(part);
                archive.resize(archive.len().next_multiple_of(4), 0);
            }
        }
        fs::write(&image.0, archive).unwrap();
        image
    }
}

/// The file of an [`Initramfs`]; dropping it deletes it.
pub struct Image(PathBuf);

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Where the host keeps a program, as the machine's `PATH` will find it.
pub fn which(program: &str) -> PathBuf {
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|dir| Path::new(dir).join(program))
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("there is no {program}: run tests/install-deps"))
}

/// A running machine; dropping it ends it.
pub struct Machine {
    qemu: Child,
    console: Receiver<String>,
    deadline: Instant,
}

impl Machine {
    /// Boots this kernel and initramfs with two CPUs. `limit` bounds the machine's whole life.
    ///
    /// Always emulates: where `/dev/kvm` is a nested one, it may hang.
    pub fn boot(kernel: &Kernel, initramfs: &Image, memory_mib: u32, limit: Duration) -> Self {
        let cpus = ["-accel", "tcg,thread=multi", "-smp", "2"];
        Self::boot_on(&cpus, kernel, initramfs, memory_mib, limit)
    }

    /// Boots with one CPU whose clock counts instructions, one to the nanosecond, and stands still
    /// while the host does something else: what is timed in the machine is the work alone.
    pub fn boot_counting(
        kernel: &Kernel,
        initramfs: &Image,
        memory_mib: u32,
        limit: Duration,
    ) -> Self {
        let cpus = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"];
        Self::boot_on(&cpus, kernel, initramfs, memory_mib, limit)
    }

    fn boot_on(
        cpus: &[&str],
        kernel: &Kernel,
        initramfs: &Image,
        memory_mib: u32,
        limit: Duration,
    ) -> Self {
        let mut qemu = Command::new(which("qemu-system-x86_64"))
            .args(cpus)
            .args(["-cpu", "qemu64,+rdrand,+ssse3"])
            .args(["-m", &memory_mib.to_string(), "-nodefaults", "-no-reboot"])
            .args(["-display", "none", "-serial", "stdio"])
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(&initramfs.0)
            .args(["-append", "console=ttyS0 quiet panic=-1 oops=panic no_timer_check"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("cannot start QEMU");
        let (sender, console) = channel();
        let output = qemu.stdout.take().unwrap();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                    break;
                }
            }
        });
        Self { qemu, console, deadline: Instant::now() + limit }
    }

    /// Follows the console to the end and hands each line to `each`. The exit status of the
    /// initramfs's command, `None` if the machine ends in another way or not in time.
    pub fn wait(self, mut each: impl FnMut(&str)) -> Option<u32> {
        let mut status = None;
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            match self.console.recv_timeout(left) {
                Ok(line) => match line.split_once(END_MARKER) {
                    Some((_, number)) => status = number.parse().ok(),
                    None => each(&line),
                },
                Err(RecvTimeoutError::Disconnected) => return status,
                Err(RecvTimeoutError::Timeout) => return None,
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
