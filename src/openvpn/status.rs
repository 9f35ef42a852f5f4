//! The reply to `status 3`: lines in, clients out. Pure; nothing but the clients is kept.
//!
//! Format: `multi_print_status` in OpenVPN's `multi.c`. Fields are separated by tabs, and
//! versions differ in their columns, so columns are found by the row that names them.

use memchr::memchr_iter;

use super::address::{is_ipv4, is_ipv6};

/// What OpenVPN shows for a client that has not yet proved who it is.
pub(super) const NO_NAME: &str = "UNDEF";

/// A client with a common name; it may not have an address yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Row<'a> {
    /// Invalid UTF-8 is replaced by U+FFFD.
    pub(super) common_name: &'a str,
    /// An IPv4 address, or empty.
    pub(super) ipv4: &'a str,
    /// An IPv6 address, or empty.
    pub(super) ipv6: &'a str,
    /// What `client-kill` takes; never used twice by one process.
    pub(super) client_id: Option<u64>,
}

/// One line of the reply.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Line<'a> {
    /// A client.
    Client(Row<'a>),
    /// Titles, routes, statistics, clients without a name.
    Other,
    /// The report is complete.
    End,
}

/// What a line that is no part of a report holds: completes "sent …".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Malformed(pub(super) &'static str);

/// Reads a report line by line.
pub(super) struct Parser {
    wants_ids: bool,
    columns: Option<Columns>,
    /// The last row that was not UTF-8, with replacements.
    replaced: String,
}

/// What the fields of a client's row are, up to the last one that is wanted.
struct Columns(Vec<Column>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Column {
    CommonName,
    Ipv4,
    /// OpenVPN has this column since 2.4.
    Ipv6,
    /// OpenVPN has this column since 2.4.
    ClientId,
    NotWanted,
}

impl Parser {
    /// For names and addresses.
    pub(super) fn new() -> Self {
        Self { wants_ids: false, columns: None, replaced: String::new() }
    }

    /// For client ids as well.
    pub(super) fn with_ids() -> Self {
        Self { wants_ids: true, ..Self::new() }
    }

    /// Reads the next line, without its end.
    pub(super) fn line<'a>(&'a mut self, line: &'a [u8]) -> Result<Line<'a>, Malformed> {
        // About half of a report.
        if line.starts_with(b"ROUTING_TABLE\t") {
            return Ok(Line::Other);
        }
        if let Some(row) = line.strip_prefix(b"CLIENT_LIST\t") {
            let Some(columns) = &self.columns else {
                return Err(Malformed("a client before the names of the columns"));
            };
            return columns.row(str::from_utf8(row).unwrap_or_else(|_| {
                self.replaced = String::from_utf8_lossy(row).into_owned();
                &self.replaced
            }));
        }
        if let Some(names) = line.strip_prefix(b"HEADER\tCLIENT_LIST\t") {
            self.columns = Some(Columns::find(&String::from_utf8_lossy(names), self.wants_ids)?);
            return Ok(Line::Other);
        }
        match line {
            // A report without columns would read like a server without clients.
            b"END" if self.columns.is_none() => Err(Malformed("a report without clients")),
            b"END" => Ok(Line::End),
            _ if line.contains(&b'\t') => Ok(Line::Other),
            _ => Err(Malformed("a line that is no part of a status report")),
        }
    }
}

impl Columns {
    fn find(names: &str, wants_ids: bool) -> Result<Self, Malformed> {
        let column = |name| match name {
            "Common Name" => Column::CommonName,
            "Virtual Address" => Column::Ipv4,
            "Virtual IPv6 Address" => Column::Ipv6,
            "Client ID" if wants_ids => Column::ClientId,
            _ => Column::NotWanted,
        };
        let mut columns: Vec<_> = fields(names).map(column).collect();
        if !columns.contains(&Column::CommonName) {
            return Err(Malformed("a report without common names"));
        }
        if !columns.contains(&Column::Ipv4) {
            return Err(Malformed("a report without addresses"));
        }
        columns.truncate(columns.iter().rposition(|c| *c != Column::NotWanted).unwrap_or(0) + 1);
        Ok(Self(columns))
    }

    fn row<'a>(&self, row: &'a str) -> Result<Line<'a>, Malformed> {
        // A column that this version does not have is empty, as is a value that is not there (yet).
        let (mut common_name, mut ipv4, mut ipv6, mut client_id) = ("", "", "", "");
        let mut columns = self.0.iter();
        for (field, column) in fields(row).zip(&mut columns) {
            match column {
                Column::CommonName => common_name = field,
                Column::Ipv4 => ipv4 = field,
                Column::Ipv6 => ipv6 = field,
                Column::ClientId => client_id = field,
                Column::NotWanted => {}
            }
        }
        if columns.next().is_some() {
            return Err(Malformed("a client with missing fields"));
        }
        if common_name.is_empty() || common_name == NO_NAME {
            return Ok(Line::Other);
        }
        if !(ipv4.is_empty() || is_ipv4(ipv4)) || !(ipv6.is_empty() || is_ipv6(ipv6)) {
            return Err(Malformed("a client whose address is none"));
        }
        let client_id = match client_id {
            "" => None,
            id => Some(id.parse().map_err(|_| Malformed("a client whose id is no number"))?),
        };
        Ok(Line::Client(Row { common_name, ipv4, ipv6, client_id }))
    }
}

