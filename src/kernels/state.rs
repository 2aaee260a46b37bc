//! What is known of a row after some of its classes were read.
//!
//! Sums are relative to a [`Reference`]: `rest = Σ exp(x − b)·2^−k` over every class that is not a maximum. With b = 0 the reference is an
//! integer power of two, so that moving it is exact; b is the maximum itself where |x| leaves the grid of the integer reduction.

use crate::array::{Float, Span, SpanMut, Vf, lanes};
use crate::simd::{Isa, Scalar, Vector};

use super::math::{Exp, apart};
use super::real::Real;

/// What exponentials are relative to: `exp(x − b) · 2^−k`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reference {
    /// Integral power of two.
    pub k: f64,
    /// Offset in logits, 0 while the maximum is on the grid.
    pub b: f64,
}

impl Reference {
    /// The reference of a running maximum of type `T`.
    #[inline(always)]
    pub fn of<T: Real>(max: T, exp: &Exp<Vf<Scalar, T>>, scale: f64) -> Self {
        let m = max.to_f64();
        let zero = Vf::<Scalar, T>::splat(Scalar, T::ZERO);
        if m == f64::NEG_INFINITY {
            Self { k: scalar::<T>(exp.reference(zero)), b: 0.0 }
        } else if (m * scale).abs() > T::LIMIT.to_f64() {
            // +inf would make NaN of every difference; the largest finite number keeps finite classes finite.
            Self { k: scalar::<T>(exp.reference(zero)), b: m.min(<T as Float>::MAX.to_f64()) }
        } else {
            Self { k: scalar::<T>(exp.reference(Vf::<Scalar, T>::splat(Scalar, max))), b: 0.0 }
        }
    }

    /// The factor that takes sums relative to `self` to sums relative to `to`.
    pub fn factor(self, to: Self, scale: f64) -> f64 {
        if self == to {
            return 1.0;
        }
        let shift = self.k - to.k;
        if self.b == to.b && (-1074.0..=1000.0).contains(&shift) {
            // Subnormal powers of two are exact as well, and what they multiply may be large enough to stay normal.
            return f64::from_bits(if shift < -1022.0 { 1 << (shift + 1074.0) as u64 } else { ((shift + 1023.0) as u64) << 52 });
        }
        // A float64 exponential of an exact difference.
        exp_f64(Scalar, (self.b - to.b) * scale, to.k - self.k)
    }
}

/// All lanes `x`, rounded to `T`.
#[inline(always)]
pub(super) fn splat<S: Isa, T: Float>(isa: S, x: f64) -> Vf<S, T> {
    Vf::<S, T>::splat(isa, T::from_f64(x))
}

fn scalar<T: Real>(v: Vf<Scalar, T>) -> f64 {
    lanes::<Scalar, T>(v)[0].to_f64()
}

/// `exp(x)·2^−k` in float64, 0 where it is tiny.
#[inline(always)]
pub fn exp_f64<S: Isa>(isa: S, x: f64, k: f64) -> f64 {
    if apart::<S::F64>() { exp_f64_apart(isa, x, k) } else { exp_f64_here(isa, x, k) }
}

#[inline(never)]
fn exp_f64_apart<S: Isa>(isa: S, x: f64, k: f64) -> f64 {
    exp_f64_here(isa, x, k)
}

#[inline(always)]
fn exp_f64_here<S: Isa>(isa: S, x: f64, k: f64) -> f64 {
    let exp = Exp::<S::F64>::new(isa, 1.0);
    let low = -1100.0 + k.min(0.0);
    if x.is_nan() {
        return x;
    }
    if x <= low || x * core::f64::consts::LOG2_E - k < -1000.0 {
        return 0.0;
    }
    lanes::<S, f64>(exp.exp2(S::F64::splat(isa, x), S::F64::splat(isa, k)))[0]
}

/// A sum carried beyond the precision of its terms: float64 lanes for float32, compensated float64 for float64.
#[derive(Clone, Copy)]
pub struct Wide<S: Isa> {
    a: S::F64,
    b: S::F64,
}

impl<S: Isa> Wide<S> {
    /// An empty sum.
    #[inline(always)]
    pub fn zero(isa: S) -> Self {
        let zero = S::F64::splat(isa, 0.0);
        Self { a: zero, b: zero }
    }

    /// From the parts of a sum in float64.
    #[inline(always)]
    pub fn of(sum: S::F64, lost: S::F64) -> Self {
        Self { a: sum, b: lost }
    }

    /// The parts, of a sum in float64: the second is what roundings took off the first.
    #[inline(always)]
    pub fn parts(self) -> (S::F64, S::F64) {
        (self.a, self.b)
    }

