//! What a codec costs, beside the format that it is made of.
//!
//! `cargo bench --bench codecs`. All are functions of one thread. `flat` is a message as most are, of a few fields;
//! `list` has 100 of them; `tree` is nested 60 levels deep; `numbers` are 1,000.
//! `bounded` is the codec of this crate, which counts levels
//! and elements; `plain` is serde_json or postcard by itself. Elements are messages.

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
    JsonCodec::encode(&message, &mut json).expect("it has a representation");
    let mut binary = Vec::new();
    BinaryCodec::encode(&message, &mut binary).expect("it has a representation");
    let of_json = |json: &[u8]| -> T { JsonCodec::decode(MessageKind::Text, json).expect("it is one") };
    let of_binary =
        |binary: &[u8]| -> T { BinaryCodec::decode(MessageKind::Binary, binary).expect("it is one") };
    assert_eq!(of_json(&json), message);
    assert_eq!(of_binary(&binary), message);

    let mut group = criterion.benchmark_group(format!("decode {name}"));
    group.throughput(Throughput::Elements(1));
    group.bench_function("JSON/plain", |bencher| {
        bencher.iter(|| serde_json::from_slice::<T>(black_box(&json)).expect("it is one"));
    });
    group.bench_function("JSON/bounded", |bencher| bencher.iter(|| of_json(black_box(&json))));
    group.bench_function("postcard/plain", |bencher| {
        bencher.iter(|| postcard::from_bytes::<T>(black_box(&binary)).expect("it is one"));
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
