//! AVX2 with FMA and F16C.

#[allow(clippy::wildcard_imports)] // a hundred intrinsics, whose names cannot be mistaken
use core::arch::{asm, x86_64::*};

use super::{Isa, Kernel, Level, Mask, Vector, row, row_mut};

/// Proof that this machine has the level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

/// Eight `f32`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct F32x8(pub(super) __m256);

/// Four `f64`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct F64x4(pub(super) __m256d);

/// Truth values of an [`F32x8`]: lanes of ones or zeros.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct Mask32x8(__m256);

/// Truth values of an [`F64x4`]: lanes of ones or zeros.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct Mask64x4(__m256d);

/// See [`Vector::before`].
macro_rules! before {
    ($inner:ty) => {
        #[inline(always)]
        fn before<E>(self, at: *const E) -> (Self, *const E) {
            #[allow(unknown_lints, clippy::pointers_in_nomem_asm_block)] // nothing is read there by this
            #[inline]
            #[target_feature(enable = "avx2")]
            fn tie<E>(mut v: $inner, mut at: *const E) -> ($inner, *const E) {
                // SAFETY: nothing but a comment, which leaves both as they are.
                unsafe { asm!("/* {0} {1} */", inout(ymm_reg) v, inout(reg) at, options(pure, nomem, nostack, preserves_flags)) }
                (v, at)
            }
            // SAFETY: a vector implies the token, which proves AVX2.
            let (v, at) = unsafe { tie(self.0, at) };
            (Self(v), at)
        }
    };
}

impl Avx2 {
    /// The token, if this machine and its operating system have every feature that [`Avx2::run`] enables.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("popcnt");
        found.then_some(Self(()))
    }

    /// Runs `kernel` compiled for this level.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c,bmi2,popcnt")]
        fn shim<K: Kernel>(isa: Avx2, kernel: K) -> K::Output {
            kernel.run(isa)
        }
        // SAFETY: the token exists, so `detect` found all of these features.
        unsafe { shim(self, kernel) }
    }
}

impl Isa for Avx2 {
    type F32 = F32x8;
    type F64 = F64x4;
    const LEVEL: Level = Level::Avx2;
    const REGISTERS: usize = 16;

