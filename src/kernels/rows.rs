//! Rows: the classes are adjacent, vectors run along them.
//!
//! `reduce` reads a row once, in blocks. While it sums the exponentials of one block it takes the maximum of the next, so that memory is read
//! in one unbroken stream; a block's exponentials are relative to the maximum of everything up to and including it. Only where a block reaches
//! the running maximum is it looked at again, to count the ties.

use crate::array::{DType, Element, Float, Span, SpanMut, Vf};
use crate::simd::{Isa, Mask, Scalar, Vector};

use super::math::{Anchored, Exp, Real};
use super::state::{Pair, Reference, State, Summand, Wide, exp_f64, splat};

/// Classes per block: large enough to hide the work between blocks, small enough for two to stay in L1.
pub const BLOCK: usize = 1024;

/// Supplies a row block by block; blocks are asked for in ascending order.
pub trait Source<E: Element> {
    /// Block `index`, in place or gathered into scratch, and the block that will be asked for next, of this row or another: empty when it
    /// cannot be read yet.
    fn block(&mut self, index: usize) -> (Span<'_, E>, Span<'_, E>);
}

/// A row that can be read where it stands, and the row after it (or nothing).
#[derive(Clone, Copy)]
pub struct Direct<'a, E> {
    /// The row.
    pub row: Span<'a, E>,
    /// The next one to be reduced.
    pub after: Span<'a, E>,
}

/// Block `index` of a row; empty past its end.
#[inline(always)]
fn block_of<E: Element>(row: Span<'_, E>, index: usize) -> Span<'_, E> {
    let start = row.len().min(index * BLOCK);
    row.part(start, BLOCK.min(row.len() - start))
}

impl<E: Element> Source<E> for Direct<'_, E> {
    #[inline(always)]
    fn block(&mut self, index: usize) -> (Span<'_, E>, Span<'_, E>) {
        let next = if (index + 1) * BLOCK < self.row.len() { block_of(self.row, index + 1) } else { block_of(self.after, 0) };
        (block_of(self.row, index), next)
    }
}

/// A row that is copied or computed block by block.
pub struct Gathered<'a, T> {
    /// Writes block `index` into the given elements.
    pub fill: &'a mut dyn FnMut(usize, &mut [T]),
    /// Room for one block.
    pub scratch: &'a mut [T],
    /// Classes in the row.
    pub classes: usize,
}

impl<T: Float> Source<T> for Gathered<'_, T> {
    #[inline(always)]
    fn block(&mut self, index: usize) -> (Span<'_, T>, Span<'_, T>) {
        let len = BLOCK.min(self.classes - index * BLOCK);
        let scratch = &mut self.scratch[..len];
        (self.fill)(index, scratch);
        (Span::of(scratch), Span::of(&[]))
    }
}

/// A dense target stream.
pub enum Stream<'a, T> {
    /// None.
    None,
    /// One value per class.
    Slice(Span<'a, T>),
    /// Computed block by block.
    Gathered(Gathered<'a, T>),
}

impl<T: Float> Stream<'_, T> {
    #[inline(always)]
    fn block(&mut self, index: usize) -> Span<'_, T> {
        match self {
            Self::None => Span::of(&[]),
            Self::Slice(span) => block_of(*span, index),
            Self::Gathered(gathered) => gathered.block(index).0,
        }
    }
    /// Whether there is one.
    #[inline(always)]
    pub fn is_some(&self) -> bool {
        !matches!(self, Self::None)
    }
}

/// What is the same for every block of every row.
#[derive(Clone, Copy)]
pub struct Setup<S: Isa, T: Real> {
    /// The instruction set.
    pub isa: S,
    exp: Exp<Vf<S, T>>,
    exp1: Exp<Vf<Scalar, T>>,
    /// 1 / temperature.
    pub scale: f64,
}

impl<S: Isa, T: Real> Setup<S, T> {
    /// Constants for logits that are multiplied by `scale`.
    #[inline(always)]
    pub fn new(isa: S, scale: f64) -> Self {
        Self { isa, exp: Exp::new(isa, scale), exp1: Exp::new(Scalar, scale), scale }
    }
}

/// A reference and a maximum as vectors.
#[derive(Clone, Copy)]
struct Lanes<V: Vector> {
    at: Anchored<V>,
    b: V,
    top: V,
    origin: V,
}

