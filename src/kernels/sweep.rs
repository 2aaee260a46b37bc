//! Many classes of columns: read once, a few classes of many columns at a time, as far as possible in the order memory has them.
//!
//! A column has a running maximum. Of that and a new class the larger one is the maximum from then on and the other one joins the sum, which so never
//! holds the maximum. (Others that are equal to it do join: nobody counts them.) Exponentials are relative to a maximum of earlier, which is given up for
//! a later one when that has outgrown it.

use crate::array::{Columns, ColumnsMut, DType, Float, Span, SpanMut, Vf};
use crate::simd::{Isa, Mask, Vector};

use super::columns::{Ceiling, Dense, Origin, rebase, reference};
use super::finish::Tile;
use super::math::Exp;
use super::state::{Summand, Wide, splat};

/// Classes that a column takes in at once.
pub const STEP: usize = 32;

/// Nats that a maximum may be above the one that exponentials are relative to: sums of [`STEP`] of them do not overflow.
const RANGE: f64 = 44.0;

/// Vectors that the state of a group of columns takes, and that are kept for its results.
const FIELDS: usize = 5;

/// Numbers of the type of the logits, and of float64, for the states of some columns, or for what becomes of their logits.
pub const fn room(columns: usize) -> [usize; 2] {
    // Not all groups are whole.
    [FIELDS * (columns + 32), 2 * (columns + 32)]
}

/// The states of some columns on their way from class to class: a group of them after another.
pub struct Running<'a, T> {
    /// [`room`].
    pub lanes: &'a mut [T],
    /// Likewise.
    pub sums: &'a mut [f64],
}

impl<T> Running<'_, T> {
    #[inline(always)]
    fn both(&self) -> (&[T], &[f64]) {
        (self.lanes, self.sums)
    }
}

#[derive(Clone, Copy)]
struct State<S: Isa, T: Float> {
    max: Vf<S, T>,
    /// What exponentials are relative to, as in [`super::state::Reference`].
    k: Vf<S, T>,
    b: Vf<S, T>,
    /// Above it a maximum is too large for that.
    bound: Vf<S, T>,
    rest: Wide<S>,
}

impl<S: Isa, T: Summand> State<S, T> {
    /// Of columns of which nothing is known.
    #[inline(always)]
    fn none(isa: S, exp: &Exp<Vf<S, T>>) -> Self {
        let (none, zero) = (Vf::<S, T>::splat(isa, T::NEG_INF), splat::<S, T>(isa, 0.0));
        Self { max: none, k: exp.reference(zero), b: zero, bound: none, rest: Wide::zero(isa) }
    }

    #[inline(always)]
    fn load(isa: S, (lanes, sums): (&[T], &[f64]), group: usize) -> Self {
        let (lanes, sums) = (Span::of(lanes), Span::of(sums));
        let (step, at, sum) = (Vf::<S, T>::LANES, group * FIELDS * Vf::<S, T>::LANES, group * 2 * S::F64::LANES);
        Self {
            max: lanes.load(isa, at),
            k: lanes.load(isa, at + step),
            b: lanes.load(isa, at + 2 * step),
            bound: lanes.load(isa, at + 3 * step),
            rest: Wide::of(sums.load(isa, sum), sums.load(isa, sum + S::F64::LANES)),
        }
    }

    /// What changes with every class.
    #[inline(always)]
    fn store(self, isa: S, running: &mut Running<T>, group: usize) {
        let (lanes, sums) = (SpanMut::of(&mut *running.lanes), SpanMut::of(&mut *running.sums));
        let sum = group * 2 * S::F64::LANES;
        lanes.store(isa, group * FIELDS * Vf::<S, T>::LANES, self.max);
        let (a, b) = self.rest.parts();
        sums.store(isa, sum, a);
        sums.store(isa, sum + S::F64::LANES, b);
    }

    /// What changes hardly ever.
    #[inline(always)]
    fn store_reference(self, isa: S, running: &mut Running<T>, group: usize) {
        let (lanes, step) = (SpanMut::of(&mut *running.lanes), Vf::<S, T>::LANES);
        let at = group * FIELDS * step;
        lanes.store(isa, at + step, self.k);
        lanes.store(isa, at + 2 * step, self.b);
        lanes.store(isa, at + 3 * step, self.bound);
    }