fn fields(row: &str) -> impl Iterator<Item = &str> {
    let mut start = 0;
    memchr_iter(b'\t', row.as_bytes()).chain([row.len()]).map_while(move |end| {
        let field = row.get(start..end);
        start = end + 1;
        field
    })
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

    fn after(header: &str) -> Parser {
        let mut parser = Parser::with_ids();
        assert_eq!(parser.line(header.as_bytes()), Ok(Line::Other));
        parser
    }

    fn row<'a>(
        common_name: &'a str,
        ipv4: &'a str,
        ipv6: &'a str,
        client_id: Option<u64>,
    ) -> Result<Line<'a>, Malformed> {
        Ok(Line::Client(Row { common_name, ipv4, ipv6, client_id }))
    }

    #[test]
    fn finds_columns_by_name() {
        let since = "2025-01-01 00:00:00\t1735689600";
        let v2_3 = format!("CLIENT_LIST\ta\t192.0.2.1:5\t10.0.0.2\t1\t2\t{since}\tUNDEF");
        assert_eq!(after(V2_3).line(v2_3.as_bytes()), row("a", "10.0.0.2", "", None));
        let v2_4 = format!("CLIENT_LIST\ta\tx\t10.0.0.2\tfd00::2\t1\t2\t{since}\tUNDEF\t7\t0");
        assert_eq!(after(V2_4).line(v2_4.as_bytes()), row("a", "10.0.0.2", "fd00::2", Some(7)));
        let v2_6 = format!("CLIENT_LIST\ta\tx\t\tfd00::2\t1\t2\t{since}\tuser\t0\t0\tAES-256-GCM");
        assert_eq!(after(V2_6).line(v2_6.as_bytes()), row("a", "", "fd00::2", Some(0)));
        let other = "HEADER\tCLIENT_LIST\tClient ID\tVirtual Address\tNew\tCommon Name";
        assert_eq!(
            after(other).line(b"CLIENT_LIST\t9\t10.0.0.1\tx\tb"),
            row("b", "10.0.0.1", "", Some(9))
        );
    }

    #[test]
    fn names_are_only_names() {
        for name in ["END", "CLIENT_LIST", "HEADER", "a,b", ">INFO:", "ERROR: x", " ", "Zoë", "\""]
        {
            let line = format!("CLIENT_LIST\t{name}\tx\t10.0.0.1\t\t1\t2\tt\t3\tu\t4\t5\tc");
            assert_eq!(
                after(V2_6).line(line.as_bytes()),
                row(name, "10.0.0.1", "", Some(4)),
                "{name}"
            );
        }
        let line = b"CLIENT_LIST\tZo\xeb\tx\t\t\t1\t2\tt\t3\tu\t4\t5\tc";
        assert_eq!(after(V2_6).line(line), row("Zo\u{fffd}", "", "", Some(4)));
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
            assert_eq!(after(V2_6).line(line.as_bytes()), Ok(Line::Other), "{line}");
        }
        assert_eq!(after(V2_6).line(b"END"), Ok(Line::End));
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
            assert!(after(V2_6).line(line.as_bytes()).is_err(), "{line}");
        }
        assert!(Parser::new().line(b"END").is_err());
        assert!(Parser::new().line(b"CLIENT_LIST\ta\tx\t10.0.0.1").is_err());
    }
}
