//! Rows: the classes are adjacent, vectors run along them.
//!
//! `reduce` reads a row once, in blocks. While it sums the exponentials of one block it takes the maximum of the next, so that memory is read
//! in one unbroken stream; a block's exponentials are relative to the maximum of everything up to and including it. Only where a block reaches
//! the running maximum is it looked at again, to count the ties.

use crate::array::{DType, Float, Span, SpanMut, Vf};
use crate::simd::{Isa, Kernel, Level, Mask, Scalar, Vector};

use super::bend;
use super::input::{Ahead, Course, Input, Known, LATER, Making, Next, Onward, Whole};
use super::math::{Anchored, Exp};
use super::real::Real;
use super::state::{Pair, Reference, State, Summand, Wide, exp_f64, splat};
use super::tanh::Cap;

/// Classes per block: large enough to hide the work between blocks, small enough for two to stay in L1.
pub const BLOCK: usize = 1024;

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
        Self { isa, exp: Exp::new(isa, scale).opaque(), exp1: Exp::new(Scalar, scale), scale }
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

/// The maximum of a block, lane by lane.
#[inline(always)]
pub(super) fn block_max<S: Isa, T: Real>(isa: S, x: Span<T>) -> Vf<S, T> {
    let step = Vf::<S, T>::LANES;
    let mut max = [Vf::<S, T>::splat(isa, T::NEG_INF); 4];
    let groups = x.len() / (4 * step);
    for k in 0..groups {
        let part = x.nth(k, 4 * step);
        for (u, max) in max.iter_mut().enumerate() {
            // In this order a NaN is passed over; it comes back through the sum.
            *max = part.load(isa, u * step).max(*max);
        }
    }
    let mut i = groups * 4 * step;
    while i + step <= x.len() {
        max[0] = x.load(isa, i).max(max[0]);
        i += step;
    }
    if i < x.len() {
        max[1] = x.load_partial(isa, i, x.len() - i, T::NEG_INF).max(max[1]);
    }
    max[0].max(max[1]).max(max[2].max(max[3]))
}

/// How far below 0 the least of a block is.
#[inline(always)]
fn block_depth<S: Isa, T: Real>(isa: S, x: Span<T>) -> T {
    let step = Vf::<S, T>::LANES;
    let mut min = [splat::<S, T>(isa, f64::INFINITY); 2];
    for k in 0..x.len() / (2 * step) {
        let part = x.nth(k, 2 * step);
        min = [part.load(isa, 0).min(min[0]), part.load(isa, step).min(min[1])];
    }
    let mut i = x.len() / (2 * step) * (2 * step);
    while i < x.len() {
        let n = step.min(x.len() - i);
        min[0] = x.load_partial(isa, i, n, x.get(i)).min(min[0]);
        i += n;
    }
    (-min[0].min(min[1])).reduce_max()
}

/// The maximum of a block, Σ (max − x), which a target that is the same for all classes needs, and where the first maximum is, as a kernel.
pub struct Distances<'a, T>(pub Span<'a, T>);

impl<T: Summand> Kernel for Distances<'_, T> {
    type Output = (f64, f64, usize);
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) -> Self::Output {
        let max = block_max(isa, self.0).reduce_max();
        let (origin, mut sum) = (if max.to_f64().is_finite() { max } else { T::ZERO }, Wide::zero(isa));
        let first = add_distances::<S, T>(isa, self.0, max, origin, &mut sum);
        (max.to_f64(), T::total_called(sum).value(), first)
    }
}

