//! AVX-512 F, BW, DQ and VL.

#[allow(clippy::wildcard_imports)] // a hundred intrinsics, whose names cannot be mistaken
use core::arch::x86_64::*;

use super::avx2::{F32x8, F64x4};
use super::{Isa, Kernel, Level, Mask, Vector, row, row_mut};

/// Proof that this machine has the level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

/// Sixteen `f32`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct F32x16(__m512);

/// Eight `f64`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct F64x8(__m512d);

/// One bit per lane of an [`F32x16`].
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct Mask16(__mmask16);

/// One bit per lane of an [`F64x8`].
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct Mask8(__mmask8);

impl Avx512 {
    /// The token, if this machine and its operating system have every feature that [`Avx512::run`] enables.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("popcnt");
        found.then_some(Self(()))
    }

    /// Runs `kernel` compiled for this level.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,popcnt")]
        fn shim<K: Kernel>(isa: Avx512, kernel: K) -> K::Output {
            kernel.run(isa)
        }
        // SAFETY: the token exists, so `detect` found all of these features.
        unsafe { shim(self, kernel) }
    }
}

impl Isa for Avx512 {
    type F32 = F32x16;
    type F64 = F64x8;
    const LEVEL: Level = Level::Avx512;
    const REGISTERS: usize = 32;

