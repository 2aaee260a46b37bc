//! Vector mathematics: exponentials relative to a power of two, and `log1p`.
//!
//! # The integer reference
//!
//! A softmax needs `exp(x − m)`. Rounding x − m costs up to |x − m|/2 units in the last place of the result before any exponential is
//! taken. Here x itself is reduced and the reference is an integral power of two, which takes part exactly:
//!
//! ```text
//! n = round(x·log2 e)      r = x·log2 e − n, with log2 e in two parts      exp(x)·2^−k = 2^r · 2^(n − k)
//! ```
//!
//! # Accuracy
//!
//! In units in the last place (ULP) of the exact result, wherever that is a normal number. `tests/math.rs` measures on every level and
//! holds to these bounds; for float32 the worst of all arguments is known, for float64 the worst of about 10^6.
//!
//! | function | bound | worst f32 | worst f64 |
//! |---|---|---|---|
//! | [`Exp::exp2`], \|x\| up to `LIMIT` | 1.1 | 1.073 | 0.95 |
//! | [`Anchored::exp2`], what most kernels take | 1.75, f64 1.2 | 1.742 | 1.150 |
//! | [`Split::exp2`], of few classes | 1.1, f64 1.2 | 1.073 | 1.150 |
//! | [`exp_full`] | 1.1 | 1.014 | 0.92 |
//! | [`log1p`] | 0.55 | | 0.53 |
//!
//! Their constants are in [`super::real`].

use crate::array::{DType, Element, Float};
use crate::simd::{Isa, Level, Vector};

use super::real::{LOG2_E, Real};

/// Whether a function is better called than made part of its callers: the portable level calls the C library for every fused multiply-add, so that
/// one more call costs nothing, and hundreds of copies would be a tenth of the library. (The vectors of the other levels must be inlined.)
#[inline(always)]
pub(super) fn apart<V: Vector>() -> bool {
    <V::Isa as Isa>::LEVEL == Level::Scalar
}

/// `c0 + c1·x + …` by Horner's rule: fewest operations; the kernels keep enough vectors in flight to hide its latency.
#[inline(always)]
pub(super) fn polynomial<V: Vector>(isa: V::Isa, c: &'static [V::Elem], x: V) -> V {
    horner(isa, V::splat(isa, c[c.len() - 1]), c, x)
}

/// The same with one more coefficient, of the highest power, which is one.
#[inline(always)]
fn monic<V: Vector>(isa: V::Isa, c: &'static [V::Elem], x: V) -> V {
    horner(isa, x + V::splat(isa, c[c.len() - 1]), c, x)
}

/// Goes on from what the last coefficient began.
#[inline(always)]
fn horner<V: Vector>(isa: V::Isa, mut sum: V, c: &'static [V::Elem], x: V) -> V {
    let mut i = c.len() - 1;
    while i > 0 {
        i -= 1;
        sum = sum.mul_add(x, V::splat(isa, c[i]));
    }
    sum
}

/// The coefficients of [`Real::LED_8`], where the level looks up so many steps.
#[inline(always)]
fn coefficients<V: Vector>(isa: V::Isa, opaque: bool) -> [V; 4]
where
    V::Elem: Real,
{
    let mut all = [V::splat(isa, V::Elem::ZERO); 4];
    if V::STEPS == 3 {
        for (v, &c) in all.iter_mut().zip(V::Elem::LED_8) {
            *v = V::splat(isa, if opaque { core::hint::black_box(c) } else { c });
        }
    }
    all
}

/// `(2^r − 1)/r` for `|r|` up to half a step of `1/2^steps` and a little.
#[inline(always)]
fn pow2_slope<V: Vector>(isa: V::Isa, r: V, steps: u32) -> V
where
    V::Elem: Real,
{
    let c = match steps {
        3 => V::Elem::EXP2_8,
        4 => V::Elem::EXP2_16,
        _ => V::Elem::EXP2,
    };
    polynomial(isa, c, r)
}

/// Exponentials relative to an integral power of two.
#[derive(Clone, Copy, Debug)]
pub struct Exp<V: Vector> {
    isa: V::Isa,
    magic: V,
    hi: V,
    lo: V,
    /// Of `hi`.
    inverse: V,
    octave: V::Octave,
    /// [`Real::LED_8`].
    monic: [V; 4],
}

