//! A batch: entries of one node as one record of the log.
//!
//! One record carries all entries that were queued while the previous record was being appended, so they share one round
//! trip to the broker and one write to its storage. By the node and the batch's number a reader recognises duplicates.
//! Decodes what other nodes have written: a length is checked against the bytes that follow before it is used. Does not
//! know the log.
//!
//! ```text
//! version u8 = 1 | node u64 | number u64 | then for each entry: length u32, its bytes        (big endian)
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::node::NodeId;

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 1 + 8 + 8;
const LENGTH_BYTES: usize = 4;

/// The bytes of a batch with entries of these lengths.
pub(crate) fn bytes_of(lengths: impl Iterator<Item = usize>) -> usize {
    HEADER_BYTES + lengths.map(entry_bytes).sum::<usize>()
}

/// The bytes that an entry of this length takes in a batch.
pub(crate) fn entry_bytes(length: usize) -> usize {
    LENGTH_BYTES + length
}

/// Why a record is no batch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidBatch {
    #[error("it is shorter than a header")]
    Short,
    #[error("its version is {0}, and this node knows version {VERSION}")]
    Version(u8),
    #[error("an entry of {length} bytes exceeds it")]
    Entry { length: usize },
}

/// Entries of one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Batch {
    pub(crate) node: NodeId,
    /// Consecutive for each node.
    pub(crate) number: u64,
    pub(crate) entries: Vec<Bytes>,
}

impl Batch {
    pub(crate) fn encode<'a>(
        node: NodeId,
        number: u64,
        entries: impl Iterator<Item = &'a Bytes> + Clone,
    ) -> Bytes {
        let mut record = BytesMut::with_capacity(bytes_of(entries.clone().map(Bytes::len)));
        record.put_u8(VERSION);
        record.put_u64(node.to_bits());
        record.put_u64(number);
        for entry in entries {
            record.put_u32(entry.len() as u32);
            record.put_slice(entry);
        }
        record.freeze()
    }

    pub(crate) fn decode(mut record: Bytes) -> Result<Self, InvalidBatch> {
        let version = record.first().copied().ok_or(InvalidBatch::Short)?;
        if version != VERSION {
            return Err(InvalidBatch::Version(version));
        }
        if record.len() < HEADER_BYTES {
            return Err(InvalidBatch::Short);
        }
        record.advance(1);
        let (node, number) = (NodeId::from_bits(record.get_u64()), record.get_u64());
        let mut entries = Vec::new();
        while record.has_remaining() {
            let length =
                record.try_get_u32().map_err(|_| InvalidBatch::Entry { length: record.len() })? as usize;
            if length > record.len() {
                return Err(InvalidBatch::Entry { length });
            }
            entries.push(record.split_to(length));
        }
        Ok(Self { node, number, entries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(entries: &[&'static [u8]]) -> Bytes {
        let entries: Vec<Bytes> = entries.iter().map(|entry| Bytes::from_static(entry)).collect();
        Batch::encode(NodeId::from_bits(7), 3, entries.iter())
    }

    #[test]
    fn a_batch_is_read_as_it_was_written() {
        let batches: [&[&'static [u8]]; 3] = [&[], &[b""], &[b"one", b"", b"three"]];
        for entries in batches {
            let record = encoded(entries);
            assert_eq!(record.len(), bytes_of(entries.iter().map(|entry| entry.len())));
            let batch = Batch::decode(record).expect("it was encoded");
            assert_eq!((batch.node, batch.number), (NodeId::from_bits(7), 3));
            assert!(batch.entries.iter().map(|entry| &entry[..]).eq(entries.iter().copied()));
        }
    }

    #[test]
    fn what_is_no_batch_is_refused_and_costs_nothing() {
        let record = encoded(&[b"one"]);
        for length in 0..record.len() {
            let cut = Batch::decode(record.slice(..length));
            // Cut off after the header it is a batch without entries.
            assert_eq!(cut.is_ok(), length == HEADER_BYTES, "{length}");
        }
        let mut other = record.to_vec();
        other[0] = 9;
        assert_eq!(Batch::decode(other.into()), Err(InvalidBatch::Version(9)));
        let mut huge = encoded(&[]).to_vec();
        huge.extend([0xFF; 4]);
        assert_eq!(Batch::decode(huge.into()), Err(InvalidBatch::Entry { length: u32::MAX as usize }));
    }
}
