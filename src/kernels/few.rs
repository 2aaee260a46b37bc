//! The plain case of few classes: one index target per row and nothing that weighs it.
//!
//! A row stays in one lane and, but for its sum and the exponential of its maximum, in the type of the logits, so that 16 rows cost one logarithm and
//! one division. What it is made of comes from [`super::finish`], which has it for everything else.

use crate::array::{ColumnsMut, Span, SpanMut, Vf};
use crate::simd::{Isa, Kernel, Mask, Vector};

use super::finish::{Odds, WIDTH, others};
use super::math::{Anchored, Exp, Real};
use super::state::{Summand, Wide, splat};

/// A tile of logits, as a kernel; see [`super::columns`] for what a tile is. The result says whether rows were left to [`super::finish`]: those
/// whose maximum is not finite or off the grid of the integer reduction, and those with a NaN. Their losses are NaN.
pub struct Few<'a, T> {
    /// 1 / temperature.
    pub scale: f64,
    /// Multiplies the gradient, which takes the place of the logits if there is one; see [`gradient_fits`].
    pub g: Option<f64>,
    /// The logits.
    pub x: ColumnsMut<'a, T>,
    /// Rows; the tile and the targets have whole vectors of them.
    pub rows: usize,
    /// Their classes, as numbers of the type.
    pub target: &'a [T],
    /// Gets the losses.
    pub loss: &'a mut [f64],
}

/// Whether nothing of a gradient leaves the normal numbers that its results do not leave.
pub fn gradient_fits<T: Real>(g: f64) -> bool {
    g == 0.0 || (-T::BIAS.to_f64()..=T::BIAS.to_f64()).contains(&g.abs().log2())
}

/// Coefficients of the gradient.
struct Slopes<T> {
    /// Multiplies the exponentials.
    a: [T; WIDTH],
    /// The value at the target.
    patch: [T; WIDTH],
}

impl<T: Summand> Kernel for Few<'_, T> {
    type Output = bool;
    #[inline(always)]
    fn run<S: Isa>(mut self, isa: S) -> bool {
        let mut slopes = Slopes { a: [T::ZERO; WIDTH], patch: [T::ZERO; WIDTH] };
        if self.g.is_none() {
            return reduce::<S, T, false>(isa, self.x, &mut self, &mut slopes);
        }
        let (x, rows, target) = (self.x, self.rows, Span::of(self.target));
        let left = reduce::<S, T, true>(isa, x, &mut self, &mut slopes);
        // Another loop: each is short enough for the processor to have several vectors of rows in flight.
        for j in (0..rows).step_by(Vf::<S, T>::LANES) {
            let (a, patch, class) = (Span::of(&slopes.a).load(isa, j), Span::of(&slopes.patch).load(isa, j), target.load(isa, j));
            let (mut number, one) = (splat::<S, T>(isa, 0.0), splat::<S, T>(isa, 1.0));
            for c in 0..x.read().classes() {
                let e = x.read().load_whole(isa, c, j);
                x.store_whole(isa, c, j, Vf::<S, T>::select(class.eq(number), patch, e * a));
                number = number + one;
            }
        }
        left
    }
}

/// Classes that are summed in the type of the logits: few enough additions to each of four accumulators.
const TOGETHER: usize = 16;

/// What is gathered of the classes of a row in each lane.
struct Lane<V> {
    rest: [V; 4],
    ties: V,
    logit: V,
    /// The number of the next class.
    number: V,
}

impl<V: Vector> Lane<V> {
    /// Adds a class; with STORE its exponential takes its place.
    #[inline(always)]
    fn add<S: Isa, T: Real<V<S> = V>, const STORE: bool, const U: usize>(
        &mut self,
        isa: S,
        at: &Anchored<V>,
        (max, class): (V, V),
        tile: ColumnsMut<T>,
        c: usize,
        j: usize,
    ) where
        V: Vector<Elem = T, Isa = S>,
    {
        let one = V::splat(isa, T::ONE);
        let v = tile.read().load_whole(isa, c, j);
        let (p, q) = at.parts(v);
        if STORE {
            tile.store_whole(isa, c, j, p * q);
        }
        // Unordered: a NaN is not the maximum and so reaches the sum.
        self.rest[U] = self.rest[U].fma_where(v.ne(max), p, q);
        self.ties = self.ties.add_where(v.eq(max), one);
        self.logit = V::select(class.eq(self.number), v, self.logit);
        self.number = self.number + one;
    }
}

