//! The batch operations against plain loops: every level of the machine × element type × layout × axis × target × option.
//!
//! Bounds are the contract's: losses and log-probabilities within 4 units in the last place (ULP) of the exact value, softmax and gradient
//! entries within 8, logsumexp within 4 of the larger of |max| and |logsumexp|; 16-bit results are rounded once on top. For `f64` the
//! oracle's own error of a few ULP is added.

mod by_products;
mod oracle;
mod tensor;

use std::io::Write;
use std::sync::Once;

use crossent::array::{Array, DType};
use crossent::ops::{self, Error, Exec, Grad, GradOutput, LossOptions, Reduction, Target};
use crossent::simd::Level;
use oracle::Row;
use proptest::prelude::*;
use tensor::{FLOATS, INTS, Layout, READABLE, Tensor, WRITABLE, ulp};

/// The levels that every test runs on. Printed past the harness's capture, so that each run shows what it covered.
fn levels() -> Vec<Level> {
    static PRINTED: Once = Once::new();
    let levels: Vec<Level> = Level::all().collect();
    PRINTED.call_once(|| {
        let names: Vec<&str> = levels.iter().map(|level| level.name()).collect();
        let line = format!("instruction-set levels tested: {}\n", names.join(", "));
        std::io::stderr().write_all(line.as_bytes()).unwrap();
    });
    levels
}

#[test]
fn no_level_of_this_machine_is_skipped() {
    let mut expected = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if avx512 {
            expected.push(Level::Avx512);
        }
        if avx2 {
            expected.push(Level::Avx2);
        }
    }
    #[cfg(target_arch = "aarch64")]
    expected.push(Level::Neon);
    expected.push(Level::Scalar);
    assert_eq!(levels(), expected);
}

// --- inputs -------------------------------------------------------------------------------------------------------------------------

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
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }
    /// One row of logits from one of the families in which things go wrong.
    fn row(&mut self, dtype: DType, classes: usize) -> Vec<f64> {
        let (far, huge) = if dtype == DType::F16 { (1e3, 6e4) } else { (1e4, 1e30) };
        let sign = if self.below(2) == 0 { 1.0 } else { -1.0 };
        let mut x: Vec<f64> = match self.below(8) {
            0 => (0..classes).map(|_| self.normal() * 10.0).collect(),
            1 => (0..classes).map(|_| sign * far + self.normal() * 3.0).collect(),
            2 => (0..classes).map(|_| self.below(3) as f64).collect(),
            3 => (0..classes).map(|_| self.uniform() * 400.0 - 200.0).collect(),
            4 => (0..classes).map(|_| sign * huge * (1.0 - self.below(2) as f64 * self.uniform())).collect(),
            _ => (0..classes).map(|_| self.normal()).collect(),
        };
        match self.below(6) {
            // A confident row.
            0 => x[self.below(classes)] += 5.0 + 83.0 * self.uniform(),
            // Classes that cannot be, but not all of them.
            1 => {
                let kept = self.below(classes);
                for (c, x) in x.iter_mut().enumerate() {
                    if c != kept && self.below(3) == 0 {
                        *x = f64::NEG_INFINITY;
                    }
                }
            }
            _ => {}
        }
        x
    }
}

/// The C-order positions of each row's classes; rows in C order of the axes that are left.
fn rows_of(shape: &[usize], axes: &[usize]) -> Vec<Vec<usize>> {
    let flat = |index: &[usize]| shape.iter().zip(index).fold(0, |flat, (&len, &i)| flat * len + i);
    let (mut rows, mut index) = (Vec::new(), vec![0; shape.len()]);
    let count = |keep: bool| (0..shape.len()).filter(|axis| axes.contains(axis) != keep).map(|axis| shape[axis]).product::<usize>();
    let step = |index: &mut [usize], keep: bool| {
        for axis in (0..shape.len()).rev().filter(|axis| axes.contains(axis) != keep) {
            index[axis] += 1;
            if index[axis] < shape[axis] {
                return;
            }
            index[axis] = 0;
        }
    };
    for _ in 0..count(true) {
        rows.push(
            (0..count(false))
                .map(|_| {
                    let at = flat(&index);
                    step(&mut index, false);
                    at
                })
                .collect(),
        );
        step(&mut index, true);
    }
    rows
}

fn without(shape: &[usize], axes: &[usize]) -> Vec<usize> {
    (0..shape.len()).filter(|axis| !axes.contains(axis)).map(|axis| shape[axis]).collect()
}

fn random_logits(random: &mut Random, dtype: DType, layout: Layout, shape: &[usize], axes: &[usize]) -> Tensor {
    let mut values = vec![0.0; shape.iter().product()];
    for row in rows_of(shape, axes) {
        if row.is_empty() {
            continue;
        }
        for (&at, x) in row.iter().zip(random.row(dtype, row.len())) {
            values[at] = x;
        }
    }
    Tensor::floats(dtype, layout, shape, &values)
}

/// Each class length of interest: all small ones, and both sides of every block and vector size.
fn lengths() -> impl Iterator<Item = usize> {
    (1..=70).chain([127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 1535, 1536, 1537, 2051, 4096])
}

// --- comparison ---------------------------------------------------------------------------------------------------------------------

/// Asserts |actual − expected| within `units` ULP of `size` in the type that is computed in, plus one rounding to `dtype`.
#[track_caller]
fn close(dtype: DType, units: f64, actual: f64, expected: f64, size: f64, what: &dyn Fn() -> String) {
    if expected.is_nan() || expected.is_infinite() {
        assert!(actual == expected || actual.is_nan() && expected.is_nan(), "{}: {actual:e}, expected {expected:e}", what());
        return;
    }
    let computed = dtype.row_dtype();
    let oracle = if computed == DType::F64 { 4.0 } else { 0.0 };
    let smallest_normal = if computed == DType::F64 { f64::MIN_POSITIVE } else { f64::from(f32::MIN_POSITIVE) };
    let mut bound = (units + oracle) * ulp(computed, size.abs().max(expected.abs())) + smallest_normal;
    if dtype != computed {
        bound += 0.5 * ulp(dtype, expected.abs() + bound);
    }
    // Beyond the largest number of the type, as for any rounding.
    let largest = match dtype {
        DType::F16 => 65504.0,
        DType::Bf16 => f64::from(half::bf16::MAX),
        DType::F32 => f64::from(f32::MAX),
        _ => f64::MAX,
    };
    if expected.abs() + bound > largest && actual == f64::INFINITY.copysign(expected) {
        return;
    }
    let error = (actual - expected).abs();
    assert!(error <= bound, "{}: {actual:e}, expected {expected:e}: error {error:e}, allowed {bound:e}", what());
}

#[test]
fn rows_of_follows_c_order() {
    assert_eq!(rows_of(&[2, 3], &[1]), [[0, 1, 2], [3, 4, 5]]);
    assert_eq!(rows_of(&[2, 3], &[0]), [[0, 3], [1, 4], [2, 5]]);
    assert_eq!(rows_of(&[2, 2, 2], &[0, 2]), [[0, 1, 4, 5], [2, 3, 6, 7]]);
    assert_eq!(rows_of(&[3], &[0]), [[0, 1, 2]]);
    assert_eq!(rows_of(&[0, 3], &[1]), Vec::<Vec<usize>>::new());
}

#[test]
fn comparison_can_fail() {
    let what = || String::new();
    let next = f64::from(f32::from_bits(1.0f32.to_bits() + 5));
    assert!(std::panic::catch_unwind(|| close(DType::F32, 4.0, next, 1.0, 0.0, &what)).is_err());
    assert!(std::panic::catch_unwind(|| close(DType::F32, 4.0, f64::NAN, 1.0, 0.0, &what)).is_err());
    assert!(std::panic::catch_unwind(|| close(DType::F32, 4.0, 1.0, f64::NAN, 0.0, &what)).is_err());
    assert!(std::panic::catch_unwind(|| close(DType::F16, 4.0, 1.001, 1.0, 0.0, &what)).is_err());
    assert!(std::panic::catch_unwind(|| close(DType::F32, 4.0, f64::INFINITY, 3.4e38, 0.0, &what)).is_err());
    close(DType::F32, 4.0, f64::NEG_INFINITY, -3.5e38, 0.0, &what);
    close(DType::F32, 5.0, next, 1.0, 0.0, &what);
}

