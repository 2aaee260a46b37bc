//! Element types: what is read and written, and what it is computed in.

use half::{bf16, f16};

use crate::simd::{Isa, Vector};

use super::DType;
use super::span::Half;

/// A float type of logits and gradients.
pub trait Element: Copy + Send + Sync + 'static {
    /// What it is computed in.
    type Acc: Float;
    /// Its tag.
    const DTYPE: DType;
    /// From a double, rounded once.
    fn from_f64(x: f64) -> Self;
    /// Widened exactly.
    fn to_acc(self) -> Self::Acc;
    /// From the type it is computed in, rounded once.
    fn from_acc(x: Self::Acc) -> Self;
    /// Whether it is larger than x, which the type holds.
    fn exceeds(self, x: f64) -> bool;
    /// Loads one vector's worth, widened.
    /// # Safety
    /// `src` is valid for reads of `LANES` elements.
    unsafe fn load<S: Isa>(isa: S, src: *const Self) -> Vf<S, Self::Acc>;
    /// Stores one vector's worth, rounded once.
    /// # Safety
    /// `dst` is valid for writes of `LANES` elements.
    unsafe fn store<S: Isa>(isa: S, v: Vf<S, Self::Acc>, dst: *mut Self);
    /// Stores one vector's worth past the caches where there is a way, rounded once.
    /// # Safety
    /// As for [`Element::store`], and `dst` is aligned to [`super::STREAM_ALIGN`] bytes or a vector's worth further.
    #[inline(always)]
    unsafe fn stream<S: Isa>(isa: S, v: Vf<S, Self::Acc>, dst: *mut Self) {
        // SAFETY: the caller's promise includes this one.
        unsafe { Self::store(isa, v, dst) }
    }
    /// Loads `n` elements, the other lanes are `fill`.
    /// # Safety
    /// `src` is valid for reads of `n` elements, `n <= LANES`.
    unsafe fn load_partial<S: Isa>(isa: S, src: *const Self, n: usize, fill: Self) -> Vf<S, Self::Acc>;
    /// Stores the first `n` lanes, rounded once.
    /// # Safety
    /// `dst` is valid for writes of `n` elements, `n <= LANES`.
    unsafe fn store_partial<S: Isa>(isa: S, v: Vf<S, Self::Acc>, dst: *mut Self, n: usize);
}

/// A type that is computed in: `f32` or `f64`.
pub trait Float: Element<Acc = Self> + PartialOrd + core::fmt::Debug {
    /// Its vectors.
    type V<S: Isa>: Vector<Isa = S, Elem = Self>;
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// Negative infinity.
    const NEG_INF: Self;
    /// The largest finite number.
    const MAX: Self;
    /// Widened exactly.
    fn to_f64(self) -> f64;
    /// The `n` halves from `i` on, widened, the other lanes −inf. Halves are computed in `f32`: other types give anything.
    fn load_half<S: Isa>(isa: S, half: Half, i: usize, n: usize) -> Vf<S, Self>;
}

/// The vector of `T` in the instruction set `S`.
pub type Vf<S, T> = <T as Float>::V<S>;

impl Element for f32 {
    type Acc = Self;
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x as Self
    }
    #[inline(always)]
    fn exceeds(self, x: f64) -> bool {
        self > x as Self
    }
    #[inline(always)]
    fn to_acc(self) -> Self {
        self
    }
    #[inline(always)]
    fn from_acc(x: Self) -> Self {
        x
    }
    #[inline(always)]
    unsafe fn load<S: Isa>(isa: S, src: *const Self) -> S::F32 {
        // SAFETY: the caller's promise is the same.
        unsafe { S::F32::load(isa, src) }
    }
    #[inline(always)]
    unsafe fn store<S: Isa>(_isa: S, v: S::F32, dst: *mut Self) {
        // SAFETY: the caller's promise is the same.
        unsafe { v.store(dst) }
    }
    #[inline(always)]
    unsafe fn stream<S: Isa>(_isa: S, v: S::F32, dst: *mut Self) {
        // SAFETY: the caller's promise is the same: no vector is larger than the alignment.
        unsafe { v.stream(dst) }
    }
    #[inline(always)]
    unsafe fn load_partial<S: Isa>(isa: S, src: *const Self, n: usize, fill: Self) -> S::F32 {
        // SAFETY: the caller's promise is the same.
        unsafe { S::F32::load_partial(isa, src, n, fill) }
    }
    #[inline(always)]
    unsafe fn store_partial<S: Isa>(_isa: S, v: S::F32, dst: *mut Self, n: usize) {
        // SAFETY: the caller's promise is the same.
        unsafe { v.store_partial(dst, n) }
    }
}

