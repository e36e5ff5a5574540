//! The header that every vsock packet begins with (specification section 5.10.6).

/// Length of a header.
pub const HEADER_SIZE: usize = 44;
/// The most payload that a packet may carry; larger ones are a protocol violation (Linux sends no more).
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the packet will receive no more data.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of the packet will send no more data.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for (`enum virtio_vsock_op`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Connect.
    Request = 1,
    /// The connection is accepted.
    Response = 2,
    /// There is no such connection, or not any more.
    Reset = 3,
    /// One side ends a direction, or both.
    Shutdown = 4,
    /// Data.
    ReadWrite = 5,
    /// Only tells the credit fields.
    CreditUpdate = 6,
    /// Asks for a [`Self::CreditUpdate`].
    CreditRequest = 7,
}

impl Operation {
    fn decode(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub source_cid: u64,
    /// Context id of the receiver.
    pub destination_cid: u64,
    /// Port of the sender.
    pub source_port: u32,
    /// Port of the receiver.
    pub destination_port: u32,
    /// Bytes of payload that follow.
    pub length: u32,
    /// [`TYPE_STREAM`], or something that is not supported.
    pub kind: u16,
    /// An [`Operation`], as a number.
    pub operation: u16,
    /// For [`Operation::Shutdown`]: `SHUTDOWN_*`.
    pub flags: u32,
    /// The sender's receive buffer in bytes.
    pub allocated: u32,
    /// Bytes that have left the sender's receive buffer so far, wrapping.
    pub forwarded: u32,
}

impl Header {
    /// The operation, if it is a known one.
    #[must_use]
    pub fn operation(&self) -> Option<Operation> {
        Operation::decode(self.operation)
    }

    /// Decodes a header; it is not checked in any way.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            source_cid: u64_at(0),
            destination_cid: u64_at(8),
            source_port: u32_at(16),
            destination_port: u32_at(20),
            length: u32_at(24),
            kind: u16_at(28),
            operation: u16_at(30),
            flags: u32_at(32),
            allocated: u32_at(36),
            forwarded: u32_at(40),
        }
    }

    /// Encodes the header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.operation.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.allocated.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_the_layout_of_the_specification() {
        let header = Header {
            source_cid: 0x1122_3344_5566_7788,
            destination_cid: 2,
            source_port: 3,
            destination_port: 4,
            length: 5,
            kind: TYPE_STREAM,
            operation: Operation::Shutdown as u16,
            flags: SHUTDOWN_BOTH,
            allocated: 8,
            forwarded: 0x99aa_bbcc,
        };
        let bytes = header.encode();
        assert_eq!(bytes[0..8], [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        assert_eq!((bytes[28], bytes[30], bytes[32], bytes[36]), (1, 4, 3, 8));
        assert_eq!(bytes[40..], [0xcc, 0xbb, 0xaa, 0x99]);
        assert_eq!(Header::decode(&bytes), header);
        assert_eq!(
            Header {
                operation: 8,
                ..header
            }
            .operation(),
            None
        );
    }
}