impl<V: Vector> Exp<V>
where
    V::Elem: Real,
{
    /// Exponentials of `x·scale`. `scale` is finite and positive, and log2 e·scale and its 2^-50 part are normal numbers of the type.
    #[inline(always)]
    pub fn new(isa: V::Isa, scale: f64) -> Self {
        // log2 e·scale as a sum of two f64: the product's rounding error is exact, the second part's own is 2^-107 of the whole.
        let hi = LOG2_E[0] * scale;
        let lo = LOG2_E[0].mul_add(scale, -hi) + LOG2_E[1] * scale;
        // The same number in two parts of the type. For f64 the first is `hi` and nothing changes.
        let first = V::Elem::from_f64(hi);
        let second = V::Elem::from_f64((hi - first.to_f64()) + lo);
        let inverse = V::Elem::from_f64(1.0 / hi);
        Self {
            isa,
            magic: V::splat(isa, V::Elem::MAGIC),
            hi: V::splat(isa, first),
            lo: V::splat(isa, second),
            inverse: V::splat(isa, inverse),
            octave: V::octave(isa, &V::Elem::OCTAVE),
            monic: coefficients(isa, false),
        }
    }

    /// The same with coefficients that the compiler does not know: it keeps them in memory then, where registers are few, as operands of the
    /// operations, instead of a register each that is loaded in every round of a loop.
    #[must_use]
    #[inline(always)]
    pub fn opaque(self) -> Self {
        Self { monic: coefficients(self.isa, true), ..self }
    }

    /// `2^(x·scale·log2 e − k)` for integral k. x is NaN (which gives NaN) or |x·scale| <= `LIMIT + CLAMP`.
    ///
    /// Results below the smallest normal number may come out as 0, and are exactly 0 from 2^-152 or 2^-1077 down. Nothing here handles
    /// overflow: round(x·scale·log2 e) − k must not exceed 127 or 1023.
    #[inline(always)]
    pub fn exp2(self, x: V, k: V) -> V {
        if apart::<V>() { self.exp2_apart(x, k) } else { self.exp2_here(x, k) }
    }

    #[inline(never)]
    fn exp2_apart(self, x: V, k: V) -> V {
        self.exp2_here(x, k)
    }

    #[inline(always)]
    fn exp2_here(self, x: V, k: V) -> V {
        let n = self.round(x);
        let r = x.mul_add(self.hi, -n);
        let r = x.mul_add(self.lo, r);
        self.pow2(r).scale2(n - k)
    }

    /// The integral reference of a maximum m: `round(m·scale·log2 e) + 1 − BIAS`, so that `exp2(m, k)` lies between 2^(BIAS − 1.51) and
    /// 2^(BIAS − 0.49), and is 2^(BIAS − 1) for m = 0. NaN and infinities come back as such.
    #[inline(always)]
    pub fn reference(self, m: V) -> V {
        self.round(m) + V::splat(self.isa, V::Elem::from_f64(1.0 - V::Elem::BIAS.to_f64()))
    }

    /// 1/e(m) of a maximum m, where exponentials are relative to its [`Exp::reference`]. m is finite.
    #[inline(always)]
    pub fn over(self, m: V) -> Over<V> {
        let unit = V::Elem::from_f64(f64::from_bits((1024 - V::Elem::BIAS.to_f64() as u64) << 52));
        Over { less_one: self.over_slope(m, self.round(m)), unit: V::splat(self.isa, unit) }
    }

    /// The same where they are relative to k.
    #[inline(always)]
    pub fn over_at(self, m: V, k: V) -> Over<V> {
        let n = self.round(m);
        Over { less_one: self.over_slope(m, n), unit: V::splat(self.isa, V::Elem::ONE).scale2(k - n) }
    }

    #[inline(always)]
    fn over_slope(self, m: V, n: V) -> V {
        let r = m.neg_mul_add(self.lo, m.neg_mul_add(self.hi, n));
        r * pow2_slope(self.isa, r, 0)
    }

    /// x·scale·log2 e to the nearest integer (of the product with the first part alone: off by |x·scale|·2^-digits at most).
    #[inline(always)]
    fn round(self, x: V) -> V {
        x.mul_add(self.hi, self.magic) - self.magic
    }

    #[inline(always)]
    fn pow2(self, r: V) -> V {
        r.mul_add(pow2_slope(self.isa, r, 0), V::splat(self.isa, V::Elem::ONE))
    }

    /// The quick exponentials of many x that are not far above one maximum, see [`Anchored`].
    #[inline(always)]
    pub fn anchor(self, k: V) -> Anchored<V> {
        let (magic, floor) = self.anchor_parts(k);
        self.anchored(magic, floor)
    }

    /// What an anchor has of its k.
    #[inline(always)]
    pub fn anchor_parts(self, k: V) -> (V, V) {
        self.steps(
            k,
            match V::STEPS {
                0 => V::Elem::LEAD,
                3 => V::Elem::LEAD_8,
                _ => V::Elem::ZERO,
            },
        )
    }

    /// An anchor from [`Exp::anchor_parts`].
    #[inline(always)]
    pub fn anchored(self, magic: V, floor: V) -> Anchored<V> {
        Anchored { isa: self.isa, by: self.by(magic, floor), monic: self.monic }
    }

    /// The closer exponentials of many x that are not far above one maximum, see [`Split`].
    #[inline(always)]
    pub fn split(self, k: V) -> Split<V> {
        let (magic, floor) = self.steps(k, V::Elem::ZERO);
        Split { isa: self.isa, by: self.by(magic, floor) }
    }

    #[inline(always)]
    fn by(self, magic: V, floor: V) -> Steps<V> {
        Steps { hi: self.hi, lo: self.lo, magic, floor, octave: self.octave }
    }

    /// What rounds to steps, and the floor.
    #[inline(always)]
    fn steps(self, k: V, lead: V::Elem) -> (V, V) {
        let bias = V::splat(self.isa, V::Elem::from_f64(V::Elem::EXPONENT_BIAS.to_f64() - lead.to_f64()));
        // 1.5·2^(digits − 1 − STEPS): sums with it are rounded to whole steps.
        let magic = V::splat(self.isa, V::Elem::from_f64(V::Elem::MAGIC.to_f64() / f64::from(1_u32 << V::STEPS)));
        (magic + (bias - k), (k - bias) * self.inverse)
    }
}

