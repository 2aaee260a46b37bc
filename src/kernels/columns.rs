//! Columns: vectors run across the rows of the batch, and each lane is a row of its own.
//!
//! The kernels work on a *tile* in scratch: class c of row j at `c * stride + j`. [`copy`](super::copy) fills it from whatever memory has,
//! [`reduce`] leaves the row states and the exponentials, `emit_*` turn them into results in place, and `copy` carries those back. So one set of
//! kernels serves NCHW, Fortran order and many rows of few classes, in and out of place.
//! With many classes a tile is filled again and again, [`BLOCK`] classes at a time: here only beside a dense target stream, otherwise in
//! [`sweep`](super::sweep).

use crate::array::{Columns, ColumnsMut, DType, Element, Float, Span, SpanMut, Vf};
use crate::simd::{Isa, Level, Mask, Vector};

use super::finish::Tile;
use super::math::{Exp, Split, SplitSum};
use super::real::{HIGH, Real};
use super::state::{Reference, Summand, Wide, splat};

/// Classes per block, and the most that are summed in one go.
pub const BLOCK: usize = 64;

/// Most classes whose vectors run across the rows although the classes are adjacent: transposing costs less than what a row costs by itself.
pub const MOST: usize = 32;

/// Classes per block of a row: as even as multiples of four allow, so that the last block is not a sliver.
pub fn block_of(classes: usize) -> usize {
    classes.div_ceil(classes.div_ceil(BLOCK).max(1)).next_multiple_of(4).min(BLOCK)
}

/// Vectors of columns whose states are carried from block to block together.
const GROUPS: usize = 16;

/// Where classes of columns stand in memory, to be asked for while others are computed with: a block is copied faster than memory can give it.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// Class 0 of the first column.
    pub base: *const u8,
    /// Bytes from class to class.
    pub class: isize,
    /// Bytes from column to column.
    pub column: isize,
    /// Bytes from there to something else that lies alike and is asked for, too, or 0.
    pub also: isize,
}

impl Origin {
    /// Asks for class `c` of column `j`, which need not be there.
    #[inline(always)]
    pub(super) fn ask<S: Isa>(self, isa: S, c: usize, j: usize) {
        self.ask_at(isa, self.base.wrapping_offset(c as isize * self.class).wrapping_offset(j as isize * self.column));
    }

    #[inline(always)]
    fn ask_at<S: Isa>(self, isa: S, at: *const u8) {
        isa.prefetch(at);
        if self.also != 0 {
            isa.prefetch(at.wrapping_offset(self.also));
        }
    }

    /// Asks for four vectors of class `c` from column `j` on.
    #[inline(always)]
    pub(super) fn ask_four<S: Isa, T: Float>(self, isa: S, c: usize, j: usize) {
        let at = self.base.wrapping_offset(c as isize * self.class).wrapping_offset(j as isize * self.column);
        for byte in (0..4 * Vf::<S, T>::LANES * size_of::<T>()).step_by(64) {
            self.ask_at(isa, at.wrapping_add(byte));
        }
    }
}

/// Runs of memory, class by class, that are asked for a line at a time: it is busy while the processor is.
#[derive(Clone, Copy, Debug)]
pub struct Runs {
    at: *const u8,
    also: isize,
    bytes: usize,
    class: isize,
    classes: usize,
    done: usize,
}

impl Runs {
    /// None.
    pub const NONE: Self = Self { at: core::ptr::null(), also: 0, bytes: 0, class: 0, classes: 0, done: 0 };

    /// `classes` runs of so many bytes, `class` bytes from each to the next, the first of them `at`. They need not be there.
    pub fn new(at: *const u8, bytes: usize, (class, classes): (isize, usize)) -> Self {
        Self { at, bytes, class, classes, ..Self::NONE }
    }

    /// And as many at the same distances elsewhere.
    #[must_use]
    pub fn and(self, at: *const u8) -> Self {
        Self { also: (at as isize).wrapping_sub(self.at as isize), ..self }
    }