impl<S: Isa, T: Real> Setup<S, T> {
    #[inline(always)]
    fn lanes(&self, reference: Reference, max: T) -> Lanes<Vf<S, T>> {
        let finite = if max.to_f64().is_finite() { max } else { T::ZERO };
        Lanes {
            at: self.exp.anchor(splat::<S, T>(self.isa, reference.k)),
            b: splat::<S, T>(self.isa, reference.b),
            top: Vf::<S, T>::splat(self.isa, max),
            origin: Vf::<S, T>::splat(self.isa, finite),
        }
    }
}

#[inline(always)]
fn block_max<S: Isa, E: Element>(isa: S, x: Span<E>) -> Vf<S, E::Acc> {
    let step = Vf::<S, E::Acc>::LANES;
    let mut max = [Vf::<S, E::Acc>::splat(isa, E::Acc::NEG_INF); 4];
    let mut i = 0;
    while i + 4 * step <= x.len() {
        let part = x.part(i, 4 * step);
        for (u, max) in max.iter_mut().enumerate() {
            // In this order a NaN is passed over; it comes back through the sum.
            *max = part.load(isa, u * step).max(*max);
        }
        i += 4 * step;
    }
    while i + step <= x.len() {
        max[0] = x.load(isa, i).max(max[0]);
        i += step;
    }
    if i < x.len() {
        max[1] = x.load_partial(isa, i, x.len() - i, E::from_acc(E::Acc::NEG_INF)).max(max[1]);
    }
    max[0].max(max[1]).max(max[2].max(max[3]))
}

/// Says where the first class equal to `top` is and sums the targets of all that are.
#[inline(always)]
fn find_top<S: Isa, E: Element>(isa: S, x: Span<E>, t: Span<E::Acc>, top: Vf<S, E::Acc>) -> (usize, Pair) {
    let step = Vf::<S, E::Acc>::LANES;
    let (mut first, mut t_top) = (usize::MAX, Pair::default());
    let mut i = 0;
    while i < x.len() {
        let n = step.min(x.len() - i);
        let v = if n == step { x.load(isa, i) } else { x.load_partial(isa, i, n, E::from_acc(E::Acc::NEG_INF)) };
        let mask = v.eq(top);
        if mask.any() {
            let bits = mask.bits() & (u64::MAX >> (64 - n));
            if bits != 0 {
                first = first.min(i + bits.trailing_zeros() as usize);
            }
            for lane in (0..n).filter(|lane| bits >> lane & 1 == 1) {
                t_top.add(t.get(i + lane).to_f64());
            }
        }
        i += n;
    }
    (first, t_top)
}

struct Sums<V> {
    rest: V,
    lin: V,
    t_rest: V,
    ties: usize,
    next: V,
}

/// What a block adds to the sums, in the lanes of one accumulator.
#[derive(Clone, Copy)]
struct Part<V> {
    rest: V,
    lin: V,
    t_rest: V,
}

/// Adds one vector of classes, whose exponentials are p·q, and returns which lanes are not the maximum. TOP: the maximum may be among them, and stays
/// out of the rest.
#[inline(always)]
fn add<S: Isa, T: Real, const LIN: bool, const TOP: bool>(
    isa: S,
    at: &Lanes<Vf<S, T>>,
    v: Vf<S, T>,
    (p, q): (Vf<S, T>, Vf<S, T>),
    w: Vf<S, T>,
    to: &mut Part<Vf<S, T>>,
) -> u64 {
    if !TOP {
        to.rest = p.mul_add(q, to.rest);
        return 0;
    }
    // Unordered: a NaN is not the maximum and so reaches the sum.
    let below = v.ne(at.top);
    to.rest = to.rest.fma_where(below, p, q);
    if LIN {
        let zero = Vf::<S, T>::splat(isa, T::ZERO);
        to.lin = to.lin.add_where(w.ne(zero), w * (at.origin - v));
        to.t_rest = to.t_rest.add_where(below, w);
    }
    below.bits()
}

