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
    /// Those with a common name; they may not have an address yet.
    pub clients: Vec<Client>,
}

/// Where the fields of a client's row stand.
struct Columns {
    common_name: usize,
    ipv4: usize,
    /// OpenVPN has these two since 2.4.
    ipv6: Option<usize>,
    id: Option<usize>,
}

impl Report {
    /// Takes the next line, without its end. Whether the report is complete.
    ///
    /// # Errors
    /// What was wrong with it; completes the sentence "sent a reply that was not understood: …".
    pub fn line(&mut self, line: &str) -> Result<bool, &'static str> {
        if let Some(row) = line.strip_prefix("CLIENT_LIST\t") {
            let columns = self.columns.as_ref();
            let columns = columns.ok_or("a client before the names of the columns")?;
            self.clients.extend(columns.client(row)?);
        } else if let Some(names) = line.strip_prefix("HEADER\tCLIENT_LIST\t") {
            self.columns = Some(Columns::find(names)?);
        } else if line == "END" {
            // A report without columns would read like a server without clients.
            return self.columns.as_ref().map(|_| true).ok_or("a report without clients");
        } else if !line.contains('\t') {
            return Err("a line that is no part of a status report");
        }
        Ok(false)
    }
}

impl Columns {
    fn find(names: &str) -> Result<Self, &'static str> {
        let column = |name| names.split('\t').position(|column| column == name);
        Ok(Self {
            common_name: column("Common Name").ok_or("a report without common names")?,
            ipv4: column("Virtual Address").ok_or("a report without addresses")?,
            ipv6: column("Virtual IPv6 Address"),
            id: column("Client ID"),
        })
    }

    /// `None` for a client without a name.
    fn client(&self, row: &str) -> Result<Option<Client>, &'static str> {
        let field = |at: usize| row.split('\t').nth(at).ok_or("a client with missing fields");
        // A column that this version does not have is like a value that is not there (yet).
        let or_empty = |at: Option<usize>| at.map_or(Ok(""), field);
        let common_name = field(self.common_name)?;
        let client = Client {
            common_name: common_name.to_owned(),
            ipv4: field(self.ipv4)?.to_owned(),
            ipv6: or_empty(self.ipv6)?.to_owned(),
            id: parsed(or_empty(self.id)?).map_err(|_| "a client whose id is no number")?,
        };
        let addresses = (parsed::<Ipv4Addr>(&client.ipv4), parsed::<Ipv6Addr>(&client.ipv6));
        if addresses.0.is_err() || addresses.1.is_err() {
            return Err("a client whose address is none");
        }
        Ok((!common_name.is_empty() && common_name != NO_NAME).then_some(client))
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
    fn client(header: &str, line: &str) -> Result<Vec<Client>, &'static str> {
        let mut report = Report::default();
        assert_eq!(report.line(header), Ok(false));
        report.line(line).map(|complete| {
            assert!(!complete);
            report.clients
        })
    }

    fn row(common_name: &str, ipv4: &str, ipv6: &str, id: Option<u64>) -> Vec<Client> {
        let [common_name, ipv4, ipv6] = [common_name, ipv4, ipv6].map(str::to_owned);
        vec![Client { common_name, ipv4, ipv6, id }]
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
            assert_eq!(client(V2_6, line), Ok(vec![]), "{line}");
        }
        let mut report = Report::default();
        assert_eq!([V2_3, "END"].map(|line| report.line(line)), [Ok(false), Ok(true)]);
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
