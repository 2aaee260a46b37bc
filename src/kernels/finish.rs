//! From row states to losses and gradient coefficients, in float64, one row per lane.
//!
//! With m the maximum, R = (ties − 1) + rest the sum without one maximum, A = Σ T the target mass and s = 1 + R:
//! log S = log1p(R), lse = m + log S, `loss = Σ T·(m − x) + A·log S (+ ζ·lse²)`, and the gradient of class c is
//! `g·((A + 2ζ·lse)·p_c − T_c)`. At a lone maximum p = 1 − R/s would cancel against T, so it is `g·(Σ_{c≠k} T_c − A·R/s + 2ζ·lse/s)` there.

use crate::array::{Float, Span, SpanMut};
use crate::simd::{Isa, Mask, Vector};

use super::math::{Exp, log1p_inverse};
use super::real::Real;
use super::state::splat;

/// Most rows in a tile, but for long runs of columns with one target each.
pub const WIDTH: usize = 256;

/// From one sparse target of a row to the next one in a tile. Were it a power of two, they would share a set of the first cache, and push each other out.
pub const APART: usize = WIDTH + 8;

/// Where one class has everything but for what rounding leaves, it has more than this and all others have less.
pub(super) const SURE: f64 = 0.5;

/// Row states on their way in, coefficients on their way out; one element per row of the tile.
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct Tile {
    pub max: Vec<f64>,
    pub ties: Vec<f64>,
    pub arg: Vec<f64>,
    pub k: Vec<f64>,
    pub b: Vec<f64>,
    pub rest: Vec<f64>,
    /// What rounding took off that: of float64 alone.
    pub lost: Vec<f64>,
    pub lin: Vec<f64>,
    pub t_rest: Vec<f64>,
    pub t_top: Vec<f64>,
    /// What every class of the row has of the target, where that takes no stream.
    pub share: Vec<f64>,
    /// Multiplies loss and gradient of the row (sample weight).
    pub weight: Vec<f64>,
    /// Multiplies the gradient of the row, the sample weight included.
    pub g: Vec<f64>,
    /// The same for the logits as they are: divided by the temperature. Multiplies t in the gradient.
    pub slope: Vec<f64>,
    pub log_sum: Vec<f64>,
    pub lse: Vec<f64>,
    pub loss: Vec<f64>,
    /// Multiplies e in the gradient.
    pub a: Vec<f64>,
    /// The gradient at a lone maximum. Of probabilities: those above it are 1.
    pub top: Vec<f64>,
    /// What the results of a column are multiplied by in the end, where its coefficients are high.
    pub lift: Vec<f64>,
    /// Logit of sparse target j of row r at `j * APART + r`.
    pub x_target: Vec<f64>,
    /// Its mass.
    pub mass: Vec<f64>,
    /// All mass on its class: sparse entries of the same class and the dense stream.
    pub mass_all: Vec<f64>,
    /// Its exponential relative to the row's reference, if [`Terms::stored`].
    pub e_target: Vec<f64>,
    /// The gradient there.
    pub patch: Vec<f64>,
    /// Where there are several sparse targets a row: those of row r at `r * entries`, as class and place in the fields above, by class; what is
    /// not there comes last, with a class beyond all.
    pub order: Vec<(usize, usize)>,
}

impl Tile {
    /// Makes room for `rows` rows, or [`WIDTH`], with `entries` sparse targets each: more than one only of up to [`WIDTH`] rows.
    pub fn reserve(&mut self, rows: usize, entries: usize) {
        // Vectors that begin anywhere are stored whole.
        let rows = rows.max(WIDTH) + 16;
        let all = (entries * APART).max(entries.min(1) * rows);
        if self.top.len() >= rows && self.patch.len() >= all {
            return;
        }
        for v in [
            &mut self.max,
            &mut self.ties,
            &mut self.arg,
            &mut self.k,
            &mut self.b,
            &mut self.rest,
            &mut self.lost,
            &mut self.lin,
            &mut self.t_rest,
            &mut self.t_top,
            &mut self.share,
            &mut self.weight,
            &mut self.g,
            &mut self.slope,
            &mut self.log_sum,
            &mut self.lse,
            &mut self.loss,
            &mut self.a,
            &mut self.top,
            &mut self.lift,
        ] {
            if v.len() < rows {
                v.resize(rows, 0.0);
            }
        }
        for v in [&mut self.x_target, &mut self.mass, &mut self.mass_all, &mut self.e_target, &mut self.patch] {
            if v.len() < all {
                v.resize(all, 0.0);
            }
        }
    }
}

/// What is the same for every row in the plain case: index targets, no weights but those of the call.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Plain {
    pub g: f64,
    pub mass: f64,
    pub mass_all: f64,
}