/// One block: the sums of its exponentials, and the maximum of the block after it in the same loop.
///
/// TOP: the running maximum is among its classes (or LIN, a dense stream, which needs to know of each whether it is). FAR: the maximum is off the
/// grid of the integer reduction; then x − b first, which is exact or dwarfed by x's own spacing.
#[inline(always)]
fn pass<S: Isa, E: Element<Acc = T>, T: Real, const LIN: bool, const STORE: bool, const TOP: bool, const FAR: bool>(
    isa: S,
    at: &Lanes<Vf<S, T>>,
    x: Span<E>,
    next: Span<E>,
    t: Span<T>,
    dst: SpanMut<T>,
) -> Sums<Vf<S, T>> {
    let step = Vf::<S, T>::LANES;
    let zero = Vf::<S, T>::splat(isa, T::ZERO);
    // Where registers are few, two accumulators: the constants need them more.
    let own = if S::REGISTERS < 32 { 1 } else { 3 };
    let mut max = [Vf::<S, T>::splat(isa, T::NEG_INF); 4];
    let mut parts = [Part { rest: zero, lin: zero, t_rest: zero }; 4];
    let mut ties = 0;
    let len = x.len();
    // Past the end of the next block its last vectors are looked at again; what is left of it comes after the loop. Without one the block looks
    // at itself, and the answer is not used.
    let fused = next.len() >= 4 * step;
    let beside = if fused { next } else { x };
    let last = beside.len().saturating_sub(4 * step);
    let mut i = 0;
    while i + 4 * step <= len {
        let (x, beside) = (x.part(i, 4 * step), beside.part(i.min(last), 4 * step));
        for u in 0..4 {
            max[u & own] = beside.load(isa, u * step).max(max[u & own]);
            let v = x.load(isa, u * step);
            let e = at.at.parts(if FAR { v - at.b } else { v });
            if STORE {
                dst.store(isa, i + u * step, e.0 * e.1);
            }
            let w = if LIN { t.load(isa, i + u * step) } else { zero };
            let below = add::<S, T, LIN, TOP>(isa, at, v, e, w, &mut parts[u & own]);
            if TOP {
                ties += step - below.count_ones() as usize;
            }
        }
        i += 4 * step;
    }
    let seen = if fused { i.min(next.len()) } else { 0 };
    while i < len {
        let n = step.min(len - i);
        let v = x.load_partial(isa, i, n, E::from_acc(T::NEG_INF));
        let e = at.at.parts(if FAR { v - at.b } else { v });
        if STORE {
            dst.store_partial(isa, i, n, e.0 * e.1);
        }
        let w = if LIN { t.load_partial(isa, i, n, T::ZERO) } else { zero };
        let below = add::<S, T, LIN, TOP>(isa, at, v, e, w, &mut parts[0]);
        if TOP {
            ties += n - (below & (u64::MAX >> (64 - n))).count_ones() as usize;
        }
        i += n;
    }
    let left = block_max(isa, next.part(seen, next.len() - seen));
    let max = if fused { max[0].max(max[1]).max(max[2].max(max[3])) } else { left };
    let [a, b, c, d] = parts;
    Sums {
        rest: (a.rest + b.rest) + (c.rest + d.rest),
        lin: (a.lin + b.lin) + (c.lin + d.lin),
        t_rest: (a.t_rest + b.t_rest) + (c.t_rest + d.t_rest),
        ties,
        next: left.max(max),
    }
}

/// The maximum of a block that was taken in the loop over the block before it; none at the start.
pub type Known<S, T> = Option<Vf<S, T>>;

/// Classes whose logits are to be told: when their block is read, because before that they are cold, and after that they may be gone.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The classes.
    pub classes: &'a [usize],
    /// Their logits, from `logits[0]` on.
    pub logits: [f64; 2],
}

/// Work that is done in between, so that memory is not idle while arithmetic goes on.
pub trait Beside {
    /// Called after block `index`.
    fn block(&mut self, index: usize);
}

impl Beside for () {
    #[inline(always)]
    fn block(&mut self, _index: usize) {}
}