    /// Adds another sum, lane by lane.
    #[inline(always)]
    pub fn merge(&mut self, other: Self) {
        self.a = self.a + other.a;
        self.b = self.b + other.b;
    }

    /// Multiplies by a number.
    #[inline(always)]
    pub fn scale(&mut self, isa: S, by: f64) {
        let by = S::F64::splat(isa, by);
        self.a = self.a * by;
        self.b = self.b * by;
    }
}

/// Float types whose sums are carried in [`Wide`].
pub trait Summand: Real {
    /// Adds a vector.
    fn add<S: Isa>(isa: S, sum: &mut Wide<S>, v: Vf<S, Self>);
    /// The total as an unevaluated pair.
    fn total<S: Isa>(sum: Wide<S>) -> Pair;
    /// The same by a call where it takes much code: for what has many sums, and not a few of them in every row.
    #[inline(always)]
    fn total_called<S: Isa>(sum: Wide<S>) -> Pair {
        Self::total(sum)
    }
    /// The lanes' sums, rounded to float64, at `dst[j..]`; one lane per column (`LANES` of `Self`).
    fn store_columns<S: Isa>(isa: S, sum: Wide<S>, dst: SpanMut<f64>, j: usize);
    /// What the rounding of [`Summand::store_columns`] takes off, at `dst[j..]`, for the type whose results have no digits to spare.
    #[inline(always)]
    fn store_lost<S: Isa>(_isa: S, _sum: Wide<S>, _dst: SpanMut<f64>, _j: usize) {}
    /// Widens a vector to `dst[j..]`.
    fn store_wide<S: Isa>(isa: S, v: Vf<S, Self>, dst: SpanMut<f64>, j: usize);
    /// Narrows `src[j..]` to a vector.
    fn load_wide<S: Isa>(isa: S, src: Span<f64>, j: usize) -> Vf<S, Self>;
    /// Multiplies lane-wise.
    fn scale_columns<S: Isa>(isa: S, sum: &mut Wide<S>, by: Vf<S, Self>);
}

impl Summand for f32 {
    #[inline(always)]
    fn add<S: Isa>(isa: S, sum: &mut Wide<S>, v: S::F32) {
        let (lo, hi) = isa.widen(v);
        sum.a = sum.a + lo;
        sum.b = sum.b + hi;
    }
    #[inline(always)]
    fn total<S: Isa>(sum: Wide<S>) -> Pair {
        Pair { hi: (sum.a + sum.b).reduce_sum(), lo: 0.0 }
    }
    #[inline(always)]
    fn store_columns<S: Isa>(isa: S, sum: Wide<S>, dst: SpanMut<f64>, j: usize) {
        dst.store(isa, j, sum.a);
        if S::F32::LANES > S::F64::LANES {
            dst.store(isa, j + S::F64::LANES, sum.b);
        }
    }
    #[inline(always)]
    fn store_wide<S: Isa>(isa: S, v: S::F32, dst: SpanMut<f64>, j: usize) {
        let (a, b) = isa.widen(v);
        Self::store_columns(isa, Wide { a, b }, dst, j);
    }
    #[inline(always)]
    fn load_wide<S: Isa>(isa: S, src: Span<f64>, j: usize) -> S::F32 {
        let lo = src.load(isa, j);
        let hi = if S::F32::LANES > S::F64::LANES { src.load(isa, j + S::F64::LANES) } else { lo };
        isa.narrow(lo, hi)
    }
    #[inline(always)]
    fn scale_columns<S: Isa>(isa: S, sum: &mut Wide<S>, by: S::F32) {
        let (a, b) = isa.widen(by);
        sum.a = sum.a * a;
        sum.b = sum.b * b;
    }
}