    #[inline(always)]
    fn widen(self, v: F32x16) -> (F64x8, F64x8) {
        // SAFETY: the token proves AVX-512 F and DQ.
        unsafe { (F64x8(_mm512_cvtps_pd(_mm512_castps512_ps256(v.0))), F64x8(_mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(v.0)))) }
    }
    #[inline(always)]
    fn narrow(self, lo: F64x8, hi: F64x8) -> F32x16 {
        // SAFETY: the token proves AVX-512 F and DQ.
        unsafe { F32x16(_mm512_insertf32x8::<1>(_mm512_castps256_ps512(_mm512_cvtpd_ps(lo.0)), _mm512_cvtpd_ps(hi.0))) }
    }
    #[inline(always)]
    unsafe fn stream_halves(self, src: *const u16, dst: *mut u16) {
        // SAFETY: the token proves AVX-512 F and with it AVX2; the caller promises the memory and its alignment.
        unsafe { _mm256_stream_si256(dst.cast(), _mm256_loadu_si256(src.cast())) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, src: *const u16) -> F32x16 {
        // SAFETY: the token proves AVX-512 F; the caller promises sixteen readable elements.
        unsafe { F32x16(_mm512_cvtph_ps(_mm256_loadu_si256(src.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: F32x16, dst: *mut u16) {
        const NEAREST_EVEN: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: the token proves AVX-512 F; the caller promises sixteen writable elements.
        unsafe { _mm256_storeu_si256(dst.cast(), _mm512_cvtps_ph::<NEAREST_EVEN>(v.0)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const u16) -> F32x16 {
        // SAFETY: the token proves AVX-512 F; the caller promises sixteen readable elements.
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(src.cast()));
            F32x16(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, v: F32x16, dst: *mut u16) {
        // SAFETY: the token proves AVX-512 F; the caller promises sixteen writable elements.
        unsafe {
            // In integers, because the conversion of AVX512_BF16 flushes subnormals. A carry out of the mantissa is the right rounding, but not of NaN.
            const HIGH: [i16; 32] = {
                let mut high = [0; 32];
                let mut i = 0;
                while i < 16 {
                    high[i] = 2 * i as i16 + 1;
                    i += 1;
                }
                high
            };
            // Its sign, and nothing else of it: (v and sign) or quiet.
            let (sign, quiet) = (_mm512_set1_epi32(i32::MIN), _mm512_set1_epi32(0x7fc0_0000));
            let nan = _mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xf8>(quiet, _mm512_castps_si512(v.0), sign));
            // That for both kinds of NaN, everything else as it is.
            let bits = _mm512_castps_si512(_mm512_fixupimm_ps::<0>(nan, v.0, _mm512_set1_epi32(0x1111_1100)));
            let odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x1_0000));
            let rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
            let words = _mm512_permutexvar_epi16(_mm512_loadu_si512(HIGH.as_ptr().cast()), rounded);
            _mm256_storeu_si256(dst.cast(), _mm512_castsi512_si256(words));
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
    ($mask:ident) => {
        impl Mask for $mask {
            #[inline(always)]
            fn any(self) -> bool {
                self.0 != 0
            }
            #[inline(always)]
            fn count(self) -> usize {
                self.0.count_ones() as usize
            }
            #[inline(always)]
            fn bits(self) -> u64 {
                u64::from(self.0)
            }
            #[inline(always)]
            fn and(self, rhs: Self) -> Self {
                Self(self.0 & rhs.0)
            }
        }
    };
}
mask!(Mask16);
mask!(Mask8);

/// The lowest `n` bits.
#[inline(always)]
fn first(n: usize) -> u32 {
    (1 << n) - 1
}

/// Transposes the 4 x 4 elements of every 128-bit lane.
#[inline(always)]
fn transpose(v: [F32x16; 4]) -> [F32x16; 4] {
    // SAFETY: vectors imply the token, which proves AVX-512 F.
    unsafe {
        let (a, b) = (_mm512_castps_pd(_mm512_unpacklo_ps(v[0].0, v[1].0)), _mm512_castps_pd(_mm512_unpackhi_ps(v[0].0, v[1].0)));
        let (c, d) = (_mm512_castps_pd(_mm512_unpacklo_ps(v[2].0, v[3].0)), _mm512_castps_pd(_mm512_unpackhi_ps(v[2].0, v[3].0)));
        [
            F32x16(_mm512_castpd_ps(_mm512_unpacklo_pd(a, c))),
            F32x16(_mm512_castpd_ps(_mm512_unpackhi_pd(a, c))),
            F32x16(_mm512_castpd_ps(_mm512_unpacklo_pd(b, d))),
            F32x16(_mm512_castpd_ps(_mm512_unpackhi_pd(b, d))),
        ]
    }
}

operators!(F32x16, _mm512_add_ps, _mm512_sub_ps, _mm512_mul_ps, _mm512_div_ps, -self = _mm512_xor_ps(self.0, _mm512_set1_ps(-0.0)));
operators!(F64x8, _mm512_add_pd, _mm512_sub_pd, _mm512_mul_pd, _mm512_div_pd, -self = _mm512_xor_pd(self.0, _mm512_set1_pd(-0.0)));

impl Vector for F32x16 {
    type Elem = f32;
    type Isa = Avx512;
    type Mask = Mask16;
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(_isa: Avx512, x: f32) -> Self {
        // SAFETY: the token proves AVX-512 F.
        Self(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(_isa: Avx512, src: *const f32) -> Self {
        // SAFETY: the token proves AVX-512 F; the caller promises the memory.
        Self(unsafe { _mm512_loadu_ps(src) })
    }
    #[inline(always)]
    unsafe fn load_partial(isa: Avx512, src: *const f32, n: usize, fill: f32) -> Self {
        debug_assert!(n <= Self::LANES);
        // SAFETY: the token proves AVX-512 F; masked lanes are not accessed, the caller promises the others.
        Self(unsafe { _mm512_mask_loadu_ps(Self::splat(isa, fill).0, first(n) as __mmask16, src) })
    }
    #[inline(always)]
    unsafe fn flags(_isa: Avx512, src: *const u8) -> Mask16 {
        // SAFETY: the token proves AVX-512 BW and VL; the caller promises the memory.
        unsafe {
            let bytes = _mm_loadu_si128(src.cast());
            Mask16(_mm_test_epi8_mask(bytes, bytes))
        }
    }
    #[inline(always)]
    unsafe fn store(self, dst: *mut f32) {
        // SAFETY: a vector implies the token, which proves AVX-512 F; the caller promises the memory.
        unsafe { _mm512_storeu_ps(dst, self.0) }
    }
    #[inline(always)]
    unsafe fn store_partial(self, dst: *mut f32, n: usize) {
        debug_assert!(n <= Self::LANES);
        // SAFETY: a vector implies the token, which proves AVX-512 F; masked lanes are not accessed, the caller promises the others.
        unsafe { _mm512_mask_storeu_ps(dst, first(n) as __mmask16, self.0) }
    }
    #[inline(always)]
    unsafe fn stream(self, dst: *mut f32) {
        // SAFETY: a vector implies the token, which proves AVX-512 F; the caller promises the memory and its alignment.
        unsafe { _mm512_stream_ps(dst, self.0) }
    }

    #[inline(always)]
    unsafe fn load4(_isa: Avx512, base: *const u8, offsets: *const isize) -> [Self; 4] {
        // SAFETY: the token proves AVX-512 F; the caller promises the offsets and four elements at each.
        unsafe {
            let mut v = [Self(_mm512_setzero_ps()); 4];
            for (i, v) in v.iter_mut().enumerate() {
                v.0 = _mm512_castps128_ps512(_mm_loadu_ps(row(base, offsets, i)));
                v.0 = _mm512_insertf32x4::<1>(v.0, _mm_loadu_ps(row(base, offsets, i + 4)));
                v.0 = _mm512_insertf32x4::<2>(v.0, _mm_loadu_ps(row(base, offsets, i + 8)));
                v.0 = _mm512_insertf32x4::<3>(v.0, _mm_loadu_ps(row(base, offsets, i + 12)));
            }
            transpose(v)
        }
    }
    #[inline(always)]
    unsafe fn store4(v: [Self; 4], base: *mut u8, offsets: *const isize) {
        // SAFETY: a vector implies the token, which proves AVX-512 F; the caller promises the offsets and four elements at each.
        unsafe {
            for (i, v) in transpose(v).iter().enumerate() {
                _mm_storeu_ps(row_mut(base, offsets, i), _mm512_castps512_ps128(v.0));
                _mm_storeu_ps(row_mut(base, offsets, i + 4), _mm512_extractf32x4_ps::<1>(v.0));
                _mm_storeu_ps(row_mut(base, offsets, i + 8), _mm512_extractf32x4_ps::<2>(v.0));
                _mm_storeu_ps(row_mut(base, offsets, i + 12), _mm512_extractf32x4_ps::<3>(v.0));
            }
        }
    }
    #[inline(always)]
    fn reverse(self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        unsafe { Self(_mm512_permutexvar_ps(_mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), self.0)) }
    }
    #[inline(always)]
    fn deinterleave(self, rhs: Self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        unsafe {
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            (Self(_mm512_permutex2var_ps(self.0, even, rhs.0)), Self(_mm512_permutex2var_ps(self.0, odd, rhs.0)))
        }
    }
    #[inline(always)]
    fn interleave(self, rhs: Self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        unsafe {
            let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
            (Self(_mm512_permutex2var_ps(self.0, low, rhs.0)), Self(_mm512_permutex2var_ps(self.0, high, rhs.0)))
        }
    }

    intrinsics! {
        fn mul_add(self, a, b) = _mm512_fmadd_ps, F32x16;
        fn mul_sub(self, a, b) = _mm512_fmsub_ps, F32x16;
        fn neg_mul_add(self, a, b) = _mm512_fnmadd_ps, F32x16;
        fn max(self, rhs) = _mm512_max_ps, F32x16;
        fn min(self, rhs) = _mm512_min_ps, F32x16;
        fn abs(self) = _mm512_abs_ps, F32x16;
        fn eq(self, rhs) = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>, Mask16;
        fn ne(self, rhs) = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>, Mask16;
        fn lt(self, rhs) = _mm512_cmp_ps_mask::<_CMP_LT_OQ>, Mask16;
        fn le(self, rhs) = _mm512_cmp_ps_mask::<_CMP_LE_OQ>, Mask16;
    }
    #[inline(always)]
    fn scale2(self, d: Self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        unsafe {
            // Where the result is subnormal or underflows by little, the instruction takes a hundred times as long; such lanes become zero.
            // NaN in d passes the comparison.
            let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(d.0, _mm512_set1_ps(-126.0));
            Self(_mm512_maskz_scalef_ps(normal, self.0, d.0))
        }
    }
    const STEPS: u32 = 4;
    type Octave = __m512i;
    #[inline(always)]
    fn octave(_isa: Avx512, powers: &[f32; 16]) -> __m512i {
        // Mantissas, less what the shift below leaves of the index.
        let mut table = [0_u32; 16];
        for (j, (entry, power)) in table.iter_mut().zip(powers).enumerate() {
            *entry = (power.to_bits() & 0x007f_ffff).wrapping_sub((j as u32) << 19);
        }
        // SAFETY: the token proves AVX-512 F; the array has sixteen entries.
        unsafe { _mm512_loadu_si512(table.as_ptr().cast()) }
    }
    #[inline(always)]
    fn power(self, octave: __m512i) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let mantissa = _mm512_permutexvar_epi32(bits, octave);
            Self(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32::<19>(bits), mantissa)))
        }
    }
    #[inline(always)]
    fn frexp(self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        unsafe {
            // The exponent counts how many whole octaves lie above sqrt(1/2); taking them off leaves f.
            let bits = _mm512_castps_si512(self.0);
            let sqrt_half = _mm512_set1_epi32(core::f32::consts::FRAC_1_SQRT_2.to_bits().cast_signed());
            let e = _mm512_srai_epi32::<23>(_mm512_sub_epi32(bits, sqrt_half));
            let f = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32::<23>(e)));
            let finite = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, _mm512_set1_ps(f32::INFINITY));
            (Self(f), Self(_mm512_mask_cvtepi32_ps(self.0, finite, e)))
        }
    }
    #[inline(always)]
    fn select(mask: Mask16, a: Self, b: Self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        Self(unsafe { _mm512_mask_blend_ps(mask.0, b.0, a.0) })
    }
    #[inline(always)]
    fn keep(self, mask: Mask16) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        Self(unsafe { _mm512_maskz_mov_ps(mask.0, self.0) })
    }
    #[inline(always)]
    fn add_where(self, mask: Mask16, x: Self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        Self(unsafe { _mm512_mask_add_ps(self.0, mask.0, self.0, x.0) })
    }
    #[inline(always)]
    fn count_where(self, mask: Mask16) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        Self(unsafe { _mm512_mask_add_ps(self.0, mask.0, self.0, _mm512_set1_ps(1.0)) })
    }
    #[inline(always)]
    fn fma_where(self, mask: Mask16, a: Self, b: Self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        Self(unsafe { _mm512_mask3_fmadd_ps(a.0, b.0, self.0, mask.0) })
    }
    #[inline(always)]
    fn reduce_sum(self) -> f32 {
        // SAFETY: a vector implies the token, which proves AVX-512 F and DQ, and AVX2 for the halves.
        unsafe { F32x8(_mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0))).reduce_sum() }
    }
    #[inline(always)]
    fn reduce_max(self) -> f32 {
        // SAFETY: a vector implies the token, which proves AVX-512 F and DQ, and AVX2 for the halves.
        unsafe { F32x8(_mm256_max_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0))).reduce_max() }
    }
}

