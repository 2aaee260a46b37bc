//! Rows: the classes are adjacent, vectors run along them.
//!
//! `reduce` reads a row once, in blocks. While it sums the exponentials of one block it takes the maximum of the next, so that memory is read
//! in one unbroken stream; a block's exponentials are relative to the maximum of everything up to and including it. Only where a block reaches
//! the running maximum is it looked at again, to count the ties.

use crate::array::{Element, Float, Span, SpanMut, Vf};
use crate::simd::{Isa, Mask, Scalar, Vector};

use super::math::{Exp, Real};
use super::state::{Pair, Reference, State, Summand, Wide, exp_f64, splat};

/// Classes per block. 256 to 1024 do equally well: large enough to hide the work between blocks, small enough for two to stay in L1.
pub const BLOCK: usize = 512;

/// Supplies a row block by block; blocks are asked for in ascending order.
pub trait Source<E: Element> {
    /// Block `index`, in place or gathered into scratch that holds until two blocks later.
    fn block(&mut self, index: usize) -> Span<'_, E>;
}

/// A row that can be read where it stands.
#[derive(Clone, Copy)]
pub struct Direct<'a, E>(pub Span<'a, E>);

impl<E: Element> Source<E> for Direct<'_, E> {
    #[inline(always)]
    fn block(&mut self, index: usize) -> Span<'_, E> {
        let start = index * BLOCK;
        self.0.part(start, BLOCK.min(self.0.len() - start))
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
    fn block(&mut self, index: usize) -> Span<'_, T> {
        let len = BLOCK.min(self.classes - index * BLOCK);
        let scratch = &mut self.scratch[..len];
        (self.fill)(index, scratch);
        Span::of(scratch)
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
            Self::Slice(span) => span.part(index * BLOCK, BLOCK.min(span.len() - index * BLOCK)),
            Self::Gathered(gathered) => gathered.block(index),
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

/// The parts of a reference as vectors: everything below `floor` is zero.
#[derive(Clone, Copy)]
struct Lanes<V> {
    k: V,
    b: V,
    floor: V,
    top: V,
    origin: V,
}

