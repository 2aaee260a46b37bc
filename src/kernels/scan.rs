//! One row read block by block, by a caller that may read other rows in between: what `rows::reduce` does in one call, and on the way what
//! scores of tokens need besides the logsumexp: the first maximum, the spread of the distribution, the place of one class, the largest classes.

use crate::array::{Float, Span, Vf, lanes};
use crate::simd::{Isa, Level, Mask, Scalar, Vector};

use super::input::ask;
use super::math::{Anchored, Exp, log1p};
use super::real::Real;
use super::rows::{block_max, chain_of};
use super::state::{Pair, Reference, Summand, Wide, exp_f64, splat};

/// Classes per block: no more than float32 lanes may sum and keep the digits of a divergence.
pub const BLOCK: usize = 512;

/// What is the same for every row of a call.
#[derive(Clone, Copy)]
pub struct Constants<S: Isa, T: Real> {
    pub(super) isa: S,
    pub(super) exp: Exp<Vf<S, T>>,
    exp1: Exp<Vf<Scalar, T>>,
    /// 1 / temperature.
    pub(super) scale: f64,
}

impl<S: Isa, T: Real> Constants<S, T> {
    /// For logits that are multiplied by `scale`.
    #[inline(always)]
    pub fn new(isa: S, scale: f64) -> Self {
        Self { isa, exp: Exp::new(isa, scale).opaque(), exp1: Exp::new(Scalar, scale), scale }
    }

    #[inline(always)]
    fn lanes(&self, reference: Reference, max: T) -> Lanes<Vf<S, T>> {
        Lanes { steps: self.exp.anchor_parts(splat::<S, T>(self.isa, reference.k)), top: Vf::<S, T>::splat(self.isa, max) }
    }
}

/// A reference and a maximum as vectors.
#[derive(Clone, Copy)]
pub(super) struct Lanes<V: Vector> {
    /// Of the exponentials where b is 0: what differs from row to row.
    steps: (V, V),
    pub(super) top: V,
}

/// What a block is summed with.
pub(super) struct Near<V: Vector> {
    pub(super) exp: Anchored<V>,
    pub(super) top: V,
}

/// What a new maximum did to sums relative to the old one.
#[derive(Clone, Copy)]
pub(super) struct Raised {
    /// Multiplies them.
    pub(super) factor: f64,
    /// By how much the maximum grew: infinite where there was none.
    pub(super) growth: f64,
}

/// The softmax of a row as far as it was read.
#[derive(Clone, Copy)]
pub(super) struct Softmax<S: Isa, T: Summand> {
    pub(super) max: T,
    /// How many classes have the maximum, and the first of them.
    pub(super) ties: f64,
    pub(super) arg: usize,
    pub(super) reference: Reference,
    /// The exponential of the maximum.
    pub(super) top: f64,
    pub(super) at: Lanes<Vf<S, T>>,
    /// Σ exp of the other classes.
    pub(super) rest: Wide<S>,
    pub(super) rest_extra: Pair,
    /// The maximum of the block that comes next, lane by lane, where it was looked at already.
    pub(super) known: Option<Vf<S, T>>,
}

impl<S: Isa, T: Summand> Softmax<S, T> {
    #[inline(always)]
    pub(super) fn new(constants: &Constants<S, T>) -> Self {
        let reference = Reference::of(T::NEG_INF, &constants.exp1, constants.scale);
        Self {
            max: T::NEG_INF,
            ties: 0.0,
            arg: 0,
            reference,
            top: 0.0,
            at: constants.lanes(reference, T::NEG_INF),
            rest: Wide::zero(constants.isa),
            rest_extra: Pair::default(),
            known: None,
        }
    }

    /// Looks at a block before it is summed: moves to its maximum if that is larger, and counts the classes that have it. Whether there are any is the
    /// second result.
    #[inline(always)]
    pub(super) fn look(&mut self, constants: &Constants<S, T>, x: Span<T>, start: usize) -> (Vf<S, T>, bool, Option<Raised>) {
        let isa = constants.isa;
        let top = match self.known.take() {
            Some(top) => top,
            None => block_max(isa, x),
        };
        let mut raised = None;
        let reached = self.at.top.le(top).any();
        if reached {
            let candidate = top.reduce_max();
            let first = self.ties == 0.0;
            if candidate > self.max {
                raised = Some(self.raise(constants, candidate));
            }
            let (ties, at) = find(isa, x, self.at.top);
            if ties > 0 && (raised.is_some() || first) {
                self.arg = start + at;
            }
            self.ties += ties as f64;
        }
        (top, reached, raised)
    }