/// Reads `classes` classes of a row. With STORE, e = exp(x − b)·2^−k is written to `dst`, `references[i]` being that of block i; `dst` may be the
/// row itself. `known` is the maximum of the first block, and then that of the block `x` has ahead at its end.
#[inline(always)]
pub fn reduce<S: Isa, E: Element<Acc = T>, T: Summand, X: Source<E>, B: Beside, const LIN: bool, const STORE: bool>(
    setup: &Setup<S, T>,
    classes: usize,
    x: &mut X,
    t: &mut Stream<T>,
    dst: SpanMut<T>,
    references: &mut [Reference],
    known: &mut Known<S, T>,
    wanted: &mut Wanted,
    beside: &mut B,
) -> State {
    let isa = setup.isa;
    let mut max = T::NEG_INF;
    let mut reference = Reference::of(max, &setup.exp1, setup.scale);
    let mut at = setup.lanes(reference, max);
    let (mut ties, mut arg, mut t_top) = (0.0, 0, Pair::default());
    let (mut rest, mut lin, mut t_rest) = (Wide::zero(isa), Wide::zero(isa), Wide::zero(isa));
    let (mut rest_extra, mut lin_extra, mut t_extra) = (Pair::default(), Pair::default(), Pair::default());
    for index in 0..classes.div_ceil(BLOCK) {
        let start = index * BLOCK;
        let (block, next) = x.block(index);
        let dense = t.block(index);
        let block_top = match known.take() {
            Some(v) => v,
            None => block_max(isa, block),
        };
        let tops = at.top.le(block_top).any();
        if tops {
            let candidate = block_top.reduce_max();
            if candidate > max {
                let moved = Reference::of(candidate, &setup.exp1, setup.scale);
                if max > T::NEG_INF {
                    let factor = reference.factor(moved, setup.scale);
                    // The old maxima join the rest, and every distance to the maximum grows.
                    rest.scale(isa, factor);
                    rest_extra.scale(factor);
                    rest_extra.add(ties * exp_f64(isa, (max.to_f64() - moved.b) * setup.scale, moved.k));
                    if LIN {
                        t_extra.merge(t_top);
                        let mut weight = T::total(t_rest);
                        weight.merge(t_extra);
                        if weight.value() != 0.0 {
                            weight.scale(candidate.to_f64() - max.to_f64());
                            lin_extra.merge(weight);
                        }
                    }
                } else if LIN {
                    // Everything so far was −inf: nothing in the rest, and targets there already made `lin` infinite.
                    t_extra.merge(t_top);
                }
                t_top = Pair::default();
                ties = 0.0;
                max = candidate;
                reference = moved;
                at = setup.lanes(reference, max);
                arg = usize::MAX;
            }
        }
        if STORE && let Some(known) = references.get_mut(index) {
            *known = reference;
        }
        for (&class, logit) in wanted.classes.iter().zip(&mut wanted.logits) {
            if (start..start + block.len()).contains(&class) {
                *logit = block.get(class - start).to_acc().to_f64();
            }
        }
        let far = reference.b != 0.0 || max >= T::MAX;
        if LIN && tops {
            let (first, weight) = find_top(isa, block, dense, at.top);
            arg = arg.min(start.saturating_add(first));
            t_top.merge(weight);
        }
        // Few enough additions to an accumulator in a row: a whole block of float32 on wide vectors, less of it on narrow ones. Float64 has nothing
        // wider to go to, and fewer digits to spare.
        let accumulators = if S::REGISTERS < 32 { 2 } else { 4 };
        let additions = if T::DTYPE == DType::F64 { 8 } else { 16 };
        let stretch = BLOCK.min(if Vf::<S, T>::LANES < 4 { 8 } else { additions * accumulators * Vf::<S, T>::LANES });
        let mut from = 0;
        let mut next_top = Vf::<S, T>::splat(isa, T::NEG_INF);
        while from < block.len() {
            let n = stretch.min(block.len() - from);
            let x = block.part(from, n);
            let t = if LIN { dense.part(from, n) } else { dense };
            let to = if STORE { dst.part(start + from, n) } else { dst };
            let at_next = next.len().min(from);
            // The last stretch takes all that is left of the next block.
            let next = next.part(at_next, if from + n < block.len() { n.min(next.len() - at_next) } else { next.len() - at_next });
            let sums = match (far, tops || LIN) {
                (false, false) => pass::<S, E, T, LIN, STORE, false, false>(isa, &at, x, next, t, to),
                (false, true) => pass::<S, E, T, LIN, STORE, true, false>(isa, &at, x, next, t, to),
                (true, _) => pass::<S, E, T, LIN, STORE, true, true>(isa, &at, x, next, t, to),
            };
            next_top = sums.next.max(next_top);
            ties += sums.ties as f64;
            T::add(isa, &mut rest, sums.rest);
            if LIN {
                T::add(isa, &mut lin, sums.lin);
                T::add(isa, &mut t_rest, sums.t_rest);
            }
            from += n;
        }
        *known = (!next.is_empty()).then_some(next_top);
        beside.block(index);
    }
    rest_extra.merge(T::total(rest));
    if LIN {
        lin_extra.merge(T::total(lin));
        t_extra.merge(T::total(t_rest));
    }
    State { max: max.to_f64(), ties, arg, reference, rest: rest_extra, lin: lin_extra, t_rest: t_extra, t_top: t_top.value() }
}

