//! Connected OpenVPN clients, and the processes that could not be asked, as JSON.

use std::io::{self, Write};

use serde::Serialize;

use crate::openvpn::{Client, Clients, Failure};

/// An OpenVPN process that could not be asked.
#[derive(Serialize)]
struct Failed<'a> {
    socket: &'a str,
    error: String,
}

/// The processes that could not be asked, as a JSON list.
pub(super) fn failed(failures: &[Failure]) -> serde_json::Result<String> {
    let failed = failures
        .iter()
        .map(|failure| Failed { socket: &failure.socket, error: failure.error.to_string() });
    serde_json::to_string(&failed.collect::<Vec<_>>())
}

/// A connected client; `""` for an address that it does not have.
#[derive(Serialize)]
struct Connection<'a> {
    common_name: &'a str,
    ip_four: &'a str,
    ip_six: &'a str,
}

/// Writes the clients with commas between them.
pub(super) fn write(clients: &Clients, mut to: impl Write) -> io::Result<()> {
    // serde_json would look at each byte of each text. Nearly always there is nothing to escape in
    // all of them, which is seen at a glance.
    let plain = is_plain(clients.text());
    for (at, client) in clients.iter().enumerate() {
        to.write_all(if at == 0 { b"" } else { b"," })?;
        match plain {
            true => write_plain(client, &mut to)?,
            false => write_any(client, &mut to)?,
        }
    }
    Ok(())
}

/// Whether a JSON string holds the text as it is (RFC 8259, 7).
fn is_plain(text: &str) -> bool {
    let plain = |byte: u8| (byte >= b' ') & (byte != b'"') & (byte != b'\\');
    // Without an early end the compiler looks at many bytes at once.
    text.bytes().fold(true, |all, byte| all & plain(byte))
}

fn write_plain(client: Client, to: &mut impl Write) -> io::Result<()> {
    to.write_all(br#"{"common_name":""#)?;
    to.write_all(client.common_name.as_bytes())?;
    to.write_all(br#"","ip_four":""#)?;
    to.write_all(client.ipv4.as_bytes())?;
    to.write_all(br#"","ip_six":""#)?;
    to.write_all(client.ipv6.as_bytes())?;
    to.write_all(br#""}"#)
}

fn write_any(client: Client, to: &mut impl Write) -> io::Result<()> {
    let Client { common_name, ipv4: ip_four, ipv6: ip_six } = client;
    Ok(serde_json::to_writer(to, &Connection { common_name, ip_four, ip_six })?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openvpn::SocketError;

    #[test]
    fn clients_are_as_in_the_contract() {
        let clients = [
            Client {
                common_name: "YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkLN0E=",
                ipv4: "10.66.21.3",
                ipv6: "fde6:76bd:ad97:ac5e::3",
            },
            Client { common_name: "é", ipv4: "", ipv6: "fd00::1" },
            Client { common_name: "\"é\"", ipv4: "10.66.21.4", ipv6: "" },
        ];
        let json = |clients: &[Client]| {
            let mut json = Vec::new();
            write(&clients.iter().copied().collect(), &mut json).unwrap();
            String::from_utf8(json).unwrap()
        };
        let plain = r#"{"common_name":"YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkLN0E=","ip_four":"10.66.21.3","ip_six":"fde6:76bd:ad97:ac5e::3"},{"common_name":"é","ip_four":"","ip_six":"fd00::1"}"#;
        let quoted = r#"{"common_name":"\"é\"","ip_four":"10.66.21.4","ip_six":""}"#;
        assert_eq!(json(&clients[..2]), plain);
        assert_eq!(json(&clients), format!("{plain},{quoted}"));
        assert_eq!(json(&[]), "");
    }

    #[test]
    fn failures_are_as_in_the_contract() {
        let failure =
            Failure { socket: "a\"b.sock".to_owned(), error: SocketError::Refused("x".to_owned()) };
        assert_eq!(
            failed(&[failure]).unwrap(),
            r#"[{"socket":"a\"b.sock","error":"refused the command: x"}]"#
        );
    }

    #[test]
    fn plain_texts_are_those_that_serde_json_leaves_alone() {
        let mut texts: Vec<String> =
            (0..0x300).filter_map(char::from_u32).map(String::from).collect();
        texts.extend(texts.clone().iter().map(|text| format!("{}{text}é", "x".repeat(40))));
        texts.push("é".repeat(40));
        for text in texts {
            let client = Client { common_name: &text, ipv4: &text, ipv6: &text };
            let (mut plain, mut any) = (Vec::new(), Vec::new());
            write_plain(client, &mut plain).unwrap();
            write_any(client, &mut any).unwrap();
            assert_eq!(is_plain(&text), plain == any, "{text:?}");
        }
    }
}
