//! The Kullback–Leibler divergence of two rows of logits that are read together, once.
//!
//! KL(P‖Q) = Σ p·δ with δ = log p − log q cancels where P and Q are close: δ is then of both signs and KL of the order of δ². With x and y the
//! logits of P and Q (times 1/τ), any number d and t = (x − y) − d, exp(y + d) is exp(x)·exp(−t), so that with S = Σ exp(x)
//!
//! ```text
//! G = Σ exp(x)·φ(t)/S,  φ(t) = exp(−t) − 1 + t >= 0      M = Σ exp(x)·t/S      W = G − M = exp(d)·Σ exp(y)/S − 1
//! KL = M + log(1 + W) = G − (W − log(1 + W))
//! ```
//!
//! No term of G is negative, and the correction is W²/2: nothing cancels as long as d is near log(S/Σ exp(y)), where W = 0. d follows what was
//! read: sums move to another d by exact formulas. A row whose class k has nearly all the mass begins with d = x − y there, where t and φ are
//! then exactly 0, and keeps the digits of the others.

use crate::array::{Element, Float, Span, SpanMut, Vf};
use crate::simd::{Isa, Mask, Scalar, Vector};

use super::input::ask;
use super::math::{apart, polynomial};
use super::real::Real;
use super::scan::BLOCK;
use super::scan::{Constants, Near, Raised, Softmax, ln_1p, stretch};
use super::state::{Pair, Reference, Summand, Wide, exp_f64, splat};

/// |t| up to which φ is a polynomial, in the range of `Real::EXPM1`. Beyond, e^(−t) − 1 + t loses four bits at most.
const SMALL: f64 = 0.34;
/// |W| from which d is moved.
const OFF: f64 = 1.0 / 16.0;
/// Nats by which a maximum of P outdoes all before so that it decides d, and by which Q's exponentials may exceed P's.
const LEAP: f64 = 3.0;
const EXCESS: f64 = 8.0;

/// Two rows as far as they were read. Sums are relative to the reference of P.
#[derive(Clone, Copy)]
pub struct Divergence<S: Isa, T: Summand> {
    p: Softmax<S, T>,
    q: Softmax<S, T>,
    /// d; not finite while there is none.
    d: Pair,
    /// Σ e·φ(t).
    gap: Wide<S>,
    gap_extra: Pair,
    /// Σ e·t.
    tilt: Wide<S>,
    tilt_extra: Pair,
    /// Whether Q excludes a class that P does not.
    infinite: bool,
}

/// d in two parts, and what takes exponentials of Q to the reference of P.
struct Shift<V> {
    hi: V,
    lo: V,
    c: V,
}

struct Sums<V> {
    rest: [V; 2],
    gap: V,
    tilt: V,
    next: [V; 2],
}

impl<S: Isa, T: Summand> Divergence<S, T> {
    /// Nothing read.
    #[inline(always)]
    pub fn new(constants: &Constants<S, T>) -> Self {
        let (row, zero) = (Softmax::new(constants), Wide::zero(constants.isa));
        Self {
            p: row,
            q: row,
            d: Pair { hi: f64::NAN, lo: 0.0 },
            gap: zero,
            gap_extra: Pair::default(),
            tilt: zero,
            tilt_extra: Pair::default(),
            infinite: false,
        }
    }

