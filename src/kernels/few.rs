//! The plain case of few classes: transforms, and one index target per row, smoothed or not, with nothing that weighs it.
//!
//! A row stays in one lane and in the type of the logits, so that 16 rows cost one logarithm and one division. What it is made of comes from
//! [`super::finish`], which has it for everything else. Of two classes one exponential says all.

use crate::array::{Columns, ColumnsMut, DType, Span, SpanMut, Vf};
use crate::simd::{Isa, Kernel, Level, Mask, Vector};

use super::columns::{BLOCK, Runs};
use super::finish::Odds;
use super::math::{Exp, Split, SplitSum};
use super::real::Real;
use super::state::{Summand, splat};

/// A tile of logits, as a kernel; see [`super::columns`] for what a tile is. The result says whether rows were left to [`super::finish`]: those
/// whose maximum is not finite or off the grid of the integer reduction, and those with a NaN. Their losses are NaN.
pub struct Few<'a, T> {
    /// 1 / temperature.
    pub scale: f64,
    /// What is computed.
    pub want: Want,
    /// The logits.
    pub x: ColumnsMut<'a, T>,
    /// Rows; the tile and the targets have whole vectors of them.
    pub rows: usize,
    /// Their classes, as numbers of the type; any numbers where there are no losses.
    pub target: &'a [T],
    /// What is taken from the target and what every class has of that, if the target is smoothed.
    pub smooth: Option<Smooth>,
    /// What the gradient of each row is multiplied by, `scale` included, in whole vectors; see [`gradient_fits`].
    pub g: &'a [T],
    /// Gets the losses, or zeros.
    pub loss: &'a mut [f64],
    /// Room for [`LANES`] numbers per row.
    pub lanes: &'a mut [T],
    /// To be asked for meanwhile.
    pub ahead: Runs,
}

/// What takes the place of the logits.
#[derive(Clone, Copy, Debug)]
pub enum Want {
    /// Nothing.
    Loss,
    /// The gradient.
    Gradient,
    /// Log-probabilities; there are no targets.
    Logs,
    /// Probabilities; there are no targets.
    Probabilities,
}

/// A smoothed target.
#[derive(Clone, Copy, Debug)]
pub struct Smooth {
    /// Share of the target that stays where it is.
    pub keep: f64,
    /// Share of every class, beside that.
    pub share: f64,
}

/// What is kept of a row between the loops.
pub const LANES: usize = 9;

/// Whether nothing of a gradient leaves the normal numbers that its results do not leave.
pub fn gradient_fits<T: Real>(g: f64) -> bool {
    let bias = T::BIAS.to_f64() as u64;
    let [least, most] = [1023 - bias, 1023 + bias].map(|exponent| f64::from_bits(exponent << 52));
    g == 0.0 || (least..=most).contains(&g.abs())
}

/// What is known of the rows, in whole vectors.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    class: Span<'a, T>,
    g: Span<'a, T>,
    /// The maximum, 0 where it is off the grid; then the rows have no `ties`.
    max: SpanMut<'a, T>,
    ties: SpanMut<'a, T>,
    /// Of the target.
    logit: SpanMut<'a, T>,
    /// The sum of the exponentials but for the maxima, and what its roundings lost.
    rest: SpanMut<'a, T>,
    lost: SpanMut<'a, T>,
    /// The gradient: what multiplies the exponentials, and the value at the target.
    slope: SpanMut<'a, T>,
    patch: SpanMut<'a, T>,
    /// Of a smoothed target: Σ (max − x), and then the value at a lone maximum; and the number of the first maximum.
    far: SpanMut<'a, T>,
    first: SpanMut<'a, T>,
    loss: SpanMut<'a, f64>,
}

