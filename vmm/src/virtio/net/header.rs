//! The header before every frame (`struct virtio_net_hdr`, specification section 5.1.6), and what a driver may say
//! in it.
//!
//! The host's kernel acts on this header for every frame that the guest sends. It gets a copy that was checked, never
//! the guest's own, which could change after the check.

/// Its length: ten bytes and `num_buffers`, which is there since version 1.
pub const LENGTH: usize = 12;
/// Where `num_buffers` lies, two bytes, little-endian.
pub const NUM_BUFFERS: usize = 10;
/// Destination, source and type: the least that is a frame.
pub const ETHERNET: usize = 14;
/// The longest frame with its header: an IP packet of 65535 bytes in Ethernet with one VLAN tag.
pub const MAX_FRAME: usize = LENGTH + ETHERNET + 4 + 65_535;

/// Feature bits (section 5.1.3).
pub mod feature {
    /// `VIRTIO_NET_F_CSUM`: the driver may leave checksums to the device.
    pub const CSUM: u64 = 1;
    /// `VIRTIO_NET_F_GUEST_CSUM`: the device may leave them to the driver.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// `VIRTIO_NET_F_MAC`.
    pub const MAC: u64 = 1 << 5;
    /// `VIRTIO_NET_F_GUEST_TSO4`: the driver takes TCP over IPv4 in frames of many segments.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// `VIRTIO_NET_F_GUEST_TSO6`.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// `VIRTIO_NET_F_GUEST_ECN`: also with congestion notification.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// `VIRTIO_NET_F_HOST_TSO4`: the device takes such frames.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// `VIRTIO_NET_F_HOST_TSO6`.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// `VIRTIO_NET_F_HOST_ECN`.
    pub const HOST_ECN: u64 = 1 << 13;
    /// `VIRTIO_NET_F_MRG_RXBUF`: a frame may be spread over several chains.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// `VIRTIO_NET_F_STATUS`: the configuration says whether the link is up.
    pub const STATUS: u64 = 1 << 16;
    /// `VIRTIO_NET_F_GUEST_USO4`: the driver takes UDP over IPv4 in frames of many segments.
    pub const GUEST_USO4: u64 = 1 << 54;
    /// `VIRTIO_NET_F_GUEST_USO6`.
    pub const GUEST_USO6: u64 = 1 << 55;
    /// `VIRTIO_NET_F_HOST_USO`: the device takes such frames.
    pub const HOST_USO: u64 = 1 << 56;
}

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV4`.
const TCPV4: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV6`.
const TCPV6: u8 = 4;
/// `VIRTIO_NET_HDR_GSO_UDP_L4`.
const UDP_L4: u8 = 5;
/// `VIRTIO_NET_HDR_GSO_ECN`, in addition to one of TCP's.
const ECN: u8 = 0x80;

/// What is wrong with the header of a frame to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The driver leaves a checksum to the device without having agreed on it.
    #[error("a frame leaves its checksum to the device, which was not agreed on")]
    Checksum,
    /// The checksum would lie outside of the frame.
    #[error("a frame of {length} bytes has its checksum at {start} + {offset}")]
    ChecksumPlace {
        /// Length of the frame without header.
        length: usize,
        /// Where summing begins.
        start: u16,
        /// Where the sum goes, from there.
        offset: u16,
    },
    /// A kind of segmentation that was not agreed on, or does not exist.
    #[error("a frame is to be segmented as {0:#04x}, which was not agreed on")]
    Segmentation(u8),
    /// Segments without length, or without checksums of their own.
    #[error("a frame is to be segmented without a size of segments or without checksums")]
    Segments,
}

