//! Criterion benches of the batch operations: every level of the machine × shape × element type, with throughput in bytes of logits
//! read plus bytes of results written. No Python is needed: `cargo bench`.
//!
//! Groups are named operation/level/shape, ids dtype/threads, so that `cargo bench -- 'loss/avx2'` or `-- 1024x32000` choose. Before
//! anything is timed, each operation's answer is compared with a plain loop in `f64`; a wrong answer ends the run.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use crossent::array::{Array, DType, Element, Float, Out, c_strides};
use crossent::ops::{self, Exec, Grad, GradOutput, LossOptions, Reduction, Scores, Target};
use crossent::simd::Level;
use half::{bf16, f16};

/// Logits of one shape with labels and the exact logsumexp of every row.
struct Case<E> {
    name: String,
    shape: Vec<usize>,
    axis: usize,
    logits: Vec<E>,
    labels: Vec<i64>,
    logsumexp: Vec<f64>,
}

impl<E: Element> Case<E> {
    fn new(shape: &[usize], axis: usize) -> Self {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let size = shape.iter().product();
        let logits: Vec<E> = (0..size).map(|_| E::from_f64(random.normal() * 3.0)).collect();
        let labels = (0..size / shape[axis]).map(|_| (random.next() % shape[axis] as u64) as i64).collect();
        let lengths: Vec<String> = shape.iter().map(ToString::to_string).collect();
        let mut case = Self { name: lengths.join("x"), shape: shape.to_vec(), axis, logits, labels, logsumexp: Vec::new() };
        case.logsumexp = (0..case.labels.len()).map(|row| case.exact_logsumexp(row)).collect();
        case
    }

    fn classes(&self) -> usize {
        self.shape[self.axis]
    }

    /// Flat position of class `c` in row `row`.
    fn at(&self, row: usize, c: usize) -> usize {
        let inner: usize = self.shape[self.axis + 1..].iter().product();
        (row / inner * self.classes() + c) * inner + row % inner
    }

    fn logit(&self, row: usize, c: usize) -> f64 {
        to_f64(self.logits[self.at(row, c)])
    }

    fn exact_logsumexp(&self, row: usize) -> f64 {
        let max = (0..self.classes()).map(|c| self.logit(row, c)).fold(f64::NEG_INFINITY, f64::max);
        // Compensated: a plain sum of 32000 terms loses more digits than what it is to check.
        let (mut sum, mut lost) = (0.0_f64, 0.0);
        for c in 0..self.classes() {
            let term = (self.logit(row, c) - max).exp();
            let next = sum + term;
            lost += if sum >= term { (sum - next) + term } else { (term - next) + sum };
            sum = next;
        }
        max + (sum + lost).ln()
    }

    fn target(&self) -> Target<'_> {
        let rows: Vec<usize> = self.shape.iter().enumerate().filter(|&(i, _)| i != self.axis).map(|(_, &len)| len).collect();
        // SAFETY: C order over `rows` reaches exactly the labels, which stay borrowed.
        Target::Index(unsafe { Array::new(self.labels.as_ptr().cast(), DType::I64, false, &rows, &c_strides(&rows, size_of::<i64>())) })
    }

    /// The sum of the row losses.
    fn expected_loss(&self) -> f64 {
        self.labels.iter().zip(&self.logsumexp).enumerate().map(|(row, (&y, lse))| lse - self.logit(row, y as usize)).sum()
    }

    /// Compares every class of some rows, the last among them.
    fn check_entries(&self, what: &str, actual: &[E], expected: impl Fn(usize, usize) -> f64) {
        // One rounding of the result, and a few units in the last place of what it is computed in.
        let tolerance = match E::DTYPE {
            DType::F16 => 1e-3,
            DType::Bf16 => 8e-3,
            DType::F32 => 2e-6,
            _ => 1e-14,
        };
        // Results below the normal range of the type have an absolute error instead.
        let floor = if E::DTYPE == DType::F16 { 6e-8 } else { 1e-37 };
        let rows = self.labels.len();
        for row in (0..rows).step_by(rows / 16 + 1).chain([rows - 1]) {
            for c in 0..self.classes() {
                let (a, e) = (to_f64(actual[self.at(row, c)]), expected(row, c));
                assert!((a - e).abs() <= tolerance * e.abs() + floor, "{what} {}: row {row} class {c}: {a:e}, expected {e:e}", self.name);
            }
        }
    }

    fn gradient(&self, row: usize, c: usize) -> f64 {
        let others = |without: usize| (0..self.classes()).filter(move |&k| k != without);
        if self.labels[row] as usize == c {
            -others(c).map(|k| (self.logit(row, k) - self.logsumexp[row]).exp()).sum::<f64>()
        } else {
            (self.logit(row, c) - self.logsumexp[row]).exp()
        }
    }
}

