//! Time over number of peers and of clients as an SVG, both scales logarithmic.

use std::fmt::Write;

use crate::row::{Row, Unit, time};

/// The rows (their work begins so) that have two lines, and the colours of daemon and floor.
const LINES: [(&str, [&str; 2]); 2] =
    [("peer list", ["#1f77b4", "#aec7e8"]), ("connection list", ["#2ca02c", "#98df8a"])];

pub fn svg(rows: &[Row]) -> String {
    // From 1,000 to 100,000; from 0.1 ms to 10 s.
    let x = |amount: f64| 60.0 + (amount.log10() - 3.0) * 220.0;
    let y = |seconds: f64| 340.0 - (seconds.log10() + 4.0) * 64.0;
    let (mut grid, mut texts, mut lines) = (String::new(), String::new(), String::new());
    let mut put = |x: f64, y: f64, style: &str, text: &str| {
        write!(texts, "<text x=\"{x:.0}\" y=\"{y:.0}\" {style}>{text}</text>").unwrap();
    };
    for amount in [1_000, 10_000, 100_000] {
        let at = x(amount as f64);
        write!(grid, "M{at:.0} 20V340").unwrap();
        put(at, 358.0, "text-anchor=\"middle\"", &amount.to_string());
    }
    for seconds in [0.000_1, 0.001, 0.01, 0.1, 1.0, 10.0] {
        let at = y(seconds);
        write!(grid, "M60 {at:.0}H500").unwrap();
        put(52.0, at + 4.0, "text-anchor=\"end\"", &time(seconds));
    }
    put(280.0, 376.0, "text-anchor=\"middle\"", "peers or clients");
    let mut legend = 0.0;
    for (work, colours) in LINES {
        let rows =
            || rows.iter().filter(|row| row.work.starts_with(work) && row.unit == Unit::Time);
        let Some(last) = rows().next_back() else { continue };
        for (side, colour) in colours.into_iter().enumerate() {
            let median = |row: &Row| <[f64; 2]>::from(row.medians())[side];
            let point = |row: &Row| format!("{:.0},{:.0} ", x(row.amount as f64), y(median(row)));
            let points: String = rows().map(point).collect();
            write!(lines, "<polyline points=\"{points}\" stroke=\"{colour}\"/>").unwrap();
            let name = [work, &last.floor][side];
            let label = format!("{name}, {}: {}", last.amount, time(median(last)));
            legend += 20.0;
            put(510.0, legend + 20.0, &format!("fill=\"{colour}\""), &label);
        }
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 720 380\" fill=\"none\">\n\
         <path d=\"M0 0H720V380H0Z\" fill=\"#fff\"/><path d=\"{grid}\" stroke=\"#ddd\"/>\n\
         <g stroke-width=\"2\">{lines}</g>\
         <g font-family=\"sans-serif\" font-size=\"12\" fill=\"#666\">{texts}</g>\n</svg>\n"
    )
}
