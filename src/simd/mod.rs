//! Instruction sets: the only place that names intrinsics.
//!
//! A [`Level`] is a plain value that callers pass around. [`Level::run`] turns it into a zero-sized token (an [`Isa`]) inside a
//! function compiled for that instruction set, and hands the token to a [`Kernel`]. Vectors can only be made with a token, and a
//! token is only made after detection, so everything above this module is safe code.
//!
//! Adding an instruction set: one file that implements [`Isa`] and two [`Vector`]s, one variant of [`Level`], one arm in
//! [`Level::available`] and one in [`Level::run`]. The tests in `tests/simd.rs` and every kernel test pick it up from [`Level::all`].

use core::ops::{Add, Div, Mul, Neg, Sub};

/// Methods that are one intrinsic each. The result is wrapped in the type that ends the line.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! intrinsics {
    ($(fn $method:ident($self:ident $(, $arg:ident)*) = $intrinsic:expr, $result:ident;)*) => {$(
        #[inline(always)]
        fn $method($self $(, $arg: Self)*) -> $result {
            // SAFETY: vectors and masks are only made with a token, so the instruction set was detected.
            $result(unsafe { $intrinsic($self.0 $(, $arg.0)*) })
        }
    )*};
}

/// The operators of a vector type, one intrinsic each.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! operators {
    ($vector:ident, $add:ident, $sub:ident, $mul:ident, $div:ident, -$self:ident = $neg:expr) => {
        impl core::ops::Add for $vector {
            type Output = Self;
            intrinsics! { fn add(self, rhs) = $add, $vector; }
        }
        impl core::ops::Sub for $vector {
            type Output = Self;
            intrinsics! { fn sub(self, rhs) = $sub, $vector; }
        }
        impl core::ops::Mul for $vector {
            type Output = Self;
            intrinsics! { fn mul(self, rhs) = $mul, $vector; }
        }
        impl core::ops::Div for $vector {
            type Output = Self;
            intrinsics! { fn div(self, rhs) = $div, $vector; }
        }
        impl core::ops::Neg for $vector {
            type Output = Self;
            #[inline(always)]
            fn neg($self) -> Self {
                // SAFETY: vectors are only made with a token, so the instruction set was detected.
                Self(unsafe { $neg })
            }
        }
    };
}

/// The row `offsets[i]` bytes from `base`.
/// # Safety
/// `offsets` has more than `i` numbers.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn row<T>(base: *const u8, offsets: *const isize, i: usize) -> *const T {
    // SAFETY: the caller's promise.
    unsafe { base.wrapping_offset(offsets.add(i).read()).cast() }
}

/// As [`row`], to write.
/// # Safety
/// As for [`row`].
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn row_mut<T>(base: *mut u8, offsets: *const isize, i: usize) -> *mut T {
    // SAFETY: the caller's promise.
    unsafe { row::<T>(base, offsets, i).cast_mut() }
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

pub use scalar::Scalar;

/// An instruction-set level, best first in [`Level::all`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Level {
    /// AVX-512 F, BW, DQ and VL, on top of [`Level::Avx2`].
    Avx512,
    /// AVX2 with FMA, F16C, BMI2 and POPCNT.
    Avx2,
    /// Arm Advanced SIMD.
    Neon,
    /// Portable code, one lane.
    Scalar,
}

impl Level {
    const EVERY: [Self; 4] = [Self::Avx512, Self::Avx2, Self::Neon, Self::Scalar];

    /// The name used in `CROSSENT_SIMD` and by `set_simd_level`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Neon => "neon",
            Self::Scalar => "scalar",
        }
    }

    /// The level of that name, whether or not this machine has it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::EVERY.into_iter().find(|level| level.name() == name)
    }

    /// Whether this machine can run the level.
    pub fn available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::Avx512::detect().is_some(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// Every level this machine can run, best first.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::EVERY.into_iter().filter(|level| level.available())
    }

    /// The best level of this machine.
    pub fn best() -> Self {
        Self::all().next().unwrap_or(Self::Scalar)
    }

    /// Runs `kernel` compiled for this level; a level this machine lacks falls back to [`Scalar`].
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                if let Some(isa) = avx512::Avx512::detect() {
                    return isa.run(kernel);
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                if let Some(isa) = avx2::Avx2::detect() {
                    return isa.run(kernel);
                }
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => return neon::Neon::detect().run(kernel),
            _ => {}
        }
        portable(kernel)
    }

    /// Orders what was written past the caches ([`Vector::stream`]) before what is written from now on: to be called before results are handed on, and not
    /// more often, as it waits for memory.
    pub fn fence(self) {
        self.run(Fence);
    }
}

struct Fence;

impl Kernel for Fence {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        isa.fence();
    }
}

/// Not part of its callers: they would carry it for nothing.
#[inline(never)]
fn portable<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Scalar)
}

/// Work that is generic over the instruction set. `run` must be `#[inline(always)]`, and so must everything it calls that touches
/// vectors (closures cannot be, so kernels use none): only code inlined into the level's shim is compiled for the level.
pub trait Kernel {
    /// What the kernel returns.
    type Output;
    /// The work itself.
    fn run<S: Isa>(self, isa: S) -> Self::Output;
}

