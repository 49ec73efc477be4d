//! The bounds on a decoder's work for one message: how deep it recurses and how many elements it reads.
//!
//! A serde deserializer that wraps another one; a value of it belongs to one call. It counts in the visitors, where
//! serde recurses, because formats differ in what they count themselves: postcard counts nothing, MessagePack
//! (`rmp-serde`) only sequences and maps, JSON neither options nor newtypes. The reason for a refusal is stored outside
//! serde's error, since postcard's errors carry no text. Values that serde's derive buffers (untagged and internally
//! tagged enums, `flatten`) are counted only while the buffer is filled. Knows serde. Does not know any format.

use std::cell::Cell;
use std::fmt;

use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess, VariantAccess, Visitor,
};
use thiserror::Error;

use super::CodecError;

/// How many levels a message may be nested, for every codec of this crate: 128. A value inside an option, a newtype, a
/// sequence, a tuple, a map, a struct or an enum is one level below it; the fields of a tuple or struct variant are
/// two levels below their enum.
///
/// At this depth a message type of about 500 bytes decodes on a thread with a stack of 2 MiB, the default of the shards
/// and of tokio, in a build without optimisations. A type that contains itself should keep larger parts in a `Box`.
pub const DEPTH_MAX: u8 = 128;

/// The most elements for which a collection reserves memory before they have been read.
const HINT_MAX: usize = 64;

/// Reads one value, nested at most [`DEPTH_MAX`] levels: for codecs whose serde format does not limit recursion, or
/// limits only some of it. A collection reserves memory for at most 64 elements of a claimed length; beyond that it
/// grows as elements are read.
///
/// Values that serde buffers are counted while the buffer is filled, but not while the message is read from it; see
/// [`Decode`](crate::Decode#untagged-enums-flatten-and-internal-tags) for the consequences.
///
/// ```
/// use serde::de::DeserializeOwned;
/// use shardcast::{CodecError, Decode, MessageKind, deserialize_bounded};
///
/// struct MessagePack;
///
/// impl<T: DeserializeOwned> Decode<T> for MessagePack {
///     fn decode(kind: MessageKind, payload: &[u8]) -> Result<T, CodecError> {
///         CodecError::require(kind, MessageKind::Binary)?;
///         let mut deserializer = rmp_serde::Deserializer::new(payload);
///         let value = deserialize_bounded(&mut deserializer)?;
///         match deserializer.into_inner() {
///             [] => Ok(value),
///             rest => Err(CodecError::TrailingBytes { count: rest.len() }),
///         }
///     }
/// }
/// ```
///
/// # Errors
/// [`CodecError::Decode`]: the format's error, or that the value is nested too deeply. The caller must refuse bytes
/// after the value.
pub fn deserialize_bounded<'de, T, D>(deserializer: D) -> Result<T, CodecError>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
    D::Error: std::error::Error + Send + Sync + 'static,
{
    deserialize_within(deserializer, None)
}

/// Like [`deserialize_bounded`], for formats in which an element may take no bytes, so that a length of a few bytes
/// could keep a thread busy for ever. All sequences and maps of the value together may have at most `elements_max`
/// elements.
pub(super) fn deserialize_counted<'de, T, D>(deserializer: D, elements_max: usize) -> Result<T, CodecError>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
    D::Error: std::error::Error + Send + Sync + 'static,
{
    deserialize_within(deserializer, Some(elements_max))
}

fn deserialize_within<'de, T, D>(deserializer: D, elements_max: Option<usize>) -> Result<T, CodecError>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
    D::Error: std::error::Error + Send + Sync + 'static,
{
    let bounds = Bounds {
        counts_elements: elements_max.is_some(),
        elements: Cell::new(elements_max.unwrap_or_default()),
        exceeded: Cell::new(None),
    };
    let bounded = Bounded { inner: deserializer, levels: DEPTH_MAX, is_counted: false, bounds: &bounds };
    T::deserialize(bounded).map_err(|error| match bounds.exceeded.get() {
        Some(exceeded) => CodecError::decode(exceeded),
        None => CodecError::decode(error),
    })
}

struct Bounds {
    counts_elements: bool,
    /// How many more elements may be read.
    elements: Cell<usize>,
    exceeded: Cell<Option<Exceeded>>,
}