// --- transforms ---------------------------------------------------------------------------------------------------------------------

fn check_transforms(exec: &Exec, x: &Tensor, axes: &[usize], out_layout: Layout, context: &dyn Fn() -> String) {
    let before = x.memory().to_vec();
    let values = x.values();
    let groups = rows_of(&x.shape, axes);
    let fibers: Vec<Vec<f64>> = groups.iter().map(|row| row.iter().map(|&at| values[at]).collect()).collect();
    let rows: Vec<Row> = fibers.iter().map(|fiber| Row::new(fiber)).collect();

    let mut lse = Tensor::empty(x.dtype.row_dtype(), out_layout, &without(&x.shape, axes));
    ops::logsumexp(exec, &x.array(), axes, &lse.out()).unwrap();
    for (r, (&actual, row)) in lse.values().iter().zip(&rows).enumerate() {
        close(lse.dtype, 4.0, actual, row.logsumexp(), row.max, &|| format!("logsumexp row {r} of {}", context()));
    }
    lse.check_guards();

    let check = |name: &str, units: f64, actual: &Tensor, exact: &dyn Fn(&Row, usize) -> f64| {
        let actual = actual.values();
        for (r, (group, row)) in groups.iter().zip(&rows).enumerate() {
            for (c, &at) in group.iter().enumerate() {
                close(x.dtype, units, actual[at], exact(row, c), 0.0, &|| format!("{name} row {r} class {c} of {}", context()));
            }
        }
    };
    let mut out = Tensor::empty(x.dtype, out_layout, &x.shape);
    ops::softmax(exec, &x.array(), axes, &out.out()).unwrap();
    check("softmax", 8.0, &out, &|row, c| row.p(c));
    ops::log_softmax(exec, &x.array(), axes, &out.out()).unwrap();
    check("log_softmax", 4.0, &out, &|row, c| row.log_p(c));
    out.check_guards();
    assert_eq!(x.memory(), before, "the input of {} was written to", context());

    let mut place = Tensor::floats(x.dtype, out_layout, &x.shape, &values);
    {
        let out = place.out();
        ops::softmax(exec, &out.array().clone(), axes, &out).unwrap();
    }
    check("softmax in place", 8.0, &place, &|row, c| row.p(c));
    let mut place = Tensor::floats(x.dtype, out_layout, &x.shape, &values);
    {
        let out = place.out();
        ops::log_softmax(exec, &out.array().clone(), axes, &out).unwrap();
    }
    check("log_softmax in place", 4.0, &place, &|row, c| row.log_p(c));
    place.check_guards();
}

#[test]
fn transforms_of_every_length_type_and_layout() {
    for level in levels() {
        let mut random = Random(1);
        for dtype in FLOATS {
            for classes in lengths() {
                for (i, layout) in READABLE.into_iter().enumerate() {
                    // Long rows in a layout each, short ones in all.
                    if classes > 70 && (i + classes) % 4 != 0 {
                        continue;
                    }
                    let (shape, axis) = if random.below(2) == 0 { ([5, classes], 1) } else { ([classes, 5], 0) };
                    let out_layout = WRITABLE[random.below(WRITABLE.len())];
                    let exec = Exec { level, threads: 1 + random.below(3) };
                    let x = random_logits(&mut random, dtype, layout, &shape, &[axis]);
                    let context = || format!("{dtype:?} {layout:?} {shape:?} axis {axis} into {out_layout:?} with {exec:?}");
                    check_transforms(&exec, &x, &[axis], out_layout, &context);
                }
            }
        }
    }
}

#[test]
fn transforms_over_any_axes() {
    for level in levels() {
        let mut random = Random(2);
        for dtype in FLOATS {
            for (shape, axes) in [
                (&[7, 3, 5][..], &[0][..]),
                (&[7, 3, 5], &[1]),
                (&[7, 3, 5], &[0, 1]),
                (&[7, 3, 5], &[0, 2]),
                (&[7, 3, 5], &[1, 2]),
                (&[7, 3, 5], &[0, 1, 2]),
                (&[2, 3, 4, 5], &[1]),
                (&[2, 3, 4, 5], &[0, 3]),
                (&[2, 21, 9, 11], &[1]),
                (&[33], &[0]),
                (&[40, 1], &[1]),
                (&[1, 40], &[0]),
                (&[1, 1, 600], &[2]),
                (&[600, 33], &[0]),
            ] {
                for layout in READABLE {
                    let x = random_logits(&mut random, dtype, layout, shape, axes);
                    let out_layout = WRITABLE[random.below(WRITABLE.len())];
                    let exec = Exec { level, threads: 1 + random.below(3) };
                    let context = || format!("{dtype:?} {layout:?} {shape:?} axes {axes:?} into {out_layout:?} with {exec:?}");
                    check_transforms(&exec, &x, axes, out_layout, &context);
                }
            }
        }
    }
}

/// Classes so far below the maximum that one of them is lost, but not all of them together, whichever comes first.
#[test]
fn transforms_of_rows_whose_rest_is_tiny() {
    for level in levels() {
        for dtype in [DType::F32, DType::F64, DType::Bf16] {
            let depth = if dtype == DType::F64 { 708.0 } else { 86.0 };
            for classes in [40, 100, 300, 1000] {
                for at in [0, classes / 2, classes - 1] {
                    let rows: Vec<f64> = (0..16).map(|i| depth + f64::from(i) * 0.25).collect();
                    let n = rows.len();
                    for (shape, axis) in [([n, classes], 1), ([classes, n], 0)] {
                        let mut values = vec![0.0; n * classes];
                        for (group, x) in rows_of(&shape, &[axis]).iter().zip(&rows) {
                            values[group[at]] = *x;
                        }
                        let x = Tensor::floats(dtype, Layout::C, &shape, &values);
                        let context = || format!("tiny rest, {dtype:?} {shape:?} axis {axis} maximum at {at} {level:?}");
                        check_transforms(&Exec { level, threads: 1 }, &x, &[axis], Layout::C, &context);
                    }
                }
            }
        }
    }
}

/// Blocks of classes whose largest probability is near the smallest normal number, read before the maximum of the row is known.
#[test]
fn transforms_of_rows_that_begin_far_below_their_maximum() {
    for level in levels() {
        for (dtype, depths) in
            [(DType::F32, [40.0, 60.0, 84.5, 86.9]), (DType::Bf16, [40.0, 60.0, 84.5, 86.0]), (DType::F64, [300.0, 500.0, 705.0, 707.9])]
        {
            for classes in [2047, 3000] {
                let values: Vec<f64> = depths
                    .iter()
                    .flat_map(|depth| {
                        (0..classes).map(move |c| if c == classes - 7 { 0.0 } else { -depth - f64::from(c as u32 % 8) * 0.0625 })
                    })
                    .collect();
                for out in [Layout::C, Layout::Rolled] {
                    let x = Tensor::floats(dtype, Layout::C, &[depths.len(), classes], &values);
                    let context = || format!("{dtype:?} far below, {classes} classes, {level:?}, into {out:?}");
                    check_transforms(&Exec { level, threads: 1 }, &x, &[1], out, &context);
                }
            }
        }
    }
}

