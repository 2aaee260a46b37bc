//! Portable code: vectors of one lane. It is what the other levels are tested against, and the fallback everywhere.

use core::ops::{Add, Div, Mul, Neg, Sub};

use super::{Isa, Level, Mask, Vector};

/// The portable level, which needs no detection.
#[derive(Clone, Copy, Debug)]
pub struct Scalar;

/// One `f32`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct F32x1(f32);

/// One `f64`.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct F64x1(f64);

/// One truth value.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Mask1(bool);

impl Isa for Scalar {
    type F32 = F32x1;
    type F64 = F64x1;
    const LEVEL: Level = Level::Scalar;
    const REGISTERS: usize = 16;

    #[inline(always)]
    fn widen(self, v: F32x1) -> (F64x1, F64x1) {
        (F64x1(f64::from(v.0)), F64x1(0.0))
    }
    #[inline(always)]
    fn narrow(self, lo: F64x1, _hi: F64x1) -> F32x1 {
        F32x1(lo.0 as f32)
    }
    #[inline(always)]
    unsafe fn load_f16(self, src: *const u16) -> F32x1 {
        // SAFETY: the caller promises one readable element.
        F32x1(f16_to_f32(unsafe { src.read() }))
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: F32x1, dst: *mut u16) {
        // SAFETY: the caller promises one writable element.
        unsafe { dst.write(f32_to_f16(v.0)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const u16) -> F32x1 {
        // SAFETY: the caller promises one readable element.
        F32x1(f32::from_bits(u32::from(unsafe { src.read() }) << 16))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, v: F32x1, dst: *mut u16) {
        // SAFETY: the caller promises one writable element.
        unsafe { dst.write(f32_to_bf16(v.0)) }
    }
}

/// Exact. A signalling NaN comes out quiet, as from the hardware conversions.
#[inline(always)]
fn f16_to_f32(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let magnitude = u32::from(half & 0x7fff);
    let bits = match magnitude {
        // The exponent biases differ by 127 - 15 = 112; a product also normalises the subnormals.
        ..0x7c00 => (f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23)).to_bits(),
        0x7c00 => 0x7f80_0000,
        _ => (magnitude << 13) | 0x7fc0_0000,
    };
    f32::from_bits(sign | bits)
}

/// Rounds to nearest even.
#[inline(always)]
fn f32_to_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    let half = if magnitude > 0x7f80_0000 {
        0x7e00 | (magnitude >> 13) & 0x3ff
    } else if magnitude >= 0x4780_0000 {
        // 2^16 and beyond; what rounds up to 2^16 from below carries into the exponent by itself.
        0x7c00
    } else if magnitude < 0x3880_0000 {
        // Below 2^-14 the half's step is 2^-24, the step of an f32 in [0.5, 1): the sum rounds to it.
        (f32::from_bits(magnitude) + 0.5).to_bits() - 0.5f32.to_bits()
    } else {
        (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13
    };
    sign | half as u16
}

/// Rounds to nearest even; a NaN keeps its upper payload and becomes quiet.
#[inline(always)]
fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16 }
}

impl Mask for Mask1 {
    #[inline(always)]
    fn any(self) -> bool {
        self.0
    }
    #[inline(always)]
    fn count(self) -> usize {
        usize::from(self.0)
    }
    #[inline(always)]
    fn bits(self) -> u64 {
        u64::from(self.0)
    }
    #[inline(always)]
    fn and(self, rhs: Self) -> Self {
        Self(self.0 && rhs.0)
    }
}

/// `x * a + b`. Without the instruction a rounded-once f32 sum costs a library call, so it is taken in f64, where the product is exact:
/// the sum is rounded twice, which moves it by one unit in the last place when the f64 lands on a midpoint of two f32, about once in 2^29.
#[inline(always)]
fn mul_add_f32(x: f32, a: f32, b: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
        x.mul_add(a, b)
    } else {
        (f64::from(x) * f64::from(a) + f64::from(b)) as f32
    }
}