    /// Reads the classes from `start` on, at most [`BLOCK`] of them; `next` are those after them, as many.
    #[inline(always)]
    pub fn block(&mut self, constants: &Constants<S, T>, x: [Span<T>; 2], next: [Option<Span<T>>; 2], start: usize) {
        let (isa, scale) = (constants.isa, constants.scale);
        let mut ties = [self.p.ties, self.q.ties];
        let mut raised = [None, None];
        // One copy of the code for both.
        for (j, row) in [&mut self.p, &mut self.q].into_iter().enumerate() {
            (_, _, raised[j]) = row.look(constants, x[j], start);
        }
        let [p_raised, q_raised] = raised;
        let mut leap = false;
        if let Some(Raised { factor, growth }) = p_raised {
            ties[0] = 0.0;
            self.gap.scale(isa, factor);
            self.gap_extra.scale(factor);
            self.tilt.scale(isa, factor);
            self.tilt_extra.scale(factor);
            leap = growth * scale > LEAP;
        }
        if q_raised.is_some() {
            ties[1] = 0.0;
        }
        let fresh = !self.d.value().is_finite();
        let guess = fresh || leap || self.above() * scale > EXCESS;
        let d = if guess {
            // d of the class that has P's maximum, unless Q all but excludes it.
            let y = if self.p.arg >= start && self.p.arg - start < x[1].len() { x[1].get(self.p.arg - start) } else { T::NEG_INF };
            let near = (self.q.max.to_f64() - y.to_f64()) * scale <= EXCESS;
            difference(self.p.max.to_f64(), if near { y.to_f64() } else { self.q.max.to_f64() })
        } else if (start / BLOCK).is_power_of_two() {
            self.centre(constants, ties)
        } else {
            self.d
        };
        let (mut d, mut fresh, mut again) = (d, fresh, guess);
        let before = loop {
            self.shift(constants, d, ties, start, fresh);
            let before = *self;
            if !self.sum(constants, x, next) {
                break before;
            }
            // A guess that turns out to be far off is made good once.
            if !again {
                return;
            }
            let better = self.centre(constants, [self.p.ties, self.q.ties]);
            if better == self.d || !better.value().is_finite() {
                return;
            }
            *self = before;
            (d, fresh, again) = (better, false, false);
        };
        *self = before;
        self.careful(constants, x);
    }

    /// Σ exp of P and of Q, with so many of the maxima.
    #[inline(always)]
    fn masses(&self, ties: [f64; 2]) -> [f64; 2] {
        [self.p.rest().value() + ties[0] * self.p.top, self.q.rest().value() + ties[1] * self.q.top]
    }

    /// By how much Q's maximum, moved by d, lies above P's.
    #[inline(always)]
    fn above(&self) -> f64 {
        above(self.d, [self.p.max.to_f64(), self.q.max.to_f64()])
    }

    /// e^d between the references.
    #[inline(always)]
    fn factor(&self, scale: f64) -> f64 {
        factor(self.d, [self.p.max.to_f64(), self.q.max.to_f64()], [self.p.reference, self.q.reference], scale)
    }

    #[inline(always)]
    fn gap(&self) -> f64 {
        let mut sum = T::total_called(self.gap);
        sum.merge(self.gap_extra);
        sum.value()
    }

    #[inline(always)]
    fn tilt(&self) -> f64 {
        let mut sum = T::total_called(self.tilt);
        sum.merge(self.tilt_extra);
        sum.value()
    }

    /// The d for which W would be 0, or the present one if that is near enough.
    #[inline(always)]
    fn centre(&self, constants: &Constants<S, T>, ties: [f64; 2]) -> Pair {
        let [p, q] = self.masses(ties);
        let w = (self.gap() - self.tilt()) / p;
        if w.abs() <= OFF {
            return self.d;
        }
        let ratio = if w.abs() <= 0.5 { 1.0 + w } else { q * self.factor(constants.scale) / p };
        let mut d = self.d;
        d.add(-ln(ratio) / constants.scale);
        if d.value().is_finite() { d } else { self.d }
    }

    /// Moves d by η: φ(t − η) = e^η·φ(t) − (e^η − 1)·t + (e^η − 1 − η). A first d, or one far away, takes the sums from the masses.
    #[inline(always)]
    fn shift(&mut self, constants: &Constants<S, T>, d: Pair, ties: [f64; 2], start: usize, first: bool) {
        let eta = ((d.hi - self.d.hi) + (d.lo - self.d.lo)) * constants.scale;
        if eta == 0.0 {
            return;
        }
        if start == 0 {
            self.d = d;
            return;
        }
        let [p, q] = self.masses(ties);
        let tilt = if first { 0.0 } else { self.tilt() };
        self.d = d;
        if eta.abs() <= 1.0 {
            let more = less_linear(eta);
            self.gap.scale(constants.isa, 1.0 + (more + eta));
            self.gap_extra.scale(1.0 + (more + eta));
            self.gap_extra.add(p * more - (more + eta) * tilt);
            self.tilt_extra.add(-eta * p);
        } else {
            let tilt = if p == 0.0 { 0.0 } else { tilt - eta * p };
            let moved = if q == 0.0 { 0.0 } else { q * self.factor(constants.scale) };
            (self.gap, self.tilt) = (Wide::zero(constants.isa), Wide::zero(constants.isa));
            (self.gap_extra, self.tilt_extra) = (Pair { hi: (moved - p) + tilt, lo: 0.0 }, Pair { hi: tilt, lo: 0.0 });
        }
    }