impl<S: Isa, T: Real> Setup<S, T> {
    #[inline(always)]
    fn lanes(&self, reference: Reference, max: T) -> Lanes<Vf<S, T>> {
        let m = max.to_f64();
        let finite = if m.is_finite() { m } else { 0.0 };
        let floor = if m == f64::INFINITY { 0.0 } else { finite - reference.b } - T::CLAMP.to_f64() / self.scale;
        Lanes {
            k: splat::<S, T>(self.isa, reference.k),
            b: splat::<S, T>(self.isa, reference.b),
            floor: splat::<S, T>(self.isa, floor),
            top: splat::<S, T>(self.isa, m),
            origin: splat::<S, T>(self.isa, finite),
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

/// Counts the classes equal to `top`, says where the first one is and sums their targets.
#[inline(always)]
fn find_top<S: Isa, E: Element>(isa: S, x: Span<E>, t: Span<E::Acc>, top: Vf<S, E::Acc>) -> (usize, usize, Pair) {
    let step = Vf::<S, E::Acc>::LANES;
    let (mut ties, mut first, mut t_top) = (0, usize::MAX, Pair::default());
    let mut i = 0;
    while i < x.len() {
        let n = step.min(x.len() - i);
        let v = if n == step { x.load(isa, i) } else { x.load_partial(isa, i, n, E::from_acc(E::Acc::NEG_INF)) };
        let mask = v.eq(top);
        if mask.any() {
            let bits = mask.bits() & (u64::MAX >> (64 - n));
            ties += bits.count_ones() as usize;
            if bits != 0 {
                first = first.min(i + bits.trailing_zeros() as usize);
            }
            if !t.is_empty() {
                for lane in (0..n).filter(|lane| bits >> lane & 1 == 1) {
                    t_top.add(t.get(i + lane).to_f64());
                }
            }
        }
        i += n;
    }
    (ties, first, t_top)
}

struct Sums<V> {
    rest: V,
    lin: V,
    t_rest: V,
    next: V,
}

/// One block: the sum of its exponentials, and the maximum of the block after it in the same loop.
#[inline(always)]
fn pass<S: Isa, E: Element<Acc = T>, T: Real, const LIN: bool, const STORE: bool>(
    setup: &Setup<S, T>,
    at: &Lanes<Vf<S, T>>,
    x: Span<E>,
    next: Span<E>,
    t: Span<T>,
    dst: SpanMut<T>,
) -> Sums<Vf<S, T>> {
    let isa = setup.isa;
    let step = Vf::<S, T>::LANES;
    let zero = Vf::<S, T>::splat(isa, T::ZERO);
    let mut max = [Vf::<S, T>::splat(isa, T::NEG_INF); 4];
    let mut rest = [zero; 4];
    let (mut lin, mut t_rest) = ([zero; 4], [zero; 4]);
    let len = x.len();
    let next = next.part(0, len);
    let mut i = 0;
    while i + 4 * step <= len {
        let (x, next) = (x.part(i, 4 * step), next.part(i, 4 * step));
        for u in 0..4 {
            max[u] = next.load(isa, u * step).max(max[u]);
            let v = x.load(isa, u * step);
            let e = setup.exp.exp2(at.floor.max(v), at.k);
            if STORE {
                dst.store(isa, i + u * step, e);
            }
            // Unordered: a NaN is not the maximum and so reaches the sum.
            let below = v.ne(at.top);
            rest[u] = rest[u].add_where(below, e);
            if LIN {
                let w = t.load(isa, i + u * step);
                lin[u] = lin[u].add_where(w.ne(zero), w * (at.origin - v));
                t_rest[u] = t_rest[u].add_where(below, w);
            }
        }
        i += 4 * step;
    }
    let mut u = 0;
    while i < len {
        let n = step.min(len - i);
        let v;
        if n == step {
            max[u] = next.load(isa, i).max(max[u]);
            v = x.load(isa, i);
        } else {
            let fill = E::from_acc(T::NEG_INF);
            max[u] = next.load_partial(isa, i, n, fill).max(max[u]);
            v = x.load_partial(isa, i, n, fill);
        }
        let e = setup.exp.exp2(at.floor.max(v), at.k);
        if STORE {
            dst.store_partial(isa, i, n, e);
        }
        let below = v.ne(at.top);
        rest[u] = rest[u].add_where(below, e);
        if LIN {
            let w = t.load_partial(isa, i, n, T::ZERO);
            lin[u] = lin[u].add_where(w.ne(zero), w * (at.origin - v));
            t_rest[u] = t_rest[u].add_where(below, w);
        }
        u = (u + 1) & 3;
        i += n;
    }
    Sums {
        rest: (rest[0] + rest[1]) + (rest[2] + rest[3]),
        lin: (lin[0] + lin[1]) + (lin[2] + lin[3]),
        t_rest: (t_rest[0] + t_rest[1]) + (t_rest[2] + t_rest[3]),
        next: max[0].max(max[1]).max(max[2].max(max[3])),
    }
}

/// The same for a block whose maximum is off the grid of the integer reduction: x − b first, which is exact or dwarfed by x's own spacing.
#[inline(always)]
fn far_pass<S: Isa, E: Element<Acc = T>, T: Real>(
    setup: &Setup<S, T>,
    at: &Lanes<Vf<S, T>>,
    x: Span<E>,
    t: Span<T>,
    dst: Option<SpanMut<T>>,
) -> Sums<Vf<S, T>> {
    let isa = setup.isa;
    let step = Vf::<S, T>::LANES;
    let zero = Vf::<S, T>::splat(isa, T::ZERO);
    let mut sums = Sums { rest: zero, lin: zero, t_rest: zero, next: zero };
    let mut i = 0;
    while i < x.len() {
        let n = step.min(x.len() - i);
        let v = x.load_partial(isa, i, n, E::from_acc(T::NEG_INF));
        let e = setup.exp.exp2(at.floor.max(v - at.b), at.k);
        if let Some(dst) = dst {
            dst.store_partial(isa, i, n, e);
        }
        let below = v.ne(at.top);
        sums.rest = sums.rest.add_where(below, e);
        if !t.is_empty() {
            let w = t.load_partial(isa, i, n, T::ZERO);
            sums.lin = sums.lin.add_where(w.ne(zero), w * (at.origin - v));
            sums.t_rest = sums.t_rest.add_where(below, w);
        }
        i += n;
    }
    sums
}

/// Reads `classes` classes of a row. With `dst`, e = exp(x − b)·2^−k is stored there, `references[i]` being that of block i; `dst` may be
/// the row itself.
#[inline(always)]
pub fn reduce<S: Isa, E: Element<Acc = T>, T: Summand, X: Source<E>, const LIN: bool, const STORE: bool>(
    setup: &Setup<S, T>,
    classes: usize,
    x: &mut X,
    t: &mut Stream<T>,
    dst: SpanMut<T>,
    references: &mut [Reference],
    ahead: Option<Span<E>>,
) -> State {
    let isa = setup.isa;
    let mut max = T::NEG_INF;
    let mut reference = Reference::of(max, &setup.exp1, setup.scale);
    let mut at = setup.lanes(reference, max);
    let (mut ties, mut arg, mut t_top) = (0.0, 0, Pair::default());
    let (mut rest, mut lin, mut t_rest) = (Wide::zero(isa), Wide::zero(isa), Wide::zero(isa));
    let (mut rest_extra, mut lin_extra, mut t_extra) = (Pair::default(), Pair::default(), Pair::default());
    let blocks = classes.div_ceil(BLOCK);
    let mut known: Option<Vf<S, T>> = None;
    for index in 0..blocks {
        let start = index * BLOCK;
        let block = x.block(index);
        let dense = t.block(index);
        let block_top = match known {
            Some(v) => v,
            None => block_max(isa, block),
        };
        if at.top.le(block_top).any() {
            let candidate = block_top.reduce_max();
            if candidate > max {
                let moved = Reference::of(candidate, &setup.exp1, setup.scale);
                if max > T::NEG_INF {
                    let factor = reference.factor(moved, setup.scale);
                    // The old maxima join the rest, and every distance to the maximum grows.
                    rest.scale(isa, factor);
                    rest_extra.scale(factor);
                    rest_extra.add(ties * exp_f64((max.to_f64() - moved.b) * setup.scale, moved.k));
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
            let (count, first, weight) = find_top(isa, block, dense, at.top);
            ties += count as f64;
            t_top.merge(weight);
            if count > 0 {
                arg = arg.min(start + first);
            }
        }
        if STORE && let Some(known) = references.get_mut(index) {
            *known = reference;
        }
        let near = reference.b == 0.0 && max < T::MAX;
        // The last blocks have no full successor: they look at themselves, and the answer is not used.
        let full = ahead.filter(|_| near && start + 2 * BLOCK <= classes);
        let next = full.map_or(block, |row| row.part(start + BLOCK, BLOCK));
        let mut next_top = Vf::<S, T>::splat(isa, T::NEG_INF);
        // Few enough additions in a row for float32: a whole block on wide vectors, less of it on narrow ones.
        let stretch = BLOCK.min(if Vf::<S, T>::LANES < 4 { 8 } else { 32 * Vf::<S, T>::LANES });
        let mut from = 0;
        while from < block.len() {
            let n = stretch.min(block.len() - from);
            let x = block.part(from, n);
            let t = if LIN { dense.part(from, n) } else { dense };
            let to = if STORE { dst.part(start + from, n) } else { dst };
            let sums = if near {
                pass::<S, E, T, LIN, STORE>(setup, &at, x, next.part(from, n), t, to)
            } else {
                far_pass(setup, &at, x, t, STORE.then_some(to))
            };
            next_top = sums.next.max(next_top);
            T::add(isa, &mut rest, sums.rest);
            if LIN {
                T::add(isa, &mut lin, sums.lin);
                T::add(isa, &mut t_rest, sums.t_rest);
            }
            from += n;
        }
        known = full.is_some().then_some(next_top);
    }
    rest_extra.merge(T::total(rest));
    if LIN {
        lin_extra.merge(T::total(lin));
        t_extra.merge(T::total(t_rest));
    }
    State { max: max.to_f64(), ties, arg, reference, rest: rest_extra, lin: lin_extra, t_rest: t_extra, t_top: t_top.value() }
}

/// Writes `a·e − g·t` for one block of stored exponentials; `dst` may be where they stand.
#[inline(always)]
pub fn emit_stored<S: Isa, E: Element<Acc = T>, T: Real>(isa: S, e: Span<T>, a: T, g: T, t: Span<T>, dst: SpanMut<E>) {
    let step = Vf::<S, T>::LANES;
    let (a, g) = (Vf::<S, T>::splat(isa, a), Vf::<S, T>::splat(isa, g));
    let len = e.len();
    let mut i = 0;
    if t.is_empty() {
        while i + step <= len {
            dst.store(isa, i, e.load(isa, i) * a);
            i += step;
        }
        if i < len {
            dst.store_partial(isa, i, len - i, e.load_partial(isa, i, len - i, T::ZERO) * a);
        }
        return;
    }
    while i < len {
        let n = step.min(len - i);
        let v = e.load_partial(isa, i, n, T::ZERO) * a - t.load_partial(isa, i, n, T::ZERO) * g;
        dst.store_partial(isa, i, n, v);
        i += n;
    }
}

/// Writes `a·exp(x − reference) − g·t` for one block.
#[inline(always)]
pub fn emit_exp<S: Isa, E: Element<Acc = T>, O: Element<Acc = T>, T: Real>(
    setup: &Setup<S, T>,
    reference: Reference,
    max: f64,
    x: Span<E>,
    a: T,
    g: T,
    t: Span<T>,
    dst: SpanMut<O>,
) {
    let isa = setup.isa;
    let step = Vf::<S, T>::LANES;
    let at = setup.lanes(reference, T::from_f64(max));
    let (av, gv) = (Vf::<S, T>::splat(isa, a), Vf::<S, T>::splat(isa, g));
    let len = x.len();
    let mut i = 0;
    if t.is_empty() && reference.b == 0.0 {
        while i + step <= len {
            dst.store(isa, i, setup.exp.exp2(at.floor.max(x.load(isa, i)), at.k) * av);
            i += step;
        }
    }
    while i < len {
        let n = step.min(len - i);
        let v = x.load_partial(isa, i, n, E::from_acc(T::NEG_INF)) - at.b;
        let mut out = setup.exp.exp2(at.floor.max(v), at.k) * av;
        if !t.is_empty() {
            out = out - t.load_partial(isa, i, n, T::ZERO) * gv;
        }
        dst.store_partial(isa, i, n, out);
        i += n;
    }
}

/// Writes `(x − max)·scale − log_sum` for one block, in this order: neither step cancels.
#[inline(always)]
pub fn emit_log<S: Isa, E: Element<Acc = T>, O: Element<Acc = T>, T: Real>(
    isa: S,
    x: Span<E>,
    max: T,
    scale: T,
    log_sum: T,
    dst: SpanMut<O>,
) {
    let step = Vf::<S, T>::LANES;
    let (max, scale, log_sum) = (Vf::<S, T>::splat(isa, max), Vf::<S, T>::splat(isa, scale), Vf::<S, T>::splat(isa, log_sum));
    let len = x.len();
    let mut i = 0;
    while i + step <= len {
        dst.store(isa, i, (x.load(isa, i) - max) * scale - log_sum);
        i += step;
    }
    if i < len {
        let v = x.load_partial(isa, i, len - i, E::from_acc(T::ZERO));
        dst.store_partial(isa, i, len - i, (v - max) * scale - log_sum);
    }
}