/// An instruction set: a zero-sized token that proves detection succeeded.
pub trait Isa: Copy + Send + Sync + 'static {
    /// Vectors of `f32`.
    type F32: Vector<Isa = Self, Elem = f32>;
    /// Vectors of `f64`, with half as many lanes (but at least one).
    type F64: Vector<Isa = Self, Elem = f64>;
    /// The value of this token.
    const LEVEL: Level;
    /// Vectors that a loop may keep in registers.
    const REGISTERS: usize;

    /// Lanes `0..F64::LANES` and the rest of `v`, widened. With one lane the second result is zero.
    fn widen(self, v: Self::F32) -> (Self::F64, Self::F64);
    /// The inverse of [`Isa::widen`], rounded to nearest even.
    fn narrow(self, lo: Self::F64, hi: Self::F64) -> Self::F32;

    /// Loads `F32::LANES` IEEE half-precision numbers.
    /// # Safety
    /// `src` is valid for reads of that many `u16`.
    unsafe fn load_f16(self, src: *const u16) -> Self::F32;
    /// Stores as IEEE half precision, rounded to nearest even.
    /// # Safety
    /// `dst` is valid for writes of `F32::LANES` `u16`.
    unsafe fn store_f16(self, v: Self::F32, dst: *mut u16);
    /// Loads `F32::LANES` bfloat16 numbers.
    /// # Safety
    /// `src` is valid for reads of that many `u16`.
    unsafe fn load_bf16(self, src: *const u16) -> Self::F32;
    /// Stores as bfloat16, rounded to nearest even; NaN stays NaN.
    /// # Safety
    /// `dst` is valid for writes of `F32::LANES` `u16`.
    unsafe fn store_bf16(self, v: Self::F32, dst: *mut u16);
    /// Copies `F32::LANES` halves, past the caches where the instruction set can.
    /// # Safety
    /// `src` is valid for reads and `dst` for writes of that many `u16`; `dst` is aligned to as many bytes.
    #[inline(always)]
    unsafe fn stream_halves(self, src: *const u16, dst: *mut u16) {
        // SAFETY: the caller's promise.
        unsafe { core::ptr::copy_nonoverlapping(src, dst, Self::F32::LANES) }
    }
    /// Asks for the cache line at an address, which need not be valid, as far as the second cache.
    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}
    /// The same for the nearest cache: for what is read very soon.
    #[inline(always)]
    fn prefetch_near(self, _at: *const u8) {}
    /// See [`Level::fence`].
    #[inline(always)]
    fn fence(self) {}
}

/// A lane-wise truth value.
pub trait Mask: Copy {
    /// Whether any lane is true.
    fn any(self) -> bool;
    /// The number of true lanes.
    fn count(self) -> usize;
    /// Bit i is lane i.
    fn bits(self) -> u64;
    /// Lane-wise and.
    #[must_use]
    fn and(self, rhs: Self) -> Self;
}

/// A vector of floats. Arithmetic is IEEE in every lane; the named operations say what they do with NaN.
pub trait Vector: Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self> + Neg<Output = Self> {
    /// The lane type.
    type Elem: Copy;
    /// The instruction set it belongs to.
    type Isa: Isa;
    /// The result of comparisons.
    type Mask: Mask;
    /// Number of lanes, a power of two.
    const LANES: usize;

    /// All lanes `x`.
    fn splat(isa: Self::Isa, x: Self::Elem) -> Self;
    /// Loads `LANES` elements; no alignment is needed beyond the element's.
    /// # Safety
    /// `src` is valid for reads of `LANES` elements.
    unsafe fn load(isa: Self::Isa, src: *const Self::Elem) -> Self;
    /// Loads the first `n <= LANES` elements, the other lanes are `fill`; memory beyond `n` is not touched.
    /// # Safety
    /// `src` is valid for reads of `n` elements.
    unsafe fn load_partial(isa: Self::Isa, src: *const Self::Elem, n: usize, fill: Self::Elem) -> Self;
    /// Which of `LANES` bytes are not 0.
    /// # Safety
    /// `src` is valid for reads of that many bytes.
    unsafe fn flags(isa: Self::Isa, src: *const u8) -> Self::Mask;
    /// Stores `LANES` elements.
    /// # Safety
    /// `dst` is valid for writes of `LANES` elements.
    unsafe fn store(self, dst: *mut Self::Elem);
    /// Stores the first `n <= LANES` lanes; memory beyond is not touched.
    /// # Safety
    /// `dst` is valid for writes of `n` elements.
    unsafe fn store_partial(self, dst: *mut Self::Elem, n: usize);
    /// Stores past the caches where the instruction set can, otherwise as [`Vector::store`].
    /// # Safety
    /// `dst` is valid for writes of `LANES` elements and aligned to the size of the vector.
    unsafe fn stream(self, dst: *mut Self::Elem);