    /// Takes in a new maximum; `below` is what it leaves to be summed. Whether the reference moves.
    #[inline(always)]
    fn raise(&mut self, isa: S, exp: &Exp<Vf<S, T>>, scale: f64, max: Vf<S, T>, below: &mut [[Vf<S, T>; 4]; STEP / 4]) -> bool {
        self.max = max;
        let grew = self.bound.lt(max);
        if grew.any() {
            let (k, b) = reference::<S, T>(isa, exp, scale, max);
            let (k, b) = (Vf::<S, T>::select(grew, k, self.k), Vf::<S, T>::select(grew, b, self.b));
            rebase::<S, T>(isa, scale, (self.k, self.b), (k, b), &mut self.rest);
            // Infinity is always above.
            let bound = Vf::<S, T>::splat(isa, <T as Float>::MAX).min(max + splat::<S, T>(isa, RANGE / scale));
            (self.k, self.b, self.bound) = (k, b, Vf::<S, T>::select(grew, bound, self.bound));
            if splat::<S, T>(isa, f64::INFINITY).eq(max).any() {
                for below in below.as_flattened_mut() {
                    *below = finite::<S, T>(isa, *below);
                }
            }
            return true;
        }
        false
    }
}

/// Without infinity, which is the maximum, and not counted.
#[inline(always)]
fn finite<S: Isa, T: Float>(isa: S, x: Vf<S, T>) -> Vf<S, T> {
    let none = Vf::<S, T>::splat(isa, T::NEG_INF);
    Vf::<S, T>::select(x.eq(-none), none, x)
}

/// Of four classes and the maximum so far the largest; the others to `below`.
#[inline(always)]
fn sort<S: Isa, T: Float>(isa: S, x: Columns<T>, c: usize, max: Vf<S, T>, below: &mut [Vf<S, T>; 4]) -> Vf<S, T> {
    let x = [x.load_whole(isa, c, 0), x.load_whole(isa, c + 1, 0), x.load_whole(isa, c + 2, 0), x.load_whole(isa, c + 3, 0)];
    // In these orders a NaN is never lost, nor the maximum.
    let (a, b) = (x[0].max(x[1]), x[2].max(x[3]));
    let top = a.max(b);
    *below = [x[1].min(x[0]), x[3].min(x[2]), b.min(a), max.min(top)];
    top.max(max)
}

/// What is read next, line by line in the order of memory.
#[derive(Clone, Copy)]
struct Ahead {
    at: usize,
    end: usize,
    run: usize,
    jump: usize,
    /// Lines that four vectors are read from.
    lines: usize,
}

impl Ahead {
    /// Runs of `width` columns of class `c` and those after it.
    #[inline(always)]
    fn new<S: Isa, T: Float>(next: Option<Origin>, c: usize, width: usize) -> Self {
        let next = next.unwrap_or(Origin { base: core::ptr::null(), class: 0, column: 0, also: 0 });
        let first = next.base.wrapping_offset(c as isize * next.class) as usize;
        let column = next.column.unsigned_abs();
        let (at, run) = (first - first % 64, (first % 64 + width * column).next_multiple_of(64));
        let lines = 4 * Vf::<S, T>::LANES * column / 64;
        Self { at, end: at.wrapping_add(run), run, jump: (next.class as usize).wrapping_sub(run), lines }
    }

    /// As much as four vectors.
    #[inline(always)]
    fn ask<S: Isa>(&mut self, isa: S) {
        // As a rule two or four.
        for line in (0..self.lines).step_by(2) {
            isa.prefetch(self.at.wrapping_add(64 * line) as *const u8);
            isa.prefetch(self.at.wrapping_add(64 * line + 64) as *const u8);
        }
        self.at = self.at.wrapping_add(64 * self.lines);
        if self.at >= self.end {
            // A little beyond the end was asked for: no more than that is missing elsewhere.
            self.at = self.end.wrapping_add(self.jump);
            self.end = self.at.wrapping_add(self.run);
        }
    }
}

/// Takes classes of columns into their states.
pub struct Sweep<'a, T> {
    /// 1 / temperature.
    pub scale: f64,
    /// All classes, or some of those after the ones before.
    pub x: Columns<'a, T>,
    /// Whether they are the first.
    pub first: bool,
    /// What is read next, to be asked for: its class 0, while that of `x` is computed with.
    pub next: Option<Origin>,
    /// The states.
    pub running: Running<'a, T>,
}

