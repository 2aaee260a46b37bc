//! What all targets draw from, and how they compare.

use arbitrary::Arbitrary;
use crossent::array::DType;
use crossent::ops::Exec;
use crossent::simd::Level;

use crate::tensor::{FLOATS, Layout, READABLE, Tensor, WRITABLE};

/// An index into a list that is known later.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Pick(u8);

impl Pick {
    pub fn of<T: Copy>(self, list: &[T]) -> T {
        list[self.0 as usize % list.len()]
    }
    pub fn below(self, n: usize) -> usize {
        self.0 as usize % n
    }
}

/// Small arrays of any number of axes, and now and then the sizes at which the core goes other ways.
#[derive(Arbitrary, Clone, Debug)]
pub struct Shape {
    kind: u8,
    dims: [u8; 4],
}

/// Both sides of every block.
const LONG: [usize; 16] = [33, 64, 65, 70, 100, 127, 128, 129, 257, 300, 512, 513, 1023, 1024, 1025, 2061];

impl Shape {
    pub fn dims(&self) -> Vec<usize> {
        let dims = self.dims.map(usize::from);
        let turn = |a: usize, b: usize| if dims[2] % 2 == 0 { vec![a, b] } else { vec![b, a] };
        match self.kind {
            0..=7 => turn(1 + dims[0] % 2, LONG[dims[1] % 16]),
            8..=31 => turn(1 + dims[0] % 80, 1 + dims[1] % 12),
            _ => dims[..1 + self.kind as usize % 4].iter().map(|n| n % 6).collect(),
        }
    }
}

/// How to run.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Run {
    level: Pick,
    threads: Pick,
}

impl Run {
    pub fn exec(self) -> Exec {
        let levels: Vec<Level> = Level::all().collect();
        Exec { level: self.level.of(&levels), threads: 1 + self.threads.below(3) }
    }
}

/// Numbers: as many as are asked for from as many bytes as there are.
#[derive(Arbitrary, Clone, Debug)]
pub struct Numbers {
    /// Whether every number is finite and near 0.
    tame: bool,
    bytes: Vec<u8>,
}

const SPECIAL: [f64; 16] = [
    f64::INFINITY,
    f64::NEG_INFINITY,
    f64::NAN,
    -0.0,
    88.0,
    -88.0,
    1e4,
    -1e4,
    1e30,
    -1e30,
    3.4e38,
    1e-40,
    -1e-310,
    65504.0,
    -131_073.0,
    1e300,
];

impl Numbers {
    fn byte(&self, i: usize) -> u8 {
        // Not with the period of the bytes: long arrays are made of few.
        let n = self.bytes.len();
        if n == 0 { 100 } else { self.bytes[(i * 7 + i / n) % n] }
    }
    pub fn real(&self, i: usize) -> f64 {
        let byte = self.byte(i);
        if byte < 240 || self.tame { (f64::from(byte) - 100.0) / 8.0 } else { SPECIAL[byte as usize - 240] }
    }
    pub fn share(&self, i: usize) -> f64 {
        f64::from(self.byte(i) % 17) / 16.0
    }
    /// Mostly below `n`.
    pub fn label(&self, i: usize, n: usize) -> i128 {
        match self.byte(i) {
            byte if byte < 240 || self.tame => i128::from(byte) * 41 % n.max(1) as i128,
            byte => [-100, -1, n as i128, 300, 1 << 40, -(1 << 40), 127, 0][byte as usize % 8],
        }
    }
    pub fn flag(&self, i: usize) -> bool {
        self.byte(i) % 4 != 0
    }
    pub fn reals(&self, dtype: DType, layout: Layout, shape: &[usize]) -> Tensor {
        let n = shape.iter().product();
        Tensor::floats(dtype, layout, shape, &(0..n).map(|i| self.real(i)).collect::<Vec<_>>())
    }
    pub fn shares(&self, dtype: DType, layout: Layout, shape: &[usize]) -> Tensor {
        let n = shape.iter().product();
        Tensor::floats(dtype, layout, shape, &(0..n).map(|i| self.share(i)).collect::<Vec<_>>())
    }
}

/// A type and a layout.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Kind {
    dtype: Pick,
    layout: Pick,
}

impl Kind {
    pub fn float(self) -> DType {
        self.dtype.of(&FLOATS)
    }
    pub fn of(self, types: &[DType]) -> DType {
        self.dtype.of(types)
    }
    pub fn readable(self) -> Layout {
        self.layout.of(&READABLE)
    }
    pub fn writable(self) -> Layout {
        self.layout.of(&WRITABLE)
    }
}

/// The C-order positions of each row's classes, rows in C order.
pub fn rows_of(shape: &[usize], axis: usize) -> Vec<Vec<usize>> {
    let inner: usize = shape[axis + 1..].iter().product();
    let outer: usize = shape[..axis].iter().product();
    (0..outer * inner).map(|r| (0..shape[axis]).map(|c| (r / inner * shape[axis] + c) * inner + r % inner).collect()).collect()
}

pub fn without(shape: &[usize], axis: usize) -> Vec<usize> {
    shape.iter().enumerate().filter(|&(i, _)| i != axis).map(|(_, &n)| n).collect()
}

/// Asserts |actual − expected| within the accuracy of `dtype`, of numbers that were computed from terms of `size`.
#[track_caller]
pub fn near(dtype: DType, actual: f64, expected: f64, size: f64, what: &dyn core::fmt::Debug) {
    if actual == expected || actual.is_nan() && expected.is_nan() {
        return;
    }
    let (unit, tiny, largest) = match dtype {
        DType::F16 => (2e-3, 6e-8, 65504.0),
        DType::Bf16 => (1.6e-2, 2e-38, 3.38e38),
        DType::F32 => (1e-5, 2e-37, f64::from(f32::MAX)),
        _ => (1e-11, 1e-306, f64::MAX),
    };
    let bound = unit * size.abs().max(expected.abs()) + tiny;
    // Beyond the largest number of the type, or the terms are.
    if (expected.abs() + bound > largest || !bound.is_finite()) && (actual.is_infinite() || actual.abs() > largest / 4.0 || actual.is_nan())
    {
        return;
    }
    assert!((actual - expected).abs() <= bound, "{what:?}: {actual:e}, expected {expected:e}, allowed {bound:e}");
}

/// The softmax of one row: log-probabilities without the rounding of a difference of large numbers, and the logsumexp. Only for rows that have one.
pub struct Softmax {
    pub max: f64,
    pub log_sum: f64,
    pub lse: f64,
}

impl Softmax {
    /// None where there is no distribution: a NaN, +inf or nothing but −inf.
    pub fn of(x: &[f64]) -> Option<Self> {
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if x.iter().any(|x| x.is_nan()) || max.is_infinite() {
            return None;
        }
        let first = x.iter().position(|&v| v == max)?;
        let rest: f64 = x.iter().enumerate().filter(|&(c, _)| c != first).map(|(_, &v)| (v - max).exp()).sum();
        let log_sum = rest.ln_1p();
        Some(Self { max, log_sum, lse: max + log_sum })
    }
    pub fn log_p(&self, x: f64) -> f64 {
        (x - self.max) - self.log_sum
    }
}
