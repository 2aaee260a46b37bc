//! Columns: rows of the batch are adjacent, vectors run across them, and each lane is a row of its own.
//!
//! A tile is read in blocks of [`BLOCK`] classes: once for the maxima, once more, from L1, for the exponentials. Tiles serve NCHW and Fortran order
//! in place, and everything with few classes through a transposed copy.

use crate::array::{Columns, ColumnsMut, Element, Float, Span, SpanMut, Vf};
use crate::simd::{Isa, Mask, Vector};

use super::finish::Tile;
use super::math::{Exp, Real};
use super::state::{Reference, Summand, Wide, splat};

/// Classes per block, and the most that are summed in one go.
pub const BLOCK: usize = 64;

/// Vectors of columns that share one sweep over the classes: long enough runs for the prefetcher in Fortran order.
const GROUPS: usize = 4;

/// A dense target stream of a tile.
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
    fn load<S: Isa>(self, isa: S, c: usize, j: usize) -> Vf<S, T> {
        match self {
            Self::None => Vf::<S, T>::splat(isa, T::ZERO),
            Self::Shared(span) => Vf::<S, T>::splat(isa, span.get(c)),
            Self::Tile(columns) => columns.load(isa, c, j),
        }
    }
    /// Whether there is one.
    #[inline(always)]
    pub fn is_some(self) -> bool {
        !matches!(self, Self::None)
    }
}

#[derive(Clone, Copy)]
struct State<S: Isa, T: Real> {
    max: Vf<S, T>,
    ties: Vf<S, T>,
    arg: Vf<S, T>,
    k: Vf<S, T>,
    b: Vf<S, T>,
    rest: Wide<S>,
    lin: Wide<S>,
    t_rest: Wide<S>,
    t_top: Wide<S>,
}

#[derive(Clone, Copy)]
struct Block<V> {
    max: V,
    origin: V,
    floor: V,
    k: V,
    b: V,
}

/// The exponentials of one block of classes of one vector of columns.
#[inline(always)]
fn pass<S: Isa, E: Element<Acc = T>, T: Summand, const LIN: bool, const STORE: bool, const FAR: bool>(
    isa: S,
    exp: &Exp<Vf<S, T>>,
    at: &Block<Vf<S, T>>,
    x: Columns<E>,
    classes: (usize, usize),
    j: usize,
    dense: Dense<T>,
    e: ColumnsMut<T>,
    state: &mut State<S, T>,
) {
    let zero = Vf::<S, T>::splat(isa, T::ZERO);
    let one = Vf::<S, T>::splat(isa, T::ONE);
    let (mut rest, mut lin, mut t_rest, mut t_top) = ([zero; 4], [zero; 4], [zero; 4], [zero; 4]);
    let mut ties = [zero; 2];
    let mut c = classes.0;
    while c < classes.1 {
        for u in 0..4 {
            if c + u >= classes.1 {
                break;
            }
            let v = x.load(isa, c + u, j);
            let y = if FAR { v - at.b } else { v };
            let exponential = exp.exp2(at.floor.max(y), at.k);
            if STORE {
                e.store(isa, c + u, j, exponential);
            }
            let below = v.ne(at.max);
            rest[u] = rest[u].add_where(below, exponential);
            let top = v.eq(at.max);
            ties[u & 1] = ties[u & 1].add_where(top, one);
            if LIN {
                let w = dense.load(isa, c + u, j);
                lin[u] = lin[u].add_where(w.ne(zero), w * (at.origin - v));
                t_rest[u] = t_rest[u].add_where(below, w);
                t_top[u] = t_top[u].add_where(top, w);
                state.arg = Vf::<S, T>::select(top, Vf::<S, T>::splat(isa, T::from_f64((c + u) as f64)), state.arg);
            }
        }
        c += 4;
    }
    state.ties = state.ties + (ties[0] + ties[1]);
    T::add(isa, &mut state.rest, (rest[0] + rest[1]) + (rest[2] + rest[3]));
    if LIN {
        T::add(isa, &mut state.lin, (lin[0] + lin[1]) + (lin[2] + lin[3]));
        T::add(isa, &mut state.t_rest, (t_rest[0] + t_rest[1]) + (t_rest[2] + t_rest[3]));
        T::add(isa, &mut state.t_top, (t_top[0] + t_top[1]) + (t_top[2] + t_top[3]));
    }
}