/// The sum relative to one maximum, without it, and 1/e(max): in float64, as their errors are those of every digit of a confident row.
#[inline(always)]
fn relative<S: Isa, T: Summand>(
    isa: S,
    exp: &Exp<S::F64>,
    max: Vf<S, T>,
    k: Vf<S, T>,
    ties: Vf<S, T>,
    sum: Wide<S>,
) -> (Vf<S, T>, Vf<S, T>) {
    let [mut max_of, mut k_of, mut ties_of, mut rest_of] = [[0.0_f64; 16]; 4];
    T::store_wide(isa, max, SpanMut::of(&mut max_of), 0);
    T::store_wide(isa, k, SpanMut::of(&mut k_of), 0);
    T::store_wide(isa, ties, SpanMut::of(&mut ties_of), 0);
    T::store_columns(isa, sum, SpanMut::of(&mut rest_of), 0);
    for r in (0..Vf::<S, T>::LANES).step_by(S::F64::LANES) {
        let over = exp.exp2(-Span::of(&max_of).load(isa, r), -Span::of(&k_of).load(isa, r));
        let others = others(isa, Span::of(&ties_of).load(isa, r), Span::of(&rest_of).load(isa, r), over);
        SpanMut::of(&mut max_of).store(isa, r, over);
        SpanMut::of(&mut rest_of).store(isa, r, others);
    }
    (T::load_wide(isa, Span::of(&rest_of), 0), T::load_wide(isa, Span::of(&max_of), 0))
}

/// Losses and coefficients; with STORE the exponentials replace the logits.
#[inline(always)]
fn reduce<S: Isa, T: Summand, const STORE: bool>(isa: S, tile: ColumnsMut<T>, job: &mut Few<T>, slopes: &mut Slopes<T>) -> bool {
    let (x, classes) = (tile.read(), tile.read().classes());
    let (exp, wide) = (Exp::<Vf<S, T>>::new(isa, job.scale), Exp::<S::F64>::new(isa, job.scale));
    let (zero, one, lowest) = (splat::<S, T>(isa, 0.0), splat::<S, T>(isa, 1.0), Vf::<S, T>::splat(isa, T::NEG_INF));
    let limit = splat::<S, T>(isa, T::LIMIT.to_f64() / job.scale);
    let (scale, g) = (splat::<S, T>(isa, job.scale), splat::<S, T>(isa, job.g.unwrap_or(0.0) * job.scale));
    let (target, mut left) = (Span::of(job.target), false);
    for j in (0..job.rows).step_by(Vf::<S, T>::LANES) {
        let class = target.load(isa, j);
        // In this order a NaN is passed over; it comes back through the sum.
        let (mut max, mut other) = (x.load_whole(isa, 0, j).max(lowest), lowest);
        let mut c = 1;
        while c + 2 <= classes {
            max = x.load_whole(isa, c, j).max(max);
            other = x.load_whole(isa, c + 1, j).max(other);
            c += 2;
        }
        if c < classes {
            max = x.load_whole(isa, c, j).max(max);
        }
        let max = other.max(max);
        let near = max.abs().le(limit);
        let origin = Vf::<S, T>::select(near, max, zero);
        let k = exp.reference(origin);
        let at = exp.anchor(k);
        let mut row = Lane { rest: [zero; 4], ties: zero, logit: zero, number: zero };
        let mut sum = Wide::zero(isa);
        let mut c = 0;
        while c < classes {
            let end = classes.min(c + TOGETHER);
            while c + 4 <= end {
                row.add::<S, T, STORE, 0>(isa, &at, (max, class), tile, c, j);
                row.add::<S, T, STORE, 1>(isa, &at, (max, class), tile, c + 1, j);
                row.add::<S, T, STORE, 2>(isa, &at, (max, class), tile, c + 2, j);
                row.add::<S, T, STORE, 3>(isa, &at, (max, class), tile, c + 3, j);
                c += 4;
            }
            while c < end {
                row.add::<S, T, STORE, 0>(isa, &at, (max, class), tile, c, j);
                c += 1;
            }
            let [r0, r1, r2, r3] = core::mem::replace(&mut row.rest, [zero; 4]);
            T::add(isa, &mut sum, r0 + r1);
            T::add(isa, &mut sum, r2 + r3);
        }
        let Lane { ties, logit, .. } = row;
        let (others, over) = relative::<S, T>(isa, &wide, origin, k, ties, sum);
        let odds = Odds::of(isa, others);
        let good = near.and(others.eq(others));
        let bad = splat::<S, T>(isa, f64::NAN);
        let loss = Vf::<S, T>::select(good, odds.loss((max - logit) * scale, one), bad);
        T::store_wide(isa, loss, SpanMut::of(job.loss), j);
        left |= good.count() < Vf::<S, T>::LANES;
        if STORE {
            let inverse = odds.p_max * over;
            let (p, q) = at.parts(logit);
            let lone = logit.eq(max).and(ties.eq(one));
            let patch = Vf::<S, T>::select(lone, odds.at_max(isa, one, (zero, one), None), (p * q) * inverse - one);
            SpanMut::of(&mut slopes.a).store(isa, j, g * inverse);
            SpanMut::of(&mut slopes.patch).store(isa, j, g * patch);
        }
    }
    left
}