impl Vector for F64x8 {
    type Elem = f64;
    type Isa = Avx512;
    type Mask = Mask8;
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(_isa: Avx512, x: f64) -> Self {
        // SAFETY: the token proves AVX-512 F.
        Self(unsafe { _mm512_set1_pd(x) })
    }
    #[inline(always)]
    unsafe fn load(_isa: Avx512, src: *const f64) -> Self {
        // SAFETY: the token proves AVX-512 F; the caller promises the memory.
        Self(unsafe { _mm512_loadu_pd(src) })
    }
    #[inline(always)]
    unsafe fn load_partial(isa: Avx512, src: *const f64, n: usize, fill: f64) -> Self {
        debug_assert!(n <= Self::LANES);
        // SAFETY: the token proves AVX-512 F; masked lanes are not accessed, the caller promises the others.
        Self(unsafe { _mm512_mask_loadu_pd(Self::splat(isa, fill).0, first(n) as __mmask8, src) })
    }
    #[inline(always)]
    unsafe fn flags(_isa: Avx512, src: *const u8) -> Mask8 {
        // SAFETY: the token proves AVX-512 BW and VL; the caller promises the memory.
        unsafe {
            let bytes = _mm_loadl_epi64(src.cast());
            Mask8(_mm_test_epi8_mask(bytes, bytes) as __mmask8)
        }
    }
    #[inline(always)]
    unsafe fn store(self, dst: *mut f64) {
        // SAFETY: a vector implies the token, which proves AVX-512 F; the caller promises the memory.
        unsafe { _mm512_storeu_pd(dst, self.0) }
    }
    #[inline(always)]
    unsafe fn store_partial(self, dst: *mut f64, n: usize) {
        debug_assert!(n <= Self::LANES);
        // SAFETY: a vector implies the token, which proves AVX-512 F; masked lanes are not accessed, the caller promises the others.
        unsafe { _mm512_mask_storeu_pd(dst, first(n) as __mmask8, self.0) }
    }
    #[inline(always)]
    unsafe fn stream(self, dst: *mut f64) {
        // SAFETY: a vector implies the token, which proves AVX-512 F; the caller promises the memory and its alignment.
        unsafe { _mm512_stream_pd(dst, self.0) }
    }