/// Adds how far the classes are below `origin`, and says where the first that equals `top` is.
#[inline(always)]
pub(super) fn add_distances<S: Isa, T: Summand>(isa: S, x: Span<T>, top: T, origin: T, sum: &mut Wide<S>) -> usize {
    let (step, group) = (Vf::<S, T>::LANES, 4 * Vf::<S, T>::LANES);
    let zero = Vf::<S, T>::splat(isa, T::ZERO);
    let (top, from) = (Vf::<S, T>::splat(isa, top), Vf::<S, T>::splat(isa, origin));
    let (mut first, mut i) = (usize::MAX, 0);
    while i < x.len() {
        let end = (i + chain::<S, T>()).min(x.len());
        let mut lanes = [zero; 4];
        while i + group <= end {
            let part = x.part(i, group);
            let mut seen = 0;
            for (u, lane) in lanes.iter_mut().enumerate() {
                let v = part.load(isa, u * step);
                *lane = *lane + (from - v);
                seen |= v.eq(top).bits() << (u * step);
            }
            if seen != 0 {
                first = first.min(i + seen.trailing_zeros() as usize);
            }
            i += group;
        }
        while i < end {
            let n = step.min(end - i);
            // What is not there is not below.
            let v = x.load_partial(isa, i, n, origin);
            lanes[0] = lanes[0] + (from - v);
            let seen = v.eq(top).bits() & (u64::MAX >> (64 - n));
            if seen != 0 {
                first = first.min(i + seen.trailing_zeros() as usize);
            }
            i += n;
        }
        let [a, b, c, d] = lanes;
        T::add(isa, sum, (a + b) + (c + d));
    }
    first
}