#[test]
fn transforms_of_special_rows() {
    const INF: f64 = f64::INFINITY;
    const NAN: f64 = f64::NAN;
    for level in levels() {
        for dtype in FLOATS {
            for classes in [1, 2, 3, 5, 16, 17, 64, 65, 512, 600] {
                let tiny = if dtype == DType::F16 { 6e-8 } else { 1e-38 };
                let largest = if dtype == DType::F16 { 65504.0 } else { 3.3e38 };
                let mut rows = Vec::new();
                for (fill, odd) in [
                    (0.0, NAN),
                    (-INF, NAN),
                    (INF, NAN),
                    (0.0, INF),
                    (-INF, INF),
                    (INF, INF),
                    (-INF, -INF),
                    (-INF, 3.0),
                    (1.0, -INF),
                    (0.0, 0.0),
                    (-0.0, 0.0),
                    (tiny, -tiny),
                    (largest, -largest),
                    (-largest, -largest),
                    (largest, largest),
                    (0.0, largest),
                    (INF, -INF),
                ] {
                    for at in [0, classes / 2, classes - 1] {
                        let mut row = vec![fill; classes];
                        row[at] = odd;
                        rows.push(row);
                    }
                }
                let n = rows.len();
                for (shape, axis) in [([n, classes], 1), ([classes, n], 0)] {
                    let mut values = vec![0.0; n * classes];
                    for (group, row) in rows_of(&shape, &[axis]).iter().zip(&rows) {
                        group.iter().zip(row).for_each(|(&at, &x)| values[at] = x);
                    }
                    let x = Tensor::floats(dtype, Layout::C, &shape, &values);
                    let context = || format!("special rows, {dtype:?} {shape:?} axis {axis} {level:?}");
                    check_transforms(&Exec { level, threads: 2 }, &x, &[axis], Layout::C, &context);
                }
            }
        }
    }
}

#[test]
fn empty_arrays() {
    for level in levels() {
        let exec = Exec { level, threads: 2 };
        for dtype in FLOATS {
            let x = Tensor::floats(dtype, Layout::C, &[3, 0], &[]);
            let mut lse = Tensor::empty(dtype.row_dtype(), Layout::C, &[3]);
            ops::logsumexp(&exec, &x.array(), &[1], &lse.out()).unwrap();
            assert_eq!(lse.values(), [f64::NEG_INFINITY; 3]);
            let mut out = Tensor::empty(dtype, Layout::C, &[3, 0]);
            ops::softmax(&exec, &x.array(), &[1], &out.out()).unwrap();
            ops::log_softmax(&exec, &x.array(), &[1], &out.out()).unwrap();

            let x = Tensor::floats(dtype, Layout::C, &[0, 3], &[]);
            let mut none = Tensor::empty(dtype.row_dtype(), Layout::C, &[0]);
            ops::logsumexp(&exec, &x.array(), &[1], &none.out()).unwrap();
            let mut out = Tensor::empty(dtype, Layout::C, &[0, 3]);
            ops::softmax(&exec, &x.array(), &[1], &out.out()).unwrap();
            let target = Tensor::ints(DType::I64, Layout::C, &[0], &[]);
            for (reduction, expected) in [(Reduction::Mean, f64::NAN), (Reduction::Sum, 0.0), (Reduction::None, 0.0)] {
                let options = LossOptions { reduction, ..LossOptions::default() };
                let rows = none.out();
                let grad = Grad { out: out.out(), grad_output: GradOutput::Scalar(1.0) };
                let loss =
                    ops::cross_entropy(&exec, &x.array(), 1, &Target::Index(target.array()), &options, Some(&rows), Some(&grad)).unwrap();
                assert!(loss == expected || loss.is_nan() && expected.is_nan(), "{reduction:?}: {loss}");
            }
            none.check_guards();
            out.check_guards();
            lse.check_guards();
        }
    }
}

#[test]
fn vjps() {
    for level in levels() {
        let mut random = Random(3);
        for dtype in FLOATS {
            for classes in lengths() {
                let (shape, axis) = if random.below(2) == 0 { ([4, classes], 1) } else { ([classes, 4], 0) };
                let exec = Exec { level, threads: 1 + random.below(3) };
                let size = 4 * classes;
                let groups = rows_of(&shape, &[axis]);
                let logits: Vec<f64> = (0..size).map(|_| random.normal() * 3.0).collect();
                let upstream: Vec<f64> = (0..size).map(|_| random.normal()).collect();
                let g_type = FLOATS[random.below(4)];
                let g = Tensor::floats(g_type, READABLE[random.below(READABLE.len())], &shape, &upstream);
                let mut forward = vec![[0.0; 2]; size];
                for group in &groups {
                    let fiber: Vec<f64> = group.iter().map(|&at| logits[at]).collect();
                    let row = Row::new(&fiber);
                    for (c, &at) in group.iter().enumerate() {
                        forward[at] = [row.p(c), row.log_p(c)];
                    }
                }
                for (which, name) in ["softmax_vjp", "log_softmax_vjp"].into_iter().enumerate() {
                    let given: Vec<f64> = forward.iter().map(|pair| pair[which]).collect();
                    let given = Tensor::floats(dtype, READABLE[random.below(READABLE.len())], &shape, &given);
                    let out_layout = WRITABLE[random.below(WRITABLE.len())];
                    let mut out = Tensor::empty(dtype, out_layout, &shape);
                    let vjp = if which == 0 { ops::softmax_vjp } else { ops::log_softmax_vjp };
                    vjp(&exec, &g.array(), &given.array(), axis, &out.out()).unwrap();
                    out.check_guards();
                    // What the arrays hold, rounded as they are, is what the result is judged by.
                    let (g, y, actual) = (g.values(), given.values(), out.values());
                    for group in &groups {
                        let gp = |at: usize| if which == 0 { g[at] * y[at] } else { g[at] };
                        let total = oracle::sum(group.iter().map(|&at| gp(at)));
                        let sizes = oracle::sum(group.iter().map(|&at| gp(at).abs()));
                        for &at in group {
                            let (expected, size) = if which == 0 {
                                (y[at] * (g[at] - total), y[at] * (g[at].abs() + sizes))
                            } else {
                                (g[at] - y[at].exp() * total, g[at].abs() + y[at].exp() * sizes)
                            };
                            close(dtype, 8.0, actual[at], expected, size, &|| {
                                format!("{name} at {at}: {dtype:?} (g {g_type:?}) {shape:?} axis {axis} into {out_layout:?} with {exec:?}")
                            });
                        }
                    }
                }
            }
        }
    }
}

// --- losses -------------------------------------------------------------------------------------------------------------------------

#[derive(Clone)]
enum Labels {
    Index(Tensor),
    Probs(Tensor),
}

/// One call of `cross_entropy`, made of data.
#[derive(Clone)]
struct Case {
    x: Tensor,
    axis: usize,
    labels: Labels,
    weight: Option<Tensor>,
    smoothing: f64,
    ignore: Option<i64>,
    reduction: Reduction,
    /// One number for all rows, or one each (with `Reduction::None`).
    grad_output: Vec<f64>,
    out_layout: Layout,
    describe: String,
}

/// What can be chosen; everything else is drawn.
#[derive(Clone, Debug)]
struct Choice {
    dtype: DType,
    layout: Layout,
    out_layout: Layout,
    shape: Vec<usize>,
    axis: usize,
    /// An integer type for indices, a float type for probabilities.
    target: DType,
    weight: Option<DType>,
    smoothing: f64,
    /// One row in so many is ignored; 0 for none.
    ignored: usize,
    reduction: Reduction,
    grad_rows: bool,
    seed: u64,
}

