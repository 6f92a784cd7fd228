//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

/// A ones' complement sum of 16-bit words, not folded yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sum(u64);

impl Sum {
    /// Returns the sum of these bytes. An odd last byte counts as the upper half of a word, so only the last part of a
    /// sequence may have an odd length.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        // In native byte order: swapping the bytes of all words swaps the bytes of the sum.
        let mut lanes = [0_u64; 8];
        let (blocks, rest) = bytes.as_chunks::<32>();
        for block in blocks {
            let words = block.as_chunks::<4>().0;
            for (lane, word) in lanes.iter_mut().zip(words) {
                *lane += u64::from(u32::from_ne_bytes(*word));
            }
        }
        let mut native: u64 = lanes.iter().sum();
        let (words, last) = rest.as_chunks::<2>();
        native += words.iter().map(|word| u64::from(u16::from_ne_bytes(*word))).sum::<u64>();
        if let [last] = last {
            native += u64::from(u16::from_ne_bytes([*last, 0]));
        }
        Self(u16::from_be(fold(native)).into())
    }

    /// Returns the sum of one word.
    pub(crate) fn of_word(word: u16) -> Self {
        Self(word.into())
    }

    /// Returns the sum of the pseudo-header of TCP and UDP, in both families (RFC 9293, section 3.1; RFC 8200, section
    /// 8.1). `len` is the length of the transport header and its payload, in bytes.
    pub(crate) fn pseudo(source: IpAddr, destination: IpAddr, protocol: u8, len: usize) -> Self {
        let len = len as u64;
        Self::of_address(source)
            .and(Self::of_address(destination))
            .and(Self(u64::from(protocol) + (len & 0xffff) + (len >> 16)))
    }

    fn of_address(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Self::of(&address.octets()),
            IpAddr::V6(address) => Self::of(&address.octets()),
        }
    }

    /// Returns the sum of both.
    pub(crate) fn and(self, other: Self) -> Self {
        // Each is the folded sum of at most 64 KiB of words, so this does not overflow.
        Self(self.0 + other.0)
    }

    /// Returns the folded sum without complement: the value in a checksum field that is completed later.
    pub(crate) fn unfinished(self) -> u16 {
        fold(self.0)
    }

    /// Returns the checksum as written to a header.
    pub(crate) fn finished(self) -> u16 {
        !fold(self.0)
    }

    /// Whether this is the sum of data with a correct checksum field.
    pub(crate) fn is_right(self) -> bool {
        fold(self.0) == 0xffff
    }
}

/// Returns the UDP checksum field. Zero would mean that there is no checksum (RFC 768).
pub(crate) fn of_udp(sum: Sum) -> u16 {
    match sum.finished() {
        0 => 0xffff,
        checksum => checksum,
    }
}

/// Returns a checksum after a change of one word that it covers (RFC 1624, equation 3).
pub(crate) fn updated(checksum: u16, old: u16, new: u16) -> u16 {
    !fold(u64::from(!checksum) + u64::from(!old) + u64::from(new))
}

fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    sum as u16
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Sums word by word and folds each time.
    fn naive(bytes: &[u8]) -> u16 {
        bytes.chunks(2).fold(0_u16, |sum, word| {
            let word = u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]);
            let (sum, carry) = sum.overflowing_add(word);
            sum + u16::from(carry)
        })
    }

    #[test]
    fn the_example_of_the_standard() {
        assert_eq!(Sum::of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]).unfinished(), 0xddf2);
    }

    #[test]
    fn the_largest_sums_do_not_overflow() {
        for len in [65_534, 65_535] {
            assert_eq!(Sum::of(&vec![0xff; len]).unfinished(), naive(&vec![0xff; len]));
        }
    }

    proptest! {
        #[test]
        fn a_sum_is_that_of_adding_word_by_word(bytes in vec(any::<u8>(), 0..2000), cut in 0_usize..2000) {
            // Zero has two representations.
            let same = |a: u16, b: u16| a == b || (a.is_multiple_of(0xffff) && b.is_multiple_of(0xffff));
            prop_assert!(same(Sum::of(&bytes).unfinished(), naive(&bytes)));
            let cut = cut.min(bytes.len()) & !1;
            let (first, second) = bytes.split_at(cut);
            prop_assert!(same(Sum::of(first).and(Sum::of(second)).unfinished(), naive(&bytes)));
        }

        #[test]
        fn an_updated_checksum_is_as_good_as_a_new_one(
            bytes in vec(any::<u8>(), 20..60), at in 1_usize..10, new in any::<u16>()
        ) {
            let mut bytes = bytes;
            bytes.truncate(bytes.len() & !1);
            bytes[..2].fill(0);
            let checksum = Sum::of(&bytes).finished();
            let old = u16::from_be_bytes([bytes[at * 2], bytes[at * 2 + 1]]);
            bytes[at * 2..at * 2 + 2].copy_from_slice(&new.to_be_bytes());
            bytes[..2].copy_from_slice(&updated(checksum, old, new).to_be_bytes());
            prop_assert!(Sum::of(&bytes).is_right() || Sum::of(&bytes).unfinished() == 0);
        }
    }
}