impl<T: Summand> Kernel for Few<'_, T> {
    type Output = bool;
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) -> bool {
        assert!(S::LEVEL != Level::Scalar, "the portable level takes the general way");
        let Self { scale, want, x, rows, target, smooth, g, loss, lanes, ahead } = self;
        let gradient = matches!(want, Want::Gradient);
        let whole = rows.next_multiple_of(Vf::<S, T>::LANES);
        let (lanes, loss) = (SpanMut::of(lanes), SpanMut::of(loss).part(0, whole));
        let [max, ties, logit, rest, lost, slope, patch, far, first] = [0, 1, 2, 3, 4, 5, 6, 7, 8].map(|i| lanes.part(i * whole, whole));
        let g = if gradient { Span::of(g).part(0, whole) } else { Span::of(g) };
        let rows = Rows { class: Span::of(target).part(0, whole), g, max, ties, logit, rest, lost, slope, patch, far, first, loss };
        if matches!(want, Want::Logs | Want::Probabilities) {
            return transform::<S, T>(isa, want, x, rows, ahead);
        }
        if smooth.is_some() {
            distances::<S, T>(isa, x.read(), rows);
        } else if x.read().classes() == 2 {
            return pairs::<S, T>(isa, scale, gradient, x, rows, ahead);
        }
        // Several loops: each is short enough for the processor to have several vectors of rows in flight.
        if gradient {
            sum::<S, T, true>(isa, scale, x, rows, ahead);
        } else {
            sum::<S, T, false>(isa, scale, x, rows, ahead);
        }
        let left = lose::<S, T>(isa, scale, gradient, smooth, x.read().classes(), rows);
        if !gradient {
            return left;
        }
        if let Some(Smooth { share, .. }) = smooth {
            smoothed::<S, T>(isa, share, x, rows);
            return left;
        }
        let (step, one) = (Vf::<S, T>::LANES, splat::<S, T>(isa, 1.0));
        for k in 0..whole / step {
            let (class, j) = (rows.class.nth(k, step).load(isa, 0), k * step);
            let (a, patch) = (rows.slope.read().nth(k, step).load(isa, 0), rows.patch.read().nth(k, step).load(isa, 0));
            let mut number = splat::<S, T>(isa, 0.0);
            for c in 0..x.read().classes() {
                let e = x.read().load_whole(isa, c, j);
                x.store_whole(isa, c, j, Vf::<S, T>::select(class.eq(number), patch, e * a));
                number = number + one;
            }
        }
        left
    }
}

/// What is gathered of the classes of a row in each lane.
struct Lane<V> {
    rest: SplitSum<V>,
    /// Classes below the maximum, counted from [`Real::WHOLE`] on.
    below: V,
    logit: V,
    /// The number of the next class.
    number: V,
}

/// Whether the target's logit is found in the loop of the maximum instead of that of the sums, and the numbers of classes are in memory, where registers are few.
/// (Elsewhere the one waits for memory, and the other does not wait for this.)
#[inline(always)]
const fn early<S: Isa>() -> bool {
    S::REGISTERS < 32
}

impl<V: Vector<Elem: Real>> Lane<V> {
    /// Keeps the logit if its class is the row's.
    #[inline(always)]
    fn find(&mut self, class: V, number: V, v: V) {
        self.logit = V::select(class.eq(number), v, self.logit);
    }

    /// Takes a class up, and returns its q; with STORE its exponential takes its place.
    #[inline(always)]
    fn take<S: Isa, T: Real<V<S> = V>, const STORE: bool>(
        &mut self,
        isa: S,
        at: &Split<V>,
        (max, class): (V, V),
        tile: ColumnsMut<T>,
        c: usize,
        j: usize,
    ) -> V
    where
        V: Vector<Elem = T, Isa = S>,
    {
        let v = tile.read().load_whole(isa, c, j);
        let (q, s) = at.parts(v);
        if STORE {
            tile.store_whole(isa, c, j, Split::whole(q, s));
        }
        // Unordered: a NaN is not the maximum and so reaches the sum.
        let below = v.ne(max);
        let q = self.rest.take(below, (q, s));
        self.below = self.below.count_where(below);
        if !early::<S>() {
            self.find(class, self.number, v);
            self.number = self.number + V::splat(isa, T::ONE);
        }
        q
    }
}

