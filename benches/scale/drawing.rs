//! Time over number of peers as an SVG, both scales logarithmic.

use std::fmt::Write;

use crate::measure::time;

/// A line through measured points: peers, seconds.
pub struct Line {
    pub name: String,
    pub colour: &'static str,
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 240.0;
const TOP: f64 = 20.0;
const BOTTOM: f64 = 50.0;
const GREY: &str = "#666";

pub fn svg(lines: &[Line]) -> String {
    let points = || lines.iter().flat_map(|line| &line.points);
    let (peers, seconds) = (Scale::over(points().map(|p| p.0)), Scale::over(points().map(|p| p.1)));
    let x = |value: f64| LEFT + peers.place(value) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| HEIGHT - BOTTOM - seconds.place(value) * (HEIGHT - TOP - BOTTOM);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    let mut put = |element: String| writeln!(svg, "{element}").unwrap();
    let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    for value in peers.decades() {
        let at = x(value);
        put(format!("<path d=\"M{at:.1} {TOP}V{bottom}\" stroke=\"#ddd\"/>"));
        put(text(at, bottom + 18.0, "middle", GREY, &thousands(value)));
    }
    for value in seconds.decades() {
        let at = y(value);
        put(format!("<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"#ddd\"/>"));
        put(text(LEFT - 8.0, at + 4.0, "end", GREY, &round_time(value)));
    }
    put(text(f64::midpoint(LEFT, right), HEIGHT - 12.0, "middle", GREY, "peers"));
    let mut labels: Vec<(f64, &Line)> =
        lines.iter().filter_map(|line| Some((y(line.points.last()?.1), line))).collect();
    labels.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut free = 0.0_f64;
    for (at, line) in labels {
        let path: Vec<_> =
            line.points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
        let (path, colour) = (path.join(" "), line.colour);
        put(format!(
            "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"
        ));
        for p in &line.points {
            put(format!(
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>",
                x(p.0),
                y(p.1)
            ));
        }
        // Lines that end close to each other have labels that do not.
        let at = at.max(free);
        free = at + 16.0;
        let last = line.points.last().map_or(0.0, |point| point.1);
        put(text(
            right + 10.0,
            at + 4.0,
            "start",
            colour,
            &format!("{}: {}", line.name, time(last)),
        ));
    }
    svg + "</svg>\n"
}

fn text(x: f64, y: f64, anchor: &str, colour: &str, text: &str) -> String {
    format!(
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{text}</text>"
    )
}

fn thousands(value: f64) -> String {
    if value < 1000.0 { format!("{value}") } else { format!("{},000", value / 1000.0) }
}

fn round_time(seconds: f64) -> String {
    match seconds {
        ..0.000_9 => format!("{:.0} µs", seconds * 1e6),
        ..0.9 => format!("{:.0} ms", seconds * 1e3),
        _ => format!("{seconds:.0} s"),
    }
}

/// A logarithmic axis between two powers of ten.
struct Scale {
    low: i32,
    high: i32,
}

impl Scale {
    fn over(values: impl Iterator<Item = f64> + Clone) -> Self {
        let low = values.clone().fold(f64::MAX, f64::min).log10().floor() as i32;
        let high = values.fold(f64::MIN_POSITIVE, f64::max).log10().ceil() as i32;
        Self { low, high: high.max(low + 1) }
    }

    /// Between 0 and 1.
    fn place(&self, value: f64) -> f64 {
        (value.log10() - f64::from(self.low)) / f64::from(self.high - self.low)
    }

    fn decades(&self) -> impl Iterator<Item = f64> {
        (self.low..=self.high).map(|power| 10_f64.powi(power))
    }
}