    /// Asks for a line.
    #[inline(always)]
    pub(super) fn ask<S: Isa>(&mut self, isa: S) {
        if self.classes > 0 {
            self.ask_here(isa, 1);
        }
    }

    /// Asks for some lines.
    #[inline(always)]
    pub(super) fn ask_for<S: Isa>(&mut self, isa: S, mut lines: usize) {
        while self.classes > 0 && lines > 0 {
            let here = lines.min((self.bytes - self.done).div_ceil(64));
            self.ask_here(isa, here);
            lines -= here;
        }
    }

    #[inline(always)]
    fn ask_here<S: Isa>(&mut self, isa: S, lines: usize) {
        for line in 0..lines {
            let at = self.at.wrapping_add(self.done + 64 * line + 63);
            isa.prefetch(at);
            // The same line again where there is nothing else: a choice would cost as much.
            isa.prefetch(at.wrapping_offset(self.also));
        }
        self.done += 64 * lines;
        if self.done >= self.bytes {
            self.done = 0;
            self.at = self.at.wrapping_offset(self.class);
            self.classes -= 1;
        }
    }
}

/// A dense target stream of a block.
#[derive(Clone, Copy)]
pub enum Dense<'a, T> {
    /// None.
    None,
    /// The same for every row.
    Shared(Span<'a, T>),
    /// One value per class and row.
    Tile(Columns<'a, T>),
}

impl<T: Float> Dense<'_, T> {
    #[inline(always)]
    pub(super) fn load<S: Isa>(self, isa: S, c: usize, j: usize) -> Vf<S, T> {
        match self {
            Self::None => Vf::<S, T>::splat(isa, T::ZERO),
            Self::Shared(span) => Vf::<S, T>::splat(isa, span.get(c)),
            Self::Tile(columns) => columns.load_whole(isa, c, j),
        }
    }
    /// Whether there is one.
    #[inline(always)]
    pub fn is_some(self) -> bool {
        !matches!(self, Self::None)
    }
}

// --- reduce -------------------------------------------------------------------------------------------------------------------------

#[derive(Clone, Copy)]
struct State<S: Isa, T: Real> {
    max: Vf<S, T>,
    ties: Vf<S, T>,
    k: Vf<S, T>,
    b: Vf<S, T>,
    rest: Wide<S>,
}

/// The part of a state that only a dense target stream needs.
#[derive(Clone, Copy)]
struct Linear<S: Isa, T: Real> {
    arg: Vf<S, T>,
    lin: Wide<S>,
    t_rest: Wide<S>,
    t_top: Wide<S>,
}

/// Where blocks of classes come from.
pub trait Blocks<T> {
    /// Fills the tile, and that of the dense stream, with `count` classes from `first` on of the `width` rows from `from` on.
    fn fill(&mut self, x: &mut [T], dense: &mut [T], first: usize, count: usize, from: usize, width: usize);
}

/// What [`reduce`] reads and writes.
pub struct Reduce<'a, T> {
    /// 1 / temperature.
    pub scale: f64,
    /// Number of classes.
    pub classes: usize,
    /// Columns in all; up to a multiple of the vector more are computed.
    pub width: usize,
    /// Distance between the classes of a tile.
    pub stride: usize,
    /// The tile: already filled if the classes are one block, and where the exponentials go then.
    pub x: &'a mut [T],
    /// The dense stream: as the tile.
    pub dense: &'a mut [T],
    /// The dense stream that is the same for every row.
    pub shared: &'a [T],
    /// Whether there is a dense stream, and whether each row has its own.
    pub linear: (bool, bool),
    /// Whether exponentials are kept.
    pub store: bool,
    /// Supplies the blocks if there are several.
    pub blocks: &'a mut dyn Blocks<T>,
    /// Where they come from, if that is to be asked for.
    pub origin: Option<Origin>,
    /// To be asked for while the only block is computed with.
    pub ahead: Runs,
}