/// `x * a + b`, rounded once.
#[inline(always)]
fn mul_add_f64(x: f64, a: f64, b: f64) -> f64 {
    x.mul_add(a, b)
}

macro_rules! operator {
    ($vector:ty, $trait:ident, $method:ident, $op:tt) => {
        impl $trait for $vector {
            type Output = Self;
            #[inline(always)]
            fn $method(self, rhs: Self) -> Self {
                Self(self.0 $op rhs.0)
            }
        }
    };
}

macro_rules! vector {
    ($vector:ident, $elem:ty, $bits:ty, $signed:ty, $mul_add:ident) => {
        operator!($vector, Add, add, +);
        operator!($vector, Sub, sub, -);
        operator!($vector, Mul, mul, *);
        operator!($vector, Div, div, /);

        impl Neg for $vector {
            type Output = Self;
            #[inline(always)]
            fn neg(self) -> Self {
                Self(-self.0)
            }
        }

        impl Vector for $vector {
            type Elem = $elem;
            type Isa = Scalar;
            type Mask = Mask1;
            const LANES: usize = 1;

            #[inline(always)]
            fn splat(_isa: Scalar, x: $elem) -> Self {
                Self(x)
            }
            #[inline(always)]
            unsafe fn load(_isa: Scalar, src: *const $elem) -> Self {
                // SAFETY: the caller promises one readable element.
                Self(unsafe { src.read() })
            }
            #[inline(always)]
            unsafe fn flags(_isa: Scalar, src: *const u8) -> Mask1 {
                // SAFETY: the caller promises one readable byte.
                Mask1(unsafe { src.read() } != 0)
            }
            #[inline(always)]
            unsafe fn load_partial(_isa: Scalar, src: *const $elem, n: usize, fill: $elem) -> Self {
                // SAFETY: the caller promises n readable elements.
                Self(if n == 0 { fill } else { unsafe { src.read() } })
            }
            #[inline(always)]
            unsafe fn store(self, dst: *mut $elem) {
                // SAFETY: the caller promises one writable element.
                unsafe { dst.write(self.0) }
            }
            #[inline(always)]
            unsafe fn store_partial(self, dst: *mut $elem, n: usize) {
                if n != 0 {
                    // SAFETY: the caller promises n writable elements.
                    unsafe { dst.write(self.0) }
                }
            }
            #[inline(always)]
            unsafe fn stream(self, dst: *mut $elem) {
                // SAFETY: the caller promises one writable element.
                unsafe { dst.write(self.0) }
            }
            #[inline(always)]
            unsafe fn load4(_isa: Scalar, base: *const u8, offsets: *const isize) -> [Self; 4] {
                // SAFETY: the caller promises one offset and four readable elements there.
                unsafe {
                    let [a, b, c, d] = base.wrapping_offset(offsets.read()).cast::<[$elem; 4]>().read_unaligned();
                    [Self(a), Self(b), Self(c), Self(d)]
                }
            }
            #[inline(always)]
            unsafe fn store4(v: [Self; 4], base: *mut u8, offsets: *const isize) {
                // SAFETY: the caller promises one offset and four writable elements there.
                unsafe { base.wrapping_offset(offsets.read()).cast::<[$elem; 4]>().write_unaligned(v.map(|x| x.0)) }
            }
            #[inline(always)]
            fn reverse(self) -> Self {
                self
            }
            #[inline(always)]
            fn deinterleave(self, rhs: Self) -> (Self, Self) {
                (self, rhs)
            }
            #[inline(always)]
            fn interleave(self, rhs: Self) -> (Self, Self) {
                (self, rhs)
            }

            #[inline(always)]
            fn mul_add(self, a: Self, b: Self) -> Self {
                Self($mul_add(self.0, a.0, b.0))
            }
            #[inline(always)]
            fn mul_sub(self, a: Self, b: Self) -> Self {
                Self($mul_add(self.0, a.0, -b.0))
            }
            #[inline(always)]
            fn neg_mul_add(self, a: Self, b: Self) -> Self {
                Self($mul_add(-self.0, a.0, b.0))
            }
            #[inline(always)]
            fn max(self, rhs: Self) -> Self {
                if self.0 > rhs.0 { self } else { rhs }
            }
            #[inline(always)]
            fn min(self, rhs: Self) -> Self {
                if self.0 < rhs.0 { self } else { rhs }
            }
            #[inline(always)]
            fn abs(self) -> Self {
                Self(self.0.abs())
            }
            #[inline(always)]
            fn scale2(self, d: Self) -> Self {
                const MANTISSA: u32 = <$elem>::MANTISSA_DIGITS - 1;
                const BIAS: $elem = (<$elem>::MAX_EXP - 1) as $elem;
                // Adding 2^MANTISSA + BIAS leaves the biased exponent in the lowest bits; the shift drops all others.
                const MAGIC: $elem = (1u64 << MANTISSA) as $elem + BIAS;
                let d = d.max(Self(-BIAS)).0;
                Self(self.0 * <$elem>::from_bits((d + MAGIC).to_bits() << MANTISSA))
            }
            const STEPS: u32 = 0;
            type Octave = ();
            #[inline(always)]
            fn octave(_isa: Scalar, _powers: &[$elem; 16]) {}
            #[inline(always)]
            fn power(self, (): ()) -> Self {
                Self(<$elem>::from_bits(self.0.to_bits() << (<$elem>::MANTISSA_DIGITS - 1)))
            }
            #[inline(always)]
            fn frexp(self) -> (Self, Self) {
                const MANTISSA: u32 = <$elem>::MANTISSA_DIGITS - 1;
                const SQRT_HALF: $bits = (core::f64::consts::FRAC_1_SQRT_2 as $elem).to_bits();
                // The exponent counts how many whole octaves lie above sqrt(1/2); taking them off leaves f.
                let e = (self.0.to_bits().wrapping_sub(SQRT_HALF) as $signed) >> MANTISSA;
                let f = <$elem>::from_bits(self.0.to_bits().wrapping_sub((e << MANTISSA) as $bits));
                (Self(f), if self.0 < <$elem>::INFINITY { Self(e as $elem) } else { self })
            }

            #[inline(always)]
            fn eq(self, rhs: Self) -> Mask1 {
                Mask1(self.0 == rhs.0)
            }
            #[inline(always)]
            fn ne(self, rhs: Self) -> Mask1 {
                Mask1(self.0 != rhs.0)
            }
            #[inline(always)]
            fn lt(self, rhs: Self) -> Mask1 {
                Mask1(self.0 < rhs.0)
            }
            #[inline(always)]
            fn le(self, rhs: Self) -> Mask1 {
                Mask1(self.0 <= rhs.0)
            }
            #[inline(always)]
            fn select(mask: Mask1, a: Self, b: Self) -> Self {
                if mask.0 { a } else { b }
            }
            #[inline(always)]
            fn keep(self, mask: Mask1) -> Self {
                if mask.0 { self } else { Self(0.0) }
            }
            #[inline(always)]
            fn add_where(self, mask: Mask1, x: Self) -> Self {
                if mask.0 { self + x } else { self }
            }
            #[inline(always)]
            fn count_where(self, mask: Mask1) -> Self {
                if mask.0 { self + Self(1.0) } else { self }
            }

            #[inline(always)]
            fn reduce_sum(self) -> $elem {
                self.0
            }
            #[inline(always)]
            fn reduce_max(self) -> $elem {
                self.0
            }
        }
    };
}
vector!(F32x1, f32, u32, i32, mul_add_f32);
vector!(F64x1, f64, u64, i64, mul_add_f64);