/// Widened exactly; every element type converts to `f32` or `f64` without rounding.
fn to_f64<E: Element>(x: E) -> f64 {
    x.to_acc().to_f64()
}

/// `SplitMix64`: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Nearly normal: the sum of twelve uniforms, centred.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| (self.next() >> 11) as f64 / (1u64 << 53) as f64).sum::<f64>() - 6.0
    }
}

fn group<'a>(c: &'a mut Criterion, operation: &str, level: Level, shape: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(format!("{operation}/{}/{shape}", level.name()));
    group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(800));
    group
}

fn grad_into(out: Out<'_>) -> Grad<'_> {
    Grad { out, grad_output: GradOutput::Scalar(1.0) }
}

fn bench_case<E: Element>(c: &mut Criterion, shape: &[usize], axis: usize) {
    let case = Case::<E>::new(shape, axis);
    let dtype = match E::DTYPE {
        DType::F16 => "f16",
        DType::Bf16 => "bf16",
        DType::F32 => "f32",
        _ => "f64",
    };
    let threads = crossent::threads::available();
    let id = format!("{dtype}/{threads}");
    let bytes = size_of_val(case.logits.as_slice()) as u64;
    // Sums, so that 16-bit gradients are not divided into subnormal numbers.
    let options = LossOptions { reduction: Reduction::Sum, ..LossOptions::default() };
    let target = case.target();
    let mut result = vec![E::from_f64(f64::NAN); case.logits.len()];
    let expected_loss = case.expected_loss();
    let check_loss = |what: &str, loss: f64| {
        let bound = if E::DTYPE == DType::F64 { 1e-13 } else { 1e-6 };
        assert!((loss / expected_loss - 1.0).abs() < bound, "{what} {}: {loss}, expected {expected_loss}", case.name);
    };

    for level in Level::all() {
        let exec = Exec { level, threads };
        let x = Array::from_slice(&case.logits, shape);
        let loss_of = |x: &Array<'_>, grad: Option<&Grad<'_>>| ops::cross_entropy(&exec, x, axis, &target, &options, None, grad).unwrap();

        check_loss("loss", loss_of(&x, None));
        let mut g = group(c, "loss", level, &case.name);
        g.throughput(Throughput::Bytes(bytes)).bench_function(&id, |b| b.iter(|| black_box(loss_of(&x, None))));
        g.finish();

        check_loss("loss_grad_out", loss_of(&x, Some(&grad_into(Out::from_slice(&mut result, shape)))));
        case.check_entries("loss_grad_out", &result, |row, class| case.gradient(row, class));
        let mut g = group(c, "loss_grad_out", level, &case.name);
        g.throughput(Throughput::Bytes(2 * bytes)).bench_function(&id, |b| {
            let grad = grad_into(Out::from_slice(&mut result, shape));
            b.iter(|| black_box(loss_of(&x, Some(&grad))));
        });
        g.finish();

        result.copy_from_slice(&case.logits);
        {
            let (x, out) = Out::in_place(&mut result, shape);
            check_loss("loss_grad_in_place", loss_of(&x, Some(&grad_into(out))));
        }
        case.check_entries("loss_grad_in_place", &result, |row, class| case.gradient(row, class));
        let mut g = group(c, "loss_grad_in_place", level, &case.name);
        g.throughput(Throughput::Bytes(2 * bytes)).bench_function(&id, |b| {
            // From the second run on the logits are the gradient of the run before: finite numbers like any other, and nothing is refilled.
            let (x, out) = Out::in_place(&mut result, shape);
            let grad = grad_into(out);
            b.iter(|| black_box(loss_of(&x, Some(&grad))));
        });
        g.finish();

        let log_softmax = |out: &Out<'_>| ops::log_softmax(&exec, &x, &[axis], out).unwrap();
        log_softmax(&Out::from_slice(&mut result, shape));
        case.check_entries("log_softmax_out", &result, |row, class| case.logit(row, class) - case.logsumexp[row]);
        let mut g = group(c, "log_softmax_out", level, &case.name);
        g.throughput(Throughput::Bytes(2 * bytes)).bench_function(&id, |b| {
            let out = Out::from_slice(&mut result, shape);
            b.iter(|| log_softmax(black_box(&out)));
        });
        g.finish();
    }
}

/// Scores with everything, the 20 largest and KL, for float32 logits whose rows are long.
fn bench_by_products(c: &mut Criterion, rows: usize, classes: usize) {
    let (case, other) = (Case::<f32>::new(&[rows, classes], 1), Case::<f32>::new(&[rows, classes], 1));
    let threads = crossent::threads::available();
    let id = format!("f32/{threads}");
    let bytes = size_of_val(case.logits.as_slice()) as u64;
    let Target::Index(tokens) = case.target() else { return };
    let (x, q) = (Array::from_slice(&case.logits, &[rows, classes]), Array::from_slice(&other.logits, &[rows, classes]));
    let int = |memory: &mut [i64], dtype, shape: &[usize], size| {
        // SAFETY: C order over as many elements as the memory has, or fewer and smaller ones; it outlives the benches.
        unsafe { Out::new(memory.as_mut_ptr().cast(), dtype, shape, &c_strides(shape, size)) }
    };
    let (mut floats, mut ints) = (vec![0.0_f32; 3 * rows + 20 * rows], vec![0_i64; 3 * rows + 20 * rows]);
    let (scored, best) = floats.split_at_mut(3 * rows);
    let (counted, order) = ints.split_at_mut(3 * rows);
    let mut scored = scored.chunks_mut(rows).map(|rows_of| Out::from_slice(rows_of, &[rows]));
    let mut next = || scored.next().unwrap();
    let (logprob, logsumexp, entropy) = (next(), next(), Some(next()));
    let mut counted = counted.chunks_mut(rows);
    let argmax = int(counted.next().unwrap(), DType::I64, &[rows], 8);
    let rank = Some(int(counted.next().unwrap(), DType::I64, &[rows], 8));
    let greedy = int(counted.next().unwrap(), DType::Bool, &[rows], 1);
    let scores = Scores { logprob, logsumexp, argmax, greedy, entropy, rank };
    let (best, order) = (Out::from_slice(best, &[rows, 20]), int(order, DType::I64, &[rows, 20], 8));
    for level in Level::all() {
        let exec = Exec { level, threads };
        let mut g = group(c, "score_tokens", level, &case.name);
        let score = || ops::score_tokens(&exec, &x, 1, &tokens, None, &scores).unwrap();
        g.throughput(Throughput::Bytes(bytes)).bench_function(&id, |b| b.iter(score));
        g.finish();
        let mut g = group(c, "topk_logprobs", level, &case.name);
        let topk = || ops::topk_logprobs(&exec, &x, 1, &best, &order).unwrap();
        g.throughput(Throughput::Bytes(bytes)).bench_function(&id, |b| b.iter(topk));
        g.finish();
        let mut g = group(c, "kl_divergence", level, &case.name);
        let kl = || ops::kl_divergence(&exec, &x, &q, 1, 1.0, Reduction::Sum, None, None).unwrap();
        assert!(kl() == 0.0, "the same logits twice");
        g.throughput(Throughput::Bytes(2 * bytes)).bench_function(&id, |b| b.iter(|| black_box(kl())));
        g.finish();
    }
}

fn main() {
    let names: Vec<&str> = Level::all().map(Level::name).collect();
    println!("levels: {}; threads: {}", names.join(", "), crossent::threads::available());
    let mut c = Criterion::default().configure_from_args();
    for (shape, axis) in [(&[65536, 10][..], 1), (&[65536, 100], 1), (&[8192, 1000], 1), (&[1024, 32000], 1), (&[4, 21, 256, 256], 1)] {
        bench_case::<f32>(&mut c, shape, axis);
    }
    // Fortran order.
    bench_case::<f32>(&mut c, &[1000, 8192], 0);
    bench_case::<bf16>(&mut c, &[1024, 32000], 1);
    bench_case::<f16>(&mut c, &[1024, 32000], 1);
    bench_case::<f64>(&mut c, &[1024, 32000], 1);
    bench_by_products(&mut c, 1024, 32000);
    c.final_summary();
}