/// Reads every class into the row states of `tile`. The exponentials replace the logits of the tile, if they are to be kept.
#[inline(always)]
pub fn reduce<S: Isa, T: Summand>(isa: S, job: Reduce<T>, tile: &mut Tile) {
    let step = Vf::<S, T>::LANES;
    let Reduce { scale, classes, width, stride, x, dense, shared, linear, store, blocks, origin, mut ahead } = job;
    let exp = Exp::<Vf<S, T>>::new(isa, scale);
    let zero = splat::<S, T>(isa, 0.0);
    let empty = State { max: Vf::<S, T>::splat(isa, T::NEG_INF), ties: zero, k: exp.reference(zero), b: zero, rest: Wide::zero(isa) };
    let none = Linear::<S, T> { arg: zero, lin: Wide::zero(isa), t_rest: Wide::zero(isa), t_top: Wide::zero(isa) };
    let (lin, one_block) = (linear.0, classes <= BLOCK);
    let depth = block_of(classes);
    let width = width.next_multiple_of(step);
    let mut from = 0;
    while from < width {
        let wide = (GROUPS * step).min(width - from);
        // Blocks of many classes stand at the start of the tile, whichever columns they are of.
        let at = if one_block { from } else { 0 };
        let mut states: [State<S, T>; GROUPS] = [empty; GROUPS];
        let mut linears: [Linear<S, T>; GROUPS] = [none; GROUPS];
        let mut first = 0;
        loop {
            let count = depth.min(classes - first);
            if !one_block {
                blocks.fill(x, dense, first, count, from, wide);
            }
            let block = ColumnsMut::of(x, stride, count, stride);
            let stream = match linear {
                (false, _) => Dense::None,
                (true, false) => Dense::Shared(Span::of(&shared[first..first + count])),
                (true, true) => Dense::Tile(Columns::of(dense, stride, count, stride)),
            };
            // Two loops: each is short enough for the processor to have several groups in flight.
            for group in 0..wide / step {
                let (state, linear) = (&mut states[group], &mut linears[group]);
                raise::<S, T>(isa, &exp, scale, block.read(), first, at + group * step, state, lin.then_some(linear));
            }
            for group in 0..wide / step {
                match origin {
                    Some(origin) => (first + count..first + 2 * count).for_each(|c| origin.ask(isa, c, from + group * step)),
                    None => ahead.ask_for(isa, count),
                }
                let (state, linear, at) = (&mut states[group], &mut linears[group], at + group * step);
                if lin {
                    sum_block::<S, T, true>(isa, &exp, store, block, first, at, stream, state, linear);
                } else {
                    sum_block::<S, T, false>(isa, &exp, store, block, first, at, stream, state, linear);
                }
            }
            first += count;
            if first >= classes {
                break;
            }
        }
        for group in 0..wide / step {
            let (state, linear, j) = (&states[group], &linears[group], from + group * step);
            T::store_wide(isa, state.max, SpanMut::of(&mut tile.max), j);
            T::store_wide(isa, state.ties, SpanMut::of(&mut tile.ties), j);
            T::store_wide(isa, state.k, SpanMut::of(&mut tile.k), j);
            T::store_wide(isa, state.b, SpanMut::of(&mut tile.b), j);
            T::store_columns(isa, state.rest, SpanMut::of(&mut tile.rest), j);
            T::store_lost(isa, state.rest, SpanMut::of(&mut tile.lost), j);
            if lin {
                T::store_wide(isa, linear.arg, SpanMut::of(&mut tile.arg), j);
                T::store_columns(isa, linear.lin, SpanMut::of(&mut tile.lin), j);
                T::store_columns(isa, linear.t_rest, SpanMut::of(&mut tile.t_rest), j);
                T::store_columns(isa, linear.t_top, SpanMut::of(&mut tile.t_top), j);
            }
        }
        from += wide;
    }
}