/// See [`Sweep`]. The loop over exponentials also reads the classes of the next columns: one after the other they would not overlap.
#[inline(always)]
pub fn sweep<S: Isa, T: Summand>(isa: S, job: Sweep<T>) {
    let Sweep { scale, x, first, next, mut running } = job;
    if x.classes() == 0 || x.width() == 0 {
        return;
    }
    let exp = Exp::<Vf<S, T>>::new(isa, scale).opaque();
    let zero = splat::<S, T>(isa, 0.0);
    let none = State::<S, T>::none(isa, &exp);
    let mut copy = [[T::ZERO; 16]; STEP];
    let (mut this, mut other) = (&mut [[zero; 4]; STEP / 4], &mut [[zero; 4]; STEP / 4]);
    let mut at = Place::first::<S, T>(x.lead::<S>(), x.width());
    let mut max = none.max;
    if !first {
        max = State::<S, T>::load(isa, running.both(), 0).max;
    }
    let window = x.window::<S, STEP>((0, at.group.0, at.group.1), &mut copy, T::NEG_INF);
    for (i, below) in this.iter_mut().enumerate() {
        max = sort::<S, T>(isa, window, 4 * i, max, below);
    }
    let mut ahead = Ahead::new::<S, T>(next, 0, x.width());
    loop {
        let new = first && at.class == 0;
        let mut state = if new { none } else { State::load(isa, running.both(), at.index) };
        if state.raise(isa, &exp, scale, max, this) || new {
            state.store_reference(isa, &mut running, at.index);
        }
        let after = at.step::<S, T>(x.lead::<S>(), x.width(), x.classes());
        let then = after.unwrap_or(at);
        if first && then.class == 0 {
            max = none.max;
        } else if then.index != at.index {
            max = State::<S, T>::load(isa, running.both(), then.index).max;
        }
        if then.class != at.class {
            ahead = Ahead::new::<S, T>(next, then.class, x.width());
        }
        let window = x.window::<S, STEP>((then.class, then.group.0, then.group.1), &mut copy, T::NEG_INF);
        if state.b.ne(zero).any() {
            // Off the grid of the integer reduction: x − b, which is exact or dwarfed by x's own spacing.
            for below in this.as_flattened_mut() {
                *below = *below - state.b;
            }
        }
        let anchor = exp.anchor(state.k);
        // Named, as the compiler keeps what it does not unroll in memory. Four additions to each: more of them take one loss in a million out of its 4 ULP.
        let (mut e, mut f, mut g, mut h) = (zero, zero, zero, zero);
        for (i, (four, below)) in this.iter().zip(other.iter_mut()).enumerate() {
            ahead.ask(isa);
            max = sort::<S, T>(isa, window, 4 * i, max, below);
            let [p, q, r, s] = [anchor.parts(four[0]), anchor.parts(four[1]), anchor.parts(four[2]), anchor.parts(four[3])];
            e = p.0.mul_add(p.1, e);
            f = q.0.mul_add(q.1, f);
            if S::REGISTERS < 32 {
                e = r.0.mul_add(r.1, e);
                f = s.0.mul_add(s.1, f);
                if i % 2 == 1 {
                    T::add(isa, &mut state.rest, e + f);
                    (e, f) = (zero, zero);
                }
            } else {
                g = r.0.mul_add(r.1, g);
                h = s.0.mul_add(s.1, h);
                if i % 4 == 3 {
                    if T::DTYPE == DType::F64 {
                        T::add(isa, &mut state.rest, e + f);
                        T::add(isa, &mut state.rest, g + h);
                    } else {
                        T::add(isa, &mut state.rest, (e + f) + (g + h));
                    }
                    (e, f, g, h) = (zero, zero, zero, zero);
                }
            }
        }
        state.store(isa, &mut running, at.index);
        let Some(after) = after else { break };
        at = after;
        core::mem::swap(&mut this, &mut other);
    }
}

/// Some classes of a group of columns.
#[derive(Clone, Copy)]
struct Place {
    class: usize,
    index: usize,
    group: (usize, usize),
}

impl Place {
    #[inline(always)]
    fn first<S: Isa, T: Float>(lead: usize, width: usize) -> Self {
        let n = if lead > 0 { lead } else { Vf::<S, T>::LANES };
        Self { class: 0, index: 0, group: (0, n.min(width)) }
    }

    #[inline(always)]
    fn step<S: Isa, T: Float>(self, lead: usize, width: usize, classes: usize) -> Option<Self> {
        let j = self.group.0 + self.group.1;
        if j < width {
            return Some(Self { index: self.index + 1, group: (j, Vf::<S, T>::LANES.min(width - j)), ..self });
        }
        let class = self.class + STEP;
        (class < classes).then(|| Self { class, ..Self::first::<S, T>(lead, width) })
    }
}