impl Choice {
    fn build(&self) -> Case {
        let mut random = Random(self.seed);
        let classes = self.shape[self.axis];
        let row_shape = without(&self.shape, &[self.axis]);
        let rows: usize = row_shape.iter().product();
        let groups = rows_of(&self.shape, &[self.axis]);
        let mut x = random_logits(&mut random, self.dtype, self.layout, &self.shape, &[self.axis]);
        let any_layout = |random: &mut Random| READABLE[random.below(READABLE.len())];
        let mut ignore = None;
        let labels = if self.target.is_float() {
            let mut mass: Vec<f64> = (0..x.len()).map(|_| if random.below(4) == 0 { 0.0 } else { random.uniform() }).collect();
            for group in &groups {
                let total: f64 = group.iter().map(|&at| mass[at]).sum();
                // Rows of probabilities need not sum to one; most do.
                if total > 0.0 && random.below(4) != 0 {
                    for &at in group {
                        mass[at] /= total;
                    }
                }
            }
            Labels::Probs(Tensor::floats(self.target, any_layout(&mut random), &self.shape, &mass))
        } else {
            // A small type cannot name every class.
            let nameable = match self.target {
                DType::I8 => classes.min(128),
                DType::U8 => classes.min(256),
                _ => classes,
            };
            let signed = matches!(self.target, DType::I8 | DType::I16 | DType::I32 | DType::I64);
            let marker: i128 = match random.below(3) {
                0 if signed => -100,
                1 if signed => -1,
                _ => random.below(nameable) as i128,
            };
            let mut chosen: Vec<i128> = (0..rows).map(|_| random.below(nameable) as i128).collect();
            if self.ignored > 0 {
                ignore = Some(marker as i64);
                chosen.iter_mut().filter(|_| random.below(self.ignored) == 0).for_each(|y| *y = marker);
                // Ignored rows are never read: whatever stands there has no effect.
                let mut values = x.values();
                for (group, _) in groups.iter().zip(&chosen).filter(|&(_, &y)| y == marker) {
                    for &at in group {
                        values[at] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1.0][random.below(4)];
                    }
                }
                x = Tensor::floats(self.dtype, self.layout, &self.shape, &values);
            }
            Labels::Index(Tensor::ints(self.target, any_layout(&mut random), &row_shape, &chosen))
        };
        let weight = self.weight.map(|dtype| {
            let layout = any_layout(&mut random);
            let w: Vec<f64> = (0..classes).map(|_| if random.below(8) == 0 { 0.0 } else { 0.25 + random.uniform() * 2.0 }).collect();
            if dtype.is_float() {
                Tensor::floats(dtype, layout, &[classes], &w)
            } else {
                Tensor::ints(dtype, layout, &[classes], &w.iter().map(|w| (w * 3.0) as i128).collect::<Vec<_>>())
            }
        });
        let n = if self.grad_rows && self.reduction == Reduction::None { rows } else { 1 };
        let grad_output = (0..n).map(|_| random.normal()).collect();
        Case {
            x,
            axis: self.axis,
            labels,
            weight,
            smoothing: self.smoothing,
            ignore,
            reduction: self.reduction,
            grad_output,
            out_layout: self.out_layout,
            describe: format!("{self:?}"),
        }
    }
}

/// What the formulas say of a case.
struct Expected {
    groups: Vec<Vec<usize>>,
    /// None for ignored rows.
    losses: Vec<Option<f64>>,
    /// The divisor of the mean.
    divisor: f64,
    /// Per entry: gradient before `grad_output` and the divisor, and the size of its terms.
    gradient: Vec<(f64, f64)>,
    kept: Vec<bool>,
}

impl Case {
    fn expected(&self) -> Expected {
        let x = self.x.values();
        let classes = self.x.shape[self.axis];
        let groups = rows_of(&self.x.shape, &[self.axis]);
        let w = self.weight.as_ref().map_or(vec![1.0; classes], Tensor::values);
        let e = self.smoothing;
        let spread = e / classes as f64;
        let (mut losses, mut kept, mut divisors) = (Vec::new(), Vec::new(), Vec::new());
        let mut gradient = vec![(0.0, 0.0); x.len()];
        let (labels, probs) = match &self.labels {
            Labels::Index(y) => (y.values(), Vec::new()),
            Labels::Probs(p) => (Vec::new(), p.values()),
        };
        for (r, group) in groups.iter().enumerate() {
            let keep = labels.is_empty() || self.ignore.is_none_or(|ignore| labels[r] != ignore as f64);
            kept.push(keep);
            if !keep {
                losses.push(None);
                continue;
            }
            let mass: Vec<f64> = (0..classes)
                .map(|c| {
                    let share = if labels.is_empty() { probs[group[c]] } else { f64::from(u8::from(labels[r] == c as f64)) };
                    w[c] * (share * (1.0 - e) + spread)
                })
                .collect();
            divisors.push(if labels.is_empty() { 1.0 } else { w[labels[r] as usize] });
            let fiber: Vec<f64> = group.iter().map(|&at| x[at]).collect();
            let row = Row::new(&fiber);
            losses.push(Some(row.loss(&mass)));
            for (c, &at) in group.iter().enumerate() {
                gradient[at] = row.gradient(&mass, c);
            }
        }
        Expected { groups, losses, divisor: oracle::sum(divisors), gradient, kept }
    }

    fn target(&self) -> Target<'_> {
        match &self.labels {
            Labels::Index(y) => Target::Index(y.array()),
            Labels::Probs(p) => Target::Probs(p.array()),
        }
    }

    fn options(&self, reduction: Reduction) -> LossOptions<'_> {
        LossOptions {
            weight: self.weight.as_ref().map(Tensor::array),
            ignore_index: self.ignore,
            label_smoothing: self.smoothing,
            reduction,
            ..LossOptions::default()
        }
    }

    /// Runs the case and returns loss, rows and gradient.
    fn run(&self, exec: &Exec, reduction: Reduction, grad: bool, in_place: bool) -> (f64, Tensor, Tensor) {
        let mut rows = Tensor::empty(self.x.dtype.row_dtype(), self.out_layout, &without(&self.x.shape, &[self.axis]));
        let mut place = if in_place {
            Tensor::floats(self.x.dtype, self.out_layout, &self.x.shape, &self.x.values())
        } else {
            Tensor::empty(self.x.dtype, self.out_layout, &self.x.shape)
        };
        let before = self.x.memory().to_vec();
        let upstream = Tensor::floats(
            DType::F64,
            Layout::C,
            &rows.shape,
            &if self.grad_output.len() == rows.len() { self.grad_output.clone() } else { vec![0.0; rows.len()] },
        );
        let loss = {
            let out = place.out();
            let x = if in_place { out.array().clone() } else { self.x.array() };
            let grad_output =
                if self.grad_output.len() == 1 { GradOutput::Scalar(self.grad_output[0]) } else { GradOutput::Rows(upstream.array()) };
            let grad = grad.then_some(Grad { out, grad_output });
            let row_out = (reduction == Reduction::None).then(|| rows.out());
            ops::cross_entropy(exec, &x, self.axis, &self.target(), &self.options(reduction), row_out.as_ref(), grad.as_ref()).unwrap()
        };
        rows.check_guards();
        place.check_guards();
        assert_eq!(self.x.memory(), before, "logits were written to: {}", self.describe);
        (loss, rows, place)
    }

    fn check(&self, exec: &Exec) {
        let expected = self.expected();
        let context = || format!("{} with {exec:?}", self.describe);
        let row_type = self.x.dtype.row_dtype();

        let (zero, rows, _) = self.run(exec, Reduction::None, false, false);
        assert_eq!(zero, 0.0, "{}", context());
        let rows = rows.values();
        for (r, (&actual, expected)) in rows.iter().zip(&expected.losses).enumerate() {
            match expected {
                Some(exact) => close(row_type, 4.0, actual, *exact, 0.0, &|| format!("loss of row {r}: {}", context())),
                None => assert_eq!(actual, 0.0, "loss of ignored row {r}: {}", context()),
            }
        }
        // The reductions are those of the rows that are returned for logits of the same layout, carried in f64.
        let check_reduced = |name: &str, loss: f64, rows: &[f64]| {
            let total = oracle::sum(rows.iter().copied());
            let size = oracle::sum(rows.iter().map(|l| l.abs()));
            let divisor = if self.reduction == Reduction::Mean { expected.divisor } else { 1.0 };
            let reduced = total / divisor;
            if self.reduction == Reduction::None {
                assert_eq!(loss, 0.0, "{name}: {}", context());
            } else if reduced.is_finite() {
                let bound = size / divisor * f64::EPSILON * (8.0 + rows.len() as f64).min(64.0);
                assert!((loss - reduced).abs() <= bound, "{name}: {loss:e}, sum of the rows {reduced:e}: {}", context());
            } else {
                assert!(loss == reduced || loss.is_nan() && reduced.is_nan(), "{name}: {loss}, sum of the rows {reduced}: {}", context());
            }
        };
        check_reduced("loss", self.run(exec, self.reduction, false, false).0, &rows);

        for (name, in_place) in [("out", false), ("in place", true)] {
            let (loss, rows_too, gradient) = self.run(exec, self.reduction, true, in_place);
            let rows_too = if self.reduction == Reduction::None {
                rows_too.values()
            } else {
                self.run(exec, Reduction::None, true, in_place).1.values()
            };
            check_reduced(name, loss, &rows_too);
            if in_place {
                // Rows may be read in another layout, so that the last bits differ.
                for (r, (&actual, expected)) in rows_too.iter().zip(&expected.losses).enumerate() {
                    close(row_type, 4.0, actual, expected.unwrap_or(0.0), 0.0, &|| {
                        format!("loss of row {r} with gradient {name}: {}", context())
                    });
                }
            } else {
                let same = rows.iter().zip(&rows_too).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan());
                assert!(same, "losses with and without gradient differ: {rows:?} and {rows_too:?}: {}", context());
            }
            let gradient = gradient.values();
            for (r, group) in expected.groups.iter().enumerate() {
                let mut factor = self.grad_output[r % self.grad_output.len()];
                if self.reduction == Reduction::Mean {
                    factor /= expected.divisor;
                }
                for (c, &at) in group.iter().enumerate() {
                    let what = || format!("gradient {name} row {r} class {c}: {}", context());
                    if !expected.kept[r] {
                        assert_eq!(gradient[at], 0.0, "ignored row: {}", what());
                        continue;
                    }
                    let (exact, size) = expected.gradient[at];
                    if expected.divisor == 0.0 && self.reduction == Reduction::Mean && self.smoothing > 0.0 {
                        // Something over nothing: infinite or nan, the contract names neither.
                        assert!(!gradient[at].is_finite(), "{}", what());
                        continue;
                    }
                    close(self.x.dtype, 8.0, gradient[at], exact * factor, size * factor, &what);
                }
            }
        }
    }
}