/// Takes the maximum of a block into a state.
#[inline(always)]
fn raise<S: Isa, T: Summand>(
    isa: S,
    exp: &Exp<Vf<S, T>>,
    scale: f64,
    x: Columns<T>,
    first: usize,
    j: usize,
    state: &mut State<S, T>,
    linear: Option<&mut Linear<S, T>>,
) {
    let lowest = Vf::<S, T>::splat(isa, T::NEG_INF);
    let classes = x.classes();
    let mut tops = [state.max, lowest, lowest, lowest];
    let mut c = 0;
    while c + 4 <= classes {
        for (u, top) in tops.iter_mut().enumerate() {
            // In this order a NaN is passed over; it comes back through the sum.
            *top = x.load_whole(isa, c + u, j).max(*top);
        }
        c += 4;
    }
    while c < classes {
        tops[0] = x.load_whole(isa, c, j).max(tops[0]);
        c += 1;
    }
    let max = tops[0].max(tops[1]).max(tops[2].max(tops[3]));
    let (k, b) = reference::<S, T>(isa, exp, scale, max);
    if first > 0 && state.max.lt(max).any() {
        grow::<S, T>(isa, exp, scale, max, (k, b), state, linear);
    }
    (state.max, state.k, state.b) = (max, k, b);
}

/// What exponentials are relative to where `max` is the maximum: see [`Reference`].
#[inline(always)]
pub(super) fn reference<S: Isa, T: Summand>(isa: S, exp: &Exp<Vf<S, T>>, scale: f64, max: Vf<S, T>) -> (Vf<S, T>, Vf<S, T>) {
    let far = splat::<S, T>(isa, T::LIMIT.to_f64() / scale).lt(max.abs());
    let finite = origin::<S, T>(isa, max);
    // Lanes far off the grid, and those of −inf, must not reach the rounding of `reference`.
    let near = Vf::<S, T>::select(far, Vf::<S, T>::splat(isa, T::ZERO), finite);
    (exp.reference(near), finite - near)
}

/// The maximum, or what stands for it where it is infinite.
#[inline(always)]
fn origin<S: Isa, T: Summand>(isa: S, max: Vf<S, T>) -> Vf<S, T> {
    let none = max.eq(Vf::<S, T>::splat(isa, T::NEG_INF));
    Vf::<S, T>::select(none, Vf::<S, T>::splat(isa, T::ZERO), max.min(Vf::<S, T>::splat(isa, <T as Float>::MAX)))
}

/// Below it exponentials are zero: in terms of x − b.
#[inline(always)]
fn floor<S: Isa, T: Summand>(isa: S, scale: f64, max: Vf<S, T>, b: Vf<S, T>) -> Vf<S, T> {
    (origin::<S, T>(isa, max) - b) - splat::<S, T>(isa, T::CLAMP.to_f64() / scale)
}

/// Products of a dense stream that are added to an accumulator in the type of the logits. Equal ones round the same way at each addition, and sixteen
/// took a loss out of its 4 ULP.
const ADDITIONS: usize = 8;

/// Adds the exponentials of a block to a state whose maximum knows of it.
#[inline(always)]
fn sum_block<S: Isa, T: Summand, const LIN: bool>(
    isa: S,
    exp: &Exp<Vf<S, T>>,
    store: bool,
    x: ColumnsMut<T>,
    first: usize,
    j: usize,
    dense: Dense<T>,
    state: &mut State<S, T>,
    linear: &mut Linear<S, T>,
) {
    let (zero, whole) = (Vf::<S, T>::splat(isa, T::ZERO), Vf::<S, T>::splat(isa, T::WHOLE));
    let classes = x.read().classes();
    let State { max, k, b, .. } = *state;
    let of = Of { at: exp.split(k), max, origin: origin::<S, T>(isa, max), b };
    // Where registers are few, two accumulators: the constants need them more.
    let accumulators = if S::REGISTERS < 32 { 2 } else { 4 };
    let none = Part { lin: zero, t_rest: zero, t_top: zero };
    let (mut count, mut arg) = (whole, linear.arg);
    let mut c = 0;
    while c < classes {
        let end = classes.min(c + ADDITIONS * accumulators);
        let (mut rest, mut parts) = (SplitSum::zero(isa), [none; 4]);
        while c < end {
            macro_rules! add {
                ($u:expr) => {
                    if c + 4 <= end || c + $u < end {
                        let (part, number) = (&mut parts[$u % accumulators], (first + c + $u) as f64);
                        add_class::<S, T, LIN>(isa, &of, store, x, (c + $u, j), dense, number, &mut rest, part, (&mut count, &mut arg))
                    } else {
                        zero
                    }
                };
            }
            let mut four = [zero; 4];
            if LIN && S::LEVEL != Level::Scalar {
                // As a loop it would be too long for the compiler to unroll, and the accumulators in memory.
                four = [add!(0), add!(1), add!(2), add!(3)];
            } else {
                for (u, q) in four.iter_mut().enumerate() {
                    *q = add!(u);
                }
            }
            rest.add(four);
            c += 4;
        }
        T::add(isa, &mut state.rest, rest.sum);
        T::add(isa, &mut state.rest, rest.little);
        if LIN {
            let [p, q, r, s] = parts;
            T::add(isa, &mut linear.lin, (p.lin + q.lin) + (r.lin + s.lin));
            T::add(isa, &mut linear.t_rest, (p.t_rest + q.t_rest) + (r.t_rest + s.t_rest));
            T::add(isa, &mut linear.t_top, (p.t_top + q.t_top) + (r.t_top + s.t_top));
        }
    }
    linear.arg = arg;
    state.ties = state.ties + (splat::<S, T>(isa, T::WHOLE.to_f64() + classes as f64) - count);
}

