//! Messages: a header, a structure that belongs to the kind of message, and attributes, each aligned to four bytes.

/// Length of `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;
/// Length of `struct nlattr`.
const ATTRIBUTE_HEADER: usize = 4;
/// `NLA_F_NESTED`: the attribute holds attributes.
const NESTED: u16 = 1 << 15;
/// The bits of an attribute's type that are flags: `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
const TYPE_FLAGS: u16 = 3 << 14;

fn align(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// A message to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    body: Vec<u8>,
}

impl Message {
    /// A message of this kind (`RTM_NEWLINK`, …) with these flags (`NLM_F_CREATE`, …) and the structure that belongs
    /// to it, as bytes in the machine's order.
    #[must_use]
    pub fn new(kind: u16, flags: u16, header: &[u8]) -> Self {
        let mut body = header.to_vec();
        body.resize(align(header.len()), 0);
        Self { kind, flags, body }
    }

    /// Adds an attribute.
    ///
    /// # Panics
    /// When the value is longer than an attribute can be (64 KiB).
    #[must_use]
    pub fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.push(kind, value);
        self
    }

    /// Adds a number.
    #[must_use]
    pub fn with_u32(self, kind: u16, value: u32) -> Self {
        self.with(kind, &value.to_ne_bytes())
    }

    /// Adds a text, with the null byte that ends it.
    #[must_use]
    pub fn with_text(self, kind: u16, text: &str) -> Self {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.with(kind, &bytes)
    }

    /// Adds an attribute that holds what `fill` adds.
    #[must_use]
    pub fn with_nested(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.body.len();
        self.push(kind | NESTED, &[]);
        let mut filled = fill(self);
        let length = u16::try_from(filled.body.len() - start).expect("a nested attribute is small");
        filled.body[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        filled
    }

    fn push(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).expect("an attribute is small");
        self.body.extend(length.to_ne_bytes());
        self.body.extend(kind.to_ne_bytes());
        self.body.extend(value);
        self.body.resize(align(self.body.len()), 0);
    }

    /// The message as it is sent.
    pub(crate) fn encode(&self, flags: u16, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(HEADER + self.body.len()).expect("a message is small");
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        bytes.extend(length.to_ne_bytes());
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend((self.flags | flags).to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&self.body);
        bytes
    }
}

/// A message from the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// `RTM_NEWLINK`, …
    pub kind: u16,
    body: Vec<u8>,
}

impl Reply {
    pub(crate) fn new(kind: u16, body: &[u8]) -> Self {
        Self {
            kind,
            body: body.to_vec(),
        }
    }

    /// The structure at its beginning, which is `N` bytes long; `None` when the message is shorter.
    #[must_use]
    pub fn header<const N: usize>(&self) -> Option<[u8; N]> {
        self.body.first_chunk().copied()
    }

    /// The attributes after a structure of `header` bytes.
    #[must_use]
    pub fn attributes(&self, header: usize) -> Attributes<'_> {
        Attributes(self.body.get(align(header)..).unwrap_or_default())
    }
}

/// A list of attributes, read one after the other. What does not fit into the list ends it.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a>(&'a [u8]);

/// One attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attribute<'a> {
    /// Its type, without flags.
    pub kind: u16,
    /// Its value.
    pub value: &'a [u8],
}

impl<'a> Attributes<'a> {
    /// The attributes in these bytes, for values that hold more than attributes.
    #[must_use]
    pub fn parse(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The attribute of this type.
    #[must_use]
    pub fn get(self, kind: u16) -> Option<Attribute<'a>> {
        self.into_iter().find(|attribute| attribute.kind == kind)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Attribute<'a>> {
        let [l0, l1, k0, k1] = *self.0.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = self.0.get(ATTRIBUTE_HEADER..length)?;
        let kind = u16::from_ne_bytes([k0, k1]) & !TYPE_FLAGS;
        self.0 = self.0.get(align(length)..).unwrap_or_default();
        Some(Attribute { kind, value })
    }
}

impl<'a> Attribute<'a> {
    /// The value as a number in the machine's order; `None` when it has another length.
    #[must_use]
    pub fn u32(self) -> Option<u32> {
        self.value.try_into().ok().map(u32::from_ne_bytes)
    }

    /// The value as text, without the null byte that ends it.
    #[must_use]
    pub fn text(self) -> String {
        let text = self.value.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    }

    /// The attributes in it.
    #[must_use]
    pub fn nested(self) -> Attributes<'a> {
        Attributes(self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_read_back_as_they_were_written() {
        let message = Message::new(16, 0, &[1, 2, 3])
            .with_text(3, "eth0")
            .with_nested(18, |nested| nested.with_text(1, "veth").with_u32(2, 7))
            .with(1, &[1, 2, 3, 4, 5, 6]);
        let bytes = message.encode(5, 9);
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(bytes[0..4], u32::try_from(bytes.len()).unwrap().to_ne_bytes());
        let reply = Reply::new(16, &bytes[HEADER..]);
        assert_eq!(reply.header::<3>(), Some([1, 2, 3]));
        let attributes = reply.attributes(3);
        assert_eq!(attributes.get(3).unwrap().text(), "eth0");
        assert_eq!(attributes.get(1).unwrap().value, [1, 2, 3, 4, 5, 6]);
        let nested = attributes.get(18).unwrap().nested();
        assert_eq!(nested.get(1).unwrap().text(), "veth");
        assert_eq!(nested.get(2).unwrap().u32(), Some(7));
        assert_eq!(attributes.get(99), None);
    }

    #[test]
    fn attributes_that_do_not_fit_end_the_list() {
        for bytes in [
            &[][..],
            &[1, 0],
            &[3, 0, 1, 0],
            &[9, 0, 1, 0, 1, 2, 3, 4],
            &[0; 8],
        ] {
            assert_eq!(Reply::new(0, bytes).attributes(0).next(), None, "{bytes:?}");
        }
        let one = Reply::new(0, &[4, 0, 1, 0, 200, 0, 2, 0]);
        assert_eq!(one.attributes(0).count(), 1);
    }
}