/// Writes the states of the columns of `x` to a tile, relative to what they would be relative to if the maximum had been known from the beginning.
/// There are those of `parts` parts of the classes, each [`room`] after the one before.
#[inline(always)]
pub fn land<S: Isa, T: Summand>(isa: S, scale: f64, x: Columns<T>, parts: usize, running: &Running<T>, tile: &mut Tile) {
    let exp = Exp::<Vf<S, T>>::new(isa, scale);
    let [lanes, sums] = room(x.width());
    let none = Vf::<S, T>::splat(isa, T::NEG_INF);
    let mut place = Some(Place::first::<S, T>(x.lead::<S>(), x.width()));
    while let Some(at) = place {
        let mut max = none;
        for part in 0..parts {
            max = State::<S, T>::load(isa, (&running.lanes[part * lanes..], &running.sums[part * sums..]), at.index).max.max(max);
        }
        let (k, b) = reference::<S, T>(isa, &exp, scale, max);
        let (mut rest, mut top) = (Wide::zero(isa), none);
        for part in 0..parts {
            let mut state = State::<S, T>::load(isa, (&running.lanes[part * lanes..], &running.sums[part * sums..]), at.index);
            rebase::<S, T>(isa, scale, (state.k, state.b), (k, b), &mut state.rest);
            rest.merge(state.rest);
            // As of classes: the smaller maximum joins the sum.
            T::add(isa, &mut rest, exp.anchor(k).exp2(finite::<S, T>(isa, top.min(state.max)) - b));
            top = state.max.max(top);
        }
        let j = at.group.0;
        T::store_wide(isa, max, SpanMut::of(&mut tile.max), j);
        T::store_wide(isa, splat::<S, T>(isa, 1.0), SpanMut::of(&mut tile.ties), j);
        T::store_wide(isa, k, SpanMut::of(&mut tile.k), j);
        T::store_wide(isa, b, SpanMut::of(&mut tile.b), j);
        T::store_columns(isa, rest, SpanMut::of(&mut tile.rest), j);
        T::store_lost(isa, rest, SpanMut::of(&mut tile.lost), j);
        place = at.step::<S, T>(x.lead::<S>(), x.width(), 0);
    }
}

/// From logits to results, which may stand in the same place.
pub struct Carry<'a, T> {
    /// 1 / temperature.
    pub scale: f64,
    /// The logits.
    pub x: Columns<'a, T>,
    /// The results.
    pub out: ColumnsMut<'a, T>,
    /// Whether those are written past the caches.
    pub stream: bool,
    /// What is read next, to be asked for: its class 0, while that of `x` is computed with.
    pub next: Option<Origin>,
    /// [`room`].
    pub formulas: &'a mut [T],
}

/// What the logits of a group of columns are turned into results with.
#[derive(Clone, Copy)]
struct Formula<S: Isa, T: Float>([Vf<S, T>; FIELDS]);

impl<S: Isa, T: Summand> Formula<S, T> {
    #[inline(always)]
    fn new<const LOG: bool>(isa: S, exp: &Exp<Vf<S, T>>, tile: &Tile, most: f64, j: usize) -> Self {
        let zero = splat::<S, T>(isa, 0.0);
        if LOG {
            let max = T::load_wide(isa, Span::of(&tile.max), j);
            return Self([max, T::load_wide(isa, Span::of(&tile.log_sum), j), zero, zero, zero]);
        }
        let (magic, floor) = exp.anchor_parts(T::load_wide(isa, Span::of(&tile.k), j));
        let (a, b) = (T::load_wide(isa, Span::of(&tile.a), j), T::load_wide(isa, Span::of(&tile.b), j));
        Self([magic, floor, a, b, Ceiling::new(isa, tile, most).above(isa, j)])
    }

    #[inline(always)]
    fn load(isa: S, formulas: Span<T>, group: usize) -> Self {
        let step = Vf::<S, T>::LANES;
        let mut fields = [splat::<S, T>(isa, 0.0); FIELDS];
        for (i, field) in fields.iter_mut().enumerate() {
            *field = formulas.load(isa, (group * FIELDS + i) * step);
        }
        Self(fields)
    }

    #[inline(always)]
    fn of<const LOG: bool>(self, exp: &Exp<Vf<S, T>>, scale: Vf<S, T>, most: Vf<S, T>, x: Vf<S, T>) -> Vf<S, T> {
        let Self([magic, floor, a, b, above]) = self;
        if LOG {
            // In this order neither step cancels.
            return (x - magic) * scale - floor;
        }
        let out = exp.anchored(magic, floor).exp2(x - b) * a;
        Vf::<S, T>::select(above.lt(out), most, out)
    }

