//! Arm Advanced SIMD, which every aarch64 target of Rust's standard library has.

#[allow(clippy::wildcard_imports)] // dozens of intrinsics, whose names cannot be mistaken
use core::arch::aarch64::*;
use core::arch::asm;

use super::{Isa, Kernel, Level, Mask, Vector, row, row_mut};

/// Proof that this machine has the level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

/// Four `f32`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct F32x4(float32x4_t);

/// Two `f64`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct F64x2(float64x2_t);

/// Truth values of an [`F32x4`]: lanes of ones or zeros.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct Mask32x4(uint32x4_t);

/// Truth values of an [`F64x2`]: lanes of ones or zeros.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct Mask64x2(uint64x2_t);

impl Neon {
    /// The token; there is nothing to detect.
    #[inline]
    pub(crate) fn detect() -> Self {
        Self(())
    }

    /// Runs `kernel` compiled for this level.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon")]
        fn shim<K: Kernel>(isa: Neon, kernel: K) -> K::Output {
            kernel.run(isa)
        }
        // SAFETY: the feature is part of the target.
        unsafe { shim(self, kernel) }
    }
}

impl Isa for Neon {
    type F32 = F32x4;
    type F64 = F64x2;
    const LEVEL: Level = Level::Neon;
    const REGISTERS: usize = 32;

    #[inline(always)]
    fn widen(self, v: F32x4) -> (F64x2, F64x2) {
        // SAFETY: the token proves NEON.
        unsafe { (F64x2(vcvt_f64_f32(vget_low_f32(v.0))), F64x2(vcvt_high_f64_f32(v.0))) }
    }
    #[inline(always)]
    fn narrow(self, lo: F64x2, hi: F64x2) -> F32x4 {
        // SAFETY: the token proves NEON.
        unsafe { F32x4(vcvt_high_f32_f64(vcvt_f32_f64(lo.0), hi.0)) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, src: *const u16) -> F32x4 {
        // SAFETY: the token proves NEON; the caller promises four readable elements; the instruction only writes its result.
        unsafe {
            let words = vld1_u16(src);
            let v: float32x4_t;
            // Its intrinsic needs a newer compiler than the rest of the crate.
            asm!("fcvtl {v:v}.4s, {words:v}.4h", v = lateout(vreg) v, words = in(vreg) words, options(pure, nomem, nostack, preserves_flags));
            F32x4(v)
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: F32x4, dst: *mut u16) {
        // SAFETY: the token proves NEON; the caller promises four writable elements; the instruction only writes its result.
        unsafe {
            let words: uint16x4_t;
            asm!("fcvtn {words:v}.4h, {v:v}.4s", words = lateout(vreg) words, v = in(vreg) v.0, options(pure, nomem, nostack, preserves_flags));
            vst1_u16(dst, words);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const u16) -> F32x4 {
        // SAFETY: the token proves NEON; the caller promises four readable elements.
        unsafe { F32x4(vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(src)))) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, v: F32x4, dst: *mut u16) {
        // SAFETY: the token proves NEON; the caller promises four writable elements.
        unsafe {
            // A carry out of the mantissa is the right rounding; NaN must not carry and becomes quiet instead.
            let bits = vreinterpretq_u32_f32(v.0);
            let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
            let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
            vst1_u16(dst, vshrn_n_u32::<16>(vbslq_u32(vceqq_f32(v.0, v.0), rounded, quiet)));
        }
    }
    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a hint, which does nothing at an invalid address; its intrinsic is not stable.
        unsafe { asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(readonly, nostack, preserves_flags)) }
    }
}

impl Mask for Mask32x4 {
    #[inline(always)]
    fn any(self) -> bool {
        // SAFETY: a mask implies the token, which proves NEON.
        unsafe { vmaxvq_u32(self.0) != 0 }
    }
    #[inline(always)]
    fn count(self) -> usize {
        // SAFETY: a mask implies the token, which proves NEON.
        unsafe { vaddvq_u32(vshrq_n_u32::<31>(self.0)) as usize }
    }
    #[inline(always)]
    fn bits(self) -> u64 {
        const BITS: [u32; 4] = [1, 2, 4, 8];
        // SAFETY: a mask implies the token, which proves NEON; the array has four elements.
        unsafe { u64::from(vaddvq_u32(vandq_u32(self.0, vld1q_u32(BITS.as_ptr())))) }
    }
    intrinsics! { fn and(self, rhs) = vandq_u32, Self; }
}