#[derive(Clone, Copy, Debug, Error)]
enum Exceeded {
    #[error("nested more than {DEPTH_MAX} levels deep")]
    Depth,
    #[error("more elements than bytes")]
    Elements,
}

/// A part of serde's data model, with what remains of the bounds.
struct Bounded<'b, T> {
    inner: T,
    /// How many more levels may be entered below this value.
    levels: u8,
    /// Whether the elements of this value are counted: it is a sequence or a map, whose length the message determines.
    is_counted: bool,
    bounds: &'b Bounds,
}

impl<'b, T> Bounded<'b, T> {
    fn around<U>(&self, inner: U) -> Bounded<'b, U> {
        Bounded { inner, levels: self.levels, is_counted: false, bounds: self.bounds }
    }

    /// The levels that remain one level down. Takes `&self` and not `self`, because the caller still needs `inner`.
    fn enter<E: serde::de::Error>(&self) -> Result<u8, E> {
        self.levels.checked_sub(1).ok_or_else(|| self.refuse(Exceeded::Depth))
    }

    #[cold]
    fn refuse<E: serde::de::Error>(&self, exceeded: Exceeded) -> E {
        self.bounds.exceeded.set(Some(exceeded));
        E::custom(exceeded)
    }

    fn count<E: serde::de::Error>(&self) -> Result<(), E> {
        if self.is_counted {
            let left = self.bounds.elements.get().checked_sub(1);
            self.bounds.elements.set(left.ok_or_else(|| self.refuse(Exceeded::Elements))?);
        }
        Ok(())
    }
}

/// A claimed length must not cause a large allocation. There can be one such length on each level.
fn plausible(hint: Option<usize>) -> Option<usize> {
    hint.map(|elements| elements.min(HINT_MAX))
}