/// What there is of every row but the losses. With STORE the exponentials replace the logits.
#[inline(always)]
fn sum<S: Isa, T: Summand, const STORE: bool>(isa: S, scale: f64, tile: ColumnsMut<T>, rows: Rows<T>, mut ahead: Runs) {
    let (x, classes, step) = (tile.read(), tile.read().classes(), Vf::<S, T>::LANES);
    let exp = Exp::<Vf<S, T>>::new(isa, scale);
    let (zero, lowest) = (splat::<S, T>(isa, 0.0), Vf::<S, T>::splat(isa, T::NEG_INF));
    // Exact: both are whole, and so is their difference.
    let (whole, all) = (Vf::<S, T>::splat(isa, T::WHOLE), splat::<S, T>(isa, T::WHOLE.to_f64() + classes as f64));
    let limit = splat::<S, T>(isa, T::LIMIT.to_f64() / scale);
    let mut numbers = [T::ZERO; BLOCK];
    let numbers = &mut numbers[..classes];
    if early::<S>() {
        for (c, number) in numbers.iter_mut().enumerate() {
            *number = T::from_f64(c as f64);
        }
    }
    for i in 0..rows.class.len() / step {
        let (class, j) = (rows.class.nth(i, step).load(isa, 0), i * step);
        let mut row = Lane { rest: SplitSum::zero(isa), below: whole, logit: zero, number: zero };
        // In this order a NaN is passed over; it comes back through the sum.
        let (mut max, mut other) = (lowest, lowest);
        let mut c = 0;
        while classes - c >= 2 {
            let two = x.part(c, 2);
            let [u, v] = [two.load_whole(isa, 0, j), two.load_whole(isa, 1, j)];
            (max, other) = (u.max(max), v.max(other));
            if early::<S>() {
                let numbers = &numbers[c..c + 2];
                row.find(class, Vf::<S, T>::splat(isa, numbers[0]), u);
                row.find(class, Vf::<S, T>::splat(isa, numbers[1]), v);
            }
            c += 2;
        }
        if c < classes {
            let v = x.load_whole(isa, c, j);
            max = v.max(max);
            if early::<S>() {
                row.find(class, Vf::<S, T>::splat(isa, numbers[c]), v);
            }
        }
        let max = other.max(max);
        let near = max.abs().le(limit);
        let origin = Vf::<S, T>::select(near, max, zero);
        let at = exp.split(exp.reference(origin));
        let mut c = 0;
        while classes - c >= 4 {
            let four = tile.part(c, 4);
            let mut q = [zero; 4];
            for (u, q) in q.iter_mut().enumerate() {
                *q = row.take::<S, T, STORE>(isa, &at, (max, class), four, u, j);
            }
            row.rest.add(q);
            for _ in 0..4 {
                ahead.ask(isa);
            }
            c += 4;
        }
        let mut q = zero;
        while c < classes {
            q = q + row.take::<S, T, STORE>(isa, &at, (max, class), tile, c, j);
            ahead.ask(isa);
            c += 1;
        }
        row.rest.add([q, zero, zero, zero]);
        // The first one is the larger one.
        let SplitSum { sum, little } = row.rest;
        let rest = sum + little;
        let lost = little - (rest - sum);
        rows.max.nth(i, step).store(isa, 0, origin);
        rows.ties.nth(i, step).store(isa, 0, Vf::<S, T>::select(near, all - row.below, zero));
        rows.logit.nth(i, step).store(isa, 0, row.logit);
        rows.rest.nth(i, step).store(isa, 0, rest);
        rows.lost.nth(i, step).store(isa, 0, lost);
    }
}

/// Distances that are summed one by one, to two accumulators.
const TOGETHER: usize = 8;

/// How far the classes are below their maximum, and which one that is.
#[inline(always)]
fn distances<S: Isa, T: Summand>(isa: S, x: Columns<T>, rows: Rows<T>) {
    let (classes, step) = (x.classes(), Vf::<S, T>::LANES);
    let (zero, one, lowest) = (splat::<S, T>(isa, 0.0), splat::<S, T>(isa, 1.0), Vf::<S, T>::splat(isa, T::NEG_INF));
    for i in 0..rows.class.len() / step {
        let j = i * step;
        let (mut max, mut first) = (lowest, zero);
        let mut number = zero;
        for c in 0..classes {
            let v = x.load_whole(isa, c, j);
            first = Vf::<S, T>::select(max.lt(v), number, first);
            (max, number) = (v.max(max), number + one);
        }
        // Few at a time: long chains of additions would lose digits.
        let (mut sum, mut c) = (zero, 0);
        while c < classes {
            let (mut a, mut b) = (zero, zero);
            let end = classes.min(c + TOGETHER);
            while c + 2 <= end {
                let two = x.part(c, 2);
                (a, b) = (a + (max - two.load_whole(isa, 0, j)), b + (max - two.load_whole(isa, 1, j)));
                c += 2;
            }
            if c < end {
                a = a + (max - x.load_whole(isa, c, j));
                c += 1;
            }
            sum = sum + (a + b);
        }
        rows.far.nth(i, step).store(isa, 0, sum);
        rows.first.nth(i, step).store(isa, 0, first);
    }
}