    #[inline(always)]
    fn raise(&mut self, constants: &Constants<S, T>, max: T) -> Raised {
        let moved = Reference::of(max, &constants.exp1, constants.scale);
        let mut raised = Raised { factor: 1.0, growth: f64::INFINITY };
        if self.max > T::NEG_INF {
            raised = Raised { factor: self.reference.factor(moved, constants.scale), growth: max.to_f64() - self.max.to_f64() };
            self.rest.scale(constants.isa, raised.factor);
            self.rest_extra.scale(raised.factor);
            // The old maxima join the rest.
            self.rest_extra.add(self.ties * self.top * raised.factor);
        }
        self.top = exp_f64(constants.isa, (max.to_f64() - moved.b) * constants.scale, moved.k);
        (self.max, self.ties, self.reference) = (max, 0.0, moved);
        self.at = constants.lanes(moved, max);
        raised
    }

    /// Whether the exponentials of the block can be taken of x itself.
    #[inline(always)]
    pub(super) fn is_near(&self) -> bool {
        self.reference.b == 0.0 && self.max < T::MAX
    }

    #[inline(always)]
    pub(super) fn near(&self, constants: &Constants<S, T>) -> Near<Vf<S, T>> {
        let (magic, floor) = self.at.steps;
        Near { exp: constants.exp.anchored(magic, floor), top: self.at.top }
    }

    /// Σ exp without the maxima.
    #[inline(always)]
    pub(super) fn rest(&self) -> Pair {
        let mut sum = T::total_called(self.rest);
        sum.merge(self.rest_extra);
        sum
    }

    #[inline(always)]
    pub(super) fn total(&self) -> Total {
        let (max, rest) = (self.max.to_f64(), self.rest());
        let nan = rest.value().is_nan();
        let valid = max.is_finite() && !nan;
        let share = rest.hi / self.top;
        let others = (self.ties - 1.0) + share;
        // What the division leaves, and what the sum has lost.
        let lost = (share.mul_add(-self.top, rest.hi) + rest.lo) / self.top;
        Total { max, arg: self.arg, valid, nan, others, lost }
    }
}

/// A whole row.
#[derive(Clone, Copy, Debug)]
pub struct Total {
    /// Largest logit.
    pub max: f64,
    /// The first class that has it.
    pub arg: usize,
    /// False for a row without a softmax: all −inf, a +inf or a NaN.
    pub valid: bool,
    /// Whether a class is NaN.
    pub nan: bool,
    /// Σ exp(x − max) without one maximum.
    pub others: f64,
    /// What roundings took off that.
    lost: f64,
}

impl Total {
    /// log Σ exp(x − max).
    #[inline(always)]
    pub fn log_sum<S: Isa>(&self, isa: S) -> f64 {
        ln_1p(isa, self.others, self.lost)
    }

    /// log Σ exp(x), also of rows without a softmax.
    pub fn logsumexp(&self, log_sum: f64) -> f64 {
        if self.nan {
            f64::NAN
        } else if self.max.is_finite() {
            self.max + log_sum
        } else {
            self.max
        }
    }

    /// The log-probability of a logit, in an order that keeps the digits of a confident row.
    pub fn log_prob(&self, x: f64, log_sum: f64) -> f64 {
        if self.valid { (x - self.max) - log_sum } else { f64::NAN }
    }
}

/// `log(1 + r)` for r >= 0 that has lost something.
#[inline(always)]
pub(super) fn ln_1p<S: Isa>(isa: S, r: f64, lost: f64) -> f64 {
    lanes::<S, f64>(log1p(isa, S::F64::splat(isa, r), S::F64::splat(isa, lost)))[0]
}

/// A row of logits as they are (scale 1) and, with SPREAD, Σ p·(max − x).
#[derive(Clone, Copy)]
pub struct Scan<S: Isa, T: Summand> {
    softmax: Softmax<S, T>,
    spread: Wide<S>,
    spread_extra: Pair,
}

impl<S: Isa, T: Summand> Scan<S, T> {
    /// Nothing read.
    #[inline(always)]
    pub fn new(constants: &Constants<S, T>) -> Self {
        Self { softmax: Softmax::new(constants), spread: Wide::zero(constants.isa), spread_extra: Pair::default() }
    }