/// What the classes of some columns are relative to.
struct Of<V: Vector> {
    at: Split<V>,
    max: V,
    origin: V,
    b: V,
}

/// Sums of a dense stream, in the type of the logits.
#[derive(Clone, Copy)]
struct Part<V> {
    lin: V,
    t_rest: V,
    t_top: V,
}

/// Adds one class, the `number`th of its row, but for the q that it returns.
#[inline(always)]
fn add_class<S: Isa, T: Summand, const LIN: bool>(
    isa: S,
    of: &Of<Vf<S, T>>,
    store: bool,
    x: ColumnsMut<T>,
    (c, j): (usize, usize),
    dense: Dense<T>,
    number: f64,
    rest: &mut SplitSum<Vf<S, T>>,
    part: &mut Part<Vf<S, T>>,
    (count, arg): (&mut Vf<S, T>, &mut Vf<S, T>),
) -> Vf<S, T> {
    let v = x.read().load_whole(isa, c, j);
    // b is 0 except where the maximum is off the grid: then x − b is exact or dwarfed by x's own spacing. (Infinity, which is the maximum and not summed, would
    // leave a NaN all the same; a NaN passes.)
    let (q, s) = of.at.parts(of.origin.min(v) - of.b);
    if store {
        x.store_whole(isa, c, j, Split::whole(q, s));
    }
    // Unordered: a NaN is not the maximum and so reaches the sum.
    let below = v.ne(of.max);
    *count = count.count_where(below);
    if LIN {
        let top = v.eq(of.max);
        let w = dense.load(isa, c, j);
        part.lin = part.lin.add_where(w.ne(Vf::<S, T>::splat(isa, T::ZERO)), w * (of.origin - v));
        part.t_rest = part.t_rest.add_where(below, w);
        part.t_top = part.t_top.add_where(top, w);
        *arg = Vf::<S, T>::select(top, splat::<S, T>(isa, number), *arg);
    }
    rest.take(below, (q, s))
}

/// The factors of [`rebase`], in two steps, where an offset changes: rare, and the vector exponential cannot take a difference of two references off
/// the grid. The references are k and b before, k and b after.
#[inline(never)]
fn far_factors(scale: f64, references: &[[f64; 16]; 4], factors: &mut [[f64; 16]; 2]) {
    for lane in 0..16 {
        let [from_k, from_b, to_k, to_b] = references.map(|lanes| lanes[lane]);
        if from_b != to_b {
            let (from, to) = (Reference { k: from_k, b: from_b }, Reference { k: to_k, b: to_b });
            // Only of sums that are empty yet the old reference may be lower.
            let lower = (from_b - to_b) * scale > (to_k - from_k) * core::f64::consts::LN_2;
            let factor = if lower { 1.0 } else { from.factor(to, scale).min(1.0) };
            // 2^-100
            let step = if factor < 7.9e-31 { f64::from_bits((1023 - 100) << 52) } else { 1.0 };
            (factors[0][lane], factors[1][lane]) = (factor / step, step);
        }
    }
}

