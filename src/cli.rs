//! Flags and environment: what the operator asked for.

use std::ffi::OsString;
use std::fmt;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::str::FromStr;

use lexopt::prelude::*;

use crate::wireguard::DeviceName;

/// The text of `-help`.
pub const HELP: &str = include_str!("help.txt");

/// Each connection takes up to three threads, and six descriptors.
const MAX_CONNECTIONS: usize = 65536;

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Run the daemon.
    Serve(Options),
    /// Look at what the daemon needs and print a report.
    Check {
        /// Options of the daemon that is to be checked.
        options: Options,
        /// Which of them a flag has set.
        given: Given,
        /// Print JSON instead of text.
        json: bool,
    },
    /// Print [`HELP`].
    Help,
    /// Print the version.
    Version,
}

/// Which of the flags that the service takes from a file stand on the command line.
#[derive(Debug, PartialEq, Eq, Clone, Copy, Default)]
pub struct Given {
    /// `-listen`.
    pub listen: bool,
    /// `-wg-device`.
    pub wg_device: bool,
}

/// How to run the daemon.
#[derive(Debug, PartialEq, Eq, Clone)]
pub struct Options {
    /// Where to listen.
    pub listen: ListenAddress,
    /// Name of the WireGuard interface.
    pub wg_device: DeviceName,
    /// Directory of the OpenVPN management sockets.
    pub openvpn_dir: PathBuf,
    /// Connections served at the same time.
    pub max_connections: usize,
    /// Names, in any case, that the header `Host` may have beside those of this host.
    pub allow_hosts: Vec<String>,
    /// Whether `GET /metrics` is there.
    pub metrics: bool,
}

/// `HOST:PORT`, or `:PORT` for every address of the host.
#[derive(Debug, PartialEq, Eq, Clone)]
pub struct ListenAddress {
    /// Host name or address; `None` is every address, IPv4 and IPv6.
    pub host: Option<String>,
    /// TCP port; 0 lets the kernel choose one.
    pub port: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: ListenAddress { host: Some("127.0.0.1".into()), port: 41194 },
            wg_device: DeviceName::default(),
            openvpn_dir: "/run/openvpn-server".into(),
            max_connections: 256,
            allow_hosts: Vec::new(),
            metrics: true,
        }
    }
}

/// Where the TLS credentials lie; `None`: plain HTTP. A variable that is set but empty is a
/// directory that cannot be read, never plain HTTP.
pub fn credentials_directory() -> Option<PathBuf> {
    std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from)
}

/// Reads the arguments, the program's name not among them.
///
/// # Errors
/// One line that names the flag.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let error = match parse_flags(arguments) {
        Ok(command) => return Ok(command),
        Err(lexopt::Error::Custom(error)) => error.to_string(),
        // lexopt writes flags with two dashes, the help text and unit files with one.
        Err(error) => error.to_string().replace("--", "-"),
    };
    Err(format!("{error}; see vpn-daemon -help"))
}

