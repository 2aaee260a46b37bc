//! Results of rows: from exponentials that were kept or are computed again, or from logits.

use crate::array::{DType, Element, Float, HalfRows, Rows, RowsMut, Span, SpanMut, Vf};
use crate::simd::{Isa, Kernel, Level, Vector};

use super::finish::{SURE, Tile};
use super::math::{Anchored, Exp};
use super::real::Real;
use super::rows::BLOCK;
use super::state::{Reference, Summand, splat};

/// Values to be written, vector by vector.
trait Values<S: Isa, T: Real>: Copy {
    /// `len` of them, from `start` on.
    fn part(self, start: usize, len: usize) -> Self;
    /// Vector `k`.
    fn nth(self, isa: S, k: usize) -> Vf<S, T>;
    /// The `n` values from `i` on.
    fn partial(self, isa: S, i: usize, n: usize) -> Vf<S, T>;
}

/// Writes values; `past` the caches if wanted.
#[inline(always)]
fn write<S: Isa, O: Element<Acc = T>, T: Real, W: Values<S, T>>(isa: S, values: W, dst: SpanMut<O>, past: bool) {
    let (step, len) = (Vf::<S, T>::LANES, dst.read().len());
    // No store of the portable level does.
    let past = past && S::LEVEL != Level::Scalar;
    let lead = if past { dst.lead().min(len) } else { 0 };
    let mut i = 0;
    while i < lead {
        let n = step.min(lead - i);
        dst.store_partial(isa, i, n, values.partial(isa, i, n));
        i += n;
    }
    // Of one length, known to the compiler: no check is left in the loops.
    let (whole, to) = (values.part(lead, len - lead), dst.part(lead, len - lead));
    let count = (len - lead) / step;
    // A load right behind a masked store waits for it, and there the next row may begin: the last vector is stored whole, over what the others
    // have written, and so made before they are stored.
    let last = (!past && len >= step && !len.is_multiple_of(step)).then(|| values.part(len - step, step).nth(isa, 0));
    if past {
        for k in 0..count {
            to.nth(k, step).stream(isa, 0, whole.nth(isa, k));
        }
    } else {
        for k in 0..count {
            to.nth(k, step).store(isa, 0, whole.nth(isa, k));
        }
    }
    let i = lead + count * step;
    if let Some(last) = last {
        dst.store(isa, len - step, last);
    } else if i < len {
        dst.store_partial(isa, i, len - i, values.partial(isa, i, len - i));
    }
}

/// `min(a·e, most) − g·t`, or `− g` where there is no stream.
#[derive(Clone, Copy)]
struct Scaling<'a, V: Vector> {
    a: V,
    most: V,
    g: V,
    t: Option<Span<'a, V::Elem>>,
}

impl<V: Vector> Scaling<'_, V>
where
    V::Elem: Real<V<V::Isa> = V>,
{
    #[inline(always)]
    fn part(self, start: usize, len: usize) -> Self {
        Self { t: self.t.map(|t| t.part(start, len)), ..self }
    }
    #[inline(always)]
    fn nth(self, isa: V::Isa, k: usize, e: V) -> V {
        // In this order NaN passes.
        let v = self.most.min(e * self.a);
        v - self.t.map_or(self.g, |t| t.nth(k, V::LANES).load(isa, 0) * self.g)
    }
    #[inline(always)]
    fn partial(self, isa: V::Isa, i: usize, n: usize, e: V) -> V {
        let v = self.most.min(e * self.a);
        v - self.t.map_or(self.g, |t| t.load_partial(isa, i, n, V::Elem::ZERO) * self.g)
    }
}

/// Exponentials that are multiplied, less what is the same for all of them: `min(a·e, most) − g`.
#[derive(Clone, Copy)]
struct Stored<'a, V: Vector> {
    e: Span<'a, V::Elem>,
    a: V,
    most: V,
    g: V,
}

impl<S: Isa, T: Real> Values<S, T> for Stored<'_, Vf<S, T>> {
    #[inline(always)]
    fn part(self, start: usize, len: usize) -> Self {
        Self { e: self.e.part(start, len), ..self }
    }
    #[inline(always)]
    fn nth(self, isa: S, k: usize) -> Vf<S, T> {
        // In this order NaN passes.
        self.most.min(self.e.nth(k, Vf::<S, T>::LANES).load(isa, 0) * self.a) - self.g
    }
    #[inline(always)]
    fn partial(self, isa: S, i: usize, n: usize) -> Vf<S, T> {
        self.most.min(self.e.load_partial(isa, i, n, T::ZERO) * self.a) - self.g
    }
}

/// Exponentials that are multiplied in two steps, less the dense stream.
#[derive(Clone, Copy)]
struct Balanced<'a, V: Vector> {
    e: Span<'a, V::Elem>,
    factor: V,
    scaling: Scaling<'a, V>,
}