/// Reads every class of the columns of `x` into the row states of `tile`. With STORE the exponentials go to `e`
/// (at most [`BLOCK`] classes, so that one reference serves them all); `e` may be `x` itself.
#[inline(always)]
pub fn reduce<S: Isa, E: Element<Acc = T>, T: Summand, const LIN: bool, const STORE: bool>(
    isa: S,
    scale: f64,
    x: Columns<E>,
    dense: Dense<T>,
    e: ColumnsMut<T>,
    tile: &mut Tile,
) {
    let step = Vf::<S, T>::LANES;
    let exp = Exp::<Vf<S, T>>::new(isa, scale);
    let zero = splat::<S, T>(isa, 0.0);
    let lowest = Vf::<S, T>::splat(isa, T::NEG_INF);
    let largest = Vf::<S, T>::splat(isa, <T as Float>::MAX);
    let clamp = splat::<S, T>(isa, T::CLAMP.to_f64() / scale);
    let limit = splat::<S, T>(isa, T::LIMIT.to_f64() / scale);
    let k0 = exp.reference(zero);
    let empty = State::<S, T> {
        max: lowest,
        ties: zero,
        arg: zero,
        k: k0,
        b: zero,
        rest: Wide::zero(isa),
        lin: Wide::zero(isa),
        t_rest: Wide::zero(isa),
        t_top: Wide::zero(isa),
    };
    let mut j0 = 0;
    while j0 < x.width() {
        let groups = GROUPS.min((x.width() - j0).div_ceil(step));
        let mut states: [State<S, T>; GROUPS] = [empty; GROUPS];
        let mut c0 = 0;
        while c0 < x.classes() {
            let c1 = x.classes().min(c0 + BLOCK);
            for (group, state) in states[..groups].iter_mut().enumerate() {
                let state: &mut State<S, T> = state;
                let j = j0 + group * step;
                let mut max = [state.max, lowest];
                let mut c = c0;
                while c < c1 {
                    max[0] = x.load(isa, c, j).max(max[0]);
                    if c + 1 < c1 {
                        max[1] = x.load(isa, c + 1, j).max(max[1]);
                    }
                    c += 2;
                }
                let max = max[0].max(max[1]);
                let far = limit.lt(max.abs());
                let none = max.eq(lowest);
                let finite = Vf::<S, T>::select(none, zero, max.min(largest));
                // Lanes far off the grid, and those of −inf, must not reach the rounding of `reference`.
                let near = Vf::<S, T>::select(far, zero, finite);
                let k = exp.reference(near);
                let b = Vf::<S, T>::select(none, zero, finite - near);
                let at = Block { max, origin: finite, floor: (finite - b) - clamp, k, b };
                let any_far = b.ne(zero).any();
                if c0 > 0 && state.max.lt(max).any() {
                    grow::<S, T, LIN>(isa, &exp, scale, &at, state);
                }
                (state.max, state.k, state.b) = (max, k, b);
                let classes = (c0, c1);
                if any_far {
                    pass::<S, E, T, LIN, STORE, true>(isa, &exp, &at, x, classes, j, dense, e, state);
                } else {
                    pass::<S, E, T, LIN, STORE, false>(isa, &exp, &at, x, classes, j, dense, e, state);
                }
            }
            c0 = c1;
        }
        for (group, state) in states[..groups].iter().enumerate() {
            let j = j0 + group * step;
            T::store_wide(isa, state.max, SpanMut::of(&mut tile.max), j);
            T::store_wide(isa, state.ties, SpanMut::of(&mut tile.ties), j);
            T::store_wide(isa, state.k, SpanMut::of(&mut tile.k), j);
            T::store_wide(isa, state.b, SpanMut::of(&mut tile.b), j);
            T::store_columns(isa, state.rest, SpanMut::of(&mut tile.rest), j);
            if LIN {
                T::store_wide(isa, state.arg, SpanMut::of(&mut tile.arg), j);
                T::store_columns(isa, state.lin, SpanMut::of(&mut tile.lin), j);
                T::store_columns(isa, state.t_rest, SpanMut::of(&mut tile.t_rest), j);
                T::store_columns(isa, state.t_top, SpanMut::of(&mut tile.t_top), j);
            }
        }
        j0 += groups * step;
    }
}