/// From exponentials to the gradient of smoothed targets, of which every class has a share.
#[inline(always)]
fn smoothed<S: Isa, T: Summand>(isa: S, share: f64, x: ColumnsMut<T>, rows: Rows<T>) {
    let (step, one, share) = (Vf::<S, T>::LANES, splat::<S, T>(isa, 1.0), splat::<S, T>(isa, share));
    for i in 0..rows.class.len() / step {
        let (class, j) = (rows.class.nth(i, step).load(isa, 0), i * step);
        let (a, patch) = (rows.slope.read().nth(i, step).load(isa, 0), rows.patch.read().nth(i, step).load(isa, 0));
        let (first, top) = (rows.first.read().nth(i, step).load(isa, 0), rows.far.read().nth(i, step).load(isa, 0));
        let least = rows.g.nth(i, step).load(isa, 0) * share;
        let mut number = splat::<S, T>(isa, 0.0);
        for c in 0..x.read().classes() {
            let v = x.read().load_whole(isa, c, j).mul_sub(a, least);
            let v = Vf::<S, T>::select(first.eq(number), top, v);
            x.store_whole(isa, c, j, Vf::<S, T>::select(class.eq(number), patch, v));
            number = number + one;
        }
    }
}

/// Losses, and the coefficients of the gradient if there is one. Whether rows were left.
#[inline(always)]
fn lose<S: Isa, T: Summand>(isa: S, scale: f64, gradient: bool, smooth: Option<Smooth>, classes: usize, rows: Rows<T>) -> bool {
    let (step, exp) = (Vf::<S, T>::LANES, Exp::<Vf<S, T>>::new(isa, scale));
    let (zero, one, bad) = (splat::<S, T>(isa, 0.0), splat::<S, T>(isa, 1.0), splat::<S, T>(isa, f64::NAN));
    let scale = splat::<S, T>(isa, scale);
    let Smooth { keep, share } = smooth.unwrap_or(Smooth { keep: 1.0, share: 0.0 });
    let (keep, share, all) = (splat::<S, T>(isa, keep), splat::<S, T>(isa, share), splat::<S, T>(isa, classes as f64));
    let mut left = false;
    for i in 0..rows.class.len() / step {
        let (max, ties) = (rows.max.read().nth(i, step).load(isa, 0), rows.ties.read().nth(i, step).load(isa, 0));
        let (logit, rest) = (rows.logit.read().nth(i, step).load(isa, 0), rows.rest.read().nth(i, step).load(isa, 0));
        let over = exp.over(max);
        let others = (ties - one) + over.times_sum(rest, rows.lost.read().nth(i, step).load(isa, 0));
        // What the classes have of a smoothed target.
        let mut far = max - logit;
        let mut plus = zero;
        if smooth.is_some() {
            (far, plus) = (far * keep, rows.far.read().nth(i, step).load(isa, 0) * (share * scale));
        }
        let odds = Odds::and(isa, others, None, T::DTYPE == DType::F64, Some(plus));
        let good = zero.lt(ties).and(others.eq(others));
        let value = Vf::<S, T>::select(good, odds.loss(far * scale, one), bad);
        T::store_wide(isa, value, rows.loss.nth(i, step), 0);
        left |= good.and(value.eq(value)).count() < step;
        if gradient {
            let g = rows.g.nth(i, step).load(isa, 0);
            let inverse = over.times(odds.p_max);
            let at_top = logit.eq(max);
            let other = exp.split(exp.reference(max)).exp2(logit) * inverse;
            let patch = if smooth.is_some() {
                let t_rest = (all - ties) * share + Vf::<S, T>::select(at_top, zero, keep);
                let t_top = ties * share + Vf::<S, T>::select(at_top, keep, zero);
                let lone = ties.eq(one);
                let top = odds.at_max(isa, one, (t_rest, t_top), None);
                rows.far.nth(i, step).store(isa, 0, g * top);
                let first = rows.first.read().nth(i, step).load(isa, 0);
                rows.first.nth(i, step).store(isa, 0, Vf::<S, T>::select(lone, first, bad));
                let p = Vf::<S, T>::select(at_top, odds.p_max, other);
                Vf::<S, T>::select(at_top.and(lone), top, p - (keep + share))
            } else {
                Vf::<S, T>::select(at_top, odds.at_max(isa, one, (zero, one), None), other - one)
            };
            rows.slope.nth(i, step).store(isa, 0, g * inverse);
            rows.patch.nth(i, step).store(isa, 0, g * patch);
        }
    }
    left
}