/// What finish is to know of the call.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::struct_excessive_bools)]
pub struct Terms {
    /// 1 / temperature.
    pub scale: f64,
    /// Weight of lse².
    pub z_loss: f64,
    /// The step from 1 to the next number of the type that is computed in.
    pub ulp: f64,
    /// Sparse targets per row.
    pub entries: usize,
    /// Whether `lin`, `t_rest`, `t_top` of the tile hold a dense stream.
    pub dense: bool,
    /// Whether there is a gradient: otherwise only the loss is filled.
    pub gradient: bool,
    /// Whether the exponentials of the sparse targets are in the tile; otherwise they are computed from the logits.
    pub stored: bool,
    /// Stands for `weight`, `g`, `mass` and `mass_all` of the tile.
    pub plain: Option<Plain>,
    /// Whether there are targets at all: a transform needs only `log_sum`, `lse` and `a` = 1/(S·e(max)).
    pub loss: bool,
}

/// What losses and gradients are made of, one row per lane.
#[derive(Clone, Copy)]
pub(super) struct Odds<V> {
    others: V,
    /// log S = log(1 + R).
    pub(super) log_sum: V,
    /// 1/S: the probability of a maximum.
    pub(super) p_max: V,
}

impl<V: Vector> Odds<V>
where
    V::Elem: Real,
{
    #[inline(always)]
    pub(super) fn of(isa: V::Isa, others: V, closely: bool) -> Self {
        Self::and(isa, others, None, closely, None)
    }

    /// The same, with what `others` has lost and something that is added to `log_sum`, see [`log1p_inverse`].
    #[inline(always)]
    pub(super) fn and(isa: V::Isa, others: V, lost: Option<V>, closely: bool, plus: Option<V>) -> Self {
        let (log_sum, p_max) = log1p_inverse(isa, others, lost, closely, plus);
        Self { others, log_sum, p_max }
    }

    /// Σ T·(m − x) + A·log S, given the first.
    #[inline(always)]
    pub(super) fn loss(self, distance: V, total: V) -> V {
        distance + total * self.log_sum
    }

    /// The gradient at a lone maximum, with `total` mass, of it `t_rest` elsewhere and `t_top` there, and what the square of lse adds.
    #[inline(always)]
    pub(super) fn at_max(self, isa: V::Isa, total: V, (t_rest, t_top): (V, V), extra: Option<V>) -> V {
        let one = V::splat(isa, V::Elem::ONE);
        // Where the maximum has less than half the mass nothing cancels, and the sum of the others is the longer way.
        let sure = t_rest - total * (self.others * self.p_max);
        let (sure, pull) = match extra {
            Some(extra) => (sure + extra * self.p_max, total + extra),
            None => (sure, total),
        };
        V::select(self.others.lt(one), sure, pull * self.p_max - t_top)
    }
}