    /// Adds a block. False if it has to be done carefully instead.
    #[inline(always)]
    fn sum(&mut self, constants: &Constants<S, T>, x: [Span<T>; 2], next: [Option<Span<T>>; 2]) -> bool {
        let isa = constants.isa;
        (self.p.known, self.q.known) = (None, None);
        if !(self.p.is_near() && self.q.is_near()) {
            return false;
        }
        // Without one, P or Q has no mass yet.
        let (d, c) = if self.d.value().is_finite() { (self.d, self.factor(constants.scale)) } else { (Pair::default(), 0.0) };
        let hi = T::from_f64(d.hi);
        let shift = Shift { hi: Vf::<S, T>::splat(isa, hi), lo: splat::<S, T>(isa, (d.hi - hi.to_f64()) + d.lo), c: splat::<S, T>(isa, c) };
        let at = [self.p.near(constants), self.q.near(constants)];
        let ahead = if let [Some(p), Some(q)] = next { Some([p, q]) } else { None };
        let lowest = Vf::<S, T>::splat(isa, T::NEG_INF);
        let mut tops = [lowest; 2];
        let mut overflow = false;
        let mut from = 0;
        while from < x[0].len() {
            let n = stretch::<S, T>(2).min(x[0].len() - from);
            let part = [x[0].part(from, n), x[1].part(from, n)];
            let after = ahead.map_or(part, |[p, q]| [p.part(from, n), q.part(from, n)]);
            let sums = pass(constants, &at, &shift, part, after);
            tops = [sums.next[0].max(tops[0]), sums.next[1].max(tops[1])];
            overflow |= sums.gap.eq(-lowest).any() || sums.tilt.abs().eq(-lowest).any();
            T::add(isa, &mut self.p.rest, sums.rest[0]);
            T::add(isa, &mut self.q.rest, sums.rest[1]);
            T::add(isa, &mut self.gap, sums.gap);
            T::add(isa, &mut self.tilt, sums.tilt);
            from += n;
        }
        if ahead.is_some() {
            (self.p.known, self.q.known) = (Some(tops[0]), Some(tops[1]));
        }
        self.infinite || !overflow
    }

    /// A block off the grid of the integer reduction, or one whose sums exceed the type (or are infinite): class by class in float64.
    #[inline(always)]
    fn careful(&mut self, constants: &Constants<S, T>, x: [Span<T>; 2]) {
        let (p, q) = (&mut self.p, &mut self.q);
        (p.known, q.known) = (None, None);
        let mut sums = Careful {
            tops: [p.max.to_f64(), q.max.to_f64()],
            references: [p.reference, q.reference],
            rest: [p.rest_extra, q.rest_extra],
            gap: self.gap_extra,
            tilt: self.tilt_extra,
            infinite: self.infinite,
        };
        sums.read(constants.scale, self.factor(constants.scale), self.above(), x);
        [self.p.rest_extra, self.q.rest_extra] = sums.rest;
        (self.gap_extra, self.tilt_extra, self.infinite) = (sums.gap, sums.tilt, sums.infinite);
    }