/// The inverse of a maximum's exponential, as 1 + `less_one` times a power of two: with more digits than one number of the type has.
#[derive(Clone, Copy, Debug)]
pub struct Over<V> {
    less_one: V,
    unit: V,
}

impl<V: Vector> Over<V> {
    /// A product with it.
    #[inline(always)]
    pub fn times(self, x: V) -> V {
        x.mul_add(self.less_one, x) * self.unit
    }

    /// The same with a sum and what it lost; and what the product has lost.
    #[inline(always)]
    pub fn times_exactly(self, sum: V, lost: V) -> (V, V) {
        let product = sum.mul_add(self.less_one, sum);
        // The sum less the product is exact: neither is more than twice the other.
        (product * self.unit, (sum.mul_add(self.less_one, sum - product) + lost.mul_add(self.less_one, lost)) * self.unit)
    }

    /// The same with a sum and what it lost.
    #[inline(always)]
    pub fn times_sum(self, sum: V, lost: V) -> V {
        (sum + sum.mul_add(self.less_one, lost)) * self.unit
    }
}

/// Reduces x·scale·log2 e to whole steps of an octave. The sum that rounds has −k and the exponent's bias in it, so that its low bits are the
/// exponent and the index of the table at once.
#[derive(Clone, Copy, Debug)]
struct Steps<V: Vector> {
    hi: V,
    lo: V,
    /// Rounds to steps, adds the bias, takes k off.
    magic: V,
    /// What has an exponential of exactly 0, and so has everything below.
    floor: V,
    octave: V::Octave,
}