    /// Four adjacent elements of `LANES` rows, transposed: lane i of vector j is element j of the row `offsets[i]` bytes from `base`.
    /// # Safety
    /// `offsets` has `LANES` numbers, and at each of them four elements are valid for reads; no alignment is needed.
    unsafe fn load4(isa: Self::Isa, base: *const u8, offsets: *const isize) -> [Self; 4];
    /// The inverse of [`Vector::load4`].
    /// # Safety
    /// `offsets` has `LANES` numbers, and at each of them four elements are valid for writes; no alignment is needed.
    unsafe fn store4(v: [Self; 4], base: *mut u8, offsets: *const isize);
    /// The lanes in the opposite order.
    #[must_use]
    fn reverse(self) -> Self;
    /// The elements of `self` followed by `rhs` with even and those with odd positions.
    fn deinterleave(self, rhs: Self) -> (Self, Self);
    /// The inverse of [`Vector::deinterleave`].
    fn interleave(self, rhs: Self) -> (Self, Self);

    /// `self * a + b`, rounded once.
    #[must_use]
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// `self * a - b`, rounded once.
    #[must_use]
    fn mul_sub(self, a: Self, b: Self) -> Self;
    /// `b - self * a`, rounded once.
    #[must_use]
    fn neg_mul_add(self, a: Self, b: Self) -> Self;
    /// `if self > rhs { self } else { rhs }`: a NaN in either operand gives `rhs`.
    #[must_use]
    fn max(self, rhs: Self) -> Self;
    /// `if self < rhs { self } else { rhs }`: a NaN in either operand gives `rhs`.
    #[must_use]
    fn min(self, rhs: Self) -> Self;
    /// Absolute value.
    #[must_use]
    fn abs(self) -> Self;
    /// `self * 2^d` for integral `d <= 127` (f32) or `d <= 1023` (f64), -inf included. `self` must be finite and in [0.25, 4] or NaN, and
    /// `d` may be NaN only where `self` is. May flush to zero (of either sign) where the factor 2^d is below the smallest normal number,
    /// and does give zero for `d <= -152` (f32) or `d <= -1077` (f64). NaN stays NaN, but where the factor is flushed it may give zero.
    #[must_use]
    fn scale2(self, d: Self) -> Self;
    /// log2 of the steps per octave that [`Vector::power`] looks up; with 0 it only shifts.
    const STEPS: u32;
    /// What [`Vector::power`] looks up.
    type Octave: Copy + core::fmt::Debug;
    /// From the powers 2^(j/16), j < 16.
    fn octave(isa: Self::Isa, powers: &[Self::Elem; 16]) -> Self::Octave;
    /// `2^(i/2^STEPS − bias)`, bias = 127 (f32) or 1023 (f64), with i the integer in the low bits of the representation of `self`: exact but for
    /// the rounding of the powers looked up, for `2^STEPS <= i < 2·bias·2^STEPS`. Zero for i = 0, something below the smallest normal
    /// number for other small i.
    #[must_use]
    fn power(self, octave: Self::Octave) -> Self;
    /// Splits a positive normal number into `f` in [sqrt(1/2), sqrt(2)) and the integral exponent. The exponent of +inf is +inf, with `f`
    /// one; that of NaN is NaN, with any `f`. Of other arguments both are meaningless.
    fn frexp(self) -> (Self, Self);

    /// `self == rhs`; false with NaN.
    fn eq(self, rhs: Self) -> Self::Mask;
    /// `!(self == rhs)`; true with NaN.
    fn ne(self, rhs: Self) -> Self::Mask;
    /// `self < rhs`; false with NaN.
    fn lt(self, rhs: Self) -> Self::Mask;
    /// `self <= rhs`; false with NaN.
    fn le(self, rhs: Self) -> Self::Mask;
    /// Lane-wise `if mask { a } else { b }`.
    fn select(mask: Self::Mask, a: Self, b: Self) -> Self;
    /// `self` in the lanes of `mask`, 0 elsewhere.
    #[must_use]
    fn keep(self, mask: Self::Mask) -> Self;
    /// `self + x` in the lanes of `mask`, `self` elsewhere.
    #[must_use]
    fn add_where(self, mask: Self::Mask, x: Self) -> Self;
    /// `a * b + self`, rounded once, in the lanes of `mask`, `self` elsewhere.
    #[must_use]
    #[inline(always)]
    fn fma_where(self, mask: Self::Mask, a: Self, b: Self) -> Self {
        Self::select(mask, a.mul_add(b, self), self)
    }

    /// `self + 1` in the lanes of `mask`, for whole numbers in [2^23, 2^24) (f32) or [2^52, 2^53): neighbouring numbers there.
    #[must_use]
    fn count_where(self, mask: Self::Mask) -> Self;

    /// `self` and `at` as they are, which spans rely on; but the compiler does not know that of `at`, and reads nothing there before it has `self`. Where registers are few
    /// that keeps it from mixing the chains of several vectors, constants and sums in memory: the processor mixes them by itself.
    #[must_use]
    #[inline(always)]
    fn before<E>(self, at: *const E) -> (Self, *const E) {
        (self, at)
    }

    /// The sum of the lanes, halves first: a fixed order.
    fn reduce_sum(self) -> Self::Elem;
    /// The largest lane; lanes hold no NaN.
    fn reduce_max(self) -> Self::Elem;
}