impl<S: Isa, T: Real> Values<S, T> for Balanced<'_, Vf<S, T>> {
    #[inline(always)]
    fn part(self, start: usize, len: usize) -> Self {
        Self { e: self.e.part(start, len), scaling: self.scaling.part(start, len), ..self }
    }
    #[inline(always)]
    fn nth(self, isa: S, k: usize) -> Vf<S, T> {
        self.scaling.nth(isa, k, self.e.nth(k, Vf::<S, T>::LANES).load(isa, 0) * self.factor)
    }
    #[inline(always)]
    fn partial(self, isa: S, i: usize, n: usize) -> Vf<S, T> {
        self.scaling.partial(isa, i, n, self.e.load_partial(isa, i, n, T::ZERO) * self.factor)
    }
}

/// What results are made from: of the type that is computed in, or logits of the results' own.
#[derive(Clone, Copy)]
enum Source<'a, T, O> {
    Wide(Span<'a, T>),
    Half(Span<'a, O>),
}

impl<T: Real, O: Element<Acc = T>> Source<'_, T, O> {
    #[inline(always)]
    fn part(self, start: usize, len: usize) -> Self {
        match self {
            Self::Wide(span) => Self::Wide(span.part(start, len)),
            Self::Half(span) => Self::Half(span.part(start, len)),
        }
    }
    #[inline(always)]
    fn nth<S: Isa>(self, isa: S, k: usize) -> Vf<S, T> {
        let step = Vf::<S, T>::LANES;
        match self {
            Self::Wide(span) => span.nth(k, step).load(isa, 0),
            Self::Half(span) => span.nth(k, step).load(isa, 0),
        }
    }
    #[inline(always)]
    fn partial<S: Isa>(self, isa: S, i: usize, n: usize) -> Vf<S, T> {
        match self {
            Self::Wide(span) => span.load_partial(isa, i, n, T::NEG_INF),
            Self::Half(span) => span.load_partial(isa, i, n, O::from_acc(T::NEG_INF)),
        }
    }
}

/// Logits whose exponentials are computed again.
#[derive(Clone, Copy)]
struct Anew<'a, V: Vector, O> {
    x: Source<'a, V::Elem, O>,
    at: Anchored<V>,
    b: V,
    scaling: Scaling<'a, V>,
}

impl<S: Isa, T: Real, O: Element<Acc = T>> Values<S, T> for Anew<'_, Vf<S, T>, O> {
    #[inline(always)]
    fn part(self, start: usize, len: usize) -> Self {
        Self { x: self.x.part(start, len), scaling: self.scaling.part(start, len), ..self }
    }
    #[inline(always)]
    fn nth(self, isa: S, k: usize) -> Vf<S, T> {
        self.scaling.nth(isa, k, self.at.exp2(self.x.nth(isa, k) - self.b))
    }
    #[inline(always)]
    fn partial(self, isa: S, i: usize, n: usize) -> Vf<S, T> {
        self.scaling.partial(isa, i, n, self.at.exp2(self.x.partial(isa, i, n) - self.b))
    }
}

/// A log-probability: `(x − max)·scale − log_sum`, in this order, where neither step cancels.
#[derive(Clone, Copy)]
struct Formula<V> {
    max: V,
    scale: V,
    log_sum: V,
}

impl<V: Vector> Formula<V> {
    #[inline(always)]
    fn of(self, x: V) -> V {
        (x - self.max) * self.scale - self.log_sum
    }
}

/// Logits, for log-probabilities.
#[derive(Clone, Copy)]
struct Logs<'a, V: Vector, O> {
    x: Source<'a, V::Elem, O>,
    log: Formula<V>,
}

impl<S: Isa, T: Real, O: Element<Acc = T>> Values<S, T> for Logs<'_, Vf<S, T>, O> {
    #[inline(always)]
    fn part(self, start: usize, len: usize) -> Self {
        Self { x: self.x.part(start, len), ..self }
    }
    #[inline(always)]
    fn nth(self, isa: S, k: usize) -> Vf<S, T> {
        self.log.of(self.x.nth(isa, k))
    }
    #[inline(always)]
    fn partial(self, isa: S, i: usize, n: usize) -> Vf<S, T> {
        self.log.of(self.x.partial(isa, i, n))
    }
}

/// What results are made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// Exponentials.
    Stored,
    /// Logits, whose exponentials are computed again.
    Anew,
    /// Logits, for log-probabilities.
    Logs,
}