impl<V: Vector> Steps<V>
where
    V::Elem: Real,
{
    /// The power and what remains for the polynomial, of x that is not below the floor.
    #[inline(always)]
    fn of(self, x: V) -> (V, V) {
        let t = x.mul_add(self.hi, self.magic);
        let n = t - self.magic;
        let r = x.mul_add(self.lo, x.mul_sub(self.hi, n));
        (t.power(self.octave), r)
    }

    #[inline(always)]
    fn raised(self, x: V) -> V {
        // In this order NaN passes.
        self.floor.max(x)
    }
}

/// `2^(x·scale·log2 e − k)` for one integral k, in few operations.
#[derive(Clone, Copy, Debug)]
pub struct Anchored<V: Vector> {
    isa: V::Isa,
    by: Steps<V>,
    monic: [V; 4],
}

impl<V: Vector> Anchored<V>
where
    V::Elem: Real,
{
    /// Two numbers whose product is the exponential, the second a power or 0. `|k| <= 1.5·LIMIT`, and k is at most `EXPONENT_BIAS − 2` below
    /// `round(x·scale·log2 e)`; x may be NaN (the first is NaN then) or −inf.
    ///
    /// x at or below `floor`, which is where the power leaves the normal numbers (to within half a step), give exactly 0: so does a result up to
    /// a lead's octaves above the smallest normal number.
    #[inline(always)]
    pub fn parts(self, x: V) -> (V, V) {
        if apart::<V>() { self.parts_apart(x) } else { self.parts_here(x) }
    }

    #[inline(never)]
    fn parts_apart(self, x: V) -> (V, V) {
        self.parts_here(x)
    }

    #[inline(always)]
    fn parts_here(self, x: V) -> (V, V) {
        self.parts_above(self.raised(x))
    }

    /// x, or the floor where that is above it.
    #[inline(always)]
    pub fn raised(self, x: V) -> V {
        self.by.raised(x)
    }

    /// As [`Anchored::parts`], of x that was [`raised`](Anchored::raised).
    #[inline(always)]
    pub fn parts_above(self, x: V) -> (V, V) {
        let (power, r) = self.by.of(x);
        let one = V::splat(self.isa, V::Elem::ONE);
        if V::STEPS == 0 && !V::Elem::LED.is_empty() {
            return (monic(self.isa, V::Elem::LED, r), power);
        }
        if V::Elem::DTYPE == DType::F64 {
            // One rounding less, for the type whose results have the fewest digits to spare.
            return (one, power.mul_add(r * pow2_slope(self.isa, r, V::STEPS), power));
        }
        if V::STEPS == 3 {
            let [c0, c1, c2, c3] = self.monic;
            return ((r + c3).mul_add(r, c2).mul_add(r, c1).mul_add(r, c0), power);
        }
        (r.mul_add(pow2_slope(self.isa, r, V::STEPS), one), power)
    }

    /// The exponential.
    #[inline(always)]
    pub fn exp2(self, x: V) -> V {
        let (p, s) = self.parts(x);
        p * s
    }
}

/// The same with one rounding instead of two, for one operation more in a sum: q + q·s, where q is a power that was looked up and s is
/// small, so that sums may take the two apart.
#[derive(Clone, Copy, Debug)]
pub struct Split<V: Vector> {
    isa: V::Isa,
    by: Steps<V>,
}

impl<V: Vector> Split<V>
where
    V::Elem: Real,
{
    /// q and s. What is said of [`Anchored::parts`] holds; of NaN it is s that is NaN, or q where nothing is looked up: s is 0 there.
    #[inline(always)]
    pub fn parts(self, x: V) -> (V, V) {
        if apart::<V>() { self.parts_apart(x) } else { self.parts_here(x) }
    }

    #[inline(never)]
    fn parts_apart(self, x: V) -> (V, V) {
        self.parts_here(x)
    }

    #[inline(always)]
    fn parts_here(self, x: V) -> (V, V) {
        let (power, r) = self.by.of(self.by.raised(x));
        let slope = pow2_slope(self.isa, r, V::STEPS);
        if V::STEPS == 0 {
            // The power is exact.
            return (r.mul_add(slope, V::splat(self.isa, V::Elem::ONE)) * power, V::splat(self.isa, V::Elem::ZERO));
        }
        (power, r * slope)
    }

    /// The exponential.
    #[inline(always)]
    pub fn exp2(self, x: V) -> V {
        let (q, s) = self.parts(x);
        Self::whole(q, s)
    }

    /// The exponential, of its parts.
    #[inline(always)]
    pub fn whole(q: V, s: V) -> V {
        if V::STEPS == 0 { q } else { q.mul_add(s, q) }
    }
}

