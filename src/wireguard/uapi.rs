//! Numbers of the kernel's interface, by the names and in the order of its headers.

/// `linux/netlink.h`: types and flags of messages, and of attributes.
pub(super) const NLM_F_REQUEST: u16 = 0x01;
pub(super) const NLM_F_ACK: u16 = 0x04;
pub(super) const NLM_F_DUMP_INTR: u16 = 0x10;
pub(super) const NLM_F_DUMP: u16 = 0x100 | 0x200; // NLM_F_ROOT | NLM_F_MATCH
pub(super) const NLMSG_ERROR: u16 = 0x2;
pub(super) const NLMSG_DONE: u16 = 0x3;
pub(super) const NLA_F_NESTED: u16 = 1 << 15;
pub(super) const NLA_F_NET_BYTEORDER: u16 = 1 << 14;
pub(super) const NLA_TYPE_MASK: u16 = !(NLA_F_NESTED | NLA_F_NET_BYTEORDER);

/// `linux/genetlink.h`: the controller, which knows the numbers of the families.
pub(super) const GENL_ID_CTRL: u16 = 0x10; // NLMSG_MIN_TYPE
pub(super) const CTRL_CMD_GETFAMILY: u8 = 3;
pub(super) const CTRL_ATTR_FAMILY_ID: u16 = 1;
pub(super) const CTRL_ATTR_FAMILY_NAME: u16 = 2;

/// `linux/wireguard.h`
pub(super) const WG_GENL_NAME: &str = "wireguard";
pub(super) const WG_CMD_GET_DEVICE: u8 = 0;
pub(super) const WG_CMD_SET_DEVICE: u8 = 1;
pub(super) const WGDEVICE_A_IFNAME: u16 = 2;
pub(super) const WGDEVICE_A_PUBLIC_KEY: u16 = 4;
pub(super) const WGDEVICE_A_PEERS: u16 = 8;
pub(super) const WGPEER_F_REMOVE_ME: u32 = 1 << 0;
pub(super) const WGPEER_F_REPLACE_ALLOWEDIPS: u32 = 1 << 1;
pub(super) const WGPEER_A_PUBLIC_KEY: u16 = 1;
pub(super) const WGPEER_A_FLAGS: u16 = 3;
pub(super) const WGPEER_A_LAST_HANDSHAKE_TIME: u16 = 6;
pub(super) const WGPEER_A_RX_BYTES: u16 = 7;
pub(super) const WGPEER_A_TX_BYTES: u16 = 8;
pub(super) const WGPEER_A_ALLOWEDIPS: u16 = 9;
pub(super) const WGALLOWEDIP_A_FAMILY: u16 = 1;
pub(super) const WGALLOWEDIP_A_IPADDR: u16 = 2;
pub(super) const WGALLOWEDIP_A_CIDR_MASK: u16 = 3;

/// `linux/socket.h`
pub(super) const AF_INET: u16 = 2;
pub(super) const AF_INET6: u16 = 10;