const SMOOTHINGS: [f64; 3] = [0.0, 0.1, 1.0];
const REDUCTIONS: [Reduction; 3] = [Reduction::Mean, Reduction::Sum, Reduction::None];

#[test]
fn losses_of_every_combination() {
    let weights = [None, Some(DType::F32), Some(DType::F64), Some(DType::I32)];
    for level in levels() {
        let mut seed = 0;
        for dtype in FLOATS {
            for layout in READABLE {
                for (shape, axis) in [(&[19, 5][..], 1), (&[5, 19], 0), (&[3, 7, 4], 1)] {
                    for reduction in REDUCTIONS {
                        for smoothing in SMOOTHINGS {
                            for weight in weights {
                                for ignored in [0, 3] {
                                    // Target types take turns: integers in three of four cases, each type as often as another.
                                    seed += 1;
                                    let target = if seed % 4 == 0 { FLOATS[seed / 4 % 4] } else { INTS[seed % 8] };
                                    let choice = Choice {
                                        dtype,
                                        layout,
                                        out_layout: WRITABLE[seed % 6],
                                        shape: shape.to_vec(),
                                        axis,
                                        target,
                                        weight,
                                        smoothing,
                                        ignored,
                                        reduction,
                                        grad_rows: seed % 2 == 0,
                                        seed: seed as u64,
                                    };
                                    choice.build().check(&Exec { level, threads: 1 + seed % 3 });
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn losses_of_every_length() {
    for level in levels() {
        let mut random = Random(5);
        for dtype in FLOATS {
            for classes in lengths() {
                for target in [DType::I64, DType::F32] {
                    for smoothing in [0.0, 0.1] {
                        // 17 and 33 rows: whole tiles of rows and one more.
                        let n = if classes > 70 { 3 } else { [1, 17, 33][random.below(3)] };
                        for (shape, axis) in [(vec![n, classes], 1), (vec![classes, n], 0)] {
                            let choice = Choice {
                                dtype,
                                layout: if random.below(2) == 0 { Layout::C } else { READABLE[random.below(READABLE.len())] },
                                out_layout: if random.below(2) == 0 { Layout::C } else { WRITABLE[random.below(WRITABLE.len())] },
                                shape,
                                axis,
                                target,
                                weight: (random.below(2) == 0).then_some(DType::F32),
                                smoothing,
                                ignored: [0, 4][random.below(2)],
                                reduction: REDUCTIONS[random.below(3)],
                                grad_rows: true,
                                seed: random.next(),
                            };
                            choice.build().check(&Exec { level, threads: 2 });
                        }
                    }
                }
            }
        }
    }
}

fn choices() -> impl Strategy<Value = Choice> {
    let shape = prop_oneof![
        3 => prop::collection::vec(1usize..=12, 1..=4),
        1 => (1usize..=4, 60usize..=1100).prop_map(|(n, c)| vec![n, c]),
        1 => (60usize..=1100, 1usize..=40).prop_map(|(c, n)| vec![c, n]),
    ];
    let kinds = (
        prop::sample::select(FLOATS.to_vec()),
        prop::sample::select(READABLE.to_vec()),
        prop::sample::select(WRITABLE.to_vec()),
        prop::sample::select([&INTS[..], &FLOATS[..]].concat()),
        prop::option::of(prop::sample::select(vec![DType::F32, DType::F64, DType::F16, DType::Bf16, DType::I64, DType::U8])),
    );
    let options = (
        prop_oneof![Just(0.0), Just(1.0), 0.0..1.0f64],
        0usize..=4,
        prop::sample::select(REDUCTIONS.to_vec()),
        any::<bool>(),
        any::<u64>(),
    );
    (shape, any::<prop::sample::Index>(), kinds, options).prop_map(|(shape, axis, kinds, options)| {
        let (dtype, layout, out_layout, target, weight) = kinds;
        let (smoothing, ignored, reduction, grad_rows, seed) = options;
        let axis = axis.index(shape.len());
        Choice { dtype, layout, out_layout, shape, axis, target, weight, smoothing, ignored, reduction, grad_rows, seed }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn losses_of_any_choice(choice in choices(), threads in 1usize..=3) {
        let case = choice.build();
        for level in levels() {
            case.check(&Exec { level, threads });
        }
    }

    #[test]
    fn transforms_of_any_choice(choice in choices(), threads in 1usize..=3) {
        let case = choice.build();
        for level in levels() {
            let exec = Exec { level, threads };
            check_transforms(&exec, &case.x, &[case.axis], case.out_layout, &|| format!("{choice:?} with {exec:?}"));
        }
    }
}

/// One call on C-ordered logits with 64-bit labels: rows and gradient (`Reduction::None`).
fn simple(exec: &Exec, dtype: DType, shape: &[usize], axis: usize, x: &[f64], y: &[i128], options: &LossOptions) -> (Vec<f64>, Vec<f64>) {
    let x = Tensor::floats(dtype, Layout::C, shape, x);
    let row_shape = without(shape, &[axis]);
    let target = Tensor::ints(DType::I64, Layout::C, &row_shape, y);
    let mut rows = Tensor::empty(dtype.row_dtype(), Layout::C, &row_shape);
    let mut gradient = Tensor::empty(dtype, Layout::C, shape);
    {
        let out = rows.out();
        let grad = Grad { out: gradient.out(), grad_output: GradOutput::Scalar(1.0) };
        let options = LossOptions { reduction: Reduction::None, ..options.clone() };
        ops::cross_entropy(exec, &x.array(), axis, &Target::Index(target.array()), &options, Some(&out), Some(&grad)).unwrap();
    }
    (rows.values(), gradient.values())
}

/// Thousands of rows of few classes, most of them confident: every rounding on the way to a small loss is one of its own digits.
#[test]
fn small_losses_of_few_classes_keep_their_digits() {
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        let mut random = Random(77);
        for classes in [2usize, 3, 5, 10, 16, 21, 32, 33, 64] {
            let rows = 2000;
            let mut values: Vec<f64> = (0..rows * classes).map(|_| f64::from((random.uniform() * 6.0) as f32)).collect();
            let labels: Vec<i128> = (0..rows).map(|r| (r % classes) as i128).collect();
            for (row, &label) in values.chunks_exact_mut(classes).zip(&labels) {
                row[label as usize] = f64::from((6.0 + random.uniform() * 20.0) as f32);
            }
            let strided: Vec<f64> = (0..rows * classes).map(|i| values[i % rows * classes + i / rows]).collect();
            for (axis, shape, x) in [(1, [rows, classes], &values), (0, [classes, rows], &strided)] {
                let (losses, gradient) = simple(&exec, DType::F32, &shape, axis, x, &labels, &LossOptions::default());
                for (r, row) in values.chunks_exact(classes).enumerate() {
                    let (exact, label) = (Row::new(row), labels[r] as usize);
                    let mut mass = vec![0.0; classes];
                    mass[label] = 1.0;
                    let context = || format!("row {r} of {classes} classes, axis {axis}, {level:?}");
                    close(DType::F32, 4.0, losses[r], exact.loss(&mass), 0.0, &|| format!("loss of {}", context()));
                    for c in 0..classes {
                        let (expected, size) = exact.gradient(&mass, c);
                        let at = if axis == 1 { r * classes + c } else { c * rows + r };
                        close(DType::F32, 8.0, gradient[at], expected, size, &|| format!("gradient {c} of {}", context()));
                    }
                }
            }
        }
    }
}

#[test]
fn special_rows_of_losses() {
    const INF: f64 = f64::INFINITY;
    const NAN: f64 = f64::NAN;
    for level in levels() {
        let exec = Exec { level, threads: 2 };
        for dtype in FLOATS {
            for classes in [2usize, 3, 5, 16, 40, 65, 600] {
                for label in [0, 1, classes - 1] {
                    for odd_at in [0, 1, classes / 2, classes - 1] {
                        for (fill, odd) in [
                            (0.0, NAN),
                            (0.0, INF),
                            (-INF, INF),
                            (INF, INF),
                            (-INF, NAN),
                            (-INF, -INF),
                            (0.0, -INF),
                            (-INF, 0.0),
                            (2.0, 2.0),
                            (1.0, 20.0),
                        ] {
                            let mut row = vec![fill; classes];
                            row[odd_at] = odd;
                            let exact = Row::new(&row);
                            for smoothing in [0.0, 0.1] {
                                let mut mass = vec![smoothing / classes as f64; classes];
                                mass[label] += 1.0 - smoothing;
                                for (shape, axis) in [([1, classes], 1), ([classes, 1], 0)] {
                                    let options = LossOptions { label_smoothing: smoothing, ..LossOptions::default() };
                                    let (loss, gradient) = simple(&exec, dtype, &shape, axis, &row, &[label as i128], &options);
                                    let context = || {
                                        format!(
                                            "{dtype:?} {fill} with {odd} at {odd_at}, label {label} of {classes}, smoothing {smoothing}, {level:?}, axis {axis}"
                                        )
                                    };
                                    close(dtype.row_dtype(), 4.0, loss[0], exact.loss(&mass), 0.0, &|| format!("loss {}", context()));
                                    for (c, &g) in gradient.iter().enumerate() {
                                        let (expected, size) = exact.gradient(&mass, c);
                                        close(dtype, 8.0, g, expected, size, &|| format!("gradient {c} {}", context()));
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn confident_rows_keep_their_digits() {
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        for x in [[20.0, 0.0], [10020.0, 10000.0]] {
            let (loss, gradient) = simple(&exec, DType::F32, &[1, 2], 1, &x, &[0], &LossOptions::default());
            let exact = (-20f64).exp().ln_1p();
            assert!((loss[0] / exact - 1.0).abs() < 4e-7, "{level:?}: {}", loss[0]);
            let p = 1.0 / (1.0 + 20f64.exp());
            assert!((gradient[0] / -p - 1.0).abs() < 8e-7 && (gradient[1] / p - 1.0).abs() < 8e-7, "{level:?}: {gradient:?}");
        }
    }
}

#[test]
fn the_divisor_of_the_mean() {
    for level in levels() {
        let exec = Exec { level, threads: 2 };
        let x = Tensor::floats(DType::F32, Layout::C, &[3, 2], &[0.0, 1.0, 2.0, 0.0, 1.0, 1.0]);
        let run = |labels: &[i128], weight: &[f64], reduction: Reduction| {
            let y = Tensor::ints(DType::I64, Layout::C, &[3], labels);
            let w = Tensor::floats(DType::F32, Layout::C, &[2], weight);
            let mut out = Tensor::empty(DType::F32, Layout::C, &[3, 2]);
            let loss = {
                let grad = Grad { out: out.out(), grad_output: GradOutput::Scalar(1.0) };
                let options = LossOptions { weight: Some(w.array()), reduction, ..LossOptions::default() };
                ops::cross_entropy(&exec, &x.array(), 1, &Target::Index(y.array()), &options, None, Some(&grad)).unwrap()
            };
            (loss, out.values())
        };
        let (loss, gradient) = run(&[-100; 3], &[1.0, 1.0], Reduction::Mean);
        assert!(loss.is_nan() && gradient == [0.0; 6], "all ignored: {loss} {gradient:?}");
        let (loss, gradient) = run(&[-100; 3], &[1.0, 1.0], Reduction::Sum);
        assert!(loss == 0.0 && gradient == [0.0; 6], "all ignored: {loss} {gradient:?}");
        let (loss, gradient) = run(&[0; 3], &[0.0, 1.0], Reduction::Mean);
        assert!(loss.is_nan() && gradient.iter().all(|g| g.is_nan()), "no weight: {loss} {gradient:?}");
        let (loss, gradient) = run(&[0; 3], &[0.0, 1.0], Reduction::Sum);
        assert!(loss == 0.0 && gradient == [0.0; 6], "no weight: {loss} {gradient:?}");
    }
}

#[test]
fn zero_weight_on_an_impossible_class_costs_nothing() {
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        let w = Tensor::floats(DType::F32, Layout::C, &[3], &[1.0, 0.0, 2.0]);
        let options = LossOptions { weight: Some(w.array()), label_smoothing: 0.3, ..LossOptions::default() };
        let x = [0.5, f64::NEG_INFINITY, 1.0];
        let (loss, gradient) = simple(&exec, DType::F32, &[1, 3], 1, &x, &[2], &options);
        let mass = [0.1, 0.0, 2.0 * 0.8];
        let row = Row::new(&x);
        close(DType::F32, 4.0, loss[0], row.loss(&mass), 0.0, &|| format!("loss at {level:?}"));
        for (c, &g) in gradient.iter().enumerate() {
            let (expected, size) = row.gradient(&mass, c);
            close(DType::F32, 8.0, g, expected, size, &|| format!("gradient {c} at {level:?}"));
        }
    }
}

#[test]
fn nll() {
    for level in levels() {
        let mut random = Random(7);
        for dtype in FLOATS {
            for (shape, axis) in [(&[19, 5][..], 1), (&[5, 19], 0), (&[3, 70, 4], 1), (&[2, 600], 1), (&[9], 0)] {
                for layout in READABLE {
                    for reduction in REDUCTIONS {
                        let exec = Exec { level, threads: 1 + random.below(3) };
                        let classes = shape[axis];
                        let groups = rows_of(shape, &[axis]);
                        let row_shape = without(shape, &[axis]);
                        let lp: Vec<f64> = (0..shape.iter().product()).map(|_| -5.0 * random.uniform()).collect();
                        let lp = Tensor::floats(dtype, layout, shape, &lp);
                        let labels: Vec<i128> =
                            groups.iter().map(|_| if random.below(4) == 0 { -1 } else { random.below(classes) as i128 }).collect();
                        let int = [DType::I8, DType::I16, DType::I32, DType::I64][random.below(4)];
                        let labels: Vec<i128> = labels.iter().map(|&y| if int == DType::I8 { y.min(127) } else { y }).collect();
                        let target = Tensor::ints(int, Layout::C, &row_shape, &labels);
                        let w = Tensor::floats(
                            DType::F64,
                            Layout::C,
                            &[classes],
                            &(0..classes).map(|_| 0.5 + random.uniform()).collect::<Vec<_>>(),
                        );
                        let out_layout = WRITABLE[random.below(WRITABLE.len())];
                        let mut rows = Tensor::empty(dtype.row_dtype(), out_layout, &row_shape);
                        let mut gradient = Tensor::empty(dtype, out_layout, shape);
                        let loss = {
                            let out = rows.out();
                            let grad = Grad { out: gradient.out(), grad_output: GradOutput::Scalar(0.75) };
                            let options =
                                LossOptions { weight: Some(w.array()), ignore_index: Some(-1), reduction, ..LossOptions::default() };
                            let out = (reduction == Reduction::None).then_some(&out);
                            ops::nll_loss(&exec, &lp.array(), axis, &target.array(), &options, out, Some(&grad)).unwrap()
                        };
                        rows.check_guards();
                        gradient.check_guards();
                        let (lp, w, actual) = (lp.values(), w.values(), gradient.values());
                        let context = || {
                            format!("{dtype:?} {layout:?} {shape:?} axis {axis} {int:?} {reduction:?} into {out_layout:?} with {exec:?}")
                        };
                        let kept: Vec<usize> = (0..labels.len()).filter(|&r| labels[r] >= 0).collect();
                        let divisor = oracle::sum(kept.iter().map(|&r| w[labels[r] as usize]));
                        let exact = |r: usize| if labels[r] < 0 { 0.0 } else { -w[labels[r] as usize] * lp[groups[r][labels[r] as usize]] };
                        let total = oracle::sum(kept.iter().map(|&r| exact(r)));
                        match reduction {
                            Reduction::None => {
                                for (r, &l) in rows.values().iter().enumerate() {
                                    close(dtype.row_dtype(), 4.0, l, exact(r), 0.0, &|| format!("row {r}: {}", context()));
                                }
                            }
                            Reduction::Sum => close(dtype.row_dtype(), 4.0, loss, total, 0.0, &|| format!("sum: {}", context())),
                            Reduction::Mean => {
                                close(dtype.row_dtype(), 4.0, loss, total / divisor, 0.0, &|| format!("mean: {}", context()));
                            }
                        }
                        let share = if reduction == Reduction::Mean { 0.75 / divisor } else { 0.75 };
                        for (r, group) in groups.iter().enumerate() {
                            for (c, &at) in group.iter().enumerate() {
                                let expected = if labels[r] == c as i128 { -w[c] * share } else { 0.0 };
                                close(dtype, 8.0, actual[at], expected, 0.0, &|| format!("gradient row {r} class {c}: {}", context()));
                                assert!(expected != 0.0 || actual[at] == 0.0, "not zero: {}", context());
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn broadcast_logits() {
    for level in levels() {
        let exec = Exec { level, threads: 2 };
        for dtype in FLOATS {
            let mut random = Random(8);
            let row = Tensor::floats(dtype, Layout::C, &[33], &(0..33).map(|_| random.normal()).collect::<Vec<_>>());
            let fiber = row.values();
            let exact = Row::new(&fiber);
            // The same row seven times; the same class 33 times; a whole plane repeated.
            for (x, axis, rows) in [(row.broadcast(0, 7), 1, 7), (row.broadcast(1, 7), 0, 7)] {
                let mut lse = Tensor::empty(dtype.row_dtype(), Layout::C, &[rows]);
                ops::logsumexp(&exec, &x, &[axis], &lse.out()).unwrap();
                for l in lse.values() {
                    close(lse.dtype, 4.0, l, exact.logsumexp(), exact.max, &|| format!("{dtype:?} {level:?} axis {axis}"));
                }
            }
            let flat = row.broadcast(0, 50);
            let mut p = Tensor::empty(dtype, Layout::C, &[50, 33]);
            ops::softmax(&exec, &flat, &[0], &p.out()).unwrap();
            for p in p.values() {
                close(dtype, 8.0, p, 0.02, 0.0, &|| format!("{dtype:?} {level:?} equal classes"));
            }
        }
    }
}

// --- the same bits ------------------------------------------------------------------------------------------------------------------

#[test]
fn the_same_bits_for_every_number_of_threads() {
    // Large enough to be shared out: many short rows, few long ones, one huge one, a strided class axis.
    let shapes: [(&[usize], usize); 6] =
        [(&[30011, 10], 1), (&[40009, 2], 1), (&[257, 513], 1), (&[1, 262_147], 1), (&[2, 21, 40, 50], 1), (&[1000, 131], 0)];
    for level in levels() {
        let mut seed = 100;
        for dtype in FLOATS {
            for (shape, axis) in shapes {
                for target in [DType::I32, DType::F32] {
                    seed += 1;
                    let choice = Choice {
                        dtype,
                        layout: if seed % 3 == 0 { Layout::Fortran } else { Layout::C },
                        out_layout: Layout::C,
                        shape: shape.to_vec(),
                        axis,
                        target,
                        weight: (seed % 2 == 0).then_some(DType::F32),
                        smoothing: if target == DType::F32 { 0.1 } else { 0.0 },
                        ignored: 7,
                        reduction: Reduction::Mean,
                        grad_rows: false,
                        seed,
                    };
                    let case = choice.build();
                    let run = |threads: usize| {
                        let exec = Exec { level, threads };
                        let (mean, _, gradient) = case.run(&exec, Reduction::Mean, true, false);
                        let (placed, _, in_place) = case.run(&exec, Reduction::Mean, true, true);
                        let (sum, _, _) = case.run(&exec, Reduction::Sum, false, false);
                        let (_, rows, _) = case.run(&exec, Reduction::None, false, false);
                        let mut lp = Tensor::empty(dtype, Layout::C, shape);
                        ops::log_softmax(&exec, &case.x.array(), &[axis], &lp.out()).unwrap();
                        let mut lse = Tensor::empty(dtype.row_dtype(), Layout::C, &without(shape, &[axis]));
                        ops::logsumexp(&exec, &case.x.array(), &[axis], &lse.out()).unwrap();
                        let scalars = [mean.to_bits(), placed.to_bits(), sum.to_bits()];
                        (scalars, [rows.bits(), gradient.bits(), in_place.bits(), lp.bits(), lse.bits()])
                    };
                    let one = run(1);
                    for threads in [2, 3] {
                        let many = run(threads);
                        assert_eq!(one.0, many.0, "reductions with {threads} threads: {choice:?} {level:?}");
                        for (name, (a, b)) in
                            ["rows", "gradient", "gradient in place", "log_softmax", "logsumexp"].iter().zip(one.1.iter().zip(&many.1))
                        {
                            assert!(a == b, "{name} differ with {threads} threads: {choice:?} {level:?}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        for dtype in FLOATS {
            for classes in [1usize, 2, 3, 10, 16, 17, 33, 64, 65, 100, 513] {
                let mut random = Random(classes as u64);
                let n = 37;
                let rows: Vec<Vec<f64>> = (0..n).map(|_| random.row(dtype, classes)).collect();
                let labels: Vec<i128> = (0..n).map(|_| random.below(classes) as i128).collect();
                let options = LossOptions::default();
                let (losses, gradients) = simple(&exec, dtype, &[n, classes], 1, &rows.concat(), &labels, &options);
                let same = |a: f64, b: f64| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                // Alone, and among strangers in the opposite order.
                let reversed: Vec<f64> = rows.iter().rev().flatten().copied().collect();
                let back: Vec<i128> = labels.iter().rev().copied().collect();
                let (losses_back, gradients_back) = simple(&exec, dtype, &[n, classes], 1, &reversed, &back, &options);
                for r in 0..n {
                    let (alone, gradient) = simple(&exec, dtype, &[1, classes], 1, &rows[r], &labels[r..=r], &options);
                    let context = format!("row {r} of {n} x {classes} {dtype:?} {level:?}");
                    assert!(same(alone[0], losses[r]), "alone {:e}, in company {:e}: {context}", alone[0], losses[r]);
                    assert!(same(losses_back[n - 1 - r], losses[r]), "the order of the rows matters: {context}");
                    for c in 0..classes {
                        let expected = gradients[r * classes + c];
                        assert!(same(gradient[c], expected), "gradient {c} alone {:e}, in company {expected:e}: {context}", gradient[c]);
                        assert!(same(gradients_back[(n - 1 - r) * classes + c], expected), "gradient {c}, order of the rows: {context}");
                    }
                }
            }
        }
    }
}

/// The bits of a row are those of its logits, the number of classes and the layout of the class axis alone.
#[test]
fn a_row_alone_is_the_row_of_the_batch() {
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        for dtype in FLOATS {
            for classes in [1usize, 2, 3, 5, 16, 64, 65, 200, 600] {
                for n in [3usize, 37, 150] {
                    for layout in READABLE {
                        let mut random = Random((classes * n) as u64);
                        let shape = [n, classes];
                        let values: Vec<f64> = (0..n).flat_map(|_| random.row(dtype, classes)).collect();
                        let x = Tensor::floats(dtype, layout, &shape, &values);
                        let labels: Vec<i128> = (0..n).map(|r| if r % 5 == 2 { -100 } else { random.below(classes) as i128 }).collect();
                        let y = Tensor::ints(DType::I64, Layout::C, &[n], &labels);
                        let out_layout = WRITABLE[random.below(WRITABLE.len())];
                        let run = |x: &Array, y: &Array, n: usize, smoothing: f64| {
                            let shape = [n, classes];
                            let mut rows = Tensor::empty(dtype.row_dtype(), Layout::C, &[n]);
                            let [mut gradient, mut p, mut lp] = [0; 3].map(|_| Tensor::empty(dtype, out_layout, &shape));
                            let options = LossOptions { label_smoothing: smoothing, reduction: Reduction::None, ..LossOptions::default() };
                            {
                                let out = rows.out();
                                let grad = Grad { out: gradient.out(), grad_output: GradOutput::Scalar(0.7) };
                                ops::cross_entropy(&exec, x, 1, &Target::Index(y.clone()), &options, Some(&out), Some(&grad)).unwrap();
                            }
                            ops::softmax(&exec, x, &[1], &p.out()).unwrap();
                            ops::log_softmax(&exec, x, &[1], &lp.out()).unwrap();
                            [rows.values(), gradient.values(), p.values(), lp.values()]
                        };
                        let smoothing = [0.0, 0.1][random.below(2)];
                        let batch = run(&x.array(), &y.array(), n, smoothing);
                        for r in [0, 1, n / 2, n - 1] {
                            let alone = run(&x.part(r, 1), &y.part(r, 1), 1, smoothing);
                            for (name, (alone, batch)) in
                                ["loss", "gradient", "softmax", "log_softmax"].iter().zip(alone.iter().zip(&batch))
                            {
                                let width = alone.len();
                                for (c, (a, b)) in alone.iter().zip(&batch[r * width..]).enumerate() {
                                    let same = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                                    assert!(
                                        same,
                                        "{name} {c} of row {r}: alone {a:e}, in company {b:e}: {dtype:?} {layout:?} {shape:?} {level:?}"
                                    );
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

// --- refusals -----------------------------------------------------------------------------------------------------------------------

#[test]
fn a_label_out_of_bounds_is_refused_before_anything_is_written() {
    for level in levels() {
        let exec = Exec { level, threads: 3 };
        for (int, bad) in [
            (DType::I8, -1),
            (DType::I16, i128::from(i16::MIN)),
            (DType::I32, 10),
            (DType::I64, i128::from(i64::MIN)),
            (DType::I64, i128::from(i64::MAX)),
            (DType::U8, 255),
            (DType::U16, 10),
            (DType::U32, i128::from(u32::MAX)),
            (DType::U64, i128::from(u64::MAX)),
            // Its low bits would be class 1.
            (DType::U64, (1 << 32) + 1),
            // As a signed number this would be -100, the default mark.
            (DType::U64, i128::from((-100i64).cast_unsigned())),
        ] {
            for (shape, axis) in [(&[20000, 10][..], 1), (&[10, 60], 0), (&[3, 10, 7], 1)] {
                let row_shape = without(shape, &[axis]);
                let n: usize = row_shape.iter().product();
                for position in [0, n / 2, n - 1] {
                    let mut labels: Vec<i128> = (0..n).map(|r| r as i128 % 10).collect();
                    labels[position] = bad;
                    let y = Tensor::ints(int, Layout::Reversed, &row_shape, &labels);
                    let x = Tensor::floats(DType::F32, Layout::C, shape, &vec![0.5; n * 10]);
                    let mut rows = Tensor::empty(DType::F32, Layout::C, &row_shape);
                    let mut gradient = Tensor::empty(DType::F32, Layout::C, shape);
                    let (rows_before, before) = (rows.memory().to_vec(), gradient.memory().to_vec());
                    let expected = Error::TargetOutOfBounds { argument: "target", position, value: bad };
                    let options = LossOptions { reduction: Reduction::None, ..LossOptions::default() };
                    let (cross_entropy, nll) = {
                        let out = rows.out();
                        let grad = Grad { out: gradient.out(), grad_output: GradOutput::Scalar(1.0) };
                        (
                            ops::cross_entropy(&exec, &x.array(), axis, &Target::Index(y.array()), &options, Some(&out), Some(&grad)),
                            ops::nll_loss(&exec, &x.array(), axis, &y.array(), &options, Some(&out), Some(&grad)),
                        )
                    };
                    assert_eq!(cross_entropy, Err(expected.clone()), "{int:?} {shape:?} {level:?}");
                    assert_eq!(nll, Err(expected), "{int:?} {shape:?} {level:?}");
                    assert!(
                        rows.memory() == rows_before && gradient.memory() == before,
                        "written to before the refusal: {int:?} {shape:?} {level:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn any_label_may_be_the_ignored_one() {
    for level in levels() {
        let exec = Exec { level, threads: 1 };
        let x = [0.0, 1.0, 2.0, 3.0];
        for mark in [-100, -1, 0, 1, 7, i128::from(i64::MIN), i128::from(i64::MAX)] {
            let options = LossOptions { ignore_index: Some(mark as i64), ..LossOptions::default() };
            let (loss, gradient) = simple(&exec, DType::F64, &[2, 2], 1, &x, &[mark, i128::from(mark == 0)], &options);
            assert!(
                loss[0] == 0.0 && gradient[..2] == [0.0; 2] && loss[1] > 0.0 && gradient[2] != 0.0,
                "{mark} {level:?}: {loss:?} {gradient:?}"
            );
        }
    }
}