/// Moves a state to a larger maximum: what was the maximum joins the rest.
#[inline(always)]
fn grow<S: Isa, T: Summand, const LIN: bool>(isa: S, exp: &Exp<Vf<S, T>>, scale: f64, at: &Block<Vf<S, T>>, state: &mut State<S, T>) {
    let zero = Vf::<S, T>::splat(isa, T::ZERO);
    let lowest = Vf::<S, T>::splat(isa, T::NEG_INF);
    let grew = state.max.lt(at.max);
    let empty = state.max.eq(lowest);
    if state.b.ne(zero).any() || at.b.ne(zero).any() {
        // Rare, and the vector exponential cannot take a difference of two references off the grid.
        let mut factors = [0.0; 16];
        let (k, b, to_k, to_b) = (
            crate::array::lanes::<S, T>(state.k),
            crate::array::lanes::<S, T>(state.b),
            crate::array::lanes::<S, T>(at.k),
            crate::array::lanes::<S, T>(at.b),
        );
        for lane in 0..Vf::<S, T>::LANES {
            let from = Reference { k: k[lane].to_f64(), b: b[lane].to_f64() };
            let to = Reference { k: to_k[lane].to_f64(), b: to_b[lane].to_f64() };
            factors[lane] = from.factor(to, scale).min(1.0);
        }
        T::scale_columns(isa, &mut state.rest, T::load_wide(isa, Span::of(&factors), 0));
    } else {
        let shift = zero.min(state.k - at.k);
        T::scale_columns(isa, &mut state.rest, Vf::<S, T>::splat(isa, T::ONE).scale2(shift));
    }
    let old = exp.exp2(at.floor.max(state.max - at.b), at.k);
    let joined = Vf::<S, T>::select(grew, state.ties * old, zero);
    T::add(isa, &mut state.rest, joined);
    state.ties = Vf::<S, T>::select(grew, zero, state.ties);
    if LIN {
        let one = Vf::<S, T>::splat(isa, T::ONE);
        let (mut joined, stays) = (state.t_top, Vf::<S, T>::select(grew, zero, one));
        T::scale_columns(isa, &mut joined, Vf::<S, T>::select(grew, one, zero));
        T::scale_columns(isa, &mut state.t_top, stays);
        state.t_rest.merge(joined);
        let mut totals = [0.0; 16];
        T::store_columns(isa, state.t_rest, SpanMut::of(&mut totals), 0);
        let weight = T::load_wide(isa, Span::of(&totals), 0);
        let moved = Vf::<S, T>::select(empty, zero, (at.max - state.max) * weight);
        let moved = Vf::<S, T>::select(weight.eq(zero), zero, moved);
        T::add(isa, &mut state.lin, Vf::<S, T>::select(grew, moved, zero));
    }
}

/// Writes `a·e − g·t` from the exponentials that `reduce` stored.
#[inline(always)]
pub fn emit_stored<S: Isa, E: Element<Acc = T>, T: Summand>(isa: S, e: Columns<T>, dense: Dense<T>, tile: &Tile, dst: ColumnsMut<E>) {
    let step = Vf::<S, T>::LANES;
    for j in (0..e.width()).step_by(step) {
        let a = T::load_wide(isa, Span::of(&tile.a), j);
        if dense.is_some() {
            let g = T::load_wide(isa, Span::of(&tile.g), j);
            for c in 0..e.classes() {
                dst.store(isa, c, j, e.load(isa, c, j) * a - dense.load(isa, c, j) * g);
            }
        } else {
            for c in 0..e.classes() {
                dst.store(isa, c, j, e.load(isa, c, j) * a);
            }
        }
    }
}

/// Writes `a·exp(x − reference) − g·t`, class by class in blocks of columns; `dst` may be `x`.
#[inline(always)]
pub fn emit_exp<S: Isa, E: Element<Acc = T>, O: Element<Acc = T>, T: Summand>(
    isa: S,
    scale: f64,
    x: Columns<E>,
    dense: Dense<T>,
    tile: &Tile,
    dst: ColumnsMut<O>,
) {
    let step = Vf::<S, T>::LANES;
    let exp = Exp::<Vf<S, T>>::new(isa, scale);
    let clamp = splat::<S, T>(isa, T::CLAMP.to_f64() / scale);
    let mut j0 = 0;
    while j0 < x.width() {
        let groups = GROUPS.min((x.width() - j0).div_ceil(step));
        for c in 0..x.classes() {
            for group in 0..groups {
                let j = j0 + group * step;
                let b = T::load_wide(isa, Span::of(&tile.b), j);
                let max = T::load_wide(isa, Span::of(&tile.max), j);
                let floor = (max - b) - clamp;
                let k = T::load_wide(isa, Span::of(&tile.k), j);
                let a = T::load_wide(isa, Span::of(&tile.a), j);
                let y = floor.max(x.load(isa, c, j) - b);
                let mut out = exp.exp2(y, k) * a;
                if dense.is_some() {
                    out = out - dense.load(isa, c, j) * T::load_wide(isa, Span::of(&tile.g), j);
                }
                dst.store(isa, c, j, out);
            }
        }
        j0 += groups * step;
    }
}

/// Writes `(x − max)·scale − log_sum`.
#[inline(always)]
pub fn emit_log<S: Isa, E: Element<Acc = T>, O: Element<Acc = T>, T: Summand>(
    isa: S,
    scale: f64,
    x: Columns<E>,
    tile: &Tile,
    dst: ColumnsMut<O>,
) {
    let step = Vf::<S, T>::LANES;
    let scale = Vf::<S, T>::splat(isa, T::from_f64(scale));
    let mut j0 = 0;
    while j0 < x.width() {
        let groups = GROUPS.min((x.width() - j0).div_ceil(step));
        for c in 0..x.classes() {
            for group in 0..groups {
                let j = j0 + group * step;
                let max = T::load_wide(isa, Span::of(&tile.max), j);
                let log_sum = T::load_wide(isa, Span::of(&tile.log_sum), j);
                dst.store(isa, c, j, (x.load(isa, c, j) - max) * scale - log_sum);
            }
        }
        j0 += groups * step;
    }
}