    #[inline(always)]
    fn widen(self, v: F32x8) -> (F64x4, F64x4) {
        // SAFETY: the token proves AVX.
        unsafe { (F64x4(_mm256_cvtps_pd(_mm256_castps256_ps128(v.0))), F64x4(_mm256_cvtps_pd(_mm256_extractf128_ps::<1>(v.0)))) }
    }
    #[inline(always)]
    fn narrow(self, lo: F64x4, hi: F64x4) -> F32x8 {
        // SAFETY: the token proves AVX.
        unsafe { F32x8(_mm256_set_m128(_mm256_cvtpd_ps(hi.0), _mm256_cvtpd_ps(lo.0))) }
    }
    #[inline(always)]
    unsafe fn stream_halves(self, src: *const u16, dst: *mut u16) {
        // SAFETY: the token proves AVX2; the caller promises the memory and its alignment.
        unsafe { _mm_stream_si128(dst.cast(), _mm_loadu_si128(src.cast())) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, src: *const u16) -> F32x8 {
        // SAFETY: the token proves F16C; the caller promises eight readable elements.
        unsafe { F32x8(_mm256_cvtph_ps(_mm_loadu_si128(src.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: F32x8, dst: *mut u16) {
        // SAFETY: the token proves F16C; the caller promises eight writable elements.
        unsafe { _mm_storeu_si128(dst.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const u16) -> F32x8 {
        // SAFETY: the token proves AVX2; the caller promises eight readable elements.
        unsafe {
            let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(src.cast()));
            F32x8(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, v: F32x8, dst: *mut u16) {
        // SAFETY: the token proves AVX2; the caller promises eight writable elements.
        unsafe {
            // A carry out of the mantissa is the right rounding; NaN must not carry and becomes quiet instead.
            let bits = _mm256_castps_si256(v.0);
            let high = _mm256_srli_epi32::<16>(bits);
            let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd));
            let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v.0, v.0));
            let words = _mm256_blendv_epi8(rounded, quiet, nan);
            let packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(dst.cast(), packed);
        }
    }
    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: SSE is part of x86-64, and prefetching an invalid address does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[inline(always)]
    fn prefetch_near(self, at: *const u8) {
        // SAFETY: SSE is part of x86-64, and prefetching an invalid address does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    fn fence(self) {
        // SAFETY: SSE is part of x86-64.
        unsafe { _mm_sfence() }
    }
}

macro_rules! mask {
    ($mask:ident, $movemask:ident, $and:ident) => {
        impl Mask for $mask {
            #[inline(always)]
            fn any(self) -> bool {
                self.bits() != 0
            }
            #[inline(always)]
            fn count(self) -> usize {
                self.bits().count_ones() as usize
            }
            #[inline(always)]
            fn bits(self) -> u64 {
                // SAFETY: a mask implies the token, which proves AVX.
                unsafe { $movemask(self.0) as u64 }
            }
            intrinsics! { fn and(self, rhs) = $and, Self; }
        }
    };
}
mask!(Mask32x8, _mm256_movemask_ps, _mm256_and_ps);
mask!(Mask64x4, _mm256_movemask_pd, _mm256_and_pd);

/// Ones in the first `n` lanes of 32 bits.
#[inline(always)]
fn first_32(_isa: Avx2, n: usize) -> __m256i {
    // SAFETY: the token proves AVX2.
    unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
}

/// Ones in the first `n` lanes of 64 bits.
#[inline(always)]
fn first_64(_isa: Avx2, n: usize) -> __m256i {
    // SAFETY: the token proves AVX2.
    unsafe { _mm256_cmpgt_epi64(_mm256_set1_epi64x(n as i64), _mm256_setr_epi64x(0, 1, 2, 3)) }
}

/// Transposes the 4 x 4 elements of every 128-bit lane.
#[inline(always)]
fn transpose(v: [F32x8; 4]) -> [F32x8; 4] {
    // SAFETY: vectors imply the token, which proves AVX.
    unsafe {
        let (a, b) = (_mm256_castps_pd(_mm256_unpacklo_ps(v[0].0, v[1].0)), _mm256_castps_pd(_mm256_unpackhi_ps(v[0].0, v[1].0)));
        let (c, d) = (_mm256_castps_pd(_mm256_unpacklo_ps(v[2].0, v[3].0)), _mm256_castps_pd(_mm256_unpackhi_ps(v[2].0, v[3].0)));
        [
            F32x8(_mm256_castpd_ps(_mm256_unpacklo_pd(a, c))),
            F32x8(_mm256_castpd_ps(_mm256_unpackhi_pd(a, c))),
            F32x8(_mm256_castpd_ps(_mm256_unpacklo_pd(b, d))),
            F32x8(_mm256_castpd_ps(_mm256_unpackhi_pd(b, d))),
        ]
    }
}

operators!(F32x8, _mm256_add_ps, _mm256_sub_ps, _mm256_mul_ps, _mm256_div_ps, -self = _mm256_xor_ps(self.0, _mm256_set1_ps(-0.0)));
operators!(F64x4, _mm256_add_pd, _mm256_sub_pd, _mm256_mul_pd, _mm256_div_pd, -self = _mm256_xor_pd(self.0, _mm256_set1_pd(-0.0)));

impl Vector for F32x8 {
    type Elem = f32;
    type Isa = Avx2;
    type Mask = Mask32x8;
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(_isa: Avx2, x: f32) -> Self {
        // SAFETY: the token proves AVX.
        Self(unsafe { _mm256_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(_isa: Avx2, src: *const f32) -> Self {
        // SAFETY: the token proves AVX; the caller promises the memory.
        Self(unsafe { _mm256_loadu_ps(src) })
    }
    #[inline(always)]
    unsafe fn load_partial(isa: Avx2, src: *const f32, n: usize, fill: f32) -> Self {
        debug_assert!(n <= Self::LANES);
        let mask = first_32(isa, n);
        // SAFETY: the token proves AVX; masked lanes are not accessed, the caller promises the others.
        Self(unsafe { _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(src, mask), _mm256_castsi256_ps(mask)) })
    }
    #[inline(always)]
    unsafe fn flags(_isa: Avx2, src: *const u8) -> Mask32x8 {
        // SAFETY: the token proves AVX2; the caller promises the memory.
        unsafe {
            let lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(src.cast()));
            Mask32x8(_mm256_castsi256_ps(_mm256_cmpgt_epi32(lanes, _mm256_setzero_si256())))
        }
    }
    #[inline(always)]
    unsafe fn store(self, dst: *mut f32) {
        // SAFETY: a vector implies the token, which proves AVX; the caller promises the memory.
        unsafe { _mm256_storeu_ps(dst, self.0) }
    }
    #[inline(always)]
    unsafe fn store_partial(self, dst: *mut f32, n: usize) {
        debug_assert!(n <= Self::LANES);
        // SAFETY: a vector implies the token, which proves AVX2; masked lanes are not accessed, the caller promises the others.
        unsafe { _mm256_maskstore_ps(dst, first_32(Avx2(()), n), self.0) }
    }
    #[inline(always)]
    unsafe fn stream(self, dst: *mut f32) {
        // SAFETY: a vector implies the token, which proves AVX; the caller promises the memory and its alignment.
        unsafe { _mm256_stream_ps(dst, self.0) }
    }

    #[inline(always)]
    unsafe fn load4(_isa: Avx2, base: *const u8, offsets: *const isize) -> [Self; 4] {
        // SAFETY: the token proves AVX; the caller promises the offsets and four elements at each.
        unsafe {
            let mut v = [Self(_mm256_setzero_ps()); 4];
            for (i, v) in v.iter_mut().enumerate() {
                v.0 = _mm256_castps128_ps256(_mm_loadu_ps(row(base, offsets, i)));
                v.0 = _mm256_insertf128_ps::<1>(v.0, _mm_loadu_ps(row(base, offsets, i + 4)));
            }
            transpose(v)
        }
    }
    #[inline(always)]
    unsafe fn store4(v: [Self; 4], base: *mut u8, offsets: *const isize) {
        // SAFETY: a vector implies the token, which proves AVX; the caller promises the offsets and four elements at each.
        unsafe {
            for (i, v) in transpose(v).iter().enumerate() {
                _mm_storeu_ps(row_mut(base, offsets, i), _mm256_castps256_ps128(v.0));
                _mm_storeu_ps(row_mut(base, offsets, i + 4), _mm256_extractf128_ps::<1>(v.0));
            }
        }
    }
    #[inline(always)]
    fn reverse(self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX2.
        unsafe { Self(_mm256_permutevar8x32_ps(self.0, _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0))) }
    }
    #[inline(always)]
    fn deinterleave(self, rhs: Self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves AVX2.
        unsafe {
            // Each half has two of either vector; the middle quarters change places.
            let even = _mm256_castps_pd(_mm256_shuffle_ps::<0b10_00_10_00>(self.0, rhs.0));
            let odd = _mm256_castps_pd(_mm256_shuffle_ps::<0b11_01_11_01>(self.0, rhs.0));
            let (even, odd) = (_mm256_permute4x64_pd::<0b11_01_10_00>(even), _mm256_permute4x64_pd::<0b11_01_10_00>(odd));
            (Self(_mm256_castpd_ps(even)), Self(_mm256_castpd_ps(odd)))
        }
    }
    #[inline(always)]
    fn interleave(self, rhs: Self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves AVX.
        unsafe {
            let (a, b) = (_mm256_unpacklo_ps(self.0, rhs.0), _mm256_unpackhi_ps(self.0, rhs.0));
            (Self(_mm256_permute2f128_ps::<0x20>(a, b)), Self(_mm256_permute2f128_ps::<0x31>(a, b)))
        }
    }

    intrinsics! {
        fn mul_add(self, a, b) = _mm256_fmadd_ps, F32x8;
        fn mul_sub(self, a, b) = _mm256_fmsub_ps, F32x8;
        fn neg_mul_add(self, a, b) = _mm256_fnmadd_ps, F32x8;
        fn max(self, rhs) = _mm256_max_ps, F32x8;
        fn min(self, rhs) = _mm256_min_ps, F32x8;
        fn eq(self, rhs) = _mm256_cmp_ps::<_CMP_EQ_OQ>, Mask32x8;
        fn ne(self, rhs) = _mm256_cmp_ps::<_CMP_NEQ_UQ>, Mask32x8;
        fn lt(self, rhs) = _mm256_cmp_ps::<_CMP_LT_OQ>, Mask32x8;
        fn le(self, rhs) = _mm256_cmp_ps::<_CMP_LE_OQ>, Mask32x8;
    }
    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX.
        Self(unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0) })
    }
    #[inline(always)]
    fn scale2(self, d: Self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX2.
        unsafe {
            // Adding 2^23 + 127 leaves the biased exponent in the lowest bits; the shift drops all others. -127 makes a factor of zero.
            let d = _mm256_max_ps(d.0, _mm256_set1_ps(-127.0));
            let biased = _mm256_castps_si256(_mm256_add_ps(d, _mm256_set1_ps(8_388_608.0 + 127.0)));
            Self(_mm256_mul_ps(self.0, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))))
        }
    }
    before! {__m256}
    const STEPS: u32 = 3;
    type Octave = __m256i;
    #[inline(always)]
    fn octave(_isa: Avx2, powers: &[f32; 16]) -> __m256i {
        // Every other one, for eight fit a register: mantissas, less what the shift below leaves of the index.
        let mut table = [0_u32; 8];
        for (j, entry) in table.iter_mut().enumerate() {
            *entry = (powers[2 * j].to_bits() & 0x007f_ffff).wrapping_sub((j as u32) << 20);
        }
        // SAFETY: the token proves AVX2; the array has eight entries.
        unsafe { _mm256_loadu_si256(table.as_ptr().cast()) }
    }
    #[inline(always)]
    fn power(self, octave: __m256i) -> Self {
        // SAFETY: a vector implies the token, which proves AVX2.
        unsafe {
            let bits = _mm256_castps_si256(self.0);
            let mantissa = _mm256_permutevar8x32_epi32(octave, bits);
            Self(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32::<20>(bits), mantissa)))
        }
    }
    #[inline(always)]
    fn frexp(self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves AVX2.
        unsafe {
            // The exponent counts how many whole octaves lie above sqrt(1/2); taking them off leaves f.
            let bits = _mm256_castps_si256(self.0);
            let sqrt_half = _mm256_set1_epi32(core::f32::consts::FRAC_1_SQRT_2.to_bits().cast_signed());
            let e = _mm256_srai_epi32::<23>(_mm256_sub_epi32(bits, sqrt_half));
            let f = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32::<23>(e)));
            let finite = _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, _mm256_set1_ps(f32::INFINITY));
            (Self(f), Self(_mm256_blendv_ps(self.0, _mm256_cvtepi32_ps(e), finite)))
        }
    }
    #[inline(always)]
    fn select(mask: Mask32x8, a: Self, b: Self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX.
        Self(unsafe { _mm256_blendv_ps(b.0, a.0, mask.0) })
    }
    #[inline(always)]
    fn keep(self, mask: Mask32x8) -> Self {
        // SAFETY: a vector implies the token, which proves AVX.
        Self(unsafe { _mm256_and_ps(self.0, mask.0) })
    }
    #[inline(always)]
    fn add_where(self, mask: Mask32x8, x: Self) -> Self {
        Self::select(mask, self + x, self)
    }
    #[inline(always)]
    fn count_where(self, mask: Mask32x8) -> Self {
        // SAFETY: a vector implies the token, which proves AVX2.
        Self(unsafe { _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(self.0), _mm256_castps_si256(mask.0))) })
    }
    #[inline(always)]
    fn reduce_sum(self) -> f32 {
        // SAFETY: a vector implies the token, which proves AVX.
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    fn reduce_max(self) -> f32 {
        // SAFETY: a vector implies the token, which proves AVX.
        unsafe {
            let x = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }
}

impl Vector for F64x4 {
    type Elem = f64;
    type Isa = Avx2;
    type Mask = Mask64x4;
    const LANES: usize = 4;

    #[inline(always)]
    fn splat(_isa: Avx2, x: f64) -> Self {
        // SAFETY: the token proves AVX.
        Self(unsafe { _mm256_set1_pd(x) })
    }
    #[inline(always)]
    unsafe fn load(_isa: Avx2, src: *const f64) -> Self {
        // SAFETY: the token proves AVX; the caller promises the memory.
        Self(unsafe { _mm256_loadu_pd(src) })
    }
    #[inline(always)]
    unsafe fn load_partial(isa: Avx2, src: *const f64, n: usize, fill: f64) -> Self {
        debug_assert!(n <= Self::LANES);
        let mask = first_64(isa, n);
        // SAFETY: the token proves AVX; masked lanes are not accessed, the caller promises the others.
        Self(unsafe { _mm256_blendv_pd(_mm256_set1_pd(fill), _mm256_maskload_pd(src, mask), _mm256_castsi256_pd(mask)) })
    }
    #[inline(always)]
    unsafe fn flags(_isa: Avx2, src: *const u8) -> Mask64x4 {
        // SAFETY: the token proves AVX2; the caller promises the memory.
        unsafe {
            let lanes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(src.cast::<i32>().read_unaligned()));
            Mask64x4(_mm256_castsi256_pd(_mm256_cmpgt_epi64(lanes, _mm256_setzero_si256())))
        }
    }
    #[inline(always)]
    unsafe fn store(self, dst: *mut f64) {
        // SAFETY: a vector implies the token, which proves AVX; the caller promises the memory.
        unsafe { _mm256_storeu_pd(dst, self.0) }
    }
    #[inline(always)]
    unsafe fn store_partial(self, dst: *mut f64, n: usize) {
        debug_assert!(n <= Self::LANES);
        // SAFETY: a vector implies the token, which proves AVX2; masked lanes are not accessed, the caller promises the others.
        unsafe { _mm256_maskstore_pd(dst, first_64(Avx2(()), n), self.0) }
    }
    #[inline(always)]
    unsafe fn stream(self, dst: *mut f64) {
        // SAFETY: a vector implies the token, which proves AVX; the caller promises the memory and its alignment.
        unsafe { _mm256_stream_pd(dst, self.0) }
    }

    #[inline(always)]
    unsafe fn load4(_isa: Avx2, base: *const u8, offsets: *const isize) -> [Self; 4] {
        // SAFETY: the token proves AVX; the caller promises the offsets and four elements at each.
        unsafe {
            // Even and odd rows, two classes at a time.
            let mut v = [_mm256_setzero_pd(); 4];
            for (i, v) in v.iter_mut().enumerate() {
                let (i, c) = (i & 1, i & 2);
                *v = _mm256_castpd128_pd256(_mm_loadu_pd(row::<f64>(base, offsets, i).add(c)));
                *v = _mm256_insertf128_pd::<1>(*v, _mm_loadu_pd(row::<f64>(base, offsets, i + 2).add(c)));
            }
            let (low, high) = (_mm256_unpacklo_pd(v[0], v[1]), _mm256_unpackhi_pd(v[0], v[1]));
            [Self(low), Self(high), Self(_mm256_unpacklo_pd(v[2], v[3])), Self(_mm256_unpackhi_pd(v[2], v[3]))]
        }
    }
    #[inline(always)]
    unsafe fn store4(v: [Self; 4], base: *mut u8, offsets: *const isize) {
        // SAFETY: a vector implies the token, which proves AVX; the caller promises the offsets and four elements at each.
        unsafe {
            for c in [0, 2] {
                let (even, odd) = (_mm256_unpacklo_pd(v[c].0, v[c + 1].0), _mm256_unpackhi_pd(v[c].0, v[c + 1].0));
                for (i, v) in [(0, even), (1, odd)] {
                    _mm_storeu_pd(row_mut::<f64>(base, offsets, i).add(c), _mm256_castpd256_pd128(v));
                    _mm_storeu_pd(row_mut::<f64>(base, offsets, i + 2).add(c), _mm256_extractf128_pd::<1>(v));
                }
            }
        }
    }
    #[inline(always)]
    fn reverse(self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX2.
        unsafe { Self(_mm256_permute4x64_pd::<0b00_01_10_11>(self.0)) }
    }
    #[inline(always)]
    fn deinterleave(self, rhs: Self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves AVX2.
        unsafe {
            let (even, odd) = (_mm256_unpacklo_pd(self.0, rhs.0), _mm256_unpackhi_pd(self.0, rhs.0));
            (Self(_mm256_permute4x64_pd::<0b11_01_10_00>(even)), Self(_mm256_permute4x64_pd::<0b11_01_10_00>(odd)))
        }
    }
    #[inline(always)]
    fn interleave(self, rhs: Self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves AVX.
        unsafe {
            let (a, b) = (_mm256_unpacklo_pd(self.0, rhs.0), _mm256_unpackhi_pd(self.0, rhs.0));
            (Self(_mm256_permute2f128_pd::<0x20>(a, b)), Self(_mm256_permute2f128_pd::<0x31>(a, b)))
        }
    }

    intrinsics! {
        fn mul_add(self, a, b) = _mm256_fmadd_pd, F64x4;
        fn mul_sub(self, a, b) = _mm256_fmsub_pd, F64x4;
        fn neg_mul_add(self, a, b) = _mm256_fnmadd_pd, F64x4;
        fn max(self, rhs) = _mm256_max_pd, F64x4;
        fn min(self, rhs) = _mm256_min_pd, F64x4;
        fn eq(self, rhs) = _mm256_cmp_pd::<_CMP_EQ_OQ>, Mask64x4;
        fn ne(self, rhs) = _mm256_cmp_pd::<_CMP_NEQ_UQ>, Mask64x4;
        fn lt(self, rhs) = _mm256_cmp_pd::<_CMP_LT_OQ>, Mask64x4;
        fn le(self, rhs) = _mm256_cmp_pd::<_CMP_LE_OQ>, Mask64x4;
    }
    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX.
        Self(unsafe { _mm256_andnot_pd(_mm256_set1_pd(-0.0), self.0) })
    }
    #[inline(always)]
    fn scale2(self, d: Self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX2.
        unsafe {
            // As for f32, with 2^52 + 1023.
            let d = _mm256_max_pd(d.0, _mm256_set1_pd(-1023.0));
            let biased = _mm256_castpd_si256(_mm256_add_pd(d, _mm256_set1_pd(4_503_599_627_370_496.0 + 1023.0)));
            Self(_mm256_mul_pd(self.0, _mm256_castsi256_pd(_mm256_slli_epi64::<52>(biased))))
        }
    }
    before! {__m256d}
    const STEPS: u32 = 0;
    type Octave = ();
    #[inline(always)]
    fn octave(_isa: Avx2, _powers: &[Self::Elem; 16]) {}
    #[inline(always)]
    fn power(self, (): ()) -> Self {
        // SAFETY: a vector implies the token, which proves AVX2.
        Self(unsafe { _mm256_castsi256_pd(_mm256_slli_epi64::<52>(_mm256_castpd_si256(self.0))) })
    }
    #[inline(always)]
    fn frexp(self) -> (Self, Self) {
        const BIAS: i64 = 1023 << 52;
        const MAGIC: f64 = 4_503_599_627_370_496.0; // 2^52
        // SAFETY: a vector implies the token, which proves AVX2.
        unsafe {
            // As for f32, but with the exponent biased, for want of an arithmetic shift and a conversion of 64-bit integers.
            let bits = _mm256_castpd_si256(self.0);
            let offset = _mm256_set1_epi64x(BIAS - core::f64::consts::FRAC_1_SQRT_2.to_bits().cast_signed());
            let biased = _mm256_srli_epi64::<52>(_mm256_add_epi64(bits, offset));
            let octaves = _mm256_sub_epi64(_mm256_slli_epi64::<52>(biased), _mm256_set1_epi64x(BIAS));
            let f = _mm256_castsi256_pd(_mm256_sub_epi64(bits, octaves));
            let e = _mm256_castsi256_pd(_mm256_or_si256(biased, _mm256_set1_epi64x(MAGIC.to_bits().cast_signed())));
            let e = _mm256_sub_pd(e, _mm256_set1_pd(MAGIC + 1023.0));
            let finite = _mm256_cmp_pd::<_CMP_LT_OQ>(self.0, _mm256_set1_pd(f64::INFINITY));
            (Self(f), Self(_mm256_blendv_pd(self.0, e, finite)))
        }
    }
    #[inline(always)]
    fn select(mask: Mask64x4, a: Self, b: Self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX.
        Self(unsafe { _mm256_blendv_pd(b.0, a.0, mask.0) })
    }
    #[inline(always)]
    fn keep(self, mask: Mask64x4) -> Self {
        // SAFETY: a vector implies the token, which proves AVX.
        Self(unsafe { _mm256_and_pd(self.0, mask.0) })
    }
    #[inline(always)]
    fn add_where(self, mask: Mask64x4, x: Self) -> Self {
        Self::select(mask, self + x, self)
    }
    #[inline(always)]
    fn count_where(self, mask: Mask64x4) -> Self {
        // SAFETY: a vector implies the token, which proves AVX2.
        Self(unsafe { _mm256_castsi256_pd(_mm256_sub_epi64(_mm256_castpd_si256(self.0), _mm256_castpd_si256(mask.0))) })
    }
    #[inline(always)]
    fn reduce_sum(self) -> f64 {
        // SAFETY: a vector implies the token, which proves AVX.
        unsafe {
            let x = _mm_add_pd(_mm256_castpd256_pd128(self.0), _mm256_extractf128_pd::<1>(self.0));
            _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)))
        }
    }
    #[inline(always)]
    fn reduce_max(self) -> f64 {
        // SAFETY: a vector implies the token, which proves AVX.
        unsafe {
            let x = _mm_max_pd(_mm256_castpd256_pd128(self.0), _mm256_extractf128_pd::<1>(self.0));
            _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)))
        }
    }
}
