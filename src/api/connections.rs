//! Connected OpenVPN clients as JSON.

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

/// Writes the clients with commas between them; `""` for an address that a client does not have.
pub(super) fn write(clients: &Clients, mut to: impl Write) -> io::Result<()> {
    // serde_json would look at each byte of each text. Nearly always there is nothing to escape in
    // all of them, which is seen at a glance.
    let plain = is_plain(clients.text());
    for (at, Client { common_name, ipv4, ipv6 }) in clients.iter().enumerate() {
        to.write_all(if at == 0 { b"" } else { b"," })?;
        to.write_all(br#"{"common_name":"#)?;
        write_text(common_name, plain, &mut to)?;
        to.write_all(br#","ip_four":"#)?;
        write_text(ipv4, plain, &mut to)?;
        to.write_all(br#","ip_six":"#)?;
        write_text(ipv6, plain, &mut to)?;
        to.write_all(b"}")?;
    }
    Ok(())
}

/// Whether a JSON string holds the text as it is (RFC 8259, 7).
fn is_plain(text: &str) -> bool {
    let plain = |byte: u8| (byte >= b' ') & (byte != b'"') & (byte != b'\\');
    // Without an early end the compiler looks at many bytes at once.
    text.bytes().fold(true, |all, byte| all & plain(byte))
}

fn write_text(text: &str, plain: bool, to: &mut impl Write) -> io::Result<()> {
    if !plain {
        return Ok(serde_json::to_writer(to, text)?);
    }
    to.write_all(b"\"")?;
    to.write_all(text.as_bytes())?;
    to.write_all(b"\"")
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
            let (mut plain, mut any) = (Vec::new(), Vec::new());
            write_text(&text, true, &mut plain).unwrap();
            write_text(&text, false, &mut any).unwrap();
            assert_eq!(is_plain(&text), plain == any, "{text:?}");
        }
    }
}