impl Float for f32 {
    type V<S: Isa> = S::F32;
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INF: Self = Self::NEG_INFINITY;
    const MAX: Self = Self::MAX;
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn load_half<S: Isa>(isa: S, half: Half, i: usize, n: usize) -> S::F32 {
        let whole = n == S::F32::LANES;
        match half {
            Half::F16(span) if whole => span.load(isa, i),
            Half::Bf16(span) if whole => span.load(isa, i),
            Half::F16(span) => span.load_partial(isa, i, n, f16::NEG_INFINITY),
            Half::Bf16(span) => span.load_partial(isa, i, n, bf16::NEG_INFINITY),
        }
    }
}

impl Element for f64 {
    type Acc = Self;
    const DTYPE: DType = DType::F64;
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn exceeds(self, x: f64) -> bool {
        self > x
    }
    #[inline(always)]
    fn to_acc(self) -> Self {
        self
    }
    #[inline(always)]
    fn from_acc(x: Self) -> Self {
        x
    }
    #[inline(always)]
    unsafe fn load<S: Isa>(isa: S, src: *const Self) -> S::F64 {
        // SAFETY: the caller's promise is the same.
        unsafe { S::F64::load(isa, src) }
    }
    #[inline(always)]
    unsafe fn store<S: Isa>(_isa: S, v: S::F64, dst: *mut Self) {
        // SAFETY: the caller's promise is the same.
        unsafe { v.store(dst) }
    }
    #[inline(always)]
    unsafe fn stream<S: Isa>(_isa: S, v: S::F64, dst: *mut Self) {
        // SAFETY: the caller's promise is the same: no vector is larger than the alignment.
        unsafe { v.stream(dst) }
    }
    #[inline(always)]
    unsafe fn load_partial<S: Isa>(isa: S, src: *const Self, n: usize, fill: Self) -> S::F64 {
        // SAFETY: the caller's promise is the same.
        unsafe { S::F64::load_partial(isa, src, n, fill) }
    }
    #[inline(always)]
    unsafe fn store_partial<S: Isa>(_isa: S, v: S::F64, dst: *mut Self, n: usize) {
        // SAFETY: the caller's promise is the same.
        unsafe { v.store_partial(dst, n) }
    }
}

impl Float for f64 {
    type V<S: Isa> = S::F64;
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INF: Self = Self::NEG_INFINITY;
    const MAX: Self = Self::MAX;
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn load_half<S: Isa>(isa: S, _half: Half, _i: usize, _n: usize) -> S::F64 {
        S::F64::splat(isa, 0.0)
    }
}