impl Mask for Mask64x2 {
    #[inline(always)]
    fn any(self) -> bool {
        // SAFETY: a mask implies the token, which proves NEON.
        unsafe { vmaxvq_u32(vreinterpretq_u32_u64(self.0)) != 0 }
    }
    #[inline(always)]
    fn count(self) -> usize {
        // SAFETY: a mask implies the token, which proves NEON.
        unsafe { vaddvq_u64(vshrq_n_u64::<63>(self.0)) as usize }
    }
    #[inline(always)]
    fn bits(self) -> u64 {
        const BITS: [u64; 2] = [1, 2];
        // SAFETY: a mask implies the token, which proves NEON; the array has two elements.
        unsafe { vaddvq_u64(vandq_u64(self.0, vld1q_u64(BITS.as_ptr()))) }
    }
    intrinsics! { fn and(self, rhs) = vandq_u64, Self; }
}

/// Transposes 4 x 4 elements.
#[inline(always)]
fn transpose(v: [F32x4; 4]) -> [F32x4; 4] {
    let ((a, b), (c, d)) = (v[0].interleave(v[2]), v[1].interleave(v[3]));
    let ((e, f), (g, h)) = (a.interleave(c), b.interleave(d));
    [e, f, g, h]
}

operators!(F32x4, vaddq_f32, vsubq_f32, vmulq_f32, vdivq_f32, -self = vnegq_f32(self.0));
operators!(F64x2, vaddq_f64, vsubq_f64, vmulq_f64, vdivq_f64, -self = vnegq_f64(self.0));

/// What is the same for both lane types, each intrinsic under its own name.
macro_rules! common {
    ($vector:ident, $mask:ident, $elem:ty, $lanes:literal, $splat:ident, $load:ident, $store:ident, $fma:ident, $fms:ident,
     $gt:ident, $lt:ident, $le:ident, $eq:ident, $blend:ident, $abs:ident) => {
        type Elem = $elem;
        type Isa = Neon;
        type Mask = $mask;
        const LANES: usize = $lanes;

        #[inline(always)]
        fn splat(_isa: Neon, x: $elem) -> Self {
            // SAFETY: the token proves NEON.
            Self(unsafe { $splat(x) })
        }
        #[inline(always)]
        unsafe fn load(_isa: Neon, src: *const $elem) -> Self {
            // SAFETY: the token proves NEON; the caller promises the memory.
            Self(unsafe { $load(src) })
        }
        #[inline(always)]
        unsafe fn load_partial(isa: Neon, src: *const $elem, n: usize, fill: $elem) -> Self {
            debug_assert!(n <= Self::LANES);
            let mut lanes = [fill; $lanes];
            // SAFETY: the token proves NEON; the caller promises n readable elements, and no more than LANES of them.
            unsafe {
                lanes.as_mut_ptr().copy_from_nonoverlapping(src, n);
                Self::load(isa, lanes.as_ptr())
            }
        }
        #[inline(always)]
        unsafe fn store(self, dst: *mut $elem) {
            // SAFETY: a vector implies the token, which proves NEON; the caller promises the memory.
            unsafe { $store(dst, self.0) }
        }
        #[inline(always)]
        unsafe fn store_partial(self, dst: *mut $elem, n: usize) {
            debug_assert!(n <= Self::LANES);
            let mut lanes = [0.0; $lanes];
            // SAFETY: a vector implies the token, which proves NEON; the caller promises n writable elements, and no more than LANES of them.
            unsafe {
                self.store(lanes.as_mut_ptr());
                dst.copy_from_nonoverlapping(lanes.as_ptr(), n);
            }
        }
        #[inline(always)]
        unsafe fn stream(self, dst: *mut $elem) {
            // SAFETY: the caller promises more than `store` asks for.
            unsafe { self.store(dst) }
        }

        #[inline(always)]
        fn mul_add(self, a: Self, b: Self) -> Self {
            // SAFETY: a vector implies the token, which proves NEON.
            Self(unsafe { $fma(b.0, self.0, a.0) })
        }
        #[inline(always)]
        fn mul_sub(self, a: Self, b: Self) -> Self {
            // Negating the difference instead would give -0 where it is zero.
            self.mul_add(a, -b)
        }
        #[inline(always)]
        fn neg_mul_add(self, a: Self, b: Self) -> Self {
            // SAFETY: a vector implies the token, which proves NEON.
            Self(unsafe { $fms(b.0, self.0, a.0) })
        }
        // The maximum and minimum instructions pass NaN on, so these are comparisons.
        #[inline(always)]
        fn max(self, rhs: Self) -> Self {
            // SAFETY: a vector implies the token, which proves NEON.
            Self(unsafe { $blend($gt(self.0, rhs.0), self.0, rhs.0) })
        }
        #[inline(always)]
        fn min(self, rhs: Self) -> Self {
            // SAFETY: a vector implies the token, which proves NEON.
            Self(unsafe { $blend($lt(self.0, rhs.0), self.0, rhs.0) })
        }
        intrinsics! {
            fn abs(self) = $abs, Self;
            fn eq(self, rhs) = $eq, $mask;
            fn lt(self, rhs) = $lt, $mask;
            fn le(self, rhs) = $le, $mask;
        }
        #[inline(always)]
        fn select(mask: $mask, a: Self, b: Self) -> Self {
            // SAFETY: a vector implies the token, which proves NEON.
            Self(unsafe { $blend(mask.0, a.0, b.0) })
        }
        #[inline(always)]
        fn keep(self, mask: $mask) -> Self {
            Self::select(mask, self, Self::splat(Neon(()), 0.0))
        }
        #[inline(always)]
        fn add_where(self, mask: $mask, x: Self) -> Self {
            Self::select(mask, self + x, self)
        }
    };
}

