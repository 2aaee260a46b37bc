//! `tanh`, its derivative, and the softcap that is made of them.
//!
//! In units in the last place, measured by `tests/math.rs` as the functions of [`super::math`]:
//!
//! | function | bound | worst f32 | worst f64 |
//! |---|---|---|---|
//! | [`tanh`] | 1.5 | 1.415 | 1.415 |
//! | [`tanh_sech2`], second result | 3.5 | 3.345 | 2.62 |

use crate::array::{Element, Float};
use crate::simd::{Mask, Vector};

use super::math::polynomial;
use super::real::{LOG2_E, Real};

/// `tanh(x)`: odd, ±1 for infinities, NaN for NaN.
#[inline(always)]
pub fn tanh<V: Vector>(isa: V::Isa, x: V) -> V
where
    V::Elem: Real,
{
    tanh_sech2(isa, x).0
}

/// `tanh(x)` and its derivative `1 − tanh²(x)`, see [`Cap::both`].
#[inline(always)]
pub fn tanh_sech2<V: Vector>(isa: V::Isa, x: V) -> (V, V)
where
    V::Elem: Real,
{
    Cap::new(1.0).both(isa, x)
}

/// Up to here `tanh` is a polynomial, a third of the work.
const TANH_NEAR: f64 = 0.625;

/// Terms of the longest [`Real::TANH`].
const TANH_TERMS: usize = 12;

/// `c·tanh(x/c)` for one positive c that the type holds.
#[derive(Clone, Copy, Debug)]
pub struct Cap<T> {
    c: T,
    near: T,
    /// c^−2.
    inverse2: T,
    /// [`Real::TANH`] in powers of x² instead of (x/c)².
    terms: [T; TANH_TERMS],
}

impl<T: Real> Cap<T> {
    /// With c = `cap`.
    pub fn new(cap: f64) -> Self {
        let c = T::from_f64(cap).to_f64();
        let inverse2 = 1.0 / (c * c);
        let mut terms = [T::ZERO; TANH_TERMS];
        let mut factor = 1.0;
        for (term, of) in terms.iter_mut().zip(T::TANH) {
            factor *= inverse2;
            *term = T::from_f64(of.to_f64() * factor);
        }
        // Where a power of c or x has no normal number nothing is near, not even 0.
        let [least, most] = T::CAPS;
        let near = if (least..=most).contains(&c) { cap * TANH_NEAR } else { -1.0 };
        Self { c: T::from_f64(cap), near: T::from_f64(near), inverse2: T::from_f64(inverse2), terms }
    }

    /// The value, and its derivative `1 − tanh²(x/c)`, which keeps its digits where tanh is near ±1.
    ///
    /// Up to [`TANH_NEAR`]·c it is x·tanh(t)/t, t = x/c, where t is never rounded. Beyond, with u = exp(−2|t|):
    /// `tanh|t| = (1 − u)/(1 + u)` and `1 − tanh² = 4u/(1 + u)²`, where 1 − u and 1 + u are carried in two parts. Which of the two a lane
    /// gets depends on itself alone.
    #[inline(always)]
    pub fn both<V: Vector<Elem = T>>(self, isa: V::Isa, x: V) -> (V, V) {
        let [near] = self.near(isa, [x]);
        let far = V::splat(isa, self.near).lt(x.abs());
        if !far.any() {
            return near;
        }
        let c = V::splat(isa, self.c);
        let (t, slope) = tanh_sech2_far(isa, x / c);
        (V::select(far, t * c, near.0), V::select(far, slope, near.1))
    }

    /// Whether numbers from `−depth` to `top` are all near enough to 0 for [`Cap::near`].
    #[inline(always)]
    pub fn is_near(self, depth: T, top: T) -> bool {
        depth <= self.near && top <= self.near
    }

    /// [`Cap::both`] of what is near 0. In step, as one is a long chain.
    #[inline(always)]
    pub fn near<V: Vector<Elem = T>, const N: usize>(self, isa: V::Isa, x: [V; N]) -> [(V, V); N] {
        let (one, inverse2) = (V::splat(isa, T::ONE), V::splat(isa, self.inverse2));
        let mut i = T::TANH.len() - 1;
        let mut z = x;
        for z in &mut z {
            *z = *z * *z;
        }
        let mut sum = [V::splat(isa, self.terms[i]); N];
        while i > 0 {
            i -= 1;
            let term = V::splat(isa, self.terms[i]);
            for (sum, z) in sum.iter_mut().zip(z) {
                *sum = sum.mul_add(z, term);
            }
        }
        let mut both = [(one, one); N];
        for ((both, x), (sum, z)) in both.iter_mut().zip(x).zip(sum.into_iter().zip(z)) {
            let y = x * z.mul_add(sum, one);
            *both = (y, (y * y).neg_mul_add(inverse2, one));
        }
        both
    }
}

#[inline(always)]
fn tanh_sech2_far<V: Vector>(isa: V::Isa, x: V) -> (V, V)
where
    V::Elem: Real,
{
    let (zero, one, two) = (V::splat(isa, V::Elem::ZERO), V::splat(isa, V::Elem::ONE), V::splat(isa, V::Elem::from_f64(2.0)));
    let magic = V::splat(isa, V::Elem::MAGIC);
    let [ln2, ln2_rest] = V::Elem::LN2;
    // In this order NaN passes. Beyond the clamp the exponential is 0.
    let y = -V::splat(isa, V::Elem::CLAMP).min(x.abs() + x.abs());
    let n = y.mul_add(V::splat(isa, V::Elem::from_f64(LOG2_E[0])), magic) - magic;
    // Reduced by multiples of ln 2, not in units of it, so that n = 0 leaves y as it is: small arguments lose nothing.
    let r = n.neg_mul_add(V::splat(isa, ln2), y);
    let r = n.neg_mul_add(V::splat(isa, ln2_rest), r);
    let em1 = (r * r).mul_add(polynomial(isa, V::Elem::EXPM1, r), r);
    // For NaN any power will do: em1 is NaN itself.
    // u − 1 and what its rounding took off (0 for n = 0; otherwise 2^n − 1 is the larger term, which leaves an exact difference).
    let power = one.scale2(n);
    let minus = em1.mul_add(power, power - one);
    let minus_rest = em1.mul_add(power, (power - one) - minus);
    // u + 1 likewise, and its inverse.
    let plus = minus + two;
    let plus_rest = (minus - (plus - two)) + minus_rest;
    let inverse = one / plus;
    // The quotient, and then what it leaves.
    let t = -minus * inverse;
    let rest = t.mul_add(plus_rest, t.mul_add(plus, minus)) + minus_rest;
    let t = rest.neg_mul_add(inverse, t);
    let t = V::select(x.lt(zero), -t, t);
    // 4u as e^r·2^(n + 2), which is normal as long as the result is.
    let power = one.scale2(n + two);
    let error = inverse.neg_mul_add(plus_rest, inverse.neg_mul_add(plus, one));
    let inverse = inverse.mul_add(error, inverse);
    (t, em1.mul_add(power, power) * inverse * inverse)
}
