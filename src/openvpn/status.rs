//! The reply to `status 3`: lines in, clients out. Pure; nothing but the clients is kept.
//!
//! Format: `multi_print_status` in OpenVPN's `multi.c`. Fields are separated by tabs, and
//! versions differ in their columns, so columns are found by the row that names them.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// What OpenVPN shows for a client that has not yet proved who it is.
pub(super) const NO_NAME: &str = "UNDEF";

/// Room for the fields of a row, so that it does not grow field by field.
const USUAL_FIELDS: usize = 16;

/// A client with a common name; it may not have an address yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Row {
    /// Invalid UTF-8 is replaced by U+FFFD.
    pub(super) common_name: String,
    pub(super) ipv4: Option<Ipv4Addr>,
    pub(super) ipv6: Option<Ipv6Addr>,
    /// What `client-kill` takes; never used twice by one process.
    pub(super) client_id: Option<u64>,
}

/// One line of the reply.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Line {
    /// A client.
    Client(Row),
    /// Titles, routes, statistics, clients without a name.
    Other,
    /// The report is complete.
    End,
}

/// What a line that is no part of a report holds: completes "sent …".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Malformed(pub(super) &'static str);

/// Reads a report line by line.
#[derive(Default)]
pub(super) struct Parser {
    columns: Option<Columns>,
}

/// Where the fields of a client's row stand.
struct Columns {
    common_name: usize,
    ipv4: usize,
    /// OpenVPN has this column since 2.4.
    ipv6: Option<usize>,
    /// OpenVPN has this column since 2.4.
    client_id: Option<usize>,
}

impl Parser {
    /// Reads the next line, without its end.
    pub(super) fn line(&mut self, line: &[u8]) -> Result<Line, Malformed> {
        // About half of a report.
        if line.starts_with(b"ROUTING_TABLE\t") {
            return Ok(Line::Other);
        }
        let mut fields: Vec<&[u8]> = Vec::with_capacity(USUAL_FIELDS);
        fields.extend(line.split(|&byte| byte == b'\t'));
        match fields.as_slice() {
            // A report without columns would read like a server without clients.
            [b"END"] if self.columns.is_none() => Err(Malformed("a report without clients")),
            [b"END"] => Ok(Line::End),
            [_] => Err(Malformed("a line that is no part of a status report")),
            [b"HEADER", b"CLIENT_LIST", names @ ..] => {
                self.columns = Some(Columns::find(names)?);
                Ok(Line::Other)
            }
            [b"CLIENT_LIST", fields @ ..] => match &self.columns {
                Some(columns) => columns.row(fields),
                None => Err(Malformed("a client before the names of the columns")),
            },
            _ => Ok(Line::Other),
        }
    }
}

impl Columns {
    fn find(names: &[&[u8]]) -> Result<Self, Malformed> {
        let find = |name: &str| names.iter().position(|field| *field == name.as_bytes());
        Ok(Self {
            common_name: find("Common Name").ok_or(Malformed("a report without common names"))?,
            ipv4: find("Virtual Address").ok_or(Malformed("a report without addresses"))?,
            ipv6: find("Virtual IPv6 Address"),
            client_id: find("Client ID"),
        })
    }

    fn row(&self, fields: &[&[u8]]) -> Result<Line, Malformed> {
        let field = |at: usize| {
            fields
                .get(at)
                .map(|field| String::from_utf8_lossy(field))
                .ok_or(Malformed("a client with missing fields"))
        };
        let common_name = field(self.common_name)?;
        if common_name.is_empty() || common_name == NO_NAME {
            return Ok(Line::Other);
        }
        let bad_address = Malformed("a client whose address is none");
        Ok(Line::Client(Row {
            ipv4: parse(&field(self.ipv4)?, bad_address)?,
            ipv6: match self.ipv6 {
                Some(at) => parse(&field(at)?, bad_address)?,
                None => None,
            },
            client_id: match self.client_id {
                Some(at) => parse(&field(at)?, Malformed("a client whose id is no number"))?,
                None => None,
            },
            common_name: common_name.into_owned(),
        }))
    }
}

