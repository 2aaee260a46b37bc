//! The batch operations against plain loops: every level of the machine × element type × layout × axis × target × option.
//!
//! Bounds are the contract's: losses and log-probabilities within 4 units in the last place (ULP) of the exact value, softmax and gradient
//! entries within 8, logsumexp within 4 of the larger of |max| and |logsumexp|; 16-bit results are rounded once on top. For `f64` the
//! oracle's own error of a few ULP is added.

mod by_products;
mod case;
mod losses;
mod oracle;
mod refusals;
mod same_bits;
mod targets;
mod tensor;
mod transforms;

use std::io::Write;
use std::sync::{Once, OnceLock};

use crossent::array::DType;
use crossent::simd::Level;
use tensor::{Layout, Tensor, ulp};

/// `CROSSENT_TEST_THIN=1`, for emulators and sanitizers: fewer lengths, and of the combinations every fifth. Every kernel still meets every
/// length around its vectors.
fn thin() -> bool {
    static THIN: OnceLock<bool> = OnceLock::new();
    *THIN.get_or_init(|| std::env::var_os("CROSSENT_TEST_THIN").is_some())
}

/// Counts a combination, and says whether it is left out.
fn skipped(count: &mut usize) -> bool {
    *count += 1;
    thin() && !count.is_multiple_of(5)
}

/// The levels that every test runs on. Printed past the harness's capture, so that each run shows what it covered.
fn levels() -> Vec<Level> {
    static PRINTED: Once = Once::new();
    // The portable level is the same everywhere, and emulated it would take most of the time.
    let levels: Vec<Level> = Level::all().filter(|&level| !(thin() && cfg!(target_arch = "aarch64") && level == Level::Scalar)).collect();
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
    if !(thin() && cfg!(target_arch = "aarch64")) {
        expected.push(Level::Scalar);
    }
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
    let (small, large) = if thin() {
        (33, &[63, 64, 65, 129, 513, 1025][..])
    } else {
        (70, &[127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 1535, 1536, 1537, 2051, 4096][..])
    };
    (1..=small).chain(large.iter().copied())
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