/// Makes a class that has everything exactly 1: the product has the error of two exponentials. Once per type: such rows are few, or cheap to look through.
#[inline(never)]
fn crown<O: Element>(dst: SpanMut<O>) {
    const STRETCH: usize = 64;
    let all = dst.read();
    for start in (0..all.len()).step_by(STRETCH) {
        let part = all.part(start, STRETCH.min(all.len() - start));
        if (0..part.len()).fold(false, |any, i| any | part.get(i).exceeds(SURE))
            && let Some(i) = (0..part.len()).find(|&i| part.get(i).exceeds(SURE))
        {
            return dst.set(start + i, O::from_f64(1.0));
        }
    }
}

/// Results of rows that were finished, or of one block of a row, as a kernel: `min(a·e, most) − slope·t`, where t may be the same for all classes.
pub struct Emit<'a, T, O> {
    /// 1 / temperature.
    pub scale: f64,
    /// What `src` holds.
    pub from: From,
    /// No product of `a` and an exponential is larger: 1 for probabilities.
    pub most: f64,
    /// The coefficients, those of row r at `first + r`.
    pub tile: &'a Tile,
    /// See there.
    pub first: usize,
    /// Logits or exponentials.
    pub src: Rows<'a, T>,
    /// Stands for `src` where there are logits of a half type.
    pub half: Option<HalfRows<'a>>,
    /// The dense stream, or nothing.
    pub t: Span<'a, T>,
    /// Whether the tile's shares stand for it.
    pub even: bool,
    /// References of the exponentials, block by block of all rows; those of the rows where it is empty.
    pub references: &'a [Reference],
    /// The results; may be where `src` is.
    pub dst: RowsMut<'a, O>,
    /// Whether they go past the caches.
    pub past: bool,
}

impl<T: Summand, O: Element<Acc = T>> Kernel for Emit<'_, T, O> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        let count = self.dst.count();
        let products = self.from == From::Stored && self.t.is_empty() && !self.past;
        if self.from == From::Logs {
            self.logs(isa);
        } else if products && self.references.is_empty() && self.tile.a[self.first..][..count].iter().all(|a| a.abs() >= Self::TINY) {
            let most = splat::<S, T>(isa, self.most);
            for (r, slot) in (0..count).zip(self.first..) {
                let (a, g) = (splat::<S, T>(isa, self.tile.a[slot]), self.shared(isa, slot));
                write(isa, Stored { e: self.src.row(r), a, most, g }, self.dst.row(r), false);
            }
        } else {
            self.blocks(isa, products);
        }
        if self.most == 1.0 {
            for (r, slot) in (0..count).zip(self.first..) {
                if self.tile.top[slot] == SURE {
                    crown(self.dst.row(r));
                }
            }
        }
    }
}