/// Fills the coefficients of the rows from `first` up to `end`; those of a few rows after them are overwritten.
#[inline(always)]
pub fn finish<S: Isa>(isa: S, terms: &Terms, tile: &mut Tile, first: usize, end: usize) {
    let (zero, one, infinity) = (splat::<S, f64>(isa, 0.0), splat::<S, f64>(isa, 1.0), splat::<S, f64>(isa, f64::INFINITY));
    let exp = Exp::<S::F64>::new(isa, terms.scale);
    let scale = splat::<S, f64>(isa, terms.scale);
    let step = S::F64::LANES;
    // Not for results that have half the digits.
    let closely = terms.ulp <= f64::EPSILON;
    // Two loops, each short enough for the processor to have several vectors in flight.
    for r in (first..end).step_by(step) {
        let max = Span::of(&tile.max).load(isa, r);
        let ties = Span::of(&tile.ties).load(isa, r);
        let b = Span::of(&tile.b).load(isa, r);
        let origin = S::F64::select(max.abs().lt(infinity), max, b);
        // 1/e(max) as an exponential of its own: it saves two divisions.
        let over_max = exp.over_at(origin - b, Span::of(&tile.k).load(isa, r));
        SpanMut::of(&mut tile.a).store(isa, r, over_max.times(one));
        let rest = Span::of(&tile.rest).load(isa, r);
        let (others, lost) =
            if closely { over_max.times_exactly(rest, Span::of(&tile.lost).load(isa, r)) } else { (over_max.times(rest), zero) };
        // Until the second loop, R and what it has lost.
        SpanMut::of(&mut tile.lse).store(isa, r, (ties - one) + others);
        SpanMut::of(&mut tile.log_sum).store(isa, r, lost);
    }
    let mut r = first;
    while r < end {
        let max = Span::of(&tile.max).load(isa, r);
        let ties = Span::of(&tile.ties).load(isa, r);
        let k = Span::of(&tile.k).load(isa, r);
        let b = Span::of(&tile.b).load(isa, r);
        let rest = Span::of(&tile.rest).load(isa, r);
        let over_max = Span::of(&tile.a).load(isa, r);
        let (others, lost) = (Span::of(&tile.lse).load(isa, r), Span::of(&tile.log_sum).load(isa, r));
        let odds = Odds::and(isa, others, Some(lost), closely, None);
        let finite = max.abs().lt(infinity);
        let origin = S::F64::select(finite, max, b);
        // A maximum of −inf or +inf makes the row NaN, and a NaN class came in through the rest.
        let valid = finite.and(rest.eq(rest));
        let bad = splat::<S, f64>(isa, f64::NAN);
        let lse = S::F64::select(finite, origin * scale + odds.log_sum, max);
        let lse = S::F64::select(rest.eq(rest), lse, bad);
        let odds = Odds { log_sum: S::F64::select(valid, odds.log_sum, bad), ..odds };
        let inverse = over_max * odds.p_max;
        if terms.loss {
            let (mut lin, mut t_rest, mut t_top) = (zero, zero, zero);
            if terms.dense {
                lin = Span::of(&tile.lin).load(isa, r);
                t_rest = Span::of(&tile.t_rest).load(isa, r);
                t_top = Span::of(&tile.t_top).load(isa, r);
            }
            for entry in 0..terms.entries {
                let at = entry * APART + r;
                let x = Span::of(&tile.x_target).load(isa, at);
                let mass = match terms.plain {
                    Some(plain) => splat::<S, f64>(isa, plain.mass),
                    None => Span::of(&tile.mass).load(isa, at),
                };
                let is_top = x.eq(max);
                t_top = t_top.add_where(is_top, mass);
                t_rest = t_rest.add_where(x.ne(max), mass);
                lin = lin.add_where(mass.ne(zero), mass * (origin - x));
            }
            let total = t_rest + t_top;
            let z = splat::<S, f64>(isa, terms.z_loss);
            let mut loss = odds.loss(lin * scale, total);
            let mut extra = zero;
            if terms.z_loss != 0.0 {
                loss = loss + z * lse * lse;
                extra = (z + z) * lse;
            }
            let pull = total + extra;
            if terms.plain.is_none() {
                loss = loss * Span::of(&tile.weight).load(isa, r);
            }
            SpanMut::of(&mut tile.loss).store(isa, r, loss);
            if !terms.gradient {
                r += step;
                continue;
            }
            let g = match terms.plain {
                Some(plain) => splat::<S, f64>(isa, plain.g),
                None => Span::of(&tile.g).load(isa, r),
            } * scale;
            let factor = S::F64::select(valid, g * pull * inverse, bad);
            SpanMut::of(&mut tile.a).store(isa, r, factor);
            if terms.dense {
                SpanMut::of(&mut tile.slope).store(isa, r, g);
            }
            let top = S::F64::select(valid, g * odds.at_max(isa, total, (t_rest, t_top), Some(extra)), bad);
            if terms.dense {
                SpanMut::of(&mut tile.top).store(isa, r, top);
            }
            // Of columns ties are not counted: but where there are any, the others have about as much as the maximum, and nothing cancels.
            let lone = ties.eq(one).and(odds.others.lt(splat::<S, f64>(isa, 0.75)));
            for entry in 0..terms.entries {
                let at = entry * APART + r;
                let x = Span::of(&tile.x_target).load(isa, at);
                let mass = match terms.plain {
                    Some(plain) => splat::<S, f64>(isa, plain.mass_all),
                    None => Span::of(&tile.mass_all).load(isa, at),
                };
                let e = if terms.stored {
                    Span::of(&tile.e_target).load(isa, at)
                } else {
                    exp.exp2((origin - b - splat::<S, f64>(isa, 1100.0 / terms.scale)).max(x - b), k)
                };
                // Of a maximum among several, without the error of its exponential.
                let p = S::F64::select(x.eq(max), odds.p_max, e * inverse);
                let other = S::F64::select(valid, g * (pull * p - mass), bad);
                SpanMut::of(&mut tile.patch).store(isa, at, S::F64::select(x.eq(max).and(lone), top, other));
            }
        } else {
            SpanMut::of(&mut tile.lse).store(isa, r, lse);
            SpanMut::of(&mut tile.log_sum).store(isa, r, odds.log_sum);
            let sure = odds.others.lt(splat::<S, f64>(isa, terms.ulp * 0.25));
            SpanMut::of(&mut tile.top).store(isa, r, S::F64::select(sure, splat::<S, f64>(isa, SURE), one));
            SpanMut::of(&mut tile.a).store(isa, r, S::F64::select(valid, inverse, bad));
        }
        r += step;
    }
}