    /// KL(P‖Q), and what its gradient needs.
    #[inline(always)]
    pub fn finish(&self, constants: &Constants<S, T>) -> (f64, Slope) {
        let scale = constants.scale;
        let (p_total, q_total) = (self.p.total(), self.q.total());
        let [p, q] = self.masses([self.p.ties, self.q.ties]);
        let (g, m) = (self.gap() / p, self.tilt() / p);
        let w = g - m;
        let kl = if !(p_total.valid && q_total.valid) {
            f64::NAN
        } else if self.infinite || g == f64::INFINITY {
            f64::INFINITY
        } else if w.abs() <= 0.25 {
            g - excess(w)
        } else {
            m + ln(q * self.factor(scale) / p)
        };
        let [r, s] = [p_total.others, q_total.others];
        let top = if p_total.arg == q_total.arg { Some((r - s) / ((1.0 + r) * (1.0 + s))) } else { None };
        let slope = Slope {
            at: [&self.p, &self.q].map(|row| {
                let Reference { k, b } = row.reference;
                let m = row.max.to_f64();
                let above = if m.is_finite() { m - b } else { 0.0 };
                // Relative to the maximum rather than far above the smallest numbers: the factors of the gradient may be small.
                Place { k: k + T::BIAS.to_f64() - 1.0, b, floor: above - T::CLAMP.to_f64() / scale }
            }),
            inverse: [p, q].map(|mass| 2.0_f64.powi(T::BIAS.to_f64() as i32 - 1) / mass),
            valid: p_total.valid && q_total.valid,
            top: top.map(|difference| (p_total.arg, difference)),
        };
        // Exactly it is never negative.
        (if kl < 0.0 { 0.0 } else { kl }, slope)
    }
}

/// What a careful block adds to; the same for every level.
struct Careful {
    tops: [f64; 2],
    references: [Reference; 2],
    rest: [Pair; 2],
    gap: Pair,
    tilt: Pair,
    infinite: bool,
}

impl Careful {
    #[inline(never)]
    fn read<T: Float>(&mut self, scale: f64, c: f64, above: f64, x: [Span<T>; 2]) {
        for i in 0..x[0].len() {
            let [p, q] = [x[0].get(i).to_f64(), x[1].get(i).to_f64()];
            let mut e = [p, q];
            for (j, e) in e.iter_mut().enumerate() {
                let Reference { k, b } = self.references[j];
                let reached = *e == self.tops[j];
                *e = exp_f64(Scalar, (*e - b) * scale, k);
                if !reached {
                    self.rest[j].add(*e);
                }
            }
            let t = (((p - self.tops[0]) - (q - self.tops[1])) - above) * scale;
            if q == f64::NEG_INFINITY && p > f64::NEG_INFINITY {
                self.infinite = true;
            } else if e[0] == 0.0 {
                self.gap.add(e[1] * c);
            } else {
                self.tilt.add(e[0] * t);
                self.gap.add(if t.abs() <= SMALL { e[0] * less_linear(-t) } else { (e[1] * c - e[0]) + e[0] * t });
            }
        }
    }
}

/// What exponentials are relative to; below the floor they are zero.
#[derive(Clone, Copy)]
struct Place {
    k: f64,
    b: f64,
    floor: f64,
}

/// What the gradient q − p of a row needs.
#[derive(Clone, Copy)]
pub struct Slope {
    at: [Place; 2],
    inverse: [f64; 2],
    /// Whether both rows have a softmax; the gradient is NaN otherwise.
    pub valid: bool,
    /// The class of both maxima, if it is the same, and its q − p: there p and q may both be nearly 1.
    pub top: Option<(usize, f64)>,
}

impl Slope {
    /// Writes `g·(q − p)` for a block of classes; `dst` may be where Q stands.
    #[inline(always)]
    pub fn emit<S: Isa, T: Real, O: Element<Acc = T>>(&self, constants: &Constants<S, T>, x: [Span<T>; 2], g: f64, dst: SpanMut<O>) {
        let isa = constants.isa;
        let step = Vf::<S, T>::LANES;
        let a = self.inverse.map(|inverse| splat::<S, T>(isa, if self.valid { g * inverse } else { f64::NAN }));
        let [k, b, floor] =
            [|at: &Place| at.k, |at: &Place| at.b, |at: &Place| at.floor].map(|of| [0, 1].map(|j| splat::<S, T>(isa, of(&self.at[j]))));
        let fill = T::NEG_INF;
        let len = x[0].len();
        let mut i = 0;
        while i < len {
            let n = step.min(len - i);
            let mut e = [a[0]; 2];
            for j in 0..2 {
                let v = if n == step { x[j].load(isa, i) } else { x[j].load_partial(isa, i, n, fill) };
                e[j] = constants.exp.exp2(floor[j].max(v - b[j]), k[j]) * a[j];
            }
            if n == step {
                dst.store(isa, i, e[1] - e[0]);
            } else {
                dst.store_partial(isa, i, n, e[1] - e[0]);
            }
            i += n;
        }
    }
}

