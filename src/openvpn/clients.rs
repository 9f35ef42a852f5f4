//! Connected clients of one process, their text in one place: a node may have tens of thousands.

/// A connected client that has a common name and at least one address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Client<'a> {
    /// Name on its certificate (or user name), as OpenVPN reports it; U+FFFD stands for what
    /// is not UTF-8.
    pub common_name: &'a str,
    /// Its IPv4 address inside the VPN, as OpenVPN writes it; empty if it has none.
    pub ipv4: &'a str,
    /// Its IPv6 address inside the VPN, as OpenVPN writes it; empty if it has none.
    pub ipv6: &'a str,
}

/// Clients in the order in which they were reported.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Clients {
    text: String,
    /// How long they are.
    lengths: Vec<[usize; 3]>,
}

impl Clients {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }

    /// All names and addresses, one after the other.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// One after the other.
    pub fn iter(&self) -> impl Iterator<Item = Client<'_>> {
        let mut rest = self.text.as_str();
        self.lengths.iter().map(move |lengths| {
            let [common_name, ipv4, ipv6] = lengths.map(|length| {
                let (field, behind) = rest.split_at(length);
                rest = behind;
                field
            });
            Client { common_name, ipv4, ipv6 }
        })
    }

    /// Adds a client.
    pub fn push(&mut self, client: Client<'_>) {
        let fields = [client.common_name, client.ipv4, client.ipv6];
        fields.iter().for_each(|field| self.text.push_str(field));
        self.lengths.push(fields.map(str::len));
    }
}

impl<'a> FromIterator<Client<'a>> for Clients {
    fn from_iter<T: IntoIterator<Item = Client<'a>>>(clients: T) -> Self {
        let mut all = Self::default();
        clients.into_iter().for_each(|client| all.push(client));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out() {
        let client = |common_name, ipv4, ipv6| Client { common_name, ipv4, ipv6 };
        let all = [client("Zoë", "10.0.0.1", ""), client("b", "", "fd00::1"), client("", "", "")];
        let clients: Clients = all.into_iter().collect();
        assert!(clients.iter().eq(all));
        assert_eq!((clients.len(), clients.text()), (3, "Zoë10.0.0.1bfd00::1"));
        assert!(Clients::default().is_empty() && Clients::default().iter().next().is_none());
    }
}