    /// Whether [`Formula::quick`] says the same in all columns.
    #[inline(always)]
    fn is_plain(self, isa: S, most: Vf<S, T>) -> bool {
        let Self([_, _, _, b, above]) = self;
        b.eq(splat::<S, T>(isa, 0.0)).and(above.eq(most)).count() == Vf::<S, T>::LANES
    }

    /// What a group's columns are as a rule turned into results with: three fields at most.
    #[inline(always)]
    fn quick<const LOG: bool>(
        isa: S,
        formulas: Span<T>,
        group: usize,
        exp: &Exp<Vf<S, T>>,
        (scale, most): (Vf<S, T>, Vf<S, T>),
        x: Vf<S, T>,
    ) -> Vf<S, T> {
        let step = Vf::<S, T>::LANES;
        let field = |i: usize| formulas.load(isa, (group * FIELDS + i) * step);
        if LOG {
            return (x - field(0)) * scale - field(1);
        }
        // In this order NaN passes.
        most.min(exp.anchored(field(0), field(1)).exp2(x) * field(2))
    }
}

/// Writes `a·exp(x − reference) − g·t`.
#[inline(always)]
pub fn emit_exp<S: Isa, T: Summand>(isa: S, job: Carry<T>, dense: Dense<T>, tile: &Tile, most: f64) {
    emit::<S, T, false>(isa, job, dense, tile, most);
}

/// Writes `(x − max)·scale − log_sum`.
#[inline(always)]
pub fn emit_log<S: Isa, T: Summand>(isa: S, job: Carry<T>, tile: &Tile) {
    emit::<S, T, true>(isa, job, Dense::None, tile, 0.0);
}

/// One class after the other: more at a time would be as many streams to write.
#[inline(always)]
fn emit<S: Isa, T: Summand, const LOG: bool>(isa: S, job: Carry<T>, dense: Dense<T>, tile: &Tile, most: f64) {
    let Carry { scale, x, out, stream, next, formulas } = job;
    let exp = Exp::<Vf<S, T>>::new(isa, scale).opaque();
    let (scale, limit) = (splat::<S, T>(isa, scale), splat::<S, T>(isa, most));
    let lead = if stream { out.read().lead::<S>() } else { x.lead::<S>() };
    let step = Vf::<S, T>::LANES;
    let first = Place::first::<S, T>(lead, x.width());
    let (mut place, mut plain) = (Some(first), step > 1 && !dense.is_some());
    while let Some(at) = place {
        let formula = Formula::<S, T>::new::<LOG>(isa, &exp, tile, most, at.group.0);
        plain &= LOG || formula.is_plain(isa, limit);
        for (i, field) in formula.0.into_iter().enumerate() {
            SpanMut::of(&mut *formulas).store(isa, (at.index * FIELDS + i) * step, field);
        }
        place = at.step::<S, T>(lead, x.width(), 0);
    }
    let formulas = Span::of(formulas);
    let pitch = FIELDS * step;
    for c in 0..x.classes() {
        let mut place = Some(first);
        while let Some(at) = place {
            let (j, n) = at.group;
            if plain && n == step && x.width() - j >= 4 * step {
                if let Some(next) = next {
                    next.ask_four::<S, T>(isa, c, j);
                }
                let four = formulas.part(at.index * pitch, 4 * pitch);
                let [v, w, y, z] = x.load_four(isa, c, j);
                let v = Formula::<S, T>::quick::<LOG>(isa, four, 0, &exp, (scale, limit), v);
                let w = Formula::<S, T>::quick::<LOG>(isa, four, 1, &exp, (scale, limit), w);
                let y = Formula::<S, T>::quick::<LOG>(isa, four, 2, &exp, (scale, limit), y);
                let z = Formula::<S, T>::quick::<LOG>(isa, four, 3, &exp, (scale, limit), z);
                out.put_four(isa, c, j, stream, [v, w, y, z]);
                place = Place { index: at.index + 3, group: (j + 3 * step, step), ..at }.step::<S, T>(lead, x.width(), 0);
                continue;
            }
            if let Some(next) = next {
                next.ask(isa, c, j);
            }
            let formula = Formula::<S, T>::load(isa, formulas, at.index);
            let mut v = formula.of::<LOG>(&exp, scale, limit, x.load_some(isa, c, (j, n)));
            if !LOG && dense.is_some() {
                v = v - dense.load(isa, c, j) * T::load_wide(isa, Span::of(&tile.slope), j);
            }
            out.put(isa, c, (j, n), stream, v);
            place = at.step::<S, T>(lead, x.width(), 0);
        }
    }
}
