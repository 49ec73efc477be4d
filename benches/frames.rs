//! What framing and encoding cost, with no socket in sight.
//!
//! `cargo bench --bench frames`. All are functions of one thread. Where the throughput is in bytes, these are bytes of
//! payload.
//!
//! - `decode`: a client's text message, whole and masked, decoded in place (and copied there first).
//! - `unmask/aligned`, `unmask/unaligned`: the XOR over a payload that begins at a multiple of eight bytes and at the
//!   key's first byte, or at neither.
//! - `UTF-8`: the checker for text that comes in pieces, in one piece and in pieces of 1000 bytes (which cut
//!   characters), beside the standard library's.
//! - `build`: a server's frame from a payload, copied, and from one that is written into it.
//! - `broadcast JSON`, `broadcast postcard`: a value encoded once and the frame shared, against encoded for each
//!   client anew. Elements are clients.

#![allow(missing_docs)] // criterion's macros make public items without any

use std::convert::Infallible;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use serde::{Deserialize, Serialize};
use shardcast::{BinaryCodec, Encode, JsonCodec};
use shardcast_engine::{Decoder, Frame, Limits, MessageKind, Utf8Checker, unmask};
use testkit::frames::{FIN, TEXT, client_frame};

const SIZES: [usize; 4] = [16, 64, 1024, 64 * 1024];
const CLIENTS: [usize; 3] = [1, 100, 10_000];

#[derive(Serialize, Deserialize)]
struct Tick {
    t: u64,
    p: String,
}

fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    for size in SIZES {
        let wire = client_frame(FIN | TEXT, &vec![b'x'; size]);
        let limits = Limits { max_message_bytes: size, ..Limits::default() };
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            let (mut decoder, mut input) = (Decoder::default(), wire.clone());
            bencher.iter(|| {
                input.copy_from_slice(&wire); // decoding unmasks in place
                let mut consumed = 0;
                let event = decoder.decode(&mut input, &mut consumed, &limits).expect("a sound frame");
                black_box(event.is_some());
            });
        });
    }
    group.finish();
}

fn mask(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("unmask");
    for size in SIZES {
        // Where eight-byte words begin; a vector of bytes may lie anywhere.
        let mut buffer = vec![b'x'; size + 16];
        let aligned = buffer.as_ptr().align_offset(8);
        group.throughput(Throughput::Bytes(size as u64));
        for (name, start, offset) in [("aligned", aligned, 0), ("unaligned", aligned + 3, 3)] {
            let payload = &mut buffer[start..start + size];
            group.bench_function(BenchmarkId::new(name, size), |bencher| {
                bencher
                    .iter(|| unmask(black_box(&mut *payload), black_box([0x12, 0x34, 0x56, 0x78]), offset));
            });
        }
    }
    group.finish();
}

fn check_text(pieces: std::slice::Chunks<'_, u8>) -> bool {
    let mut checker = Utf8Checker::new();
    pieces.into_iter().all(|piece| checker.feed(piece).is_ok()) && checker.finish().is_ok()
}

fn utf8(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("UTF-8");
    for size in SIZES {
        let ascii = vec![b'x'; size];
        // Three bytes a character, so that pieces of 1000 bytes cut it.
        let wide: Vec<u8> = "€".repeat(size / 3).into_bytes();
        for (script, text) in [("ascii", &ascii), ("wide", &wide)] {
            assert!(check_text(text.chunks(1000)), "a valid text is refused");
            group.throughput(Throughput::Bytes(text.len() as u64));
            let name = |checker| BenchmarkId::new(format!("{checker}/{script}"), size);
            group.bench_function(name("checker"), |bencher| {
                bencher.iter(|| black_box(check_text(black_box(text).chunks(text.len()))));
            });
            if size > 1000 {
                group.bench_function(name("checker in pieces"), |bencher| {
                    bencher.iter(|| black_box(check_text(black_box(text).chunks(1000))));
                });
            }
            group.bench_function(name("std"), |bencher| {
                bencher.iter(|| black_box(std::str::from_utf8(black_box(text)).is_ok()));
            });
        }
    }
    group.finish();
}

fn build(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("build");
    for size in SIZES {
        let payload = vec![b'x'; size];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new("copied", size), |bencher| {
            bencher.iter(|| black_box(Frame::binary(&payload)));
        });
        group.bench_function(BenchmarkId::new("written", size), |bencher| {
            bencher.iter(|| {
                let write = |buffer: &mut Vec<u8>| {
                    buffer.extend_from_slice(black_box(&payload));
                    Ok::<_, Infallible>(MessageKind::Binary)
                };
                black_box(Frame::build(size, write))
            });
        });
    }
    group.finish();
}

fn encode<C: Encode<Tick>>(tick: &Tick) -> Frame {
    Frame::build(118, |payload| C::encode(tick, payload)).expect("an encodable value")
}

/// The same broadcast: encoded once and shared, or encoded for each client anew.
fn broadcast<C: Encode<Tick>>(criterion: &mut Criterion, codec: &str) {
    let mut group = criterion.benchmark_group(format!("broadcast {codec}"));
    let tick = Tick { t: 1_000_000_000, p: "x".repeat(40) };
    for clients in CLIENTS {
        group.throughput(Throughput::Elements(clients as u64));
        group.bench_function(BenchmarkId::new("once", clients), |bencher| {
            bencher.iter(|| {
                let frame = encode::<C>(&tick);
                for _ in 0..clients {
                    black_box(frame.clone());
                }
            });
        });
        group.bench_function(BenchmarkId::new("per client", clients), |bencher| {
            bencher.iter(|| {
                for _ in 0..clients {
                    black_box(encode::<C>(&tick));
                }
            });
        });
    }
    group.finish();
}

fn codecs(criterion: &mut Criterion) {
    broadcast::<JsonCodec>(criterion, "JSON");
    broadcast::<BinaryCodec>(criterion, "postcard");
}

criterion_group!(benches, decode, mask, utf8, build, codecs);
criterion_main!(benches);
