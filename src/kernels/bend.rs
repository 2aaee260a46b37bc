//! What softcap and mask do to runs of logits and gradients.

use crate::array::{Element, Float, Span, SpanMut, Vf};
use crate::simd::{Isa, Kernel, Mask, Vector};

use super::math::{Real, TANH_NEAR, tanh_sech2};

/// `cap·tanh(x/cap)` of a run, or the derivative 1 − tanh² there; or the one and the other in `slopes`, if there is room.
pub struct Softcap<'a, T> {
    /// Positive.
    pub cap: f64,
    /// Whether the derivative is wanted.
    pub slope: bool,
    /// The logits.
    pub x: Span<'a, T>,
    /// May be where x is.
    pub dst: SpanMut<'a, T>,
    /// As many derivatives, or no room for them.
    pub slopes: &'a mut [T],
}

/// A cap as vectors.
#[derive(Clone, Copy)]
struct Cap<V> {
    c: V,
    inverse: V,
    near: V,
}

impl<V: Vector> Cap<V>
where
    V::Elem: Real,
{
    #[inline(always)]
    fn new(isa: V::Isa, cap: f64) -> Self {
        let splat = |x: f64| V::splat(isa, V::Elem::from_f64(x));
        let inverse = 1.0 / V::Elem::from_f64(cap).to_f64();
        // Without an inverse nothing is near, not even 0.
        Self { c: splat(cap), inverse: splat(inverse), near: splat(if inverse.is_finite() { cap * TANH_NEAR } else { -1.0 }) }
    }
    /// `cap·tanh(x/cap)` and its derivative.
    #[inline(always)]
    fn both(self, isa: V::Isa, x: V) -> (V, V) {
        // A product and what it leaves, for less than a division.
        let y = x * self.inverse;
        let y = y.neg_mul_add(self.c, x).mul_add(self.inverse, y);
        let far = self.near.lt(x.abs());
        let y = if far.any() { V::select(far, x / self.c, y) } else { y };
        let (tanh, sech2) = tanh_sech2(isa, y);
        (tanh * self.c, sech2)
    }
}

impl<T: Real> Kernel for Softcap<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        let (step, len) = (Vf::<S, T>::LANES, self.x.len());
        let cap = Cap::<Vf<S, T>>::new(isa, self.cap);
        let dst = self.dst.part(0, len);
        let slopes = (!self.slopes.is_empty()).then(|| SpanMut::of(self.slopes).part(0, len));
        for k in 0..len / step {
            isa.prefetch(self.x.address(len + k * step));
            let (y, slope) = cap.both(isa, self.x.nth(k, step).load(isa, 0));
            dst.nth(k, step).store(isa, 0, if self.slope { slope } else { y });
            if let Some(slopes) = slopes {
                slopes.nth(k, step).store(isa, 0, slope);
            }
        }
        let (i, left) = (len / step * step, len % step);
        if left > 0 {
            let (y, slope) = cap.both(isa, self.x.load_partial(isa, i, left, T::ZERO));
            dst.store_partial(isa, i, left, if self.slope { slope } else { y });
            if let Some(slopes) = slopes {
                slopes.store_partial(isa, i, left, slope);
            }
        }
    }
}

/// A run with `to` for what is under False.
pub struct Masked<'s, T> {
    /// One byte for each, 0 is False; may be longer.
    pub mask: &'s [u8],
    /// See there.
    pub to: T,
    /// The run.
    pub x: Span<'s, T>,
    /// May be where x is.
    pub dst: SpanMut<'s, T>,
    /// Where more of the mask is, to be asked for.
    pub ahead: *const u8,
}

impl<T: Real> Kernel for Masked<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        // Plain enough for the compiler to make vectors of.
        let Self { mask, to, x, dst, ahead } = self;
        let n = x.len();
        for line in (0..n).step_by(64) {
            isa.prefetch(ahead.wrapping_add(line));
        }
        let dst = dst.part(0, n);
        for (i, &flag) in mask[..n].iter().enumerate() {
            let kept = x.get(i);
            dst.set(i, if flag == 0 { to } else { kept });
        }
    }
}

/// Lane-wise product, rounded once.
pub struct Product<'s, E, T> {
    /// One factor.
    pub x: Span<'s, T>,
    /// The other.
    pub by: Span<'s, T>,
    /// May be where x is.
    pub dst: SpanMut<'s, E>,
}

impl<E: Element<Acc = T>, T: Real> Kernel for Product<'_, E, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        let (step, len) = (Vf::<S, T>::LANES, self.x.len());
        let (by, dst) = (self.by.part(0, len), self.dst.part(0, len));
        for k in 0..len / step {
            let (x, by) = (self.x.nth(k, step).load(isa, 0), by.nth(k, step).load(isa, 0));
            dst.nth(k, step).store(isa, 0, x * by);
        }
        let (i, left) = (len / step * step, len % step);
        if left > 0 {
            let (x, by) = (self.x.load_partial(isa, i, left, T::ZERO), by.load_partial(isa, i, left, T::ZERO));
            dst.store_partial(isa, i, left, x * by);
        }
    }
}