/// Values to be written, vector by vector.
trait Values<S: Isa, T: Real> {
    fn whole(&self, isa: S, i: usize) -> Vf<S, T>;
    fn partial(&self, isa: S, i: usize, n: usize) -> Vf<S, T>;
}

/// Writes values; `past` the caches if wanted.
#[inline(always)]
fn write<S: Isa, E: Element<Acc = T>, T: Real, W: Values<S, T>>(isa: S, values: &W, dst: SpanMut<E>, past: bool) {
    let step = Vf::<S, T>::LANES;
    let len = dst.read().len();
    let mut i = 0;
    if past {
        let lead = dst.lead().min(len);
        while i < lead {
            let n = step.min(lead - i);
            dst.store_partial(isa, i, n, values.partial(isa, i, n));
            i += n;
        }
        while i + step <= len {
            dst.stream(isa, i, values.whole(isa, i));
            i += step;
        }
    } else {
        while i + step <= len {
            dst.store(isa, i, values.whole(isa, i));
            i += step;
        }
    }
    if i < len {
        dst.store_partial(isa, i, len - i, values.partial(isa, i, len - i));
    }
}

/// `min(a·e, most) − g·t`.
#[derive(Clone, Copy)]
struct Scaling<'a, V: Vector> {
    a: V,
    most: V,
    g: V,
    t: Span<'a, V::Elem>,
}

impl<V: Vector> Scaling<'_, V>
where
    V::Elem: Real<V<V::Isa> = V>,
{
    #[inline(always)]
    fn whole(&self, isa: V::Isa, i: usize, e: V) -> V {
        // In this order NaN passes.
        let v = self.most.min(e * self.a);
        if self.t.is_empty() { v } else { v - self.t.load(isa, i) * self.g }
    }
    #[inline(always)]
    fn partial(&self, isa: V::Isa, i: usize, n: usize, e: V) -> V {
        let v = self.most.min(e * self.a);
        if self.t.is_empty() { v } else { v - self.t.load_partial(isa, i, n, V::Elem::ZERO) * self.g }
    }
}

struct Stored<'a, V: Vector> {
    e: Span<'a, V::Elem>,
    scaling: Scaling<'a, V>,
}

impl<S: Isa, T: Real> Values<S, T> for Stored<'_, Vf<S, T>> {
    #[inline(always)]
    fn whole(&self, isa: S, i: usize) -> Vf<S, T> {
        self.scaling.whole(isa, i, self.e.load(isa, i))
    }
    #[inline(always)]
    fn partial(&self, isa: S, i: usize, n: usize) -> Vf<S, T> {
        self.scaling.partial(isa, i, n, self.e.load_partial(isa, i, n, T::ZERO))
    }
}

struct Anew<'a, E, V: Vector> {
    x: Span<'a, E>,
    at: Anchored<V>,
    b: V,
    scaling: Scaling<'a, V>,
}

impl<S: Isa, E: Element<Acc = T>, T: Real> Values<S, T> for Anew<'_, E, Vf<S, T>> {
    #[inline(always)]
    fn whole(&self, isa: S, i: usize) -> Vf<S, T> {
        self.scaling.whole(isa, i, self.at.exp2(self.x.load(isa, i) - self.b))
    }
    #[inline(always)]
    fn partial(&self, isa: S, i: usize, n: usize) -> Vf<S, T> {
        let x = self.x.load_partial(isa, i, n, E::from_acc(T::NEG_INF));
        self.scaling.partial(isa, i, n, self.at.exp2(x - self.b))
    }
}