impl<T: Summand, O: Element<Acc = T>> Emit<'_, T, O> {
    /// Factors below may leave the normal numbers where the product does not.
    const TINY: f64 = if matches!(T::DTYPE, DType::F64) { 1e-250 } else { 1e-30 };

    /// The formula of a row's log-probabilities.
    #[inline(always)]
    fn log<S: Isa>(&self, isa: S, r: usize) -> Formula<Vf<S, T>> {
        let slot = self.first + r;
        let (max, log_sum) = (self.tile.max[slot], self.tile.log_sum[slot]);
        Formula { max: splat::<S, T>(isa, max), scale: splat::<S, T>(isa, self.scale), log_sum: splat::<S, T>(isa, log_sum) }
    }

    #[inline(always)]
    fn logs<S: Isa>(&self, isa: S) {
        let (rows, single) = (0..self.dst.count(), O::DTYPE == T::DTYPE && S::LEVEL != Level::Scalar);
        if single && self.past {
            if let (Some(src), Some(dst)) = (self.src.line(), self.dst.line()) {
                return self.stretch(isa, 0, src, dst);
            }
            return rows.for_each(|r| self.stretch(isa, r, self.src.row(r), self.dst.row(r)));
        }
        for r in rows {
            write(isa, Logs { x: self.source(r), log: self.log(isa, r) }, self.dst.row(r), self.past && !single);
        }
    }

    /// Log-probabilities of adjacent rows, of which `r` is the first, past the caches: the vector in which one ends and the next one begins is written whole.
    /// (Parts of lines have to be read first, and everything after them waits.)
    #[inline(always)]
    fn stretch<S: Isa>(&self, isa: S, mut r: usize, src: Span<T>, dst: SpanMut<O>) {
        let (step, len, all) = (Vf::<S, T>::LANES, self.dst.read().len(), src.len());
        let mut ones = [T::ZERO; 32];
        ones[..16].fill(T::ONE);
        let (ones, one) = (Span::of(&ones), splat::<S, T>(isa, 1.0));
        let some = |i: usize, n: usize, log: Formula<Vf<S, T>>| dst.store_partial(isa, i, n, log.of(src.load_partial(isa, i, n, T::ZERO)));
        let (mut i, lead) = (0, dst.lead().min(all));
        let (mut log, mut end) = (self.log(isa, r), len);
        while i < lead {
            let n = step.min(lead - i).min(end - i);
            some(i, n, log);
            i += n;
        }
        loop {
            let n = (end - i) / step;
            let (from, to) = (src.part(i, n * step), dst.part(i, n * step));
            for k in 0..n {
                to.nth(k, step).stream(isa, 0, log.of(from.nth(k, step).load(isa, 0)));
            }
            i += n * step;
            if end == all {
                return some(i, end - i, log);
            }
            r += 1;
            let after = self.log(isa, r);
            if i < end {
                let here = ones.load(isa, 16 - (end - i)).eq(one);
                let x = src.load(isa, i);
                dst.stream(isa, i, Vf::<S, T>::select(here, log.of(x), after.of(x)));
                i += step;
            }
            (log, end) = (after, end + len);
        }
    }

    /// What is taken off all classes of a row.
    #[inline(always)]
    fn shared<S: Isa>(&self, isa: S, slot: usize) -> Vf<S, T> {
        splat::<S, T>(isa, if self.even { self.tile.slope[slot] * self.tile.share[slot] } else { 0.0 })
    }

    #[inline(always)]
    fn source(&self, r: usize) -> Source<'_, T, O> {
        match self.half.and_then(|half| half.row(r).of::<O>()) {
            Some(half) if O::DTYPE != T::DTYPE => Source::Half(half),
            _ => Source::Wide(self.src.row(r)),
        }
    }

    /// Rows whose blocks have references of their own, or that take more than a product.
    #[inline(always)]
    fn blocks<S: Isa>(&self, isa: S, products: bool) {
        let exp = Exp::<Vf<S, T>>::new(isa, self.scale);
        let (len, most) = (self.dst.read().len(), splat::<S, T>(isa, self.most));
        let (blocks, size) = if self.references.is_empty() { (1, len) } else { (len.div_ceil(BLOCK), BLOCK) };
        for r in 0..self.dst.count() {
            let (src, dst, slot) = (self.source(r), self.dst.row(r), self.first + r);
            for index in 0..blocks {
                let (start, n) = (index * size, size.min(len - index * size));
                let factor = self.references.get(r * blocks + index).map_or(1.0, |reference| reference.factor(self.own(slot), self.scale));
                let a = self.tile.a[slot] * factor;
                let (src, dst) = (src.part(start, n), dst.part(start, n));
                match src {
                    Source::Wide(e) if products && a.abs() >= Self::TINY => {
                        write(isa, Stored { e, a: splat::<S, T>(isa, a), most, g: self.shared(isa, slot) }, dst, false);
                    }
                    _ => {
                        let t = if self.t.is_empty() { self.t } else { self.t.part(start, n) };
                        self.part(isa, &exp, slot, factor, src, t, dst);
                    }
                }
            }
        }
    }

    fn own(&self, slot: usize) -> Reference {
        Reference { k: self.tile.k[slot], b: self.tile.b[slot] }
    }

    #[inline(always)]
    fn part<S: Isa>(&self, isa: S, exp: &Exp<Vf<S, T>>, slot: usize, factor: f64, src: Source<T, O>, t: Span<T>, dst: SpanMut<O>) {
        let tile = self.tile;
        // In one factor, unless it leaves the normal numbers where the result may not.
        let a = tile.a[slot];
        let shift = T::BIAS.to_f64().exp2();
        let (a, factor) = match ((a * factor).abs() < Self::TINY, a.abs() < Self::TINY) {
            (false, _) => (a * factor, 1.0),
            (true, false) => (a, factor),
            (true, true) => (a * shift, factor / shift),
        };
        let scaling = Scaling {
            a: splat::<S, T>(isa, a),
            most: splat::<S, T>(isa, self.most),
            g: if t.is_empty() { self.shared(isa, slot) } else { splat::<S, T>(isa, tile.slope[slot]) },
            t: (!t.is_empty()).then_some(t),
        };
        match (self.from, src) {
            (From::Stored, Source::Wide(e)) => {
                // Exponentials of the results' own type are where those will be.
                let past = self.past && O::DTYPE != T::DTYPE;
                write(isa, Balanced { e, factor: splat::<S, T>(isa, factor), scaling }, dst, past);
            }
            // Exponentials are never halves.
            (From::Stored, Source::Half(_)) => {}
            _ => {
                let own = self.own(slot);
                let at = exp.anchor(splat::<S, T>(isa, own.k - factor.log2()));
                write(isa, Anew { x: src, at, b: splat::<S, T>(isa, own.b), scaling }, dst, self.past);
            }
        }
    }
}
