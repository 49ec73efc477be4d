//! What framing and encoding cost, with no socket in sight.
//!
//! Decode and unmask a client's message, build a server's frame, and a broadcast encoded
//! once against encoded once per client. `cargo bench --bench frames`

#![allow(missing_docs)] // criterion's macros make public items without any

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use serde::{Deserialize, Serialize};
use shardcast::{BinaryCodec, Encode, JsonCodec};
use shardcast_engine::{Decoder, Frame, Limits, unmask};

const SIZES: [usize; 4] = [16, 64, 1024, 64 * 1024];
const CLIENTS: [usize; 3] = [1, 100, 10_000];

#[derive(Serialize, Deserialize)]
struct Tick {
    t: u64,
    p: String,
}

/// A client's text message as it comes from the wire.
fn masked(payload: &[u8]) -> Vec<u8> {
    let key = [0x12, 0x34, 0x56, 0x78];
    let mut wire = vec![0x81];
    match payload.len() {
        length @ 0..126 => wire.push(0x80 | length as u8),
        length @ 126..65_536 => {
            wire.push(0x80 | 126);
            wire.extend_from_slice(&(length as u16).to_be_bytes());
        }
        length => {
            wire.push(0x80 | 127);
            wire.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    wire.extend_from_slice(&key);
    let start = wire.len();
    wire.extend_from_slice(payload);
    unmask(&mut wire[start..], key, 0);
    wire
}

fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    for size in SIZES {
        let wire = masked(&vec![b'x'; size]);
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

fn build(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("build");
    for size in SIZES {
        let payload = vec![b'x'; size];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| black_box(Frame::binary(&payload)));
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

criterion_group!(benches, decode, build, codecs);
criterion_main!(benches);