/// An empty field is a value that is not there (yet).
fn parse<T: FromStr>(field: &str, otherwise: Malformed) -> Result<Option<T>, Malformed> {
    if field.is_empty() {
        return Ok(None);
    }
    field.parse().map(Some).map_err(|_| otherwise)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2_3: &str = "HEADER\tCLIENT_LIST\tCommon Name\tReal Address\tVirtual Address\t\
        Bytes Received\tBytes Sent\tConnected Since\tConnected Since (time_t)\tUsername";
    const V2_4: &str = "HEADER\tCLIENT_LIST\tCommon Name\tReal Address\tVirtual Address\t\
        Virtual IPv6 Address\tBytes Received\tBytes Sent\tConnected Since\t\
        Connected Since (time_t)\tUsername\tClient ID\tPeer ID";
    const V2_6: &str = "HEADER\tCLIENT_LIST\tCommon Name\tReal Address\tVirtual Address\t\
        Virtual IPv6 Address\tBytes Received\tBytes Sent\tConnected Since\t\
        Connected Since (time_t)\tUsername\tClient ID\tPeer ID\tData Channel Cipher";

    fn after(header: &str, line: &[u8]) -> Result<Line, Malformed> {
        let mut parser = Parser::default();
        assert_eq!(parser.line(header.as_bytes()), Ok(Line::Other));
        parser.line(line)
    }

    fn row(name: &str, ipv4: &str, ipv6: &str, client_id: Option<u64>) -> Result<Line, Malformed> {
        Ok(Line::Client(Row {
            common_name: name.to_owned(),
            ipv4: ipv4.parse().ok(),
            ipv6: ipv6.parse().ok(),
            client_id,
        }))
    }

    #[test]
    fn finds_columns_by_name() {
        let since = "2025-01-01 00:00:00\t1735689600";
        let v2_3 = format!("CLIENT_LIST\ta\t192.0.2.1:5\t10.0.0.2\t1\t2\t{since}\tUNDEF");
        assert_eq!(after(V2_3, v2_3.as_bytes()), row("a", "10.0.0.2", "", None));
        let v2_4 = format!("CLIENT_LIST\ta\tx\t10.0.0.2\tfd00::2\t1\t2\t{since}\tUNDEF\t7\t0");
        assert_eq!(after(V2_4, v2_4.as_bytes()), row("a", "10.0.0.2", "fd00::2", Some(7)));
        let v2_6 = format!("CLIENT_LIST\ta\tx\t\tfd00::2\t1\t2\t{since}\tuser\t0\t0\tAES-256-GCM");
        assert_eq!(after(V2_6, v2_6.as_bytes()), row("a", "", "fd00::2", Some(0)));
        let other = "HEADER\tCLIENT_LIST\tClient ID\tVirtual Address\tNew\tCommon Name";
        assert_eq!(
            after(other, b"CLIENT_LIST\t9\t10.0.0.1\tx\tb"),
            row("b", "10.0.0.1", "", Some(9))
        );
    }

    #[test]
    fn names_are_only_names() {
        for name in ["END", "CLIENT_LIST", "HEADER", "a,b", ">INFO:", "ERROR: x", " ", "Zoë", "\""]
        {
            let line = format!("CLIENT_LIST\t{name}\tx\t10.0.0.1\t\t1\t2\tt\t3\tu\t4\t5\tc");
            assert_eq!(after(V2_6, line.as_bytes()), row(name, "10.0.0.1", "", Some(4)), "{name}");
        }
        let line = b"CLIENT_LIST\tZo\xeb\tx\t\t\t1\t2\tt\t3\tu\t4\t5\tc";
        assert_eq!(after(V2_6, line), row("Zo\u{fffd}", "", "", Some(4)));
    }

    #[test]
    fn other_lines_are_passed_over() {
        for line in [
            "TITLE\tOpenVPN 2.6.14",
            "TIME\t2025-01-01 00:00:00\t1735689600",
            "HEADER\tROUTING_TABLE\tVirtual Address\tCommon Name",
            "ROUTING_TABLE\t10.0.0.2\tEND\tx\tt\t1",
            "GLOBAL_STATS\tMax bcast/mcast queue length\t0",
            "NEW IN SOME VERSION\tx",
            "CLIENT_LIST\tUNDEF\tx\t\t\t1\t2\tt\t3\tu\t4\t5\tc",
            "CLIENT_LIST\t\tx\t\t\t1\t2\tt\t3\tu\t4\t5\tc",
        ] {
            assert_eq!(after(V2_6, line.as_bytes()), Ok(Line::Other), "{line}");
        }
        assert_eq!(after(V2_6, b"END"), Ok(Line::End));
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "",
            "end",
            "END ",
            "CLIENT_LIST",
            "CLIENT_LIST\ta",
            "CLIENT_LIST\ta\tx\t10.0.0.1",
            "CLIENT_LIST\ta\tx\t10.0.0.1\tfd00::1\t1\t2\tt\t3\tu",
            "CLIENT_LIST\ta\tx\t10.0.0.256\t\t1\t2\tt\t3\tu\t4\t5\tc",
            "CLIENT_LIST\ta\tx\t10.0.0.1/24\t\t1\t2\tt\t3\tu\t4\t5\tc",
            "CLIENT_LIST\ta\tx\tfd00::1\t\t1\t2\tt\t3\tu\t4\t5\tc",
            "CLIENT_LIST\ta\tx\t\t10.0.0.1\t1\t2\tt\t3\tu\t4\t5\tc",
            "CLIENT_LIST\ta\tx\t\tfe80::1%eth0\t1\t2\tt\t3\tu\t4\t5\tc",
            "CLIENT_LIST\ta\tx\t\t\t1\t2\tt\t3\tu\t-4\t5\tc",
            "HEADER\tCLIENT_LIST\tVirtual Address",
            "HEADER\tCLIENT_LIST\tCommon Name",
        ] {
            assert!(after(V2_6, line.as_bytes()).is_err(), "{line}");
        }
        assert!(Parser::default().line(b"END").is_err());
        assert!(Parser::default().line(b"CLIENT_LIST\ta\tx\t10.0.0.1").is_err());
    }
}