    /// Reads the classes from `start` on, at most [`BLOCK`] of them; `next` are those after them, as many. Returns the maximum, lane by lane.
    #[inline(always)]
    pub fn block<const SPREAD: bool>(&mut self, constants: &Constants<S, T>, x: Span<T>, next: Option<Span<T>>, start: usize) -> Vf<S, T> {
        let isa = constants.isa;
        let (top, reached, raised) = self.softmax.look(constants, x, start);
        if SPREAD
            && let Some(Raised { factor, growth }) = raised
            && growth < f64::INFINITY
        {
            self.spread.scale(isa, factor);
            self.spread_extra.scale(factor);
            let mut weight = self.softmax.rest();
            weight.scale(growth);
            self.spread_extra.merge(weight);
        }
        // Portable code is there to be right, not to be large. Below −inf there is nothing, and nothing can be taken from it.
        if S::LEVEL == Level::Scalar || !self.softmax.is_near() || self.softmax.max == T::NEG_INF {
            let Softmax { max, reference, ref mut rest_extra, .. } = self.softmax;
            careful(x, max.to_f64(), reference, rest_extra, SPREAD.then_some(&mut self.spread_extra));
            return top;
        }
        let at = self.softmax.near(constants);
        let mut next_top = Vf::<S, T>::splat(isa, T::NEG_INF);
        let mut from = 0;
        while from < x.len() {
            let n = stretch::<S, T>(if S::REGISTERS < 32 { 2 } else { 4 }).min(x.len() - from);
            let part = x.part(from, n);
            // Without a successor it looks at itself, and the answer is not used.
            let ahead = next.map_or(part, |next| next.part(from, n));
            let sums = if reached {
                pass::<S, T, SPREAD, true>(isa, &at, part, ahead)
            } else {
                pass::<S, T, SPREAD, false>(isa, &at, part, ahead)
            };
            next_top = sums.next.max(next_top);
            T::add(isa, &mut self.softmax.rest, sums.rest);
            if SPREAD {
                T::add(isa, &mut self.spread, sums.spread);
            }
            from += n;
        }
        self.softmax.known = next.is_some().then_some(next_top);
        top
    }

    /// The row.
    #[inline(always)]
    pub fn total(&self) -> Total {
        self.softmax.total()
    }

    /// The entropy, where SPREAD was asked for: log S + Σ p·(max − x), of which no term is negative.
    #[inline(always)]
    pub fn entropy(&self, total: &Total, log_sum: f64) -> f64 {
        let mut spread = T::total_called(self.spread);
        spread.merge(self.spread_extra);
        if total.valid { log_sum + spread.value() / ((1.0 + total.others) * self.softmax.top) } else { f64::NAN }
    }
}

/// A block off the grid of the integer reduction, where logits are far from 0 beyond use: class by class in float64, the same for every level.
#[inline(never)]
fn careful<T: Float>(x: Span<T>, max: f64, reference: Reference, rest: &mut Pair, mut spread: Option<&mut Pair>) {
    for i in 0..x.len() {
        let x = x.get(i).to_f64();
        if x != max {
            let e = exp_f64(Scalar, x - reference.b, reference.k);
            rest.add(e);
            if let Some(spread) = &mut spread
                && e != 0.0
            {
                spread.add(e * (max - x));
            }
        }
    }
}

/// Classes that are summed in one go by a loop with so many accumulators.
#[inline(always)]
pub(super) fn stretch<S: Isa, T: Float>(accumulators: usize) -> usize {
    BLOCK.min(chain_of::<S, T>(accumulators))
}

struct Sums<V> {
    rest: V,
    spread: V,
    next: V,
}