impl Summand for f64 {
    #[inline(always)]
    fn add<S: Isa>(_isa: S, sum: &mut Wide<S>, v: S::F64) {
        // Knuth's two-sum: the rounding error of the addition, exactly.
        let s = sum.a + v;
        let t = s - sum.a;
        sum.b = sum.b + ((sum.a - (s - t)) + (v - t));
        sum.a = s;
    }
    #[inline(always)]
    fn total<S: Isa>(sum: Wide<S>) -> Pair {
        let (a, b) = (lanes::<S, Self>(sum.a), lanes::<S, Self>(sum.b));
        total(&a[..S::F64::LANES], &b[..S::F64::LANES])
    }
    #[inline(always)]
    fn total_called<S: Isa>(sum: Wide<S>) -> Pair {
        let (a, b) = (lanes::<S, Self>(sum.a), lanes::<S, Self>(sum.b));
        total_apart(&a[..S::F64::LANES], &b[..S::F64::LANES])
    }
    #[inline(always)]
    fn store_columns<S: Isa>(isa: S, sum: Wide<S>, dst: SpanMut<f64>, j: usize) {
        // An infinite sum has a compensation of NaN.
        let total = sum.a + sum.b;
        dst.store(isa, j, S::F64::select(sum.b.eq(sum.b), total, sum.a));
    }
    #[inline(always)]
    fn store_lost<S: Isa>(isa: S, sum: Wide<S>, dst: SpanMut<f64>, j: usize) {
        // The compensation is the smaller one.
        dst.store(isa, j, (sum.a - (sum.a + sum.b)) + sum.b);
    }
    #[inline(always)]
    fn store_wide<S: Isa>(isa: S, v: S::F64, dst: SpanMut<f64>, j: usize) {
        dst.store(isa, j, v);
    }
    #[inline(always)]
    fn load_wide<S: Isa>(isa: S, src: Span<f64>, j: usize) -> S::F64 {
        src.load(isa, j)
    }
    #[inline(always)]
    fn scale_columns<S: Isa>(_isa: S, sum: &mut Wide<S>, by: S::F64) {
        sum.a = sum.a * by;
        sum.b = sum.b * by;
    }
}

#[inline(never)]
fn total_apart(sums: &[f64], lost: &[f64]) -> Pair {
    total(sums, lost)
}

/// Of the parts of a sum in float64, lane by lane.
#[inline(always)]
fn total(sums: &[f64], lost: &[f64]) -> Pair {
    let mut total = Pair::default();
    for (&sum, &lost) in sums.iter().zip(lost) {
        total.add(sum);
        // An infinite lane has a compensation of NaN.
        total.lo += if lost.is_nan() { 0.0 } else { lost };
    }
    total.settle()
}

/// An unevaluated sum of two float64.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pair {
    /// Leading part.
    pub hi: f64,
    /// What its roundings lost.
    pub lo: f64,
}

impl Pair {
    /// Adds a number. Infinities stay infinities.
    #[inline(always)]
    pub fn add(&mut self, x: f64) {
        let s = self.hi + x;
        let t = s - self.hi;
        let error = (self.hi - (s - t)) + (x - t);
        if error.is_finite() {
            self.lo += error;
        }
        self.hi = s;
    }
    /// Adds a pair.
    #[inline(always)]
    pub fn merge(&mut self, other: Self) {
        self.add(other.hi);
        self.lo += other.lo;
    }
    /// Multiplies by a number.
    #[inline(always)]
    pub fn scale(&mut self, by: f64) {
        // The leading product's rounding error, exactly.
        let hi = self.hi * by;
        let error = self.hi.mul_add(by, -hi);
        self.lo = self.lo * by + if error.is_finite() { error } else { 0.0 };
        self.hi = hi;
    }
    /// Its value.
    #[inline(always)]
    pub fn value(self) -> f64 {
        self.hi + self.lo
    }
    /// What rounding takes off its value.
    #[inline(always)]
    pub fn lost(self) -> f64 {
        (self.hi - self.value()) + self.lo
    }
    fn settle(self) -> Self {
        let hi = self.hi + self.lo;
        Self { hi, lo: if hi.is_finite() { (self.hi - hi) + self.lo } else { 0.0 } }
    }
}

/// A row, or the part of it that was read.
#[derive(Clone, Copy, Debug)]
pub struct State {
    /// Largest logit.
    pub max: f64,
    /// How many classes have it.
    pub ties: f64,
    /// The first class that has it.
    pub arg: usize,
    /// Reference of `rest`.
    pub reference: Reference,
    /// `Σ exp` of the other classes.
    pub rest: Pair,
    /// `Σ t·(max − x)` of a dense target stream.
    pub lin: Pair,
    /// `Σ t` over the other classes.
    pub t_rest: Pair,
    /// `Σ t` over the maxima.
    pub t_top: f64,
}

impl State {
    /// What is known of a part of a row and the one after it, but for a dense stream.
    #[must_use]
    pub fn join(self, next: Self, scale: f64) -> Self {
        let high = if next.max > self.max { next } else { self };
        let to = high.reference;
        let (mut rest, mut ties) = (Pair::default(), 0.0);
        for mut part in [self, next] {
            // Where everything is −inf there is nothing in the rest, or NaN.
            if part.max > f64::NEG_INFINITY {
                part.rest.scale(part.reference.factor(to, scale));
            }
            rest.merge(part.rest);
            if part.max == high.max {
                ties += part.ties;
            } else if part.max > f64::NEG_INFINITY {
                rest.add(part.ties * exp_f64(Scalar, (part.max - to.b) * scale, to.k));
            }
        }
        Self { ties, rest, ..high }
    }
}