impl Vector for F32x4 {
    common! {
        F32x4, Mask32x4, f32, 4, vdupq_n_f32, vld1q_f32, vst1q_f32, vfmaq_f32, vfmsq_f32, vcgtq_f32, vcltq_f32, vcleq_f32, vceqq_f32,
        vbslq_f32, vabsq_f32
    }
    #[inline(always)]
    unsafe fn flags(_isa: Neon, src: *const u8) -> Mask32x4 {
        // SAFETY: the token proves NEON; the caller promises the memory.
        unsafe {
            let bytes = vcreate_u8(u64::from(src.cast::<u32>().read_unaligned()));
            let lanes = vmovl_u16(vget_low_u16(vmovl_u8(bytes)));
            Mask32x4(vtstq_u32(lanes, lanes))
        }
    }
    #[inline(always)]
    unsafe fn load4(_isa: Neon, base: *const u8, offsets: *const isize) -> [Self; 4] {
        // SAFETY: the token proves NEON; the caller promises the offsets and four elements at each.
        unsafe {
            let mut v = [Self(vdupq_n_f32(0.0)); 4];
            for (i, v) in v.iter_mut().enumerate() {
                v.0 = vld1q_f32(row(base, offsets, i));
            }
            transpose(v)
        }
    }
    #[inline(always)]
    unsafe fn store4(v: [Self; 4], base: *mut u8, offsets: *const isize) {
        // SAFETY: a vector implies the token, which proves NEON; the caller promises the offsets and four elements at each.
        unsafe {
            for (i, v) in transpose(v).iter().enumerate() {
                vst1q_f32(row_mut(base, offsets, i), v.0);
            }
        }
    }
    #[inline(always)]
    fn count_where(self, mask: Mask32x4) -> Self {
        // SAFETY: a vector implies the token, which proves NEON.
        Self(unsafe { vreinterpretq_f32_u32(vsubq_u32(vreinterpretq_u32_f32(self.0), mask.0)) })
    }
    #[inline(always)]
    fn reverse(self) -> Self {
        // SAFETY: a vector implies the token, which proves NEON.
        unsafe {
            let pairs = vrev64q_f32(self.0);
            Self(vextq_f32::<2>(pairs, pairs))
        }
    }
    #[inline(always)]
    fn deinterleave(self, rhs: Self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves NEON.
        unsafe { (Self(vuzp1q_f32(self.0, rhs.0)), Self(vuzp2q_f32(self.0, rhs.0))) }
    }
    #[inline(always)]
    fn interleave(self, rhs: Self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves NEON.
        unsafe { (Self(vzip1q_f32(self.0, rhs.0)), Self(vzip2q_f32(self.0, rhs.0))) }
    }
    #[inline(always)]
    fn scale2(self, d: Self) -> Self {
        // SAFETY: a vector implies the token, which proves NEON.
        unsafe {
            // Adding 2^23 + 127 leaves the biased exponent in the lowest bits; the shift drops all others. -127 makes a factor of zero.
            let d = d.max(Self(vdupq_n_f32(-127.0))) + Self(vdupq_n_f32(8_388_608.0 + 127.0));
            self * Self(vreinterpretq_f32_u32(vshlq_n_u32::<23>(vreinterpretq_u32_f32(d.0))))
        }
    }
    const STEPS: u32 = 0;
    type Octave = ();
    #[inline(always)]
    fn octave(_isa: Neon, _powers: &[Self::Elem; 16]) {}
    #[inline(always)]
    fn power(self, (): ()) -> Self {
        // SAFETY: a vector implies the token, which proves NEON.
        Self(unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<23>(vreinterpretq_u32_f32(self.0))) })
    }
    #[inline(always)]
    fn frexp(self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves NEON.
        unsafe {
            // The exponent counts how many whole octaves lie above sqrt(1/2); taking them off leaves f.
            let bits = vreinterpretq_s32_f32(self.0);
            let sqrt_half = vdupq_n_s32(core::f32::consts::FRAC_1_SQRT_2.to_bits().cast_signed());
            let e = vshrq_n_s32::<23>(vsubq_s32(bits, sqrt_half));
            let f = Self(vreinterpretq_f32_s32(vsubq_s32(bits, vshlq_n_s32::<23>(e))));
            let finite = self.lt(Self(vdupq_n_f32(f32::INFINITY)));
            (f, Self::select(finite, Self(vcvtq_f32_s32(e)), self))
        }
    }
    #[inline(always)]
    fn ne(self, rhs: Self) -> Mask32x4 {
        // SAFETY: a vector implies the token, which proves NEON.
        Mask32x4(unsafe { vmvnq_u32(vceqq_f32(self.0, rhs.0)) })
    }
    #[inline(always)]
    fn reduce_sum(self) -> f32 {
        // SAFETY: a vector implies the token, which proves NEON.
        unsafe { vaddv_f32(vadd_f32(vget_low_f32(self.0), vget_high_f32(self.0))) }
    }
    #[inline(always)]
    fn reduce_max(self) -> f32 {
        // SAFETY: a vector implies the token, which proves NEON.
        unsafe { vmaxvq_f32(self.0) }
    }
}