/// A sum of such exponentials.
#[derive(Clone, Copy, Debug)]
pub struct SplitSum<V> {
    /// Of q.
    pub sum: V,
    /// Of q·s, which is at most a twentieth of that, and of what its roundings lost.
    pub little: V,
}

impl<V: Vector> SplitSum<V>
where
    V::Elem: Real,
{
    /// Nothing.
    #[inline(always)]
    pub fn zero(isa: V::Isa) -> Self {
        let zero = V::splat(isa, V::Elem::ZERO);
        Self { sum: zero, little: zero }
    }

    /// Takes an exponential up, where `mask` says so; s is a number there and elsewhere, or the sum is to be NaN. Returns its q, a few of which are then to be added together.
    #[inline(always)]
    pub fn take(&mut self, mask: V::Mask, (q, s): (V, V)) -> V {
        let q = q.keep(mask);
        if V::STEPS != 0 {
            self.little = q.mul_add(s, self.little);
        }
        q
    }

    /// Adds the q of four, and Knuth's rounding error of the sum: long chains of additions would lose digits.
    #[inline(always)]
    pub fn add(&mut self, [a, b, c, d]: [V; 4]) {
        let q = (a + b) + (c + d);
        let sum = self.sum + q;
        let t = sum - self.sum;
        self.little = self.little + ((self.sum - (sum - t)) + (q - t));
        self.sum = sum;
    }
}

/// `exp(x)` over the whole range, for an `e` made with scale 1: 0 and infinity beyond the type's range, NaN for NaN. Results below the
/// smallest normal number may come out as 0.
#[inline(always)]
pub fn exp_full<V: Vector>(isa: V::Isa, e: &Exp<V>, x: V) -> V
where
    V::Elem: Real,
{
    let [low, high] = V::Elem::EXP_RANGE;
    // In this order NaN passes both.
    let x = V::splat(isa, low).max(V::splat(isa, high).min(x));
    let n = e.round(x);
    let r = x.mul_add(e.lo, x.mul_add(e.hi, -n));
    // 2^n itself may be too large where the result is not: one factor of two goes last.
    let (zero, one, two) = (V::splat(isa, V::Elem::ZERO), V::splat(isa, V::Elem::ONE), V::splat(isa, V::Elem::from_f64(2.0)));
    let large = zero.lt(n);
    e.pow2(r).scale2(n - V::select(large, one, zero)) * V::select(large, two, one)
}

/// `log(1 + r + lost)` for r >= 0 and what roundings took off it: accurate for every r down to subnormals; infinity for infinity, NaN for NaN.
///
/// With 1 + r = 2^k·(1 + f), f in [sqrt(1/2) − 1, sqrt(2) − 1], and s = f/(2 + f): log(1 + f) = 2·atanh(s), and 2s = f − s·f.
#[inline(always)]
pub fn log1p<V: Vector>(isa: V::Isa, r: V, lost: V) -> V
where
    V::Elem: Real,
{
    let (one, two) = (V::splat(isa, V::Elem::ONE), V::splat(isa, V::Elem::from_f64(2.0)));
    let mut parts = Log1p::of(isa, r);
    parts.lost = parts.lost + lost;
    parts.log(isa, r, one / (two + parts.f), one / parts.u, true, None)
}