/// Says where the first class equal to `top` is and sums the targets of all that are.
#[inline(always)]
fn find_top<S: Isa, T: Real>(isa: S, x: Span<T>, t: Span<T>, top: Vf<S, T>) -> (usize, Pair) {
    let step = Vf::<S, T>::LANES;
    let (mut first, mut t_top) = (usize::MAX, Pair::default());
    let mut i = 0;
    while i < x.len() {
        let n = step.min(x.len() - i);
        let v = if n == step { x.load(isa, i) } else { x.load_partial(isa, i, n, T::NEG_INF) };
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
    /// The least of the next block, where logits are capped.
    low: V,
}

/// What a block adds to the sums, in the lanes of one accumulator.
#[derive(Clone, Copy)]
struct Part<V> {
    rest: V,
    lin: V,
    t_rest: V,
}

impl<V: Vector> Part<V>
where
    V::Elem: Real,
{
    /// Takes up what was gathered in the accumulators, which begin anew.
    #[inline(always)]
    fn with(self, isa: V::Isa, parts: &mut [Self; 4]) -> Self {
        let zero = V::splat(isa, V::Elem::ZERO);
        let [a, b, c, d] = core::mem::replace(parts, [Self { rest: zero, lin: zero, t_rest: zero }; 4]);
        Self {
            rest: self.rest + ((a.rest + b.rest) + (c.rest + d.rest)),
            lin: self.lin + ((a.lin + b.lin) + (c.lin + d.lin)),
            t_rest: self.t_rest + ((a.t_rest + b.t_rest) + (c.t_rest + d.t_rest)),
        }
    }
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

/// What a loop over classes gathers.
struct Gathered<V> {
    parts: [Part<V>; 4],
    /// Maxima of the next block, and where logits are capped the least of it.
    max: [V; 4],
    low: [V; 2],
    ties: usize,
}

/// Four vectors of classes, of the next block and of the dense stream, and where the exponentials go.
struct Group<'a, T, M> {
    x: Span<'a, T>,
    next: Next<'a, T, M>,
    t: Span<'a, T>,
    dst: SpanMut<'a, T>,
}

/// Whether vectors are summed one after the other, and not mixed by the compiler. (Where something is written in the loop, they are anyway.)
#[inline(always)]
const fn in_order<S: Isa, T: Real, M: Making<T>>() -> bool {
    S::REGISTERS < 32 && matches!(T::DTYPE, DType::F32) && !M::MADE
}

/// Whether the vectors of a group are written out: as a loop they would be too long for the compiler to unroll, and the accumulators in memory. (What it
/// does unroll it does better by itself, but where the order matters.)
#[inline(always)]
const fn written_out<S: Isa, T: Real, M: Making<T>, const LIN: bool, const KEEP: bool, const CAP: bool, const TOP: bool>() -> bool {
    let few = S::REGISTERS < 32;
    !matches!(S::LEVEL, Level::Scalar) && (LIN || few && (TOP || matches!(T::DTYPE, DType::F64)) || in_order::<S, T, M>() && (KEEP || !CAP))
}

/// Vector `u` of a group, `bent` if logits are capped (and its slope); see [`pass`].
#[inline(always)]
fn add_vector<S: Isa, T: Real, M: Making<T>, const LIN: bool, const KEEP: bool, const CAP: bool, const TOP: bool>(
    isa: S,
    at: &Lanes<Vf<S, T>>,
    u: usize,
    bent: (Vf<S, T>, Vf<S, T>),
    group: &mut Group<T, M>,
    to: &mut Gathered<Vf<S, T>>,
) {
    let (step, zero) = (Vf::<S, T>::LANES, Vf::<S, T>::splat(isa, T::ZERO));
    // Where registers are few, two accumulators and one for the maximum: the constants need them more.
    let (own, most) = if S::REGISTERS < 32 { (u & 1, 0) } else { (u, u) };
    group.next.ask(isa, u * step);
    // In this order a NaN is passed over; it comes back through the sum.
    let ahead = group.next.load(isa, u * step);
    to.max[most] = ahead.max(to.max[most]);
    if CAP {
        to.low[u & 1] = ahead.min(to.low[u & 1]);
    }
    let (v, slope) = if CAP { bent } else { (group.x.load(isa, u * step), zero) };
    let e = at.at.parts(if TOP { v - at.b } else { v });
    if CAP && !TOP {
        // Such a loop waits for multiplications, and has one less this way where exponentials are kept.
        let e = e.0 * e.1;
        if KEEP {
            group.dst.store(isa, u * step, e * slope);
        }
        to.parts[own].rest = to.parts[own].rest + e;
        return;
    }
    if KEEP {
        group.dst.store(isa, u * step, if CAP { e.0 * e.1 * slope } else { e.0 * e.1 });
    }
    let w = if LIN { group.t.load(isa, u * step) } else { zero };
    let below = add::<S, T, LIN, TOP>(isa, at, v, e, w, &mut to.parts[own]);
    if TOP {
        to.ties += step - below.count_ones() as usize;
    }
    if in_order::<S, T, M>() && !(KEEP || LIN || CAP) {
        group.x = group.x.after(&mut to.parts[own].rest);
    }
}

/// Classes of one block: the sums of their exponentials, and in the same loop the maximum of as many classes of the block after it. What is to be
/// written `later` is asked for.
///
/// CAP: they are capped first, and the exponentials that are kept are multiplied by the slopes. TOP: the running maximum is among them (or LIN, a
/// dense stream, which needs to know of each whether it is), or off the grid of the integer reduction: then x − b first, which is exact or dwarfed
/// by x's own spacing, and x itself where b is 0.
#[inline(always)]
fn pass<S: Isa, T: Real, M: Making<T>, const LIN: bool, const KEEP: bool, const CAP: bool, const TOP: bool>(
    isa: S,
    at: &Lanes<Vf<S, T>>,
    x: Span<T>,
    next: Next<T, M>,
    t: Span<T>,
    cap: Cap<T>,
    (dst, later): (SpanMut<T>, Option<*const u8>),
) -> Sums<Vf<S, T>> {
    let step = Vf::<S, T>::LANES;
    let zero = Vf::<S, T>::splat(isa, T::ZERO);
    let nothing = Part { rest: zero, lin: zero, t_rest: zero };
    let to = &mut Gathered {
        parts: [nothing; 4],
        max: [Vf::<S, T>::splat(isa, T::NEG_INF); 4],
        low: [splat::<S, T>(isa, f64::INFINITY); 2],
        ties: 0,
    };
    let mut total = nothing;
    let (len, group) = (x.len(), 4 * step);
    // Of one length, known to the compiler: no check is left in the loop.
    let next = next.part(0, len);
    let (t, dst) = (if LIN { t.part(0, len) } else { t }, if KEEP { dst.part(0, len) } else { dst });
    let mut k = 0;
    while k < len / group {
        let end = (len / group).min(k + chain::<S, T>() / group);
        if KEEP && let Some(later) = later {
            for i in (k * group..end * group).step_by(64 / size_of::<T>()) {
                isa.prefetch(later.wrapping_add(i * size_of::<T>()));
            }
        }
        while k < end {
            let (x, next) = (x.nth(k, group), next.nth(k, group));
            let (t, dst) = (if LIN { t.nth(k, group) } else { t }, if KEEP { dst.nth(k, group) } else { dst });
            let mut bent = [(zero, zero); 4];
            if CAP {
                bent = cap.near(isa, [x.load(isa, 0), x.load(isa, step), x.load(isa, 2 * step), x.load(isa, 3 * step)]);
            }
            let group = &mut Group { x, next, t, dst };
            if written_out::<S, T, M, LIN, KEEP, CAP, TOP>() {
                add_vector::<S, T, M, LIN, KEEP, CAP, TOP>(isa, at, 0, bent[0], group, to);
                add_vector::<S, T, M, LIN, KEEP, CAP, TOP>(isa, at, 1, bent[1], group, to);
                add_vector::<S, T, M, LIN, KEEP, CAP, TOP>(isa, at, 2, bent[2], group, to);
                add_vector::<S, T, M, LIN, KEEP, CAP, TOP>(isa, at, 3, bent[3], group, to);
            } else {
                for (u, &bent) in bent.iter().enumerate() {
                    add_vector::<S, T, M, LIN, KEEP, CAP, TOP>(isa, at, u, bent, group, to);
                }
            }
            k += 1;
        }
        total = total.with(isa, &mut to.parts);
    }
    let mut i = k * group;
    while i < len {
        let n = step.min(len - i);
        let ahead = next.load_partial(isa, i, n);
        to.max[0] = ahead.max(to.max[0]);
        let mut v = x.load_partial(isa, i, n, T::NEG_INF);
        let mut slope = zero;
        if CAP {
            // Nothing stays where nothing is: where two ways to fill up differ.
            let (lowest, x0) = (Vf::<S, T>::splat(isa, T::NEG_INF), x.load_partial(isa, i, n, T::ZERO));
            let beyond = v.eq(lowest).and(x0.eq(zero));
            to.low[0] = Vf::<S, T>::select(beyond, to.low[0], ahead.min(to.low[0]));
            [(v, slope)] = cap.near(isa, [x0]);
            v = Vf::<S, T>::select(beyond, lowest, v);
        }
        let e = at.at.parts(if TOP { v - at.b } else { v });
        if KEEP {
            dst.store_partial(isa, i, n, if CAP { e.0 * e.1 * slope } else { e.0 * e.1 });
        }
        let w = if LIN { t.load_partial(isa, i, n, T::ZERO) } else { zero };
        let below = add::<S, T, LIN, TOP>(isa, at, v, e, w, &mut to.parts[0]);
        if TOP {
            to.ties += n - (below & (u64::MAX >> (64 - n))).count_ones() as usize;
        }
        i += n;
    }
    let Part { rest, lin, t_rest } = total.with(isa, &mut to.parts);
    let ([a, b, c, d], [low, lower]) = (to.max, to.low);
    Sums { rest, lin, t_rest, ties: to.ties, next: a.max(b).max(c.max(d)), low: low.min(lower) }
}

/// Blocks of a row, from the first of `range` on, none of which holds the maximum: up to the last of it, or until one comes that
/// reaches the maximum. Which one comes next, and its maximum, lane by lane. (What a block costs by itself is a tenth of its time.)
#[inline(always)]
fn skim<S: Isa, T: Summand, M: Onward<T>, const KEEP: bool>(
    isa: S,
    at: &Lanes<Vf<S, T>>,
    mut row: Whole<T, M>,
    range: (usize, usize),
    (dst, cold): (SpanMut<T>, bool),
    rest: &mut Wide<S>,
) -> (usize, Vf<S, T>) {
    let stretch = stretch::<S, T>();
    let (mut index, mut sum) = (range.0, *rest);
    loop {
        let mut top = Vf::<S, T>::splat(isa, T::NEG_INF);
        for from in (0..BLOCK).step_by(stretch) {
            let (x, next) = row.part(index, from, stretch);
            let x = row.standing(&x, from, stretch);
            let to = if KEEP { dst.part(index * BLOCK + from, stretch) } else { dst };
            let to = (to, cold.then(|| to.read().address(0).wrapping_add(LATER)));
            let sums = pass::<S, T, _, false, KEEP, false, false>(isa, at, x, next, x, Cap::new(1.0), to);
            T::add(isa, &mut sum, sums.rest);
            top = sums.next.max(top);
        }
        index += 1;
        row.step();
        if index == range.1 || at.top.le(top).any() {
            *rest = sum;
            return (index, top);
        }
    }
}

/// Classes whose logits are to be told: when their block is read, because before that they are cold, and after that they may be gone.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// The classes, ascending, and where their logits go. Those beyond the row are none.
    pub classes: &'a [(usize, usize)],
    /// Gets their logits.
    pub logits: &'a mut [f64],
}