impl Vector for F64x2 {
    common! {
        F64x2, Mask64x2, f64, 2, vdupq_n_f64, vld1q_f64, vst1q_f64, vfmaq_f64, vfmsq_f64, vcgtq_f64, vcltq_f64, vcleq_f64, vceqq_f64,
        vbslq_f64, vabsq_f64
    }
    #[inline(always)]
    unsafe fn flags(_isa: Neon, src: *const u8) -> Mask64x2 {
        // SAFETY: the token proves NEON; the caller promises the memory.
        unsafe {
            let lanes = vcombine_u64(vcreate_u64(u64::from(src.read())), vcreate_u64(u64::from(src.add(1).read())));
            Mask64x2(vtstq_u64(lanes, lanes))
        }
    }
    #[inline(always)]
    unsafe fn load4(_isa: Neon, base: *const u8, offsets: *const isize) -> [Self; 4] {
        // SAFETY: the token proves NEON; the caller promises the offsets and four elements at each.
        unsafe {
            let (even, odd) = (row::<f64>(base, offsets, 0), row::<f64>(base, offsets, 1));
            let (a, b) = Self(vld1q_f64(even)).interleave(Self(vld1q_f64(odd)));
            let (c, d) = Self(vld1q_f64(even.add(2))).interleave(Self(vld1q_f64(odd.add(2))));
            [a, b, c, d]
        }
    }
    #[inline(always)]
    unsafe fn store4(v: [Self; 4], base: *mut u8, offsets: *const isize) {
        // SAFETY: a vector implies the token, which proves NEON; the caller promises the offsets and four elements at each.
        unsafe {
            for c in [0, 2] {
                let (even, odd) = v[c].interleave(v[c + 1]);
                vst1q_f64(row_mut::<f64>(base, offsets, 0).add(c), even.0);
                vst1q_f64(row_mut::<f64>(base, offsets, 1).add(c), odd.0);
            }
        }
    }
    #[inline(always)]
    fn count_where(self, mask: Mask64x2) -> Self {
        // SAFETY: a vector implies the token, which proves NEON.
        Self(unsafe { vreinterpretq_f64_u64(vsubq_u64(vreinterpretq_u64_f64(self.0), mask.0)) })
    }
    #[inline(always)]
    fn reverse(self) -> Self {
        // SAFETY: a vector implies the token, which proves NEON.
        unsafe { Self(vextq_f64::<1>(self.0, self.0)) }
    }
    #[inline(always)]
    fn deinterleave(self, rhs: Self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves NEON.
        unsafe { (Self(vuzp1q_f64(self.0, rhs.0)), Self(vuzp2q_f64(self.0, rhs.0))) }
    }
    #[inline(always)]
    fn interleave(self, rhs: Self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves NEON.
        unsafe { (Self(vzip1q_f64(self.0, rhs.0)), Self(vzip2q_f64(self.0, rhs.0))) }
    }
    #[inline(always)]
    fn scale2(self, d: Self) -> Self {
        // SAFETY: a vector implies the token, which proves NEON.
        unsafe {
            // As for f32, with 2^52 + 1023.
            let d = d.max(Self(vdupq_n_f64(-1023.0))) + Self(vdupq_n_f64(4_503_599_627_370_496.0 + 1023.0));
            self * Self(vreinterpretq_f64_u64(vshlq_n_u64::<52>(vreinterpretq_u64_f64(d.0))))
        }
    }
    const STEPS: u32 = 0;
    type Octave = ();
    #[inline(always)]
    fn octave(_isa: Neon, _powers: &[Self::Elem; 16]) {}
    #[inline(always)]
    fn power(self, (): ()) -> Self {
        // SAFETY: a vector implies the token, which proves NEON.
        Self(unsafe { vreinterpretq_f64_u64(vshlq_n_u64::<52>(vreinterpretq_u64_f64(self.0))) })
    }
    #[inline(always)]
    fn frexp(self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves NEON.
        unsafe {
            // As for f32.
            let bits = vreinterpretq_s64_f64(self.0);
            let sqrt_half = vdupq_n_s64(core::f64::consts::FRAC_1_SQRT_2.to_bits().cast_signed());
            let e = vshrq_n_s64::<52>(vsubq_s64(bits, sqrt_half));
            let f = Self(vreinterpretq_f64_s64(vsubq_s64(bits, vshlq_n_s64::<52>(e))));
            let finite = self.lt(Self(vdupq_n_f64(f64::INFINITY)));
            (f, Self::select(finite, Self(vcvtq_f64_s64(e)), self))
        }
    }
    #[inline(always)]
    fn ne(self, rhs: Self) -> Mask64x2 {
        // SAFETY: a vector implies the token, which proves NEON.
        Mask64x2(unsafe { veorq_u64(vceqq_f64(self.0, rhs.0), vdupq_n_u64(u64::MAX)) })
    }
    #[inline(always)]
    fn reduce_sum(self) -> f64 {
        // SAFETY: a vector implies the token, which proves NEON.
        unsafe { vaddvq_f64(self.0) }
    }
    #[inline(always)]
    fn reduce_max(self) -> f64 {
        // SAFETY: a vector implies the token, which proves NEON.
        unsafe { vmaxvq_f64(self.0) }
    }
}
