//! A set of shards, one bit for each.
//!
//! Takes no allocation for the first 64 shards. Knows nothing else.

use smallvec::SmallVec;

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct ShardSet(SmallVec<[u64; 1]>);

impl ShardSet {
    /// The word and the bit that stand for a shard.
    pub(crate) fn bit(shard: usize) -> (usize, u64) {
        (shard / 64, 1 << (shard % 64))
    }

    pub(crate) fn insert(&mut self, shard: usize) {
        let (word, bit) = Self::bit(shard);
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= bit;
    }

    pub(crate) fn words(&self) -> &[u64] {
        &self.0
    }

    pub(crate) fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().flat_map(|(word, bits)| {
            let mut bits = *bits;
            std::iter::from_fn(move || {
                let bit = bits.trailing_zeros() as usize;
                (bits != 0).then(|| {
                    bits &= bits - 1;
                    word * 64 + bit
                })
            })
        })
    }
}

impl FromIterator<usize> for ShardSet {
    fn from_iter<I: IntoIterator<Item = usize>>(shards: I) -> Self {
        let mut set = Self::default();
        shards.into_iter().for_each(|shard| set.insert(shard));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_contains_each_shard_once_in_order() {
        let set: ShardSet = [4095, 0, 63, 64, 0].into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 63, 64, 4095]);
        assert_eq!(set.len(), 4);
        assert_eq!(ShardSet::default().iter().next(), None);
    }
}
