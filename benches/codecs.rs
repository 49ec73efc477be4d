//! The cost of a codec, compared with the format that it uses.
//!
//! `cargo bench --bench codecs`. All cases run on one thread. `flat` is a typical message with a few fields; `list` has
//! 100 of them; `tree` is nested 60 levels deep; `numbers` has 1,000 numbers. `bounded` is the codec of this crate,
//! which counts levels and elements; `plain` is serde_json or postcard alone. Elements are messages.

#![allow(missing_docs)] // criterion's macros make public items without any

use std::fmt::Debug;
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use shardcast::{BinaryCodec, Decode, Encode, JsonCodec, MessageKind};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Said {
    id: u64,
    name: String,
    text: String,
    reply_to: Option<u64>,
    mood: Mood,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Mood {
    Plain,
    Loud { exclamations: u8 },
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Tree {
    Leaf(u32),
    Node(Box<Tree>),
}

fn said() -> Said {
    let mood = Mood::Loud { exclamations: 3 };
    let text = "the quick brown fox jumps over the lazy dog".to_owned();
    Said { id: 123_456, name: "Ada Lovelace".to_owned(), text, reply_to: Some(123_400), mood }
}

fn both<T>(criterion: &mut Criterion, name: &str, message: T)
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let mut json = Vec::new();
    JsonCodec::encode(&message, &mut json).expect("the message can be encoded");
    let mut binary = Vec::new();
    BinaryCodec::encode(&message, &mut binary).expect("the message can be encoded");
    let of_json =
        |json: &[u8]| -> T { JsonCodec::decode(MessageKind::Text, json).expect("the payload is valid") };
    let of_binary = |binary: &[u8]| -> T {
        BinaryCodec::decode(MessageKind::Binary, binary).expect("the payload is valid")
    };
    assert_eq!(of_json(&json), message);
    assert_eq!(of_binary(&binary), message);

    let mut group = criterion.benchmark_group(format!("decode {name}"));
    group.throughput(Throughput::Elements(1));
    group.bench_function("JSON/plain", |bencher| {
        bencher.iter(|| serde_json::from_slice::<T>(black_box(&json)).expect("the payload is valid"));
    });
    group.bench_function("JSON/bounded", |bencher| bencher.iter(|| of_json(black_box(&json))));
    group.bench_function("postcard/plain", |bencher| {
        bencher.iter(|| postcard::from_bytes::<T>(black_box(&binary)).expect("the payload is valid"));
    });
    group.bench_function("postcard/bounded", |bencher| bencher.iter(|| of_binary(black_box(&binary))));
    group.finish();
}

fn decode(criterion: &mut Criterion) {
    both(criterion, "flat", said());
    both(criterion, "list", vec![said(); 100]);
    both(criterion, "tree", (0..60).fold(Tree::Leaf(7), |tree, _| Tree::Node(Box::new(tree))));
    both(criterion, "numbers", (0..1000_u32).collect::<Vec<_>>());
}

criterion_group!(benches, decode);
criterion_main!(benches);