/// Classes that are summed without a pause.
#[inline(always)]
pub(super) fn chain<S: Isa, T: Real>() -> usize {
    chain_of::<S, T>(if S::REGISTERS < 32 { 2 } else { 4 })
}

/// The same of so many accumulators: eight additions to each, four of float64, whose results have no digits to spare. Equal classes round the same way at
/// each of them, and sixteen took a loss out of its 4 ULP.
#[inline(always)]
pub(super) fn chain_of<S: Isa, T: Float>(accumulators: usize) -> usize {
    let additions = if matches!(T::DTYPE, DType::F64) { 4 } else { 8 };
    if Vf::<S, T>::LANES < 4 { 8 } else { additions * accumulators * Vf::<S, T>::LANES }
}

/// Classes that are summed in the type of the logits: four chains, added up; one where all of them go to one lane.
#[inline(always)]
fn stretch<S: Isa, T: Real>() -> usize {
    BLOCK.min(if Vf::<S, T>::LANES < 4 { chain::<S, T>() } else { 4 * chain::<S, T>() })
}

/// Stretches of a block whose maxima are told apart.
const MOST_STRETCHES: usize = 4;

/// One row to be reduced, as a kernel; its result is the state of the row.
pub struct Reduce<'a, T> {
    /// 1 / temperature.
    pub scale: f64,
    /// Classes in the row.
    pub classes: usize,
    /// The logits.
    pub x: Input<'a, T>,
    /// The dense target stream.
    pub t: Input<'a, T>,
    /// Where e = exp(x − b)·2^−k goes, if anywhere; may be the row itself.
    pub dst: Option<SpanMut<'a, T>>,
    /// Whether that is memory that no cache has: it is asked for, too.
    pub cold: bool,
    /// The reference of block i at i, as far as there is room.
    pub references: &'a mut [Reference],
    /// What is known of the first block, and then of the block that `x` has ahead at its end.
    pub known: &'a mut Known<T>,
    /// Logits to be told.
    pub wanted: Wanted<'a>,
}

