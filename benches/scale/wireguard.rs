//! WireGuard in the kernel: boots a virtual machine, runs `guest` there, makes tables and a drawing
//! of what it prints.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::ROLE;
use crate::drawing::{self, Line};
use crate::guest::{self, FIGURE, SIZES};
use crate::measure::time;
use crate::table::{self, Table};
use crate::vm::{Initramfs, Kernel, Machine, which};

/// Emulation on a busy machine is slow: this bounds a hang, it is no measure.
const LIMIT: Duration = Duration::from_secs(60 * 60);

const MEMORY_MIB: u32 = 2048;

/// What a work is called, what its floor is, and how many times the floor it may take.
const WORKS: [(&str, &str, &str, f64); 5] = [
    (guest::LIST, "`GET /w/peer_list?show_all=yes`", "`wg show wg0 dump`", 2.0),
    (guest::SYNC, "`POST /w/sync_peers`, empty device", "`wg setconf`", 1.5),
    (guest::UNCHANGED, "`POST /w/sync_peers`, nothing to change", "`GET /w/peer_list`", 1.3),
    (guest::ADD, "`POST /w/add_peer`", "the same, empty device", 1.1),
    (guest::REMOVE, "`POST /w/remove_peer`", "`wg show wg0 dump`, `wg set`", 2.0),
];

/// Time per peer at the largest device, beside that at the smallest, may be this many times as much.
const GROWTH: f64 = 1.3;

/// MiB that listing 100,000 peers may take, and that may be left of them.
const PEAK: f64 = 150.0;
const IDLE: f64 = 20.0;

/// What a line of the guest says.
struct Figure {
    work: String,
    peers: usize,
    numbers: [f64; 3],
}

pub fn measure(directory: &Path) -> Vec<Table> {
    let figures = run();
    fs::write(directory.join("scale.svg"), drawing::svg(&lines(&figures))).unwrap();
    vec![costs(&figures), growth(&figures), memory(&figures)]
}

fn run() -> Vec<Figure> {
    let kernel = Kernel::find();
    let executable = std::env::current_exe().unwrap();
    let command = format!("{ROLE}={} {}", guest::ROLE, executable.display());
    let mut initramfs = Initramfs::new(&kernel, &["wireguard"], &command);
    initramfs.program(&executable);
    initramfs.program(Path::new(env!("CARGO_BIN_EXE_vpn-daemon")));
    for program in ["wg", "ip"] {
        initramfs.program(&which(program));
    }
    let image = initramfs.write();
    let machine = Machine::boot_counting(&kernel, &image, MEMORY_MIB, LIMIT);
    let (mut console, mut figures) = (String::new(), Vec::new());
    let status = machine.wait(|line| {
        console += line;
        console.push('\n');
        if let Some(figure) = line.strip_prefix(FIGURE) {
            println!("{}", line.replace('\t', " "));
            figures.push(parse(figure).unwrap_or_else(|| panic!("the machine prints {line}")));
        }
    });
    assert!(status == 0, "failed in the machine:\n{console}");
    figures
}

fn parse(line: &str) -> Option<Figure> {
    let mut fields = line.trim().split('\t');
    let (work, peers) = (fields.next()?.to_owned(), fields.next()?.parse().ok()?);
    let numbers: Vec<f64> = fields.map(str::parse).collect::<Result<_, _>>().ok()?;
    Some(Figure { work, peers, numbers: numbers.try_into().ok()? })
}

fn costs(figures: &[Figure]) -> Table {
    let mut rows = Vec::new();
    for (work, name, floor_name, limit) in WORKS {
        for Figure { peers, numbers: [daemon, floor, ratio], .. } in of(figures, work) {
            let mut row = vec![name.to_owned(), thousands(*peers), time(*daemon)];
            row.extend([time(*floor), floor_name.to_owned()]);
            row.extend(table::ratio(*ratio, limit));
            rows.push(row);
        }
    }
    Table {
        title: "WireGuard in the kernel",
        columns: &["work", "peers", "the daemon", "floor", "which is", "ratio", "at most"],
        rows,
    }
}

fn growth(figures: &[Figure]) -> Table {
    let mut rows = Vec::new();
    for (work, name, ..) in WORKS {
        let all: Vec<_> = of(figures, work).collect();
        let (Some(first), Some(last)) = (all.first(), all.last()) else {
            continue;
        };
        if all.len() < 2 {
            continue;
        }
        let each = |figure: &Figure| match work {
            // These are for one peer already.
            guest::ADD => figure.numbers[0],
            _ => figure.numbers[0] / figure.peers as f64,
        };
        let mut row = vec![name.to_owned(), time(each(first)), time(each(last))];
        row.extend(table::ratio(each(last) / each(first), GROWTH));
        rows.push(row);
    }
    Table {
        title: "Time per peer, from the smallest device to the largest",
        columns: &["work", "smallest", "largest", "ratio", "at most"],
        rows,
    }
}

fn memory(figures: &[Figure]) -> Table {
    let mebibytes = |kibibytes: f64, limit: f64| {
        let value = kibibytes / 1024.0;
        format!("{value:.1} MiB{}", if value > limit { " (over)" } else { "" })
    };
    let row = |Figure { peers, numbers: [before, peak, after], .. }: &Figure| {
        vec![
            thousands(*peers),
            mebibytes(*before, IDLE),
            mebibytes(*peak, PEAK),
            mebibytes(*after, IDLE),
        ]
    };
    Table {
        title: "Resident memory of the daemon, listing all peers",
        columns: &["peers", "before", "peak (at most 150 MiB)", "2 s later (at most 20 MiB)"],
        rows: of(figures, guest::MEMORY).map(row).collect(),
    }
}

fn lines(figures: &[Figure]) -> Vec<Line> {
    let through = |name: &str, colour, work, number: usize| Line {
        name: name.to_owned(),
        colour,
        points: of(figures, work).map(|f| (f.peers as f64, f.numbers[number])).collect(),
    };
    let mut lines = vec![
        through("list", "#1f77b4", guest::LIST, 0),
        through("wg show dump", "#aec7e8", guest::LIST, 1),
        through("sync_peers", "#2ca02c", guest::SYNC, 0),
        through("wg setconf", "#98df8a", guest::SYNC, 1),
    ];
    // One by one, a node of N peers takes N times as long as one addition.
    let additions: Vec<f64> = of(figures, guest::ADD).map(|figure| figure.numbers[0]).collect();
    if let Some(one) = additions.first() {
        lines.push(Line {
            name: "add_peer, one by one".to_owned(),
            colour: "#d62728",
            points: SIZES.map(|peers| (peers as f64, peers as f64 * one)).to_vec(),
        });
    }
    lines.retain(|line| !line.points.is_empty());
    lines
}

fn of<'a>(figures: &'a [Figure], work: &'a str) -> impl Iterator<Item = &'a Figure> {
    figures.iter().filter(move |figure| figure.work == work)
}

fn thousands(number: usize) -> String {
    format!("{},{:03}", number / 1000, number % 1000)
}