fn parse_flags(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, lexopt::Error> {
    let mut arguments = arguments.into_iter().peekable();
    let check = arguments.next_if(|first| first == "check").is_some();
    let mut parser = lexopt::Parser::from_args(arguments.map(two_dashes));
    let (mut options, mut given, mut json) = (Options::default(), Given::default(), false);
    while let Some(argument) = parser.next()? {
        let Long(flag) = argument else { return Err(argument.unexpected()) };
        let flag = flag.to_owned();
        match flag.as_str() {
            "listen" => {
                options.listen = checked(&flag, &mut parser)?;
                given.listen = true;
            }
            "wg-device" => {
                options.wg_device = checked(&flag, &mut parser)?;
                given.wg_device = true;
            }
            "openvpn-dir" => options.openvpn_dir = parser.value()?.into(),
            "max-connections" => {
                options.max_connections = checked(&flag, &mut parser)?;
                if !(1..=MAX_CONNECTIONS).contains(&options.max_connections) {
                    return Err(format!("-{flag}: must be 1 to {MAX_CONNECTIONS}").into());
                }
            }
            "allow-host" => {
                let name: String = checked(&flag, &mut parser)?;
                let fits = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
                if name.is_empty() || !name.chars().all(fits) {
                    return Err(format!("-allow-host {name}: is not a host name in ASCII").into());
                }
                options.allow_hosts.push(name);
            }
            "metrics" => {
                options.metrics = match parser.value()?.to_str() {
                    Some("yes") => true,
                    Some("no") => false,
                    _ => return Err(format!("-{flag}: must be yes or no").into()),
                }
            }
            "json" if check => json = true,
            "version" => return Ok(Command::Version),
            "help" | "h" => return Ok(Command::Help),
            _ => return Err(format!("unknown flag -{flag}").into()),
        }
    }
    Ok(if check { Command::Check { options, given, json } } else { Command::Serve(options) })
}

/// Unit files write `-flag`, which lexopt would read as a row of one-letter flags.
fn two_dashes(argument: OsString) -> OsString {
    match argument.to_str() {
        Some(text) if text.len() > 1 && text.starts_with('-') && !text.starts_with("--") => {
            format!("-{text}").into()
        }
        _ => argument,
    }
}

fn checked<T>(flag: &str, parser: &mut lexopt::Parser) -> Result<T, lexopt::Error>
where
    T: FromStr<Err: fmt::Display>,
{
    let value = parser.value()?.into_string().map_err(|_| format!("-{flag}: is not UTF-8"))?;
    value.parse().map_err(|error| format!("-{flag} {value}: {error}").into())
}

impl FromStr for ListenAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (host, port) = text.rsplit_once(':').ok_or("has no port; write HOST:PORT or :PORT")?;
        let port = port.parse().map_err(|_| "the port is not a number from 0 to 65535")?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        match bare.filter(|bare| bare.parse::<Ipv6Addr>().is_ok()) {
            Some(address) => Ok(Self { host: Some(address.to_owned()), port }),
            None if host.contains([':', '[', ']']) => {
                Err("an IPv6 address is written in brackets: [::1]:41194")
            }
            None => Ok(Self { host: (!host.is_empty()).then(|| host.to_owned()), port }),
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.as_deref().unwrap_or_default() {
            host if host.contains(':') => write!(f, "[{host}]:{}", self.port),
            host => write!(f, "{host}:{}", self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(line: &str) -> Result<Command, String> {
        parse(line.split_whitespace().map(OsString::from)).map_err(|error| error.to_string())
    }

    fn options(line: &str) -> Options {
        match parse_words(line) {
            Ok(Command::Serve(options)) => options,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn one_dash_and_two_a_space_and_an_equals_sign() {
        let expected = Options {
            listen: ListenAddress { host: None, port: 41194 },
            wg_device: "wg1".parse().unwrap(),
            openvpn_dir: "/tmp/o".into(),
            max_connections: 7,
            allow_hosts: vec!["VPN.example.org".to_owned(), "b_1".to_owned()],
            metrics: false,
        };
        for line in [
            "-wg-device wg1 -listen :41194 -openvpn-dir /tmp/o -max-connections 7 -metrics no \
             -allow-host VPN.example.org -allow-host b_1",
            "--wg-device wg1 --listen :41194 --openvpn-dir /tmp/o --max-connections 7 --metrics no \
             -allow-host VPN.example.org -allow-host b_1",
            "-wg-device=wg1 -listen=:41194 -openvpn-dir=/tmp/o -max-connections=7 -metrics=no \
             -allow-host=VPN.example.org -allow-host=b_1",
            "--wg-device=wg1 --listen=:41194 --openvpn-dir=/tmp/o --max-connections=7 --metrics=no \
             -allow-host=VPN.example.org -allow-host=b_1",
        ] {
            assert_eq!(options(line), expected, "{line}");
        }
        assert_eq!(options(""), Options::default());
        assert_eq!(parse_words("-version"), Ok(Command::Version));
        assert_eq!(parse_words("-listen :1 --help -nonsense"), Ok(Command::Help));
        assert_eq!(parse_words("-h"), Ok(Command::Help));
    }

    #[test]
    fn check_takes_the_same_flags() {
        for (line, flags, given, json) in [
            ("check", "", [false; 2], false),
            ("check -json -wg-device wg7", "-wg-device wg7", [false, true], true),
            ("check -listen 127.0.0.1:41194", "", [true, false], false),
        ] {
            let given = Given { listen: given[0], wg_device: given[1] };
            let expected = Command::Check { options: options(flags), given, json };
            assert_eq!(parse_words(line), Ok(expected));
        }
        assert_eq!(parse_words("check -help"), Ok(Command::Help));
    }

    #[test]
    fn addresses() {
        for (text, host, port) in [
            (":41194", None, 41194),
            ("127.0.0.1:1", Some("127.0.0.1"), 1),
            ("[::1]:41194", Some("::1"), 41194),
            ("vpn.example.org:65535", Some("vpn.example.org"), 65535),
            ("localhost:0", Some("localhost"), 0),
        ] {
            let address: ListenAddress = text.parse().unwrap();
            assert_eq!((address.host.as_deref(), address.port), (host, port));
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn errors_name_what_is_wrong() {
        for (line, part) in [
            ("-frobnicate", "unknown flag -frobnicate"),
            ("--frobnicate=1", "unknown flag -frobnicate"),
            ("serve", "unexpected argument \"serve\""),
            ("-json", "unknown flag -json"),
            ("-listen :1 check", "unexpected argument \"check\""),
            ("check check", "unexpected argument \"check\""),
            ("check -frobnicate", "unknown flag -frobnicate"),
            ("check -json=yes", "-json"),
            ("-listen", "-listen"),
            ("-listen 41194", "-listen 41194: has no port"),
            ("-listen ::1", "-listen ::1: an IPv6 address is written in brackets"),
            ("-listen ::1:41194", "in brackets"),
            ("-listen [localhost]:1", "in brackets"),
            ("-listen host:http", "the port is not a number"),
            ("-listen :65536", "the port is not a number"),
            ("-metrics maybe", "-metrics: must be yes or no"),
            ("-metrics=", "-metrics: must be yes or no"),
            ("-max-connections 0", "-max-connections: must be 1 to 65536"),
            ("-max-connections 65537", "-max-connections: must be 1 to 65536"),
            ("-max-connections 18446744073709551615", "-max-connections: must be 1 to 65536"),
            ("-max-connections many", "-max-connections many: "),
            ("-allow-host vpn:41194", "-allow-host vpn:41194: is not a host name"),
            // A header `Host` has it as xn--…
            ("-allow-host vpn.exämple", "-allow-host vpn.exämple: is not a host name in ASCII"),
            ("-allow-host=", "-allow-host : is not a host name"),
        ] {
            let error = parse_words(line).expect_err(line);
            assert!(error.contains(part), "{line}: {error}");
            assert!(!error.contains('\n') && !error.contains("--"), "{line}: {error}");
        }
    }
}