/// Checks the header of a frame of `length` bytes, itself not counted, and returns it as the kernel shall have it.
///
/// # Errors
/// [`HeaderError`]: the frame must not be sent.
pub fn check(header: [u8; LENGTH], length: usize, features: u64) -> Result<[u8; LENGTH], HeaderError> {
    let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    // Other flags have no meaning from the driver (section 5.1.6.2).
    let flags = header[0] & NEEDS_CSUM;
    let (kind, size, start, offset) = (header[1], word(4), word(6), word(8));
    if flags != 0 {
        if features & feature::CSUM == 0 {
            return Err(HeaderError::Checksum);
        }
        if usize::from(start) + usize::from(offset) + 2 > length {
            return Err(HeaderError::ChecksumPlace {
                length,
                start,
                offset,
            });
        }
    }
    let agreed = match kind & !ECN {
        0 => kind == 0,
        TCPV4 => features & feature::HOST_TSO4 != 0,
        TCPV6 => features & feature::HOST_TSO6 != 0,
        UDP_L4 => features & feature::HOST_USO != 0 && kind & ECN == 0,
        _ => false,
    };
    if !agreed || kind & ECN != 0 && features & feature::HOST_ECN == 0 {
        return Err(HeaderError::Segmentation(kind));
    }
    if kind != 0 && (size == 0 || flags == 0) {
        return Err(HeaderError::Segments);
    }
    let mut checked = header;
    checked[0] = flags;
    // The length of the headers is only a hint; one that is longer than the frame is none.
    if usize::from(word(2)) > length {
        checked[2..4].fill(0);
    }
    checked[NUM_BUFFERS..].fill(0);
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::feature::*;
    use super::*;

    fn header(flags: u8, kind: u8, size: u16, start: u16, offset: u16) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        (bytes[0], bytes[1]) = (flags, kind);
        for (at, value) in [(4, size), (6, start), (8, offset)] {
            bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    const ALL: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_USO;

    #[test]
    fn headers_that_linux_sends_pass_unchanged() {
        for bytes in [
            header(0, 0, 0, 0, 0),
            header(1, 0, 0, 34, 16),
            header(1, 0, 0, 1498, 0),
            header(1, TCPV4, 1448, 34, 16),
            header(1, TCPV4 | ECN, 1448, 34, 16),
            header(1, TCPV6, 1428, 54, 16),
            header(1, UDP_L4, 1400, 34, 6),
        ] {
            assert_eq!(check(bytes, 1500, ALL), Ok(bytes));
        }
    }

    #[test]
    fn what_was_not_agreed_on_is_refused() {
        assert_eq!(
            check(header(1, 0, 0, 34, 16), 1500, 0),
            Err(HeaderError::Checksum)
        );
        for (kind, needed) in [
            (TCPV4, HOST_TSO4),
            (TCPV6, HOST_TSO6),
            (UDP_L4, HOST_USO),
            (TCPV4 | ECN, HOST_ECN),
        ] {
            let bytes = header(1, kind, 1000, 34, 16);
            assert_eq!(
                check(bytes, 1500, ALL & !needed),
                Err(HeaderError::Segmentation(kind))
            );
        }
        for kind in [2, 3, 6, ECN, UDP_L4 | ECN, 0x7f] {
            let bytes = header(1, kind, 1000, 34, 16);
            assert_eq!(check(bytes, 1500, u64::MAX), Err(HeaderError::Segmentation(kind)));
        }
    }

    #[test]
    fn places_outside_of_the_frame_and_segments_without_size_are_refused() {
        for (start, offset) in [(1499, 0), (0, 1499), (u16::MAX, u16::MAX), (1500, 0)] {
            let refused = check(header(1, 0, 0, start, offset), 1500, ALL);
            assert!(
                matches!(refused, Err(HeaderError::ChecksumPlace { .. })),
                "{start} {offset}"
            );
        }
        assert_eq!(
            check(header(1, TCPV4, 0, 34, 16), 1500, ALL),
            Err(HeaderError::Segments)
        );
        assert_eq!(
            check(header(0, TCPV4, 1448, 34, 16), 1500, ALL),
            Err(HeaderError::Segments)
        );
    }

    #[test]
    fn what_the_driver_may_not_say_is_taken_out() {
        let mut bytes = header(0xff, 0, 0, 34, 16);
        bytes[2..4].copy_from_slice(&1501_u16.to_le_bytes());
        bytes[NUM_BUFFERS..].fill(0xee);
        assert_eq!(check(bytes, 1500, ALL), Ok(header(1, 0, 0, 34, 16)));
    }
}