/// The exponentials of a few classes, and the maximum of those that come after them in the same loop: memory is read in one unbroken stream. TOP: the
/// maximum of the row may be among them, and stays out of the sum.
#[inline(always)]
fn pass<S: Isa, T: Real, const SPREAD: bool, const TOP: bool>(isa: S, at: &Near<Vf<S, T>>, x: Span<T>, next: Span<T>) -> Sums<Vf<S, T>> {
    let step = Vf::<S, T>::LANES;
    let zero = Vf::<S, T>::splat(isa, T::ZERO);
    // Where registers are few, two accumulators and one for the maximum: the constants need them more.
    let (own, most) = if S::REGISTERS < 32 { (1, 0) } else { (3, 3) };
    let mut max = [Vf::<S, T>::splat(isa, T::NEG_INF); 4];
    let (mut rest, mut spread) = ([zero; 4], [zero; 4]);
    let (len, group) = (x.len(), 4 * step);
    // Of one length, known to the compiler: no check is left in the loop.
    let next = next.part(0, len);
    for k in 0..len / group {
        let (x, next) = (x.nth(k, group), next.nth(k, group));
        for u in 0..4 {
            ask(isa, next, u * step);
            // In this order a NaN is passed over; it comes back through the sum.
            max[u & most] = next.load(isa, u * step).max(max[u & most]);
            add::<S, T, SPREAD, TOP>(at, x.load(isa, u * step), &mut rest[u & own], &mut spread[u & own]);
        }
    }
    let fill = T::NEG_INF;
    let mut i = len / group * group;
    while i < len {
        let n = step.min(len - i);
        // Always the first: an index that is not known keeps all of them in memory.
        max[0] = next.load_partial(isa, i, n, fill).max(max[0]);
        add::<S, T, SPREAD, TOP>(at, x.load_partial(isa, i, n, fill), &mut rest[0], &mut spread[0]);
        i += n;
    }
    Sums {
        rest: (rest[0] + rest[1]) + (rest[2] + rest[3]),
        spread: (spread[0] + spread[1]) + (spread[2] + spread[3]),
        next: max[0].max(max[1]).max(max[2].max(max[3])),
    }
}

#[inline(always)]
fn add<S: Isa, T: Real, const SPREAD: bool, const TOP: bool>(at: &Near<Vf<S, T>>, v: Vf<S, T>, rest: &mut Vf<S, T>, spread: &mut Vf<S, T>) {
    // 0·log 0 = 0, also for a class of −inf: what is far below the maximum is as good as the floor.
    let v = at.exp.raised(v);
    let (p, q) = at.exp.parts_above(v);
    // Unordered: a NaN is not the maximum and so reaches the sum.
    *rest = if TOP { rest.fma_where(v.ne(at.top), p, q) } else { p.mul_add(q, *rest) };
    if SPREAD {
        *spread = (p * q).mul_add(at.top - v, *spread);
    }
}

/// How many classes equal `top`, and the first of them.
#[inline(always)]
fn find<S: Isa, T: Float>(isa: S, x: Span<T>, top: Vf<S, T>) -> (usize, usize) {
    let step = Vf::<S, T>::LANES;
    let (mut ties, mut first) = (0, usize::MAX);
    let mut i = 0;
    while i < x.len() {
        let n = step.min(x.len() - i);
        let v = if n == step { x.load(isa, i) } else { x.load_partial(isa, i, n, T::NEG_INF) };
        let bits = v.eq(top).bits() & (u64::MAX >> (64 - n));
        if bits != 0 {
            ties += bits.count_ones() as usize;
            first = first.min(i + bits.trailing_zeros() as usize);
        }
        i += n;
    }
    (ties, first)
}

/// How many classes are larger than `x`.
#[inline(always)]
pub fn larger<S: Isa, T: Real>(isa: S, block: Span<T>, x: T) -> usize {
    let step = Vf::<S, T>::LANES;
    let than = Vf::<S, T>::splat(isa, x);
    let groups = block.len() / (4 * step);
    let whole = Vf::<S, T>::splat(isa, T::WHOLE);
    let mut counts = [whole; 4];
    for k in 0..groups {
        let part = block.nth(k, 4 * step);
        for (u, counts) in counts.iter_mut().enumerate() {
            *counts = counts.count_where(than.lt(part.load(isa, u * step)));
        }
    }
    let [a, b, c, d] = counts.map(|counts| counts - whole);
    let mut count = ((a + b) + (c + d)).reduce_sum().to_f64() as usize;
    let mut i = groups * 4 * step;
    while i < block.len() {
        let n = step.min(block.len() - i);
        // Nothing is larger than NaN, and −inf larger than nothing.
        count += than.lt(block.load_partial(isa, i, n, T::NEG_INF)).count();
        i += n;
    }
    count
}

/// The k largest classes of a row as far as it was read: candidates are collected until there are too many, and then those that cannot be
/// among the k are dropped. What remains afterwards is a threshold that few vectors reach; if k is small, those that do are put in order at once.
#[derive(Debug)]
pub struct Largest<T> {
    k: usize,
    room: usize,
    /// As float64: one sort for all types.
    found: Vec<(f64, usize)>,
    /// Whether the first k are in order.
    in_order: bool,
    /// The k-th largest, once there were k.
    threshold: Option<T>,
}

