//! The reply to `status 3`: lines in, clients out. Pure.
//!
//! Format: `multi_print_status` in OpenVPN's `multi.c`. Fields are separated by tabs, and
//! versions differ in their columns, so columns are found by the row that names them.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use super::Client;

/// What OpenVPN shows for a client that has not yet proved who it is.
pub(super) const NO_NAME: &str = "UNDEF";

/// A report as far as it has come.
#[derive(Default)]
pub struct Report {
    columns: Option<Columns>,
    /// Whether its last line has come.
    pub is_complete: bool,
}

/// The columns that are read. OpenVPN has the last two since 2.4.
const NAMES: [&str; 4] = ["Common Name", "Virtual Address", "Virtual IPv6 Address", "Client ID"];

/// Where these columns stand in a client's row.
struct Columns([Option<usize>; NAMES.len()]);

impl Report {
    /// Takes the next line, without its end. The client of which it tells, if that has a common name;
    /// it may not have an address yet.
    ///
    /// # Errors
    /// What was wrong with it; completes the sentence "sent a reply that was not understood: …".
    pub fn line<'a>(&mut self, line: &'a str) -> Result<Option<Client<'a>>, &'static str> {
        if let Some(row) = line.strip_prefix("CLIENT_LIST\t") {
            let columns = self.columns.as_ref();
            return columns.ok_or("a client before the names of the columns")?.client(row);
        } else if let Some(names) = line.strip_prefix("HEADER\tCLIENT_LIST\t") {
            self.columns = Some(Columns::find(names)?);
        } else if line == "END" {
            // A report without columns would read like a server without clients.
            self.columns.as_ref().ok_or("a report without clients")?;
            self.is_complete = true;
        } else if !line.contains('\t') {
            return Err("a line that is no part of a status report");
        }
        Ok(None)
    }
}

impl Columns {
    fn find(names: &str) -> Result<Self, &'static str> {
        let columns = NAMES.map(|name| names.split('\t').position(|column| column == name));
        columns[0].ok_or("a report without common names")?;
        columns[1].ok_or("a report without addresses")?;
        Ok(Self(columns))
    }

    /// `None` for a client without a name.
    fn client<'a>(&self, row: &'a str) -> Result<Option<Client<'a>>, &'static str> {
        // A column that this version does not have is like a value that is not there (yet).
        let mut fields = self.0.map(|column| column.is_none().then_some(""));
        // As bytes: a `str` is searched for a tab and then compared with it.
        for (at, field) in row.as_bytes().split(|byte| *byte == b'\t').enumerate() {
            if let Some(place) = self.0.iter().position(|column| *column == Some(at)) {
                fields[place] = str::from_utf8(field).ok();
            }
        }
        let [Some(common_name), Some(ipv4), Some(ipv6), Some(id)] = fields else {
            return Err("a client with missing fields");
        };
        let id = parsed(id).map_err(|_| "a client whose id is no number")?;
        if parsed::<Ipv4Addr>(ipv4).is_err() || parsed::<Ipv6Addr>(ipv6).is_err() {
            return Err("a client whose address is none");
        }
        let client = Client { common_name, ipv4, ipv6, id };
        Ok(Some(client).filter(|client| !["", NO_NAME].contains(&client.common_name)))
    }
}

/// `None` if empty.
fn parsed<T: FromStr>(field: &str) -> Result<Option<T>, T::Err> {
    if field.is_empty() { Ok(None) } else { field.parse().map(Some) }
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

    /// What a line after this header gives.
    fn client<'a>(header: &str, line: &'a str) -> Result<Option<Client<'a>>, &'static str> {
        let mut report = Report::default();
        assert_eq!(report.line(header), Ok(None));
        let client = report.line(line);
        assert!(!report.is_complete);
        client
    }

    fn row<'a>(
        common_name: &'a str,
        ipv4: &'a str,
        ipv6: &'a str,
        id: Option<u64>,
    ) -> Option<Client<'a>> {
        Some(Client { common_name, ipv4, ipv6, id })
    }

    #[test]
    fn finds_columns_by_name() {
        let since = "2025-01-01 00:00:00\t1735689600";
        let v2_3 = format!("a\t192.0.2.1:5\t10.0.0.2\t1\t2\t{since}\tUNDEF");
        let v2_4 = format!("a\tx\t10.0.0.2\tfd00::2\t1\t2\t{since}\tUNDEF\t7\t0");
        let v2_6 = format!("a\tx\t\tfd00::2\t1\t2\t{since}\tuser\t0\t0\tAES-256-GCM");
        let other = "HEADER\tCLIENT_LIST\tClient ID\tVirtual Address\tNew\tCommon Name";
        for (header, line, expected) in [
            (V2_3, v2_3.as_str(), row("a", "10.0.0.2", "", None)),
            (V2_4, &v2_4, row("a", "10.0.0.2", "fd00::2", Some(7))),
            (V2_6, &v2_6, row("a", "", "fd00::2", Some(0))),
            (other, "9\t10.0.0.1\tx\tb", row("b", "10.0.0.1", "", Some(9))),
        ] {
            assert_eq!(client(header, &format!("CLIENT_LIST\t{line}")), Ok(expected), "{line}");
        }
    }

    #[test]
    fn names_are_only_names() {
        for name in ["END", "CLIENT_LIST", "HEADER", "a,b", ">INFO:", "ERROR: x", " ", "Zoë", "\""]
        {
            let line = format!("CLIENT_LIST\t{name}\tx\t10.0.0.1\t\t1\t2\tt\t3\tu\t4\t5\tc");
            assert_eq!(client(V2_6, &line), Ok(row(name, "10.0.0.1", "", Some(4))));
        }
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
            assert_eq!(client(V2_6, line), Ok(None), "{line}");
        }
        let mut report = Report::default();
        for (line, is_complete) in [(V2_3, false), ("END", true)] {
            assert_eq!((report.line(line), report.is_complete), (Ok(None), is_complete));
        }
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
            assert!(client(V2_6, line).is_err(), "{line}");
        }
        assert!(Report::default().line("END").is_err());
        assert!(Report::default().line("CLIENT_LIST\ta\tx\t10.0.0.1").is_err());
    }
}