    #[inline(always)]
    unsafe fn load4(_isa: Avx512, base: *const u8, offsets: *const isize) -> [Self; 4] {
        // SAFETY: the token proves AVX-512 F and DQ; the caller promises the offsets and four elements at each.
        unsafe {
            // Even and odd rows, two classes at a time.
            let mut v = [_mm512_setzero_pd(); 4];
            for (i, v) in v.iter_mut().enumerate() {
                let (i, c) = (i & 1, i & 2);
                *v = _mm512_castpd128_pd512(_mm_loadu_pd(row::<f64>(base, offsets, i).add(c)));
                *v = _mm512_insertf64x2::<1>(*v, _mm_loadu_pd(row::<f64>(base, offsets, i + 2).add(c)));
                *v = _mm512_insertf64x2::<2>(*v, _mm_loadu_pd(row::<f64>(base, offsets, i + 4).add(c)));
                *v = _mm512_insertf64x2::<3>(*v, _mm_loadu_pd(row::<f64>(base, offsets, i + 6).add(c)));
            }
            let (low, high) = (_mm512_unpacklo_pd(v[0], v[1]), _mm512_unpackhi_pd(v[0], v[1]));
            [Self(low), Self(high), Self(_mm512_unpacklo_pd(v[2], v[3])), Self(_mm512_unpackhi_pd(v[2], v[3]))]
        }
    }
    #[inline(always)]
    unsafe fn store4(v: [Self; 4], base: *mut u8, offsets: *const isize) {
        // SAFETY: a vector implies the token, which proves AVX-512 F and DQ; the caller promises the offsets and four elements at each.
        unsafe {
            for c in [0, 2] {
                let (even, odd) = (_mm512_unpacklo_pd(v[c].0, v[c + 1].0), _mm512_unpackhi_pd(v[c].0, v[c + 1].0));
                for (i, v) in [(0, even), (1, odd)] {
                    _mm_storeu_pd(row_mut::<f64>(base, offsets, i).add(c), _mm512_castpd512_pd128(v));
                    _mm_storeu_pd(row_mut::<f64>(base, offsets, i + 2).add(c), _mm512_extractf64x2_pd::<1>(v));
                    _mm_storeu_pd(row_mut::<f64>(base, offsets, i + 4).add(c), _mm512_extractf64x2_pd::<2>(v));
                    _mm_storeu_pd(row_mut::<f64>(base, offsets, i + 6).add(c), _mm512_extractf64x2_pd::<3>(v));
                }
            }
        }
    }
    #[inline(always)]
    fn reverse(self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        unsafe { Self(_mm512_permutexvar_pd(_mm512_setr_epi64(7, 6, 5, 4, 3, 2, 1, 0), self.0)) }
    }
    #[inline(always)]
    fn deinterleave(self, rhs: Self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        unsafe {
            let even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
            let odd = _mm512_add_epi64(even, _mm512_set1_epi64(1));
            (Self(_mm512_permutex2var_pd(self.0, even, rhs.0)), Self(_mm512_permutex2var_pd(self.0, odd, rhs.0)))
        }
    }
    #[inline(always)]
    fn interleave(self, rhs: Self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        unsafe {
            let low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
            let high = _mm512_add_epi64(low, _mm512_set1_epi64(4));
            (Self(_mm512_permutex2var_pd(self.0, low, rhs.0)), Self(_mm512_permutex2var_pd(self.0, high, rhs.0)))
        }
    }