/// Transforms, whose rows have no class. Whether rows were left.
#[inline(always)]
fn transform<S: Isa, T: Summand>(isa: S, want: Want, x: ColumnsMut<T>, rows: Rows<T>, ahead: Runs) -> bool {
    // The sums of a loss, so that it has their code.
    match want {
        Want::Probabilities => sum::<S, T, true>(isa, 1.0, x, rows, ahead),
        _ => sum::<S, T, false>(isa, 1.0, x, rows, ahead),
    }
    let (step, exp) = (Vf::<S, T>::LANES, Exp::<Vf<S, T>>::new(isa, 1.0));
    let (zero, one, bad) = (splat::<S, T>(isa, 0.0), splat::<S, T>(isa, 1.0), splat::<S, T>(isa, f64::NAN));
    let mut left = false;
    for i in 0..rows.class.len() / step {
        let j = i * step;
        let (max, ties) = (rows.max.read().nth(i, step).load(isa, 0), rows.ties.read().nth(i, step).load(isa, 0));
        let over = exp.over(max);
        let others = (ties - one) + over.times_sum(rows.rest.read().nth(i, step).load(isa, 0), rows.lost.read().nth(i, step).load(isa, 0));
        let odds = Odds::of(isa, others, T::DTYPE == DType::F64);
        let good = zero.lt(ties).and(others.eq(others));
        left |= good.count() < step;
        T::store_wide(isa, Vf::<S, T>::select(good, zero, bad), rows.loss.nth(i, step), 0);
        if let Want::Logs = want {
            for c in 0..x.read().classes() {
                x.store_whole(isa, c, j, (x.read().load_whole(isa, c, j) - max) - odds.log_sum);
            }
        }
        if let Want::Probabilities = want {
            // The probability of a maximum, with a division of its own: all others have its error.
            let p_max = one / (one + others);
            let inverse = over.times(p_max);
            let top = exp.split(exp.reference(max)).exp2(max);
            for c in 0..x.read().classes() {
                let e = x.read().load_whole(isa, c, j);
                // As good as the maximum: without the errors of two exponentials.
                x.store_whole(isa, c, j, Vf::<S, T>::select(e.eq(top), p_max, e * inverse));
            }
        }
    }
    left
}

/// All of it for two classes. A gradient takes the place of the logits. Whether rows were left.
#[inline(always)]
fn pairs<S: Isa, T: Summand>(isa: S, scale: f64, gradient: bool, x: ColumnsMut<T>, rows: Rows<T>, mut ahead: Runs) -> bool {
    let (step, exp) = (Vf::<S, T>::LANES, Exp::<Vf<S, T>>::new(isa, scale));
    let (zero, one, bad) = (splat::<S, T>(isa, 0.0), splat::<S, T>(isa, 1.0), splat::<S, T>(isa, f64::NAN));
    let limit = splat::<S, T>(isa, T::LIMIT.to_f64() / scale);
    let scale = splat::<S, T>(isa, scale);
    let mut left = false;
    for i in 0..rows.class.len() / step {
        let (class, j) = (rows.class.nth(i, step).load(isa, 0), i * step);
        let (x0, x1) = (x.read().load_whole(isa, 0, j), x.read().load_whole(isa, 1, j));
        ahead.ask(isa);
        ahead.ask(isa);
        // In these orders one of them is NaN if a logit is.
        let (max, other) = (x0.max(x1), x1.min(x0));
        let origin = Vf::<S, T>::select(max.abs().le(limit), max, zero);
        let e = exp.split(exp.reference(origin)).exp2(other);
        let others = Vf::<S, T>::select(other.eq(max), one, exp.over(origin).times(e));
        let odds = Odds::of(isa, others, T::DTYPE == DType::F64);
        let second = class.eq(one);
        let logit = Vf::<S, T>::select(second, x1, x0);
        let good = max.eq(origin).and(others.eq(others));
        let value = Vf::<S, T>::select(good, odds.loss((max - logit) * scale, one), bad);
        T::store_wide(isa, value, rows.loss.nth(i, step), 0);
        left |= good.count() < step;
        if gradient {
            let g = rows.g.nth(i, step).load(isa, 0);
            // The probability of the other class, which pulls one up and the other down; 1 − p where p has digits to spare.
            let least = others * odds.p_max;
            let pull = g * Vf::<S, T>::select(logit.eq(max), least, one - least);
            let first = Vf::<S, T>::select(second, pull, -pull);
            x.store_whole(isa, 0, j, first);
            x.store_whole(isa, 1, j, -first);
        }
    }
    left
}