macro_rules! half_element {
    ($type:ty, $dtype:ident, $load:ident, $store:ident) => {
        impl Element for $type {
            type Acc = f32;
            const DTYPE: DType = DType::$dtype;
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                <$type>::from_f32(round_to_odd(x))
            }
            #[inline(always)]
            fn exceeds(self, x: f64) -> bool {
                self > Self::from_f64(x)
            }
            #[inline(always)]
            fn to_acc(self) -> f32 {
                self.to_f32()
            }
            #[inline(always)]
            fn from_acc(x: f32) -> Self {
                <$type>::from_f32(x)
            }
            #[inline(always)]
            unsafe fn load<S: Isa>(isa: S, src: *const Self) -> S::F32 {
                // SAFETY: the type is a transparent u16; otherwise the caller's promise is the same.
                unsafe { isa.$load(src.cast()) }
            }
            #[inline(always)]
            unsafe fn store<S: Isa>(isa: S, v: S::F32, dst: *mut Self) {
                // SAFETY: the type is a transparent u16; otherwise the caller's promise is the same.
                unsafe { isa.$store(v, dst.cast()) }
            }
            #[inline(always)]
            unsafe fn stream<S: Isa>(isa: S, v: S::F32, dst: *mut Self) {
                let mut whole = [<$type>::ZERO; 16];
                // SAFETY: the copy has room for every lane; otherwise the caller's promise is the same.
                unsafe {
                    isa.$store(v, whole.as_mut_ptr().cast());
                    isa.stream_halves(whole.as_ptr().cast(), dst.cast());
                }
            }
            #[inline(always)]
            unsafe fn load_partial<S: Isa>(isa: S, src: *const Self, n: usize, fill: Self) -> S::F32 {
                let mut whole = [fill; 16];
                // SAFETY: n <= LANES <= 16 elements are readable, and the copy has 16.
                unsafe {
                    core::ptr::copy_nonoverlapping(src, whole.as_mut_ptr(), n);
                    isa.$load(whole.as_ptr().cast())
                }
            }
            #[inline(always)]
            unsafe fn store_partial<S: Isa>(isa: S, v: S::F32, dst: *mut Self, n: usize) {
                let mut whole = [<$type>::ZERO; 16];
                // SAFETY: the copy has room for every lane; n <= LANES elements are writable.
                unsafe {
                    isa.$store(v, whole.as_mut_ptr().cast());
                    core::ptr::copy_nonoverlapping(whole.as_ptr(), dst, n);
                }
            }
        }
    };
}
half_element!(f16, F16, load_f16, store_f16);
half_element!(bf16, Bf16, load_bf16, store_bf16);

/// To single precision such that a second rounding, to a half type, gives what one rounding would: truncated, the last bit set when inexact.
/// (The conversions from float64 of the crate `half` look at the upper 32 bits only, which moves numbers just above a tie.)
#[inline(always)]
pub(super) fn round_to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let back = f64::from(nearest);
    if back == x || x.is_nan() {
        return nearest;
    }
    // One step towards zero where rounding went away from it; infinity steps to the largest finite number.
    let bits = if back.abs() > x.abs() { nearest.to_bits() - 1 } else { nearest.to_bits() };
    f32::from_bits(bits | 1)
}

/// The lanes of a vector, in order; the rest of the array is zero.
#[inline(always)]
pub fn lanes<S: Isa, T: Float>(v: Vf<S, T>) -> [T; 16] {
    const { assert!(<Vf<S, T> as Vector>::LANES <= 16) };
    let mut out = [T::ZERO; 16];
    // SAFETY: a vector has at most 16 lanes, checked above.
    unsafe { v.store(out.as_mut_ptr()) };
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both sides of every tie between two neighbours, further apart than float64 resolves and less than float32 does.
    fn ties_are_kept_apart<E: Element<Acc = f32>>(from_bits: impl Fn(u16) -> E, infinity: u16) {
        for bits in 0..infinity - 1 {
            let (low, high) = (f64::from(from_bits(bits).to_acc()), f64::from(from_bits(bits + 1).to_acc()));
            let tie = f64::midpoint(low, high);
            let even = if bits % 2 == 0 { low } else { high };
            for (x, expected) in [(tie.next_down(), low), (tie, even), (tie.next_up(), high), (low, low)] {
                for sign in [1.0, -1.0] {
                    assert_eq!(f64::from(E::from_f64(sign * x).to_acc()), sign * expected, "{x:e} from {low:e} and {high:e}");
                }
            }
        }
        assert_eq!(E::from_f64(1e300).to_acc(), f32::INFINITY);
        assert!(E::from_f64(f64::NAN).to_acc().is_nan());
    }

    #[test]
    fn float64_is_rounded_once_to_half_types() {
        ties_are_kept_apart(f16::from_bits, f16::INFINITY.to_bits());
        ties_are_kept_apart(bf16::from_bits, bf16::INFINITY.to_bits());
    }
}