macro_rules! deserialize_with {
    ($($method:ident($($argument:ident: $type:ty),*))*) => {
        $(
            #[inline]
            fn $method<V: Visitor<'de>>(self, $($argument: $type,)* visitor: V) -> Result<V::Value, D::Error> {
                let visitor = self.around(visitor);
                self.inner.$method($($argument,)* visitor)
            }
        )*
    };
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Bounded<'_, D> {
    type Error = D::Error;

    deserialize_with! {
        deserialize_any()
        deserialize_bool()
        deserialize_i8()
        deserialize_i16()
        deserialize_i32()
        deserialize_i64()
        deserialize_i128()
        deserialize_u8()
        deserialize_u16()
        deserialize_u32()
        deserialize_u64()
        deserialize_u128()
        deserialize_f32()
        deserialize_f64()
        deserialize_char()
        deserialize_str()
        deserialize_string()
        deserialize_bytes()
        deserialize_byte_buf()
        deserialize_option()
        deserialize_unit()
        deserialize_unit_struct(name: &'static str)
        deserialize_newtype_struct(name: &'static str)
        deserialize_tuple(len: usize)
        deserialize_tuple_struct(name: &'static str, len: usize)
        deserialize_struct(name: &'static str, fields: &'static [&'static str])
        deserialize_enum(name: &'static str, variants: &'static [&'static str])
        deserialize_identifier()
        deserialize_ignored_any()
    }

    #[inline]
    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = Bounded { is_counted: self.bounds.counts_elements, ..self.around(visitor) };
        self.inner.deserialize_seq(visitor)
    }

    #[inline]
    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = Bounded { is_counted: self.bounds.counts_elements, ..self.around(visitor) };
        self.inner.deserialize_map(visitor)
    }

    #[inline]
    fn is_human_readable(&self) -> bool {
        self.inner.is_human_readable()
    }
}

macro_rules! visit_leaf {
    ($($method:ident($type:ty))*) => {
        $(
            #[inline]
            fn $method<E: serde::de::Error>(self, value: $type) -> Result<V::Value, E> {
                self.inner.$method(value)
            }
        )*
    };
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Bounded<'_, V> {
    type Value = V::Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.expecting(formatter)
    }

    visit_leaf! {
        visit_bool(bool)
        visit_i8(i8)
        visit_i16(i16)
        visit_i32(i32)
        visit_i64(i64)
        visit_i128(i128)
        visit_u8(u8)
        visit_u16(u16)
        visit_u32(u32)
        visit_u64(u64)
        visit_u128(u128)
        visit_f32(f32)
        visit_f64(f64)
        visit_char(char)
        visit_str(&str)
        visit_borrowed_str(&'de str)
        visit_string(String)
        visit_bytes(&[u8])
        visit_borrowed_bytes(&'de [u8])
        visit_byte_buf(Vec<u8>)
    }

    #[inline]
    fn visit_none<E: serde::de::Error>(self) -> Result<V::Value, E> {
        self.inner.visit_none()
    }

    #[inline]
    fn visit_unit<E: serde::de::Error>(self) -> Result<V::Value, E> {
        self.inner.visit_unit()
    }

    #[inline]
    fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        let levels = self.enter()?;
        self.inner.visit_some(Bounded { inner, levels, is_counted: false, bounds: self.bounds })
    }

    #[inline]
    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        let levels = self.enter()?;
        self.inner.visit_newtype_struct(Bounded { inner, levels, is_counted: false, bounds: self.bounds })
    }

    #[inline]
    fn visit_seq<A: SeqAccess<'de>>(self, inner: A) -> Result<V::Value, A::Error> {
        let levels = self.enter()?;
        let (is_counted, bounds) = (self.is_counted, self.bounds);
        self.inner.visit_seq(Bounded { inner, levels, is_counted, bounds })
    }

    #[inline]
    fn visit_map<A: MapAccess<'de>>(self, inner: A) -> Result<V::Value, A::Error> {
        let levels = self.enter()?;
        let (is_counted, bounds) = (self.is_counted, self.bounds);
        self.inner.visit_map(Bounded { inner, levels, is_counted, bounds })
    }

    #[inline]
    fn visit_enum<A: EnumAccess<'de>>(self, inner: A) -> Result<V::Value, A::Error> {
        let levels = self.enter()?;
        self.inner.visit_enum(Bounded { inner, levels, is_counted: false, bounds: self.bounds })
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Bounded<'_, A> {
    type Error = A::Error;

    #[inline]
    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, A::Error> {
        let seed = self.around(seed);
        let element = self.inner.next_element_seed(seed)?;
        if element.is_some() {
            self.count()?;
        }
        Ok(element)
    }

    #[inline]
    fn size_hint(&self) -> Option<usize> {
        plausible(self.inner.size_hint())
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Bounded<'_, A> {
    type Error = A::Error;

    #[inline]
    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        let seed = self.around(seed);
        let key = self.inner.next_key_seed(seed)?;
        if key.is_some() {
            self.count()?;
        }
        Ok(key)
    }

    #[inline]
    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, A::Error> {
        let seed = self.around(seed);
        self.inner.next_value_seed(seed)
    }

    #[inline]
    fn size_hint(&self) -> Option<usize> {
        plausible(self.inner.size_hint())
    }
}

impl<'de, 'b, A: EnumAccess<'de>> EnumAccess<'de> for Bounded<'b, A> {
    type Error = A::Error;
    type Variant = Bounded<'b, A::Variant>;

    #[inline]
    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self::Variant), A::Error> {
        let Self { inner, levels, is_counted, bounds } = self;
        let (value, inner) = inner.variant_seed(Bounded { inner: seed, levels, is_counted, bounds })?;
        Ok((value, Bounded { inner, levels, is_counted, bounds }))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Bounded<'_, A> {
    type Error = A::Error;

    #[inline]
    fn unit_variant(self) -> Result<(), A::Error> {
        self.inner.unit_variant()
    }

    #[inline]
    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, A::Error> {
        let seed = self.around(seed);
        self.inner.newtype_variant_seed(seed)
    }

    #[inline]
    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, A::Error> {
        let visitor = self.around(visitor);
        self.inner.tuple_variant(len, visitor)
    }

    #[inline]
    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        let visitor = self.around(visitor);
        self.inner.struct_variant(fields, visitor)
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Bounded<'_, S> {
    type Value = S::Value;

    #[inline]
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        let deserializer = self.around(deserializer);
        self.inner.deserialize(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::error::Error as _;
    use std::fmt::Debug;

    use serde::{Deserialize, Serialize, de::DeserializeOwned};
    use shardcast_engine::MessageKind;

    use super::*;
    use crate::codec::{BinaryCodec, Decode, Encode, JsonCodec};

    /// As in the example `custom_codec`.
    struct MessagePack;

    impl<T: DeserializeOwned> Decode<T> for MessagePack {
        fn decode(_: MessageKind, payload: &[u8]) -> Result<T, CodecError> {
            deserialize_bounded(&mut rmp_serde::Deserializer::new(payload))
        }
    }

    impl<T: Serialize> Encode<T> for MessagePack {
        fn encode(value: &T, payload: &mut Vec<u8>) -> Result<MessageKind, CodecError> {
            rmp_serde::encode::write_named(payload, value).map_err(CodecError::encode)?;
            Ok(MessageKind::Binary)
        }
    }

    /// Recurses in each way that serde knows.
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Tree {
        Leaf,
        Newtype(Box<Tree>),
        Tuple(u8, Box<Tree>),
        Struct { below: Box<Tree> },
        Option(Option<Box<Tree>>),
        Vec(Vec<Tree>),
        Map(BTreeMap<String, Tree>),
        Wrapped(Wrapper),
        Pair((Box<Tree>, u8)),
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Wrapper(Box<Tree>);

    /// A way to put one tree into another, and how many levels that adds.
    type Nest = (fn(Tree) -> Tree, usize);

    const WAYS: [Nest; 8] = [
        (|tree| Tree::Newtype(Box::new(tree)), 1),
        (|tree| Tree::Tuple(7, Box::new(tree)), 2),
        (|tree| Tree::Struct { below: Box::new(tree) }, 2),
        (|tree| Tree::Option(Some(Box::new(tree))), 2),
        (|tree| Tree::Vec(vec![tree]), 2),
        (|tree| Tree::Map(BTreeMap::from([("k".to_owned(), tree)])), 2),
        (|tree| Tree::Wrapped(Wrapper(Box::new(tree))), 2),
        (|tree| Tree::Pair((Box::new(tree), 7)), 2),
    ];

    fn nested(times: usize, nest: fn(Tree) -> Tree) -> Tree {
        (0..times).fold(Tree::Leaf, |tree, _| nest(tree))
    }

    fn decoded<C: Encode<T> + Decode<T>, T>(value: &T) -> Result<T, CodecError> {
        let mut payload = Vec::new();
        let kind = C::encode(value, &mut payload).unwrap();
        C::decode(kind, &payload)
    }

    fn assert_too_deep<T: Debug>(result: Result<T, CodecError>) {
        let error = result.unwrap_err();
        assert!(matches!(error, CodecError::Decode(_)), "{error:?}");
        assert_eq!(error.source().unwrap().to_string(), "nested more than 128 levels deep");
    }

    fn has_the_limit_in_each_way<C: Encode<Tree> + Decode<Tree>>() {
        for (nest, levels) in WAYS {
            // The leaf is an enum: one level itself.
            let most = (usize::from(DEPTH_MAX) - 1) / levels;
            let deepest = nested(most, nest);
            assert_eq!(decoded::<C, Tree>(&deepest).unwrap(), deepest);
            assert_too_deep(decoded::<C, Tree>(&nest(deepest)));
        }
    }

    #[test]
    fn postcard_stops_at_128_levels_in_each_way_of_nesting() {
        has_the_limit_in_each_way::<BinaryCodec>();
    }

    #[test]
    fn message_pack_stops_at_128_levels_in_each_way_of_nesting() {
        has_the_limit_in_each_way::<MessagePack>();
    }

    #[test]
    fn json_stops_at_128_levels_in_each_way_of_nesting() {
        for (nest, levels) in WAYS {
            let most = (usize::from(DEPTH_MAX) - 1) / levels;
            let deepest = nested(most, nest);
            assert_eq!(decoded::<JsonCodec, Tree>(&deepest).unwrap(), deepest);
            // Which of the two limits is met first, serde_json's or ours, depends on the way.
            let refused = decoded::<JsonCodec, Tree>(&nest(deepest));
            assert!(matches!(refused, Err(CodecError::Decode(_))), "{refused:?}");
        }
        let lists = |times| format!("{}{}", "[".repeat(times), "]".repeat(times));
        let read = |text: String| -> Result<serde_json::Value, _> {
            JsonCodec::decode(MessageKind::Text, text.as_bytes())
        };
        assert!(read(lists(127)).is_ok());
        assert!(matches!(read(lists(129)), Err(CodecError::Decode(_))));
    }

    /// serde_json counts neither options nor newtypes, so any number would recurse for ever without the limit.
    #[test]
    fn a_type_that_recurses_without_a_byte_is_refused() {
        #[derive(Debug, Serialize, Deserialize)]
        struct Endless(Option<Box<Endless>>);

        assert_too_deep(<JsonCodec as Decode<Endless>>::decode(MessageKind::Text, b"1"));
        assert_too_deep(<MessagePack as Decode<Endless>>::decode(MessageKind::Binary, &[1]));
        assert_too_deep(<BinaryCodec as Decode<Endless>>::decode(MessageKind::Binary, &[1; 1000]));
    }

    #[test]
    fn siblings_are_not_levels() {
        let wide = Tree::Vec((0..10_000).map(|_| Tree::Newtype(Box::new(Tree::Leaf))).collect());
        assert_eq!(decoded::<BinaryCodec, Tree>(&wide).unwrap(), wide);
        assert_eq!(decoded::<MessagePack, Tree>(&wide).unwrap(), wide);
        assert_eq!(decoded::<JsonCodec, Tree>(&wide).unwrap(), wide);
    }

    /// About 500 bytes, which are moved on the stack at every level.
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[allow(clippy::large_enum_variant)] // that is the point
    enum Fat {
        Leaf,
        Node { numbers: [[u64; 16]; 3], names: [String; 4], below: Box<Fat> },
        Thin(Box<Fat>),
    }

    /// The stack of a shard and of a tokio worker is 2 MiB. Decoding uses about 1.1 MiB of it, and a fraction of that
    /// with optimisations.
    #[test]
    fn the_deepest_message_fits_a_stack_of_2_mib_in_a_debug_build() {
        const STACK_BYTES: usize = 2 << 20;
        assert!((480..=512).contains(&size_of::<Fat>()), "{}", size_of::<Fat>());
        let fat = || {
            let node = |below| Fat::Node { numbers: [[1; 16]; 3], names: Default::default(), below };
            // The numbers of the innermost node are two levels below it.
            (0..(DEPTH_MAX - 3) / 2).fold(Fat::Leaf, |fat, _| node(Box::new(fat)))
        };
        let thin = || (1..DEPTH_MAX).fold(Fat::Leaf, |fat, _| Fat::Thin(Box::new(fat)));
        let decoding = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
            type Codec = fn(&Fat) -> Result<Fat, CodecError>;
            let codecs: [Codec; 3] =
                [decoded::<BinaryCodec, Fat>, decoded::<JsonCodec, Fat>, decoded::<MessagePack, Fat>];
            for codec in codecs {
                for fat in [fat(), thin()] {
                    assert_eq!(codec(&fat).unwrap(), fat);
                }
            }
        });
        decoding.unwrap().join().unwrap();
    }

    #[test]
    fn a_length_that_lies_about_elements_without_bytes_is_refused_soon() {
        #[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        struct Nothing;

        let half_of_all = [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01]; // 2^63
        let vec: Result<Vec<()>, _> = BinaryCodec::decode(MessageKind::Binary, &half_of_all);
        let map: Result<BTreeMap<Nothing, ()>, _> = BinaryCodec::decode(MessageKind::Binary, &half_of_all);
        for error in [vec.unwrap_err(), map.unwrap_err()] {
            assert_eq!(error.source().unwrap().to_string(), "more elements than bytes");
        }
        let some = vec![(); 1 << 16];
        assert_eq!(decoded::<BinaryCodec, _>(&some).unwrap(), some);
        let bytes = vec![7_u8; 1 << 20];
        assert_eq!(decoded::<BinaryCodec, _>(&bytes).unwrap(), bytes);
    }

    /// Each of these types recurses through serde's own buffer.
    #[allow(clippy::large_enum_variant)] // that is the point
    mod buffered {
        use super::*;

        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        #[serde(untagged)]
        pub(super) enum Untagged {
            Leaf(u8),
            Node { numbers: [[u64; 16]; 3], below: Box<Untagged> },
            List(Vec<Untagged>),
        }

        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "is")]
        pub(super) enum Tagged {
            Leaf,
            Node { numbers: [[u64; 16]; 3], below: Box<Tagged> },
        }

        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        pub(super) struct Flat {
            #[serde(flatten)]
            pub(super) more: More,
        }

        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        pub(super) struct More {
            pub(super) numbers: [[u64; 16]; 3],
            pub(super) below: Option<Box<Flat>>,
        }
    }

    /// Decodes a value within the limit, including the arrays in it, and refuses one beyond the limit.
    fn a_buffer_has_the_limit<C, T>(leaf: fn() -> T, nest: fn(T) -> T)
    where
        C: Encode<T> + Decode<T>,
        T: PartialEq + Debug,
    {
        let nested = |levels| (0..levels).fold(leaf(), |value, _| nest(value));
        let deepest = nested(DEPTH_MAX - 5);
        assert_eq!(decoded::<C, T>(&deepest).unwrap(), deepest);
        let refused = decoded::<C, T>(&nested(DEPTH_MAX + 1));
        assert!(matches!(refused, Err(CodecError::Decode(_))), "{refused:?}");
    }

    fn buffers_have_the_limit<C>()
    where
        C: Encode<buffered::Untagged> + Decode<buffered::Untagged>,
        C: Encode<buffered::Tagged> + Decode<buffered::Tagged>,
        C: Encode<buffered::Flat> + Decode<buffered::Flat>,
    {
        use buffered::{Flat, More, Tagged, Untagged};

        a_buffer_has_the_limit::<C, _>(|| Untagged::Leaf(7), |below| Untagged::List(vec![below]));
        a_buffer_has_the_limit::<C, _>(
            || Untagged::Leaf(7),
            |below| Untagged::Node { numbers: [[1; 16]; 3], below: Box::new(below) },
        );
        a_buffer_has_the_limit::<C, _>(
            || Tagged::Leaf,
            |below| Tagged::Node { numbers: [[1; 16]; 3], below: Box::new(below) },
        );
        a_buffer_has_the_limit::<C, _>(
            || Flat { more: More { numbers: [[1; 16]; 3], below: None } },
            |below| Flat { more: More { numbers: [[1; 16]; 3], below: Some(Box::new(below)) } },
        );
    }

    /// Values read from serde's buffer are not counted, but they are no deeper than the buffer.
    #[test]
    fn what_serde_buffers_nests_at_most_128_levels_and_fits_a_stack_of_2_mib_in_a_debug_build() {
        let decoding = || {
            buffers_have_the_limit::<JsonCodec>();
            buffers_have_the_limit::<MessagePack>();
        };
        std::thread::Builder::new().stack_size(2 << 20).spawn(decoding).unwrap().join().unwrap();
    }

    /// So postcard cannot reach the recursion that the limits do not count.
    #[test]
    fn postcard_refuses_what_serde_buffers() {
        let refused = |result: Result<(), CodecError>| {
            assert!(matches!(result, Err(CodecError::Decode(_))), "{result:?}");
        };
        for payload in [&[0][..], &[1, 1, 65, 0], &[0; 400]] {
            refused(
                <BinaryCodec as Decode<buffered::Untagged>>::decode(MessageKind::Binary, payload).map(drop),
            );
            refused(
                <BinaryCodec as Decode<buffered::Tagged>>::decode(MessageKind::Binary, payload).map(drop),
            );
            refused(<BinaryCodec as Decode<buffered::Flat>>::decode(MessageKind::Binary, payload).map(drop));
        }
    }

    /// The size hint of a sequence, for which collections reserve memory.
    #[derive(Debug)]
    struct Hint(Option<usize>);

    impl<'de> Deserialize<'de> for Hint {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct HintVisitor;

            impl<'de> Visitor<'de> for HintVisitor {
                type Value = Hint;

                fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                    formatter.write_str("a sequence")
                }

                fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Hint, A::Error> {
                    let hint = elements.size_hint();
                    while elements.next_element::<u8>()?.is_some() {}
                    Ok(Hint(hint))
                }
            }

            deserializer.deserialize_seq(HintVisitor)
        }
    }

    #[test]
    fn a_length_that_is_only_claimed_reserves_room_for_few_elements() {
        let elements = vec![7_u8; 1000];
        let mut payload = Vec::new();
        MessagePack::encode(&elements, &mut payload).unwrap();
        let hint: Hint = MessagePack::decode(MessageKind::Binary, &payload).unwrap();
        assert_eq!(hint.0, Some(HINT_MAX), "{hint:?}");
        payload.clear();
        BinaryCodec::encode(&elements, &mut payload).unwrap();
        let hint: Hint = BinaryCodec::decode(MessageKind::Binary, &payload).unwrap();
        assert_eq!(hint.0, Some(HINT_MAX), "{hint:?}");
    }
}
