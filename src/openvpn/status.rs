//! The reply to `status 3`: lines in, clients out. Pure; nothing but the clients is kept.
//!
//! Format: `multi_print_status` in OpenVPN's `multi.c`. Fields are separated by tabs, and
//! versions differ in their columns, so columns are found by the row that names them.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// What OpenVPN shows for a client that has not yet proved who it is.
pub(super) const NO_NAME: &str = "UNDEF";

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
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b'\t').collect();
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