/// The same and 1/(1 + r), for the price of one division, for r up to 2^100 (f32) or 2^1000 (f64). `closely`, the logarithm is hardly ever but the
/// nearest number there is; otherwise it is within one unit, and the inverse always within half a one and a little. `lost` is what roundings
/// took off r. Where `plus` is something, that is added to the logarithm, without a rounding of its own as long as it is small.
#[inline(always)]
pub fn log1p_inverse<V: Vector>(isa: V::Isa, r: V, lost: Option<V>, closely: bool, plus: Option<V>) -> (V, V)
where
    V::Elem: Real,
{
    let (one, two) = (V::splat(isa, V::Elem::ONE), V::splat(isa, V::Elem::from_f64(2.0)));
    let mut parts = Log1p::of(isa, r);
    if let Some(lost) = lost {
        (parts.missing, parts.lost) = (parts.missing + lost, parts.lost + lost);
    }
    let both = one / (parts.u * (two + parts.f));
    let inverse = both * (two + parts.f);
    // Newton's step takes the roundings of both products off, and adds what is missing in u.
    let error = inverse.neg_mul_add(parts.missing, inverse.neg_mul_add(parts.u, one));
    let inverse = inverse.mul_add(error, inverse);
    (parts.log(isa, r, both * parts.u, inverse, closely, plus), inverse)
}

/// 1 + r = u + missing, u = 2^k·(1 + f) but for what f has lost.
#[derive(Clone, Copy)]
struct Log1p<V> {
    u: V,
    f: V,
    k: V,
    missing: V,
    lost: V,
}

impl<V: Vector> Log1p<V>
where
    V::Elem: Real,
{
    #[inline(always)]
    fn of(isa: V::Isa, r: V) -> Self {
        let (zero, one) = (V::splat(isa, V::Elem::ZERO), V::splat(isa, V::Elem::ONE));
        let u = one + r;
        // The larger term leaves an exact difference.
        let large = one.lt(r);
        let missing = V::select(large, one, r) - (u - V::select(large, r, one));
        let (m, k) = u.frexp();
        // 1 + r < sqrt(2): r is f without any rounding.
        let small = r.lt(V::splat(isa, V::Elem::from_f64(core::f64::consts::SQRT_2 - 1.0)));
        Self { u, f: V::select(small, r, m - one), k: V::select(small, zero, k), missing, lost: V::select(small, zero, missing) }
    }

    /// The logarithm, given about 1/(2 + f), and 1/u.
    #[inline(always)]
    fn log(self, isa: V::Isa, r: V, half: V, inverse: V, closely: bool, plus: Option<V>) -> V {
        if apart::<V>() {
            self.log_apart(isa, r, half, inverse, closely, plus)
        } else {
            self.log_here(isa, r, half, inverse, closely, plus)
        }
    }

    #[inline(never)]
    fn log_apart(self, isa: V::Isa, r: V, half: V, inverse: V, closely: bool, plus: Option<V>) -> V {
        self.log_here(isa, r, half, inverse, closely, plus)
    }

    #[inline(always)]
    fn log_here(self, isa: V::Isa, r: V, half: V, inverse: V, closely: bool, plus: Option<V>) -> V {
        let Self { f, k, lost, .. } = self;
        let s = f * half;
        let z = s * s;
        let bend = z * polynomial(isa, V::Elem::LOG, z);
        let [ln2, ln2_rest] = V::Elem::LN2.map(|part| V::splat(isa, part));
        // What was lost adds lost/u.
        let little = k.mul_add(ln2_rest, lost * inverse);
        let little = plus.map_or(little, |plus| little + plus);
        let log = if closely {
            // Every step with what it rounds off: s, f − bend, their product, k·ln 2, and two sums.
            let two = V::splat(isa, V::Elem::from_f64(2.0));
            let c = two + f;
            let s_rest = s.neg_mul_add(f - (c - two), s.neg_mul_add(c, f)) * half;
            let w = f - bend;
            let w_rest = (f - w) - bend;
            let tail = s * w;
            let tail_rest = s.mul_sub(w, tail) + s.mul_add(w_rest, s_rest * w);
            let whole = k * ln2;
            let high = whole + f;
            // k is 0 or whole is the larger one.
            let high_rest = k.mul_sub(ln2, whole) + (f - (high - whole));
            let log = high - tail;
            log + (((high - log) - tail) + ((high_rest + little) - tail_rest))
        } else {
            k.mul_add(ln2, f - (s * (f - bend) - little))
        };
        V::select(r.lt(V::splat(isa, V::Elem::from_f64(f64::INFINITY))), log, r)
    }
}
