//! The token that a store compares before it overwrites a record.

use std::fmt;

/// The token that the store compares before it overwrites a record: etcd's revisions, a Node's uid, a file's
/// generation. Opaque outside the store. The default is no token.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Fence(Token);

/// Numbers are kept without an allocation: there is a fence for each of ten thousand records.
#[derive(Clone, PartialEq, Eq, Default)]
enum Token {
    #[default]
    None,
    Numbers([i64; 3]),
    /// Any text but that of three numbers.
    Text(Box<str>),
}

impl Fence {
    /// Creates a fence of any text.
    pub fn new(text: &str) -> Self {
        let mut parts = text.splitn(3, '.').map(str::parse);
        if let (Some(Ok(first)), Some(Ok(second)), Some(Ok(third))) = (parts.next(), parts.next(), parts.next()) {
            let numbers = Self::of_numbers([first, second, third]);
            if numbers.text().as_deref() == Some(text) {
                return numbers;
            }
        }
        Self(Token::Text(text.into()))
    }

    /// Creates a fence of three numbers. It is equal to that of their text, such as `7.-9.12`.
    pub fn of_numbers(numbers: [i64; 3]) -> Self {
        Self(Token::Numbers(numbers))
    }

    /// Returns the text; `None` if there is no token.
    pub fn text(&self) -> Option<String> {
        match &self.0 {
            Token::None => None,
            Token::Numbers([first, second, third]) => Some(format!("{first}.{second}.{third}")),
            Token::Text(text) => Some(text.to_string()),
        }
    }

    /// Returns the numbers; `None` if it is not made of three.
    pub fn numbers(&self) -> Option<[i64; 3]> {
        match self.0 {
            Token::Numbers(numbers) => Some(numbers),
            Token::None | Token::Text(_) => None,
        }
    }
}

impl fmt::Debug for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Fence").field(&self.text()).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_fence_is_its_text(
            text in "\\PC{0,20}|[0-9+-]{1,3}(\\.[0-9+-]{1,3}){0,3}",
            numbers in proptest::array::uniform3(any::<i64>()),
        ) {
            prop_assert_eq!(Fence::new(&text).text(), Some(text));
            let fence = Fence::of_numbers(numbers);
            prop_assert_eq!(&Fence::new(&fence.text().unwrap()), &fence);
            prop_assert_eq!(fence.numbers(), Some(numbers));
            prop_assert_ne!(fence, Fence::default());
        }
    }
}