/// The sums of a few classes, and the maxima of those that come after them in the same loop.
#[inline(always)]
fn pass<S: Isa, T: Real>(
    constants: &Constants<S, T>,
    at: &[Near<Vf<S, T>>; 2],
    shift: &Shift<Vf<S, T>>,
    x: [Span<T>; 2],
    next: [Span<T>; 2],
) -> Sums<Vf<S, T>> {
    let isa = constants.isa;
    let step = Vf::<S, T>::LANES;
    let zero = Vf::<S, T>::splat(isa, T::ZERO);
    let lowest = Vf::<S, T>::splat(isa, T::NEG_INF);
    let one = [
        Sums { rest: [zero; 2], gap: zero, tilt: zero, next: [lowest; 2] },
        Sums { rest: [zero; 2], gap: zero, tilt: zero, next: [lowest; 2] },
    ];
    let [mut a, mut b] = one;
    let (len, group) = (x[0].len(), 2 * step);
    // Of one length, known to the compiler: no check is left in the loop.
    let (x, next) = (x.map(|x| x.part(0, len)), next.map(|x| x.part(0, len)));
    for k in 0..len / group {
        let (x, next) = (x.map(|x| x.nth(k, group)), next.map(|x| x.nth(k, group)));
        for next in next {
            ask(isa, next, 0);
            ask(isa, next, step);
        }
        add(constants, at, shift, x.map(|x| x.load(isa, 0)), next.map(|x| x.load(isa, 0)), &mut a);
        add(constants, at, shift, x.map(|x| x.load(isa, step)), next.map(|x| x.load(isa, step)), &mut b);
    }
    let mut i = len / group * group;
    let fill = T::NEG_INF;
    while i < len {
        let n = step.min(len - i);
        let v = [x[0].load_partial(isa, i, n, fill), x[1].load_partial(isa, i, n, fill)];
        let after = [next[0].load_partial(isa, i, n, fill), next[1].load_partial(isa, i, n, fill)];
        add(constants, at, shift, v, after, &mut b);
        i += n;
    }
    Sums {
        rest: [a.rest[0] + b.rest[0], a.rest[1] + b.rest[1]],
        gap: a.gap + b.gap,
        tilt: a.tilt + b.tilt,
        next: [a.next[0].max(b.next[0]), a.next[1].max(b.next[1])],
    }
}

/// Adds a vector of classes.
#[inline(always)]
fn add<S: Isa, T: Real>(
    constants: &Constants<S, T>,
    at: &[Near<Vf<S, T>>; 2],
    shift: &Shift<Vf<S, T>>,
    x: [Vf<S, T>; 2],
    next: [Vf<S, T>; 2],
    sums: &mut Sums<Vf<S, T>>,
) {
    if apart::<Vf<S, T>>() {
        add_apart(constants, at, shift, x, next, sums);
    } else {
        add_here(constants, at, shift, x, next, sums);
    }
}

#[inline(never)]
fn add_apart<S: Isa, T: Real>(
    constants: &Constants<S, T>,
    at: &[Near<Vf<S, T>>; 2],
    shift: &Shift<Vf<S, T>>,
    x: [Vf<S, T>; 2],
    next: [Vf<S, T>; 2],
    sums: &mut Sums<Vf<S, T>>,
) {
    add_here(constants, at, shift, x, next, sums);
}