struct Logs<'a, E, V> {
    x: Span<'a, E>,
    max: V,
    scale: V,
    log_sum: V,
}

impl<S: Isa, E: Element<Acc = T>, T: Real> Values<S, T> for Logs<'_, E, Vf<S, T>> {
    #[inline(always)]
    fn whole(&self, isa: S, i: usize) -> Vf<S, T> {
        (self.x.load(isa, i) - self.max) * self.scale - self.log_sum
    }
    #[inline(always)]
    fn partial(&self, isa: S, i: usize, n: usize) -> Vf<S, T> {
        (self.x.load_partial(isa, i, n, E::from_acc(T::ZERO)) - self.max) * self.scale - self.log_sum
    }
}

/// What the results of a row are made with.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its maximum.
    pub max: f64,
    /// Its reference.
    pub reference: Reference,
    /// Logarithm of the sum, relative to the maximum.
    pub log_sum: f64,
    /// Multiplies the exponentials.
    pub a: f64,
    /// Multiplies the dense stream.
    pub slope: f64,
    /// No product of the first kind is larger: 1 for probabilities.
    pub most: f64,
}

impl<S: Isa, T: Real> Setup<S, T> {
    /// `factor` and `a` once more, so that neither their product nor `a` leaves the normal numbers where the result does not.
    #[inline(always)]
    fn balanced(a: f64, factor: f64) -> (f64, f64) {
        let tiny = if T::DTYPE == DType::F64 { 1e-250 } else { 1e-30 };
        let shift = if (a * factor).abs() < tiny { (T::BIAS.to_f64()).exp2() } else { 1.0 };
        if shift == 1.0 { (a * factor, 1.0) } else { (a * shift, factor / shift) }
    }

    #[inline(always)]
    fn scaling<'a>(&self, row: &Row, a: f64, t: Span<'a, T>) -> Scaling<'a, Vf<S, T>> {
        let isa = self.isa;
        Scaling { a: splat::<S, T>(isa, a), most: splat::<S, T>(isa, row.most), g: splat::<S, T>(isa, row.slope), t }
    }

    /// Writes `a·e − slope·t` for one block of exponentials stored relative to `reference`; `dst` may be where they stand.
    #[inline(always)]
    pub fn emit_stored<E: Element<Acc = T>>(&self, row: &Row, reference: Reference, e: SpanMut<T>, t: Span<T>, dst: SpanMut<E>) {
        let (a, factor) = Self::balanced(row.a, reference.factor(row.reference, self.scale));
        if factor != 1.0 {
            let first = Row { most: f64::INFINITY, ..*row };
            let values = Stored { e: e.read(), scaling: self.scaling(&first, factor, Span::of(&[])) };
            write(self.isa, &values, e, false);
        }
        write(self.isa, &Stored { e: e.read(), scaling: self.scaling(row, a, t) }, dst, false);
    }

    /// Writes `a·exp(x − reference) − slope·t` for one block, `past` the caches if wanted.
    #[inline(always)]
    pub fn emit_exp<E: Element<Acc = T>, O: Element<Acc = T>>(&self, row: &Row, x: Span<E>, t: Span<T>, dst: SpanMut<O>, past: bool) {
        let (a, factor) = Self::balanced(row.a, 1.0);
        let k = row.reference.k - factor.log2();
        let at = self.exp.anchor(splat::<S, T>(self.isa, k));
        write(self.isa, &Anew { x, at, b: splat::<S, T>(self.isa, row.reference.b), scaling: self.scaling(row, a, t) }, dst, past);
    }

    /// Writes `(x − max)·scale − log_sum` for one block, in this order: neither step cancels.
    #[inline(always)]
    pub fn emit_log<E: Element<Acc = T>, O: Element<Acc = T>>(&self, row: &Row, x: Span<E>, dst: SpanMut<O>, past: bool) {
        let [max, scale, log_sum] = [row.max, self.scale, row.log_sum].map(|v| T::from_f64(v));
        let isa = self.isa;
        let values =
            Logs { x, max: Vf::<S, T>::splat(isa, max), scale: Vf::<S, T>::splat(isa, scale), log_sum: Vf::<S, T>::splat(isa, log_sum) };
        write(isa, &values, dst, past);
    }
}