impl<T> Default for Largest<T> {
    fn default() -> Self {
        Self { k: 0, room: 0, found: Vec::new(), in_order: false, threshold: None }
    }
}

/// Most classes that are put in order.
const SMALL: usize = 64;

/// Most candidates of four vectors that are put in order one by one.
const FEW: usize = 8;

impl<T: Float> Largest<T> {
    /// Begins a row. False where there is no memory.
    pub fn begin(&mut self, k: usize) -> bool {
        self.room = if k <= SMALL { k + 1 } else { k.saturating_add(k) };
        (self.k, self.threshold, self.in_order) = (k, None, false);
        self.found.clear();
        // A block is looked at by four vectors: so many more than there is room for.
        self.found.try_reserve(self.room.saturating_add(64)).is_ok()
    }

    /// Reads the classes from `start` on, of which `top` is the maximum, lane by lane. Ascending: of equals the first stays.
    #[inline(always)]
    pub fn block<S: Isa>(&mut self, isa: S, x: Span<T>, top: Vf<S, T>, start: usize) {
        let step = Vf::<S, T>::LANES;
        if self.k == 0 || self.threshold.is_some_and(|than| !Vf::<S, T>::splat(isa, than).lt(top).any()) {
            return;
        }
        let mut i = 0;
        while i < x.len() {
            let n = (4 * step).min(x.len() - i);
            let part = x.part(i, n);
            let mut bits = 0;
            for u in 0..4 {
                let (at, len) = (u * step, n.saturating_sub(u * step).min(step));
                let v = if n == 4 * step { part.load(isa, at) } else { part.load_partial(isa, at.min(n), len, T::NEG_INF) };
                let mask = match self.threshold {
                    Some(than) => Vf::<S, T>::splat(isa, than).lt(v),
                    None => v.eq(v),
                };
                bits |= mask.bits() << at;
            }
            bits &= u64::MAX >> (64 - n);
            if bits != 0 {
                let before = self.found.len();
                while bits != 0 {
                    let class = bits.trailing_zeros() as usize;
                    self.found.push((part.get(class).to_f64(), start + i + class));
                    bits &= bits - 1;
                }
                self.settle(before);
            }
            i += n;
        }
    }

    /// After more than `before` were found.
    fn settle(&mut self, before: usize) {
        if self.k <= SMALL && before == self.k && self.found.len() - before <= FEW {
            if !self.in_order {
                sort(&mut self.found[..before]);
                self.in_order = true;
            }
            put_in_order(&mut self.found, before);
            self.threshold = self.found.last().map(|&(x, _)| T::from_f64(x));
        } else if self.found.len() >= self.room {
            self.drop_others();
        }
    }

    fn drop_others(&mut self) {
        if self.found.len() > self.k {
            select(&mut self.found, self.k);
            self.in_order = false;
        }
        if self.found.len() == self.k {
            self.threshold = self.found.iter().map(|&(x, _)| x).reduce(|a, b| if b < a { b } else { a }).map(T::from_f64);
        }
    }

    /// The largest classes and their logits in falling order, of equals the first class first. Fewer than k where classes are NaN.
    pub fn finish(&mut self) -> &[(f64, usize)] {
        if self.k > 0 {
            self.drop_others();
        }
        sort(&mut self.found);
        &self.found
    }
}

/// Puts all behind the first k to their places among these, which are in order and stay k.
#[inline(never)]
fn put_in_order(found: &mut Vec<(f64, usize)>, k: usize) {
    let (first, others) = found.split_at_mut(k);
    for new in others {
        // From behind, as most go there; behind equals, which came before.
        let mut at = k;
        while at > 0 && first[at - 1].0 < new.0 {
            if at < k {
                first[at] = first[at - 1];
            }
            at -= 1;
        }
        if at < k {
            first[at] = *new;
        }
    }
    found.truncate(k);
}

/// Keeps the first k.
#[inline(never)]
fn select(found: &mut Vec<(f64, usize)>, k: usize) {
    found.select_nth_unstable_by(k - 1, order);
    found.truncate(k);
}

#[inline(never)]
fn sort(found: &mut [(f64, usize)]) {
    found.sort_unstable_by(order);
}

/// Falling, then by class: total, as no NaN is collected.
fn order(a: &(f64, usize), b: &(f64, usize)) -> core::cmp::Ordering {
    b.0.partial_cmp(&a.0).unwrap_or(core::cmp::Ordering::Equal).then(a.1.cmp(&b.1))
}