#[inline(always)]
fn add_here<S: Isa, T: Real>(
    constants: &Constants<S, T>,
    at: &[Near<Vf<S, T>>; 2],
    shift: &Shift<Vf<S, T>>,
    [p, q]: [Vf<S, T>; 2],
    next: [Vf<S, T>; 2],
    sums: &mut Sums<Vf<S, T>>,
) {
    let isa = constants.isa;
    let zero = Vf::<S, T>::splat(isa, T::ZERO);
    // In this order a NaN is passed over; it comes back through the sums.
    sums.next = [next[0].max(sums.next[0]), next[1].max(sums.next[1])];
    let (e, f) = (at[0].exp.exp2(p), at[1].exp.exp2(q));
    sums.rest[0] = sums.rest[0].add_where(p.ne(at[0].top), e);
    sums.rest[1] = sums.rest[1].add_where(q.ne(at[1].top), f);
    // p − q and what its rounding lost, which is NaN beside an infinity.
    let d = p - q;
    let v = d - p;
    let lost = ((p - (d - v)) - (q + v)) - shift.lo;
    let t = (d - shift.hi).add_where(lost.eq(lost), lost) * splat::<S, T>(isa, constants.scale);
    let some = e.ne(zero);
    let linear = e * t;
    sums.tilt = sums.tilt.add_where(some, linear);
    let minus = -t;
    let curved = linear * t * polynomial(isa, T::EXPM1, minus);
    let small = t.abs().le(splat::<S, T>(isa, SMALL));
    let f = f * shift.c;
    let gap = Vf::<S, T>::select(small, curved, (f - e) + linear);
    // No mass of P: what is left is that of Q. But a class that Q excludes and P does not, however small, is infinitely far.
    let gap = Vf::<S, T>::select(some, gap, f);
    let infinity = -Vf::<S, T>::splat(isa, T::NEG_INF);
    sums.gap = sums.gap + Vf::<S, T>::select(t.eq(infinity), infinity, gap);
}

#[inline(always)]
fn above(d: Pair, [p, q]: [f64; 2]) -> f64 {
    let between = difference(p, q);
    (d.hi - between.hi) + (d.lo - between.lo)
}

/// See [`Divergence::factor`]; the same for every level.
#[inline(never)]
fn factor(d: Pair, tops: [f64; 2], [p, q]: [Reference; 2], scale: f64) -> f64 {
    let k = p.k - q.k;
    if p.b == 0.0 && q.b == 0.0 {
        // What d·scale does not fit into one number multiplies the exponential.
        let x = d.hi * scale;
        let lost = d.hi.mul_add(scale, -x) + d.lo * scale;
        return exp_f64(Scalar, x, k) * (1.0 + lost);
    }
    exp_f64(Scalar, (((tops[0] - p.b) - (tops[1] - q.b)) + above(d, tops)) * scale, k)
}

/// a − b and what its rounding lost.
#[inline(always)]
fn difference(a: f64, b: f64) -> Pair {
    let mut pair = Pair { hi: a, lo: 0.0 };
    pair.add(-b);
    pair
}

/// 1/n!, and 1/n.
const FACTORIAL: [f64; 21] = {
    let mut inverse = [1.0; 21];
    let mut n = 1;
    while n < inverse.len() {
        inverse[n] = inverse[n - 1] / n as f64;
        n += 1;
    }
    inverse
};
const HARMONIC: [f64; 28] = {
    let mut inverse = [1.0; 28];
    let mut n = 2;
    while n < inverse.len() {
        inverse[n] = 1.0 / n as f64;
        n += 1;
    }
    inverse
};

/// e^x − 1 − x.
#[inline(never)]
fn less_linear(x: f64) -> f64 {
    if x.abs() > 1.0 {
        return exp_f64(Scalar, x, 0.0) - 1.0 - x;
    }
    // Σ x^n/n! from n = 2: 1/21! is 2^-65.
    FACTORIAL[2..].iter().rev().fold(0.0, |sum: f64, &c| sum * x + c) * x * x
}

/// w − log(1 + w) for |w| <= 1/4: w²·Σ (−w)^n/(n + 2); (1/4)^26 is 2^-52 of the first term.
#[inline(never)]
fn excess(w: f64) -> f64 {
    HARMONIC[2..].iter().rev().fold(0.0, |sum: f64, &c| c - sum * w) * w * w
}

/// The logarithm of a number that is not negative.
#[inline(never)]
fn ln(x: f64) -> f64 {
    if x >= 1.0 { ln_1p(Scalar, x - 1.0, 0.0) } else { -ln_1p(Scalar, (1.0 - x) / x, 0.0) }
}