/// Moves sums from one reference to another that is not lower.
#[inline(always)]
pub(super) fn rebase<S: Isa, T: Summand>(
    isa: S,
    scale: f64,
    (from_k, from_b): (Vf<S, T>, Vf<S, T>),
    (to_k, to_b): (Vf<S, T>, Vf<S, T>),
    rest: &mut Wide<S>,
) {
    // In two steps: many classes far below the new maximum may count together, though the factor itself is subnormal.
    let (zero, one, magic) = (Vf::<S, T>::splat(isa, T::ZERO), Vf::<S, T>::splat(isa, T::ONE), Vf::<S, T>::splat(isa, T::MAGIC));
    let shift = zero.min(from_k - to_k);
    let half = (shift * splat::<S, T>(isa, 0.5) + magic) - magic;
    let mut by = [one.scale2(half), one.scale2(shift - half)];
    if from_b.ne(to_b).any() {
        let mut references = [[0.0; 16]; 4];
        for (lanes, v) in references.iter_mut().zip([from_k, from_b, to_k, to_b]) {
            T::store_wide(isa, v, SpanMut::of(lanes), 0);
        }
        let mut factors = [[0.0; 16]; 2];
        T::store_wide(isa, by[0], SpanMut::of(&mut factors[0]), 0);
        T::store_wide(isa, by[1], SpanMut::of(&mut factors[1]), 0);
        far_factors(scale, &references, &mut factors);
        by = [T::load_wide(isa, Span::of(&factors[0]), 0), T::load_wide(isa, Span::of(&factors[1]), 0)];
    }
    T::scale_columns(isa, rest, by[0]);
    T::scale_columns(isa, rest, by[1]);
}

/// Moves a state to a larger maximum: what was the maximum joins the rest.
#[inline(always)]
fn grow<S: Isa, T: Summand>(
    isa: S,
    exp: &Exp<Vf<S, T>>,
    scale: f64,
    max: Vf<S, T>,
    (k, b): (Vf<S, T>, Vf<S, T>),
    state: &mut State<S, T>,
    linear: Option<&mut Linear<S, T>>,
) {
    let (zero, one) = (Vf::<S, T>::splat(isa, T::ZERO), Vf::<S, T>::splat(isa, T::ONE));
    let grew = state.max.lt(max);
    let empty = state.max.eq(Vf::<S, T>::splat(isa, T::NEG_INF));
    rebase::<S, T>(isa, scale, (state.k, state.b), (k, b), &mut state.rest);
    let old = exp.exp2(floor::<S, T>(isa, scale, max, b).max(state.max - b), k);
    T::add(isa, &mut state.rest, Vf::<S, T>::select(grew, state.ties * old, zero));
    state.ties = Vf::<S, T>::select(grew, zero, state.ties);
    if let Some(linear) = linear {
        let (mut joined, stays) = (linear.t_top, Vf::<S, T>::select(grew, zero, one));
        T::scale_columns(isa, &mut joined, Vf::<S, T>::select(grew, one, zero));
        T::scale_columns(isa, &mut linear.t_top, stays);
        linear.t_rest.merge(joined);
        let mut totals = [0.0; 16];
        T::store_columns(isa, linear.t_rest, SpanMut::of(&mut totals), 0);
        let weight = T::load_wide(isa, Span::of(&totals), 0);
        let moved = Vf::<S, T>::select(empty, zero, (max - state.max) * weight);
        let moved = Vf::<S, T>::select(weight.eq(zero), zero, moved);
        T::add(isa, &mut linear.lin, Vf::<S, T>::select(grew, moved, zero));
    }
}

// --- emit ---------------------------------------------------------------------------------------------------------------------------

/// What keeps probabilities at 1, and makes a class that has everything exactly 1: the product has the error of two exponentials.
#[derive(Clone, Copy)]
pub(super) struct Ceiling<'t, V> {
    tile: &'t Tile,
    most: V,
}