impl<T: Summand> Kernel for Reduce<'_, T> {
    type Output = State;
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) -> State {
        reduce::<S, T, false>(isa, self, Cap::new(1.0), &mut [])
    }
}

/// The same of logits that are capped first, without a dense stream: a kernel of its own, so that the loops of the other keep their registers. What
/// is stored is multiplied by the slopes. Not for the portable level.
pub struct ReduceCapped<'a, T> {
    /// The row as it stands.
    pub row: Reduce<'a, T>,
    /// What becomes of its logits.
    pub cap: Cap<T>,
    /// Room for two blocks.
    pub bent: &'a mut [T],
}

impl<T: Summand> Kernel for ReduceCapped<'_, T> {
    type Output = State;
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) -> State {
        assert!(S::LEVEL != Level::Scalar, "blocks are capped before they come here");
        reduce::<S, T, true>(isa, self.row, self.cap, self.bent)
    }
}

/// One logit, with the bits that all have, and apart from the loops: few are asked for.
fn capped<T: Real>(level: Level, cap: Cap<T>, x: T) -> T {
    let mut y = [x];
    bend::cap(level, cap, Span::of(&[x]), SpanMut::of(&mut y), &mut []);
    y[0]
}

#[inline(always)]
fn reduce<S: Isa, T: Summand, const CAP: bool>(isa: S, job: Reduce<T>, cap: Cap<T>, bent: &mut [T]) -> State {
    let Reduce { scale, classes, mut x, mut t, dst, cold, references, known, mut wanted } = job;
    let setup = &Setup::<S, T>::new(isa, scale);
    let (lin, store) = (!CAP && !matches!(t, Input::None), dst.is_some());
    let dst = dst.unwrap_or(SpanMut::of(&mut []));
    let mut max = T::NEG_INF;
    let mut reference = Reference::of(max, &setup.exp1, setup.scale);
    let mut at = setup.lanes(reference, max);
    let (mut ties, mut arg, mut t_top) = (0.0, 0, Pair::default());
    let (mut rest, mut spread, mut t_rest) = (Wide::zero(isa), Wide::zero(isa), Wide::zero(isa));
    let (mut rest_extra, mut spread_extra, mut t_extra) = (Pair::default(), Pair::default(), Pair::default());
    // The maximum before it is capped; how far below 0 the least of the next block is, if known.
    let (mut highest, mut depth) = (T::NEG_INF, None);
    // The maxima of the next block's stretches, where they are known.
    let stretch = stretch::<S, T>();
    let mut peaks = [None; MOST_STRETCHES];
    let skims = T::DTYPE == DType::F32 && x.course(known).is_some();
    let mut index = 0;
    while index < classes.div_ceil(BLOCK) {
        let start = index * BLOCK;
        let (block, next) = x.block(isa, index, known);
        let dense = if CAP { Span::of(&[]) } else { t.block(isa, index, &mut Known::default()).0 };
        let candidate = match known.top.take() {
            Some(top) => top,
            None => block_max(isa, block).reduce_max(),
        };
        let (raw, mut candidate) = (candidate, candidate);
        if CAP {
            // Capping changes no order: what is below the maximum stays there.
            candidate = if highest <= raw { capped(S::LEVEL, cap, raw) } else { T::NEG_INF };
            highest = if highest < raw { raw } else { highest };
        }
        let tops = max <= candidate;
        if candidate > max {
            let moved = Reference::of(candidate, &setup.exp1, setup.scale);
            if max > T::NEG_INF {
                let factor = reference.factor(moved, setup.scale);
                // The old maxima join the rest, and every distance to the maximum grows.
                rest.scale(isa, factor);
                rest_extra.scale(factor);
                rest_extra.add(ties * exp_f64(isa, (max.to_f64() - moved.b) * setup.scale, moved.k));
                if lin {
                    t_extra.merge(t_top);
                    let mut weight = T::total(t_rest);
                    weight.merge(t_extra);
                    if weight.value() != 0.0 {
                        weight.scale(candidate.to_f64() - max.to_f64());
                        spread_extra.merge(weight);
                    }
                }
            } else if lin {
                // Everything so far was −inf: nothing in the rest, and targets there already made `spread` infinite.
                t_extra.merge(t_top);
            }
            t_top = Pair::default();
            ties = 0.0;
            max = candidate;
            reference = moved;
            at = setup.lanes(reference, max);
            arg = usize::MAX;
        }
        if store && let Some(known) = references.get_mut(index) {
            *known = reference;
        }
        while let [(class, at), others @ ..] = wanted.classes
            && *class < start + block.len()
        {
            let x = block.get(class - start);
            wanted.logits[*at] = if CAP { capped(S::LEVEL, cap, x) } else { x }.to_f64();
            wanted.classes = others;
        }
        let far = reference.b != 0.0 || max >= T::MAX;
        if lin && tops {
            let (first, weight) = find_top(isa, block, dense, at.top);
            arg = arg.min(start.saturating_add(first));
            t_top.merge(weight);
        }
        let usual = !(far || lin || CAP) && S::LEVEL != Level::Scalar;
        if skims && usual && !tops {
            // Up to the block with a class that is to be told, or the last one that has a whole one after it. (Of float64 it is not worth its code.)
            let until = wanted.classes.first().map_or(usize::MAX, |&(class, _)| class / BLOCK).min((classes / BLOCK).saturating_sub(1));
            if index < until {
                let Some(course) = x.course(known) else { unreachable!("asked before") };
                let (range, to) = ((index, until), (dst, cold));
                let (done, top) = match (course, store) {
                    (Course::Here(row), false) => skim::<S, T, _, false>(isa, &at, row, range, to, &mut rest),
                    (Course::Here(row), true) => skim::<S, T, _, true>(isa, &at, row, range, to, &mut rest),
                    (Course::F16(row), false) => skim::<S, T, _, false>(isa, &at, row, range, to, &mut rest),
                    (Course::F16(row), true) => skim::<S, T, _, true>(isa, &at, row, range, to, &mut rest),
                    (Course::Bf16(row), false) => skim::<S, T, _, false>(isa, &at, row, range, to, &mut rest),
                    (Course::Bf16(row), true) => skim::<S, T, _, true>(isa, &at, row, range, to, &mut rest),
                };
                if (done - index).is_multiple_of(2) {
                    // Of those that are made the next one is where this was.
                    known.turn = 1 - known.turn;
                }
                for known in references.iter_mut().take(done).skip(index) {
                    *known = reference;
                }
                (index, known.top) = (done, Some(top.reduce_max()));
                peaks = [None; MOST_STRETCHES];
                continue;
            }
        }
        let mut from = 0;
        let peaks_here = core::mem::replace(&mut peaks, [None; MOST_STRETCHES]);
        let single = T::DTYPE == DType::F32;
        let mut rare = far || tops || lin || S::LEVEL == Level::Scalar;
        // The loops want a next block that is as long as this one (or this one itself, where the answer is not used), and make it in the usual case only,
        // or apply its mask where exponentials are kept as well.
        let masks = store && !lin && !CAP && S::LEVEL != Level::Scalar && matches!(next, Ahead::Masked(_));
        let fused = next.block().len() >= block.len() && (masks || !((rare || CAP) && next.is_made()));
        let (ahead, seen) = if fused { (next, block.len()) } else { (Ahead::Here(next.instead(block)), 0) };
        let (mut top, mut lowest) = (Vf::<S, T>::splat(isa, T::NEG_INF), splat::<S, T>(isa, f64::INFINITY));
        // Capped in the loop if all of it is near 0, as most is; otherwise before it.
        let mut near = CAP && !far && (store || !tops);
        if near {
            let depth = if let Some(depth) = depth { depth } else { block_depth(isa, block) };
            near = cap.is_near(depth, raw);
        }
        let (mut block, mut factors) = (block, Span::of(&[]));
        if CAP && !near {
            // One kind of loop is enough for it.
            rare = true;
            let (y, slopes) = bent.split_at_mut(BLOCK);
            let (y, slopes) = (SpanMut::of(&mut y[..block.len()]), &mut slopes[..block.len()]);
            bend::cap(S::LEVEL, cap, block, y, slopes);
            (block, factors) = (y.read(), Span::of(slopes));
        }
        while from < block.len() {
            let n = stretch.min(block.len() - from);
            // Where only the maximum makes a block rare, just the stretch that holds it is.
            let rare = rare && !(usual && matches!(peaks_here.get(from / stretch), Some(&Some(peak)) if peak < max));
            let x = block.part(from, n);
            let t = if lin { dense.part(from, n) } else { dense };
            let to = if store { dst.part(start + from, n) } else { dst };
            let to = (to, cold.then(|| to.read().address(0).wrapping_add(LATER)));
            let sums = match (ahead, store) {
                (Ahead::Here(next), false) if lin => pass::<S, T, _, true, false, false, true>(isa, &at, x, next.part(from, n), t, cap, to),
                (Ahead::Here(next), true) if lin => pass::<S, T, _, true, true, false, true>(isa, &at, x, next.part(from, n), t, cap, to),
                (Ahead::Here(next), true) if CAP && near && tops => {
                    pass::<S, T, _, false, true, true, true>(isa, &at, x, next.part(from, n), t, cap, to)
                }
                (Ahead::Here(next), false) if CAP && near => {
                    pass::<S, T, _, false, false, true, false>(isa, &at, x, next.part(from, n), t, cap, to)
                }
                (Ahead::Here(next), true) if CAP && near => {
                    pass::<S, T, _, false, true, true, false>(isa, &at, x, next.part(from, n), t, cap, to)
                }
                (Ahead::Here(next), false) if rare => {
                    pass::<S, T, _, false, false, false, true>(isa, &at, x, next.part(from, n), t, cap, to)
                }
                (Ahead::Here(next), true) if rare => pass::<S, T, _, false, true, false, true>(isa, &at, x, next.part(from, n), t, cap, to),
                (Ahead::Here(next), false) if !CAP => {
                    pass::<S, T, _, false, false, false, false>(isa, &at, x, next.part(from, n), t, cap, to)
                }
                (Ahead::Here(next), true) if !CAP => {
                    pass::<S, T, _, false, true, false, false>(isa, &at, x, next.part(from, n), t, cap, to)
                }
                (Ahead::F16(next), false) if single && !CAP => {
                    pass::<S, T, _, false, false, false, false>(isa, &at, x, next.part(from, n), t, cap, to)
                }
                (Ahead::F16(next), true) if single && !CAP => {
                    pass::<S, T, _, false, true, false, false>(isa, &at, x, next.part(from, n), t, cap, to)
                }
                (Ahead::Bf16(next), false) if single && !CAP => {
                    pass::<S, T, _, false, false, false, false>(isa, &at, x, next.part(from, n), t, cap, to)
                }
                (Ahead::Bf16(next), true) if single && !CAP => {
                    pass::<S, T, _, false, true, false, false>(isa, &at, x, next.part(from, n), t, cap, to)
                }
                (Ahead::Backwards(next), false) if single && !CAP => {
                    pass::<S, T, _, false, false, false, false>(isa, &at, x, next.part(from, n), t, cap, to)
                }
                (Ahead::Backwards(next), true) if single && !CAP => {
                    pass::<S, T, _, false, true, false, false>(isa, &at, x, next.part(from, n), t, cap, to)
                }
                (Ahead::Masked(next), false) if single && !CAP => {
                    pass::<S, T, _, false, false, false, false>(isa, &at, x, next.part(from, n), t, cap, to)
                }
                (Ahead::Masked(next), true) if single && !CAP && rare => {
                    pass::<S, T, _, false, true, false, true>(isa, &at, x, next.part(from, n), t, cap, to)
                }
                (Ahead::Masked(next), true) if single && !CAP => {
                    pass::<S, T, _, false, true, false, false>(isa, &at, x, next.part(from, n), t, cap, to)
                }
                _ => unreachable!("only blocks of float32 are made here, and those to be capped are near 0 or rare"),
            };
            if fused
                && n == stretch
                && n < BLOCK
                && let Some(peak) = peaks.get_mut(from / stretch)
            {
                *peak = Some(sums.next.reduce_max());
            }
            top = sums.next.max(top);
            if CAP && near {
                lowest = sums.low.min(lowest);
            }
            ties += sums.ties as f64;
            T::add(isa, &mut rest, sums.rest);
            if lin {
                T::add(isa, &mut spread, sums.lin);
                T::add(isa, &mut t_rest, sums.t_rest);
            }
            from += n;
        }
        let left = next.max(isa, seen);
        let top = if fused { left.max(top) } else { left };
        known.top = (!next.block().is_empty()).then(|| top.reduce_max());
        depth = (CAP && near && fused && next.block().len() == seen).then(|| (-lowest).reduce_max());
        if CAP && store && !factors.is_empty() {
            let dst = dst.part(start, factors.len());
            bend::multiply(S::LEVEL, dst, factors);
        }
        index += 1;
    }
    rest_extra.merge(T::total(rest));
    if lin {
        spread_extra.merge(T::total(spread));
        t_extra.merge(T::total(t_rest));
    }
    State { max: max.to_f64(), ties, arg, reference, rest: rest_extra, lin: spread_extra, t_rest: t_extra, t_top: t_top.value() }
}
