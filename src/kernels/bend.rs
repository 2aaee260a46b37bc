//! What softcap and mask do to runs of logits and gradients.

use crate::array::{Element, Flags, Span, SpanMut, Vf};
use crate::simd::{Isa, Kernel, Level, Vector};

use super::real::Real;
use super::tanh::Cap;

/// `cap·tanh(x/cap)` of a run, or the derivative 1 − tanh² there; or the one and the other in `slopes`, if there is room.
pub struct Softcap<'a, T> {
    /// How.
    pub cap: Cap<T>,
    /// Whether the derivative is wanted.
    pub slope: bool,
    /// The logits.
    pub x: Span<'a, T>,
    /// May be where x is.
    pub dst: SpanMut<'a, T>,
    /// As many derivatives, or no room for them.
    pub slopes: &'a mut [T],
}

impl<T: Real> Kernel for Softcap<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        let (step, len) = (Vf::<S, T>::LANES, self.x.len());
        let cap = self.cap;
        let dst = self.dst.part(0, len);
        let slopes = (!self.slopes.is_empty()).then(|| SpanMut::of(self.slopes).part(0, len));
        for k in 0..len / step {
            isa.prefetch(self.x.address(len + k * step));
            let (y, slope) = cap.both::<Vf<S, T>>(isa, self.x.nth(k, step).load(isa, 0));
            dst.nth(k, step).store(isa, 0, if self.slope { slope } else { y });
            if let Some(slopes) = slopes {
                slopes.nth(k, step).store(isa, 0, slope);
            }
        }
        let (i, left) = (len / step * step, len % step);
        if left > 0 {
            let (y, slope) = cap.both::<Vf<S, T>>(isa, self.x.load_partial(isa, i, left, T::ZERO));
            dst.store_partial(isa, i, left, if self.slope { slope } else { y });
            if let Some(slopes) = slopes {
                slopes.store_partial(isa, i, left, slope);
            }
        }
    }
}

/// Capped logits and their slopes, apart from the caller.
#[inline(never)]
pub fn cap<T: Real>(level: Level, cap: Cap<T>, x: Span<T>, dst: SpanMut<T>, slopes: &mut [T]) {
    level.run(Softcap { cap, slope: false, x, dst, slopes });
}

/// Lane-wise product in place, apart from the caller.
#[inline(never)]
pub fn multiply<T: Real>(level: Level, x: SpanMut<T>, by: Span<T>) {
    level.run(Product { x: x.read(), by, dst: x });
}

/// A run with `to` for what is under False.
pub struct Mask<'s, T> {
    /// A truth value for each.
    pub mask: Flags<'s>,
    /// See there.
    pub to: T,
    /// The run.
    pub x: Span<'s, T>,
    /// May be where x is.
    pub dst: SpanMut<'s, T>,
    /// Where more of the mask is, to be asked for.
    pub ahead: *const u8,
}

impl<T: Real> Kernel for Mask<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        let Self { mask, to, x, dst, ahead } = self;
        let (step, len) = (Vf::<S, T>::LANES, x.len());
        let (mask, dst, to) = (mask.part(0, len), dst.part(0, len), Vf::<S, T>::splat(isa, to));
        for line in (0..len).step_by(64) {
            isa.prefetch(ahead.wrapping_add(line));
        }
        for k in 0..len / step {
            let kept = mask.nth(k, step).load::<Vf<S, T>>(isa, 0);
            dst.nth(k, step).store(isa, 0, Vf::<S, T>::select(kept, x.nth(k, step).load(isa, 0), to));
        }
        let (i, left) = (len / step * step, len % step);
        if left > 0 {
            let kept = mask.load_partial::<Vf<S, T>>(isa, i, left);
            dst.store_partial(isa, i, left, Vf::<S, T>::select(kept, x.load_partial(isa, i, left, T::ZERO), to));
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