    intrinsics! {
        fn mul_add(self, a, b) = _mm512_fmadd_pd, F64x8;
        fn mul_sub(self, a, b) = _mm512_fmsub_pd, F64x8;
        fn neg_mul_add(self, a, b) = _mm512_fnmadd_pd, F64x8;
        fn max(self, rhs) = _mm512_max_pd, F64x8;
        fn min(self, rhs) = _mm512_min_pd, F64x8;
        fn abs(self) = _mm512_abs_pd, F64x8;
        fn eq(self, rhs) = _mm512_cmp_pd_mask::<_CMP_EQ_OQ>, Mask8;
        fn ne(self, rhs) = _mm512_cmp_pd_mask::<_CMP_NEQ_UQ>, Mask8;
        fn lt(self, rhs) = _mm512_cmp_pd_mask::<_CMP_LT_OQ>, Mask8;
        fn le(self, rhs) = _mm512_cmp_pd_mask::<_CMP_LE_OQ>, Mask8;
    }
    #[inline(always)]
    fn scale2(self, d: Self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        unsafe {
            // As for f32.
            let normal = _mm512_cmp_pd_mask::<_CMP_NLT_UQ>(d.0, _mm512_set1_pd(-1022.0));
            Self(_mm512_maskz_scalef_pd(normal, self.0, d.0))
        }
    }
    const STEPS: u32 = 4;
    type Octave = [__m512i; 2];
    #[inline(always)]
    fn octave(_isa: Avx512, powers: &[f64; 16]) -> [__m512i; 2] {
        let mut table = [0_u64; 16];
        for (j, (entry, power)) in table.iter_mut().zip(powers).enumerate() {
            *entry = (power.to_bits() & 0x000f_ffff_ffff_ffff).wrapping_sub((j as u64) << 48);
        }
        // SAFETY: the token proves AVX-512 F; the array has sixteen entries.
        unsafe { [_mm512_loadu_si512(table.as_ptr().cast()), _mm512_loadu_si512(table.as_ptr().add(8).cast())] }
    }
    #[inline(always)]
    fn power(self, octave: [__m512i; 2]) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        unsafe {
            let bits = _mm512_castpd_si512(self.0);
            let mantissa = _mm512_permutex2var_epi64(octave[0], bits, octave[1]);
            Self(_mm512_castsi512_pd(_mm512_add_epi64(_mm512_slli_epi64::<48>(bits), mantissa)))
        }
    }
    #[inline(always)]
    fn frexp(self) -> (Self, Self) {
        // SAFETY: a vector implies the token, which proves AVX-512 F and DQ.
        unsafe {
            // As for f32.
            let bits = _mm512_castpd_si512(self.0);
            let sqrt_half = _mm512_set1_epi64(core::f64::consts::FRAC_1_SQRT_2.to_bits().cast_signed());
            let e = _mm512_srai_epi64::<52>(_mm512_sub_epi64(bits, sqrt_half));
            let f = _mm512_castsi512_pd(_mm512_sub_epi64(bits, _mm512_slli_epi64::<52>(e)));
            let finite = _mm512_cmp_pd_mask::<_CMP_LT_OQ>(self.0, _mm512_set1_pd(f64::INFINITY));
            (Self(f), Self(_mm512_mask_cvtepi64_pd(self.0, finite, e)))
        }
    }
    #[inline(always)]
    fn select(mask: Mask8, a: Self, b: Self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        Self(unsafe { _mm512_mask_blend_pd(mask.0, b.0, a.0) })
    }
    #[inline(always)]
    fn keep(self, mask: Mask8) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        Self(unsafe { _mm512_maskz_mov_pd(mask.0, self.0) })
    }
    #[inline(always)]
    fn add_where(self, mask: Mask8, x: Self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        Self(unsafe { _mm512_mask_add_pd(self.0, mask.0, self.0, x.0) })
    }
    #[inline(always)]
    fn count_where(self, mask: Mask8) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        Self(unsafe { _mm512_mask_add_pd(self.0, mask.0, self.0, _mm512_set1_pd(1.0)) })
    }
    #[inline(always)]
    fn fma_where(self, mask: Mask8, a: Self, b: Self) -> Self {
        // SAFETY: a vector implies the token, which proves AVX-512 F.
        Self(unsafe { _mm512_mask3_fmadd_pd(a.0, b.0, self.0, mask.0) })
    }
    #[inline(always)]
    fn reduce_sum(self) -> f64 {
        // SAFETY: a vector implies the token, which proves AVX-512 F, and AVX2 for the halves.
        unsafe { F64x4(_mm256_add_pd(_mm512_castpd512_pd256(self.0), _mm512_extractf64x4_pd::<1>(self.0))).reduce_sum() }
    }
    #[inline(always)]
    fn reduce_max(self) -> f64 {
        // SAFETY: a vector implies the token, which proves AVX-512 F, and AVX2 for the halves.
        unsafe { F64x4(_mm256_max_pd(_mm512_castpd512_pd256(self.0), _mm512_extractf64x4_pd::<1>(self.0))).reduce_max() }
    }
}