impl<'t, V: Vector> Ceiling<'t, V>
where
    V::Elem: Summand + Float<V<V::Isa> = V>,
{
    #[inline(always)]
    pub(super) fn new(isa: V::Isa, tile: &'t Tile, most: f64) -> Self {
        Self { tile, most: V::splat(isa, V::Elem::from_f64(most)) }
    }
    /// Above which the results of the columns from `j` on are the most there is.
    #[inline(always)]
    pub(super) fn above(self, isa: V::Isa, j: usize) -> V {
        // Without a cap `top` is the gradient at the maximum.
        let top = V::Elem::load_wide(isa, Span::of(&self.tile.top), j);
        V::select(self.most.eq(V::splat(isa, V::Elem::ONE)), top, self.most)
    }
    #[inline(always)]
    pub(super) fn cut(self, above: V, v: V) -> V {
        V::select(above.lt(v), self.most, v)
    }
}

/// Replaces the stored exponentials of a tile by `a·e − g·t`.
#[inline(always)]
pub fn emit_stored<S: Isa, T: Summand>(isa: S, x: ColumnsMut<T>, width: usize, dense: Dense<T>, tile: &Tile, most: f64) {
    let (e, ceiling) = (x.read(), Ceiling::new(isa, tile, most));
    for j in (0..width).step_by(Vf::<S, T>::LANES) {
        let a = T::load_wide(isa, Span::of(&tile.a), j);
        if dense.is_some() {
            let g = T::load_wide(isa, Span::of(&tile.slope), j);
            for c in 0..e.classes() {
                x.store_whole(isa, c, j, e.load_whole(isa, c, j) * a - dense.load(isa, c, j) * g);
            }
        } else {
            let above = ceiling.above(isa, j);
            for c in 0..e.classes() {
                x.store_whole(isa, c, j, ceiling.cut(above, e.load_whole(isa, c, j) * a));
            }
        }
    }
}

/// Takes a power of two from the exponentials of columns whose factor a alone would leave the normal numbers of the type, and gives it to a.
/// If they are not `stored`, their reference is moved. Where a, or the slope beside a `dense` stream, is too large, it is taken from what will be the
/// results: whether there are such columns, for [`lift`].
#[must_use]
pub fn balance<T: Summand>(stored: Option<ColumnsMut<T>>, width: usize, dense: bool, tile: &mut Tile) -> bool {
    let tiny = if T::DTYPE == DType::F64 { 1e-250 } else { 1e-30 };
    let bias = T::BIAS.to_f64();
    let mut high = false;
    for j in 0..width {
        let (a, slope) = (tile.a[j].abs(), if dense { tile.slope[j].abs() } else { 0.0 });
        tile.lift[j] = 1.0;
        if T::DTYPE == DType::F32 && (HIGH..f64::INFINITY).contains(&a.max(slope)) {
            // A power of two that leaves room for a maximum above 1, and a stream.
            let by = f64::from_bits(a.max(slope).to_bits() >> 52 << 52) * 2.0_f64.powi(-60);
            tile.a[j] /= by;
            tile.slope[j] /= by;
            tile.lift[j] = by;
            high = true;
            continue;
        }
        if a == 0.0 || a.is_nan() || a >= tiny {
            continue;
        }
        tile.a[j] *= bias.exp2();
        if let Some(x) = stored {
            for c in 0..x.read().classes() {
                x.set(c, j, T::from_f64(x.read().get(c, j).to_f64() * (-bias).exp2()));
            }
        } else {
            tile.k[j] += bias;
        }
    }
    high
}

/// Gives results what [`balance`] took from them.
#[inline(never)]
pub fn lift<T: Summand>(x: ColumnsMut<T>, tile: &Tile) {
    for (j, &by) in tile.lift.iter().enumerate().take(x.read().width()).filter(|&(_, &by)| by != 1.0) {
        for c in 0..x.read().classes() {
            x.set(c, j, T::from_f64(x.read().get(c, j).to_f64() * by));
        }
    }
}
