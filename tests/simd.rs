//! Every operation of every instruction-set level this machine has, against plain scalar code.
//!
//! Lanes are filled with different values, so that an operation which crosses lanes is caught. Where two results are compared, NaN equals
//! any NaN and zeros must agree in sign.

use core::fmt::Debug;
use core::ops::{Add, Div, Mul, Neg, Sub};

use crossent::simd::{Isa, Kernel, Level, Mask, Vector};

/// Tests that run their body once per level, as a kernel.
macro_rules! every_level {
    ($($(#[$note:meta])* fn $name:ident<$S:ident>($isa:ident) $body:block)*) => {$(
        $(#[$note])*
        #[test]
        fn $name() {
            struct Test;
            impl Kernel for Test {
                type Output = ();
                #[inline(always)]
                fn run<$S: Isa>(self, $isa: $S) $body
            }
            let mut levels = 0;
            for level in Level::all() {
                println!("{} on {}", stringify!($name), level.name());
                level.run(Test);
                levels += 1;
            }
            assert!(levels > 0);
        }
    )*};
}

/// What the tests need to know of a lane type, in plain code.
trait Lane:
    Copy
    + Debug
    + Default
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + 'static
{
    const NAN: Self;
    const INFINITY: Self;
    const ONE: Self;
    /// Smallest and largest biased exponent field of normal numbers, unbiased.
    const EXPONENTS: core::ops::RangeInclusive<i32>;
    /// The exponent from which [`Vector::scale2`] promises zero.
    const VANISHED: i32;
    /// The lowest `f` that [`Vector::frexp`] may give.
    const SQRT_HALF: Self;
    /// NaN, zeros, infinities, the ends of the subnormal and normal ranges, ordinary numbers.
    fn specials() -> Vec<Self>;
    fn fused(self, a: Self, b: Self) -> Self;
    /// The product and sum as the scalar level takes them where there is no fused instruction.
    fn fused_by_scalar(self, a: Self, b: Self) -> Self;
    fn magnitude(self) -> Self;
    fn same(self, other: Self) -> bool;
    /// The next number away from zero and the one before.
    fn neighbours(self) -> [Self; 2];
    /// `self * 2^e`, rounded once.
    fn times_power(self, e: i32) -> Self;
    fn from_i32(x: i32) -> Self;
    /// Any bit pattern.
    fn from_random(bits: u64) -> Self;
}

macro_rules! lane {
    ($t:ident, $bits:ty, $vanished:literal, |$s:ident, $a:ident, $b:ident| $by_scalar:expr, |$x:ident, $e:ident| $times_power:expr) => {
        impl Lane for $t {
            const NAN: Self = $t::NAN;
            const INFINITY: Self = $t::INFINITY;
            const ONE: Self = 1.0;
            const EXPONENTS: core::ops::RangeInclusive<i32> = $t::MIN_EXP - 1..=$t::MAX_EXP - 1;
            const VANISHED: i32 = $vanished;
            const SQRT_HALF: Self = core::$t::consts::FRAC_1_SQRT_2;
            fn specials() -> Vec<Self> {
                let positive = [
                    0.0,
                    $t::from_bits(1),
                    $t::from_bits($t::MIN_POSITIVE.to_bits() - 1),
                    $t::MIN_POSITIVE,
                    1e-30,
                    0.1,
                    0.5,
                    1.0,
                    1.0 + $t::EPSILON,
                    1.5,
                    3.7,
                    88.7,
                    16_777_217.0,
                    1e30,
                    $t::MAX,
                    $t::INFINITY,
                    $t::NAN,
                ];
                positive.into_iter().flat_map(|x| [x, -x]).collect()
            }
            fn fused(self, a: Self, b: Self) -> Self {
                self.mul_add(a, b)
            }
            fn fused_by_scalar(self, $a: Self, $b: Self) -> Self {
                let $s = self;
                $by_scalar
            }
            fn magnitude(self) -> Self {
                $t::from_bits(self.to_bits() << 1 >> 1)
            }
            fn same(self, other: Self) -> bool {
                if self.is_nan() { other.is_nan() } else { self.to_bits() == other.to_bits() }
            }
            fn neighbours(self) -> [Self; 2] {
                [$t::from_bits(self.to_bits() + 1), $t::from_bits(self.to_bits() - 1)]
            }
            fn times_power(self, $e: i32) -> Self {
                let $x = self;
                $times_power
            }
            fn from_i32(x: i32) -> Self {
                x as $t
            }
            fn from_random(bits: u64) -> Self {
                $t::from_bits(bits as $bits)
            }
        }
    };
}

/// `2^e` of a normal number.
fn power(e: i32) -> f64 {
    assert!((-1022..=1023).contains(&e));
    f64::from_bits(((e + 1023) as u64) << 52)
}

lane!(f32, u32, -152, |x, a, b| (f64::from(x) * f64::from(a) + f64::from(b)) as f32, |x, e| (f64::from(x) * power(e.max(-1022))) as f32);
// The first step down is exact for numbers of ordinary size.
lane!(f64, u64, -1077, |x, a, b| x.mul_add(a, b), |x, e| x * power(e.max(-500)) * power((e - e.max(-500)).max(-1022)));

/// A reproducible stream of bits.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    /// Of magnitude 2^-12 to 2^12.
    fn ordinary(&mut self) -> f64 {
        let bits = self.next();
        let x = (1.0 + (bits >> 12) as f64 * power(-52)) * power((bits & 15) as i32 - 12 + (bits >> 4 & 7) as i32);
        if bits & 0x800 == 0 { x } else { -x }
    }
}

fn of<V: Vector>(isa: V::Isa, lanes: &[V::Elem]) -> V {
    assert!(lanes.len() >= V::LANES);
    // SAFETY: the slice is long enough.
    unsafe { V::load(isa, lanes.as_ptr()) }
}

fn lanes<V: Vector>(v: V) -> Vec<V::Elem>
where
    V::Elem: Default,
{
    let mut out = vec![V::Elem::default(); V::LANES];
    // SAFETY: the vector is long enough.
    unsafe { v.store(out.as_mut_ptr()) };
    out
}

/// `values` from `start` on, round and round.
fn window<T: Copy>(values: &[T], start: usize, len: usize) -> Vec<T> {
    values.iter().copied().cycle().skip(start % values.len()).take(len).collect()
}

#[track_caller]
fn expect<T: Lane>(level: Level, what: &str, got: &[T], want: impl Fn(usize) -> T) {
    for (i, &got) in got.iter().enumerate() {
        let want = want(i);
        assert!(got.same(want), "{what} on {}: lane {i} is {got:?}, not {want:?}", level.name());
    }
}

#[test]
fn levels_are_those_of_the_machine() {
    let all: Vec<Level> = Level::all().collect();
    println!("levels: {all:?}");
    let mut want = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("popcnt");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if avx2 && avx512 {
            want.push(Level::Avx512);
        }
        if avx2 {
            want.push(Level::Avx2);
        }
    }
    if cfg!(target_arch = "aarch64") {
        want.push(Level::Neon);
    }
    want.push(Level::Scalar);
    assert_eq!(all, want);
    assert_eq!(Level::best(), want[0]);
}

struct WhichLevel;
impl Kernel for WhichLevel {
    type Output = (Level, usize, usize);
    #[inline(always)]
    fn run<S: Isa>(self, _isa: S) -> Self::Output {
        (S::LEVEL, S::F32::LANES, S::F64::LANES)
    }
}

#[test]
fn a_level_runs_as_itself_or_as_scalar() {
    for (name, lanes) in [("avx512", (16, 8)), ("avx2", (8, 4)), ("neon", (4, 2)), ("scalar", (1, 1))] {
        let level = Level::from_name(name).unwrap();
        assert_eq!(level.name(), name);
        assert_eq!(level.available(), Level::all().any(|other| other == level));
        let want = if level.available() { (level, lanes.0, lanes.1) } else { (Level::Scalar, 1, 1) };
        assert_eq!(level.run(WhichLevel), want);
    }
    for name in ["", "AVX2", "avx", "best"] {
        assert_eq!(Level::from_name(name), None);
    }
}

fn arithmetic<V: Vector>(isa: V::Isa)
where
    V::Elem: Lane,
{
    let level = <V::Isa as Isa>::LEVEL;
    let specials = V::Elem::specials();
    for p in 0..specials.len() {
        let x = window(&specials, p, V::LANES);
        let v = of::<V>(isa, &x);
        expect(level, "splat", &lanes(V::splat(isa, x[0])), |_| x[0]);
        expect(level, "load and store", &lanes(v), |i| x[i]);
        expect(level, "-", &lanes(-v), |i| -x[i]);
        expect(level, "abs", &lanes(v.abs()), |i| x[i].magnitude());
        for q in 0..specials.len() {
            let y = window(&specials, q, V::LANES);
            let w = of::<V>(isa, &y);
            expect(level, "+", &lanes(v + w), |i| x[i] + y[i]);
            expect(level, "-", &lanes(v - w), |i| x[i] - y[i]);
            expect(level, "*", &lanes(v * w), |i| x[i] * y[i]);
            expect(level, "/", &lanes(v / w), |i| x[i] / y[i]);
            expect(level, "max", &lanes(v.max(w)), |i| if x[i] > y[i] { x[i] } else { y[i] });
            expect(level, "min", &lanes(v.min(w)), |i| if x[i] < y[i] { x[i] } else { y[i] });
        }
    }
    // The rule for NaN and zeros in so many words.
    let (one, nan, zero) = (V::splat(isa, V::Elem::ONE), V::splat(isa, V::Elem::NAN), V::splat(isa, V::Elem::default()));
    for (name, op) in [("max", V::max as fn(V, V) -> V), ("min", V::min)] {
        expect(level, name, &lanes(op(nan, one)), |_| V::Elem::ONE);
        expect(level, name, &lanes(op(one, nan)), |_| V::Elem::NAN);
        expect(level, name, &lanes(op(zero, -zero)), |_| -V::Elem::default());
        expect(level, name, &lanes(op(-zero, zero)), |_| V::Elem::default());
    }
}

fn fused<V: Vector>(isa: V::Isa, mut random: impl FnMut() -> V::Elem)
where
    V::Elem: Lane,
{
    let level = <V::Isa as Isa>::LEVEL;
    let check = |x: &[V::Elem], y: &[V::Elem], z: &[V::Elem]| {
        let (a, b, c) = (of::<V>(isa, x), of::<V>(isa, y), of::<V>(isa, z));
        // A scalar level without the instruction may round twice, which shows in the last place only.
        let close = |got: V::Elem, x: V::Elem, y: V::Elem, z: V::Elem| {
            let want = x.fused(y, z);
            got.same(want)
                || level == Level::Scalar && got.same(x.fused_by_scalar(y, z)) && want.neighbours().into_iter().any(|next| got.same(next))
        };
        for (i, got) in lanes(a.mul_add(b, c)).into_iter().enumerate() {
            assert!(close(got, x[i], y[i], z[i]), "mul_add on {}: {:?} -> {got:?}", level.name(), (x[i], y[i], z[i]));
        }
        for (i, got) in lanes(a.mul_sub(b, c)).into_iter().enumerate() {
            assert!(close(got, x[i], y[i], -z[i]), "mul_sub on {}: {:?} -> {got:?}", level.name(), (x[i], y[i], z[i]));
        }
        for (i, got) in lanes(a.neg_mul_add(b, c)).into_iter().enumerate() {
            assert!(close(got, -x[i], y[i], z[i]), "neg_mul_add on {}: {:?} -> {got:?}", level.name(), (x[i], y[i], z[i]));
        }
    };
    let specials = V::Elem::specials();
    for p in 0..specials.len() {
        for q in 0..specials.len() {
            for r in 0..specials.len() {
                check(&window(&specials, p, V::LANES), &window(&specials, q, V::LANES), &window(&specials, r, V::LANES));
            }
        }
    }
    let mut told_apart = 0;
    for _ in 0..20_000 {
        let [x, y, z]: [Vec<V::Elem>; 3] = core::array::from_fn(|_| (0..V::LANES).map(|_| random()).collect());
        told_apart += (0..V::LANES).filter(|&i| !x[i].fused(y[i], z[i]).same(x[i] * y[i] + z[i])).count();
        check(&x, &y, &z);
        // Cancellation, where only one rounding leaves the error of the product.
        let cancel: Vec<V::Elem> = (0..V::LANES).map(|i| -(x[i] * y[i])).collect();
        check(&x, &y, &cancel);
    }
    assert!(told_apart > 1000, "the random triples do not tell one rounding from two");
}

#[track_caller]
fn expect_mask<M: Mask>(level: Level, what: &str, mask: M, bits: u64) {
    assert_eq!(mask.bits(), bits, "{what} on {}", level.name());
    assert_eq!(mask.count(), bits.count_ones() as usize, "count of {what} on {}", level.name());
    assert_eq!(mask.any(), bits != 0, "any of {what} on {}", level.name());
}

fn comparisons<V: Vector>(isa: V::Isa)
where
    V::Elem: Lane,
{
    let level = <V::Isa as Isa>::LEVEL;
    let specials = V::Elem::specials();
    let bits = |want: &dyn Fn(usize) -> bool| (0..V::LANES).fold(0u64, |bits, i| bits | u64::from(want(i)) << i);
    for p in 0..specials.len() {
        for q in 0..specials.len() {
            let (x, y) = (window(&specials, p, V::LANES), window(&specials, q, V::LANES));
            let (v, w) = (of::<V>(isa, &x), of::<V>(isa, &y));
            expect_mask(level, "eq", v.eq(w), bits(&|i| x[i] == y[i]));
            expect_mask(level, "ne", v.ne(w), bits(&|i| x[i] != y[i]));
            expect_mask(level, "lt", v.lt(w), bits(&|i| x[i] < y[i]));
            expect_mask(level, "le", v.le(w), bits(&|i| x[i] <= y[i]));
            expect_mask(level, "and", v.le(w).and(w.le(v)), bits(&|i| x[i] <= y[i] && y[i] <= x[i]));
            let lt = v.lt(w);
            expect(level, "select", &lanes(V::select(lt, v, w)), |i| if x[i] < y[i] { x[i] } else { y[i] });
            expect(level, "keep", &lanes(v.keep(lt)), |i| if x[i] < y[i] { x[i] } else { V::Elem::default() });
            expect(level, "add_where", &lanes(v.add_where(lt, w)), |i| if x[i] < y[i] { x[i] + y[i] } else { x[i] });
            let (one, sum) = (V::splat(isa, V::Elem::ONE), lanes(v.mul_add(w, V::splat(isa, V::Elem::ONE))));
            expect(level, "fma_where", &lanes(one.fma_where(lt, v, w)), |i| if x[i] < y[i] { sum[i] } else { V::Elem::ONE });
        }
    }
    // Every pattern of lanes (few enough of them for sixteen), each as a comparison, alone and with another.
    let patterns = 1u64 << V::LANES;
    let mask_of = |pattern: u64| {
        let marks: Vec<V::Elem> = (0..V::LANES).map(|i| if pattern >> i & 1 == 1 { V::Elem::ONE } else { V::Elem::default() }).collect();
        of::<V>(isa, &marks).eq(V::splat(isa, V::Elem::ONE))
    };
    let mut random = Random(1);
    let digits = if size_of::<V::Elem>() == 4 { 23 } else { 52 };
    let whole = (0..digits).fold(V::Elem::ONE, |x, _| x + x);
    let mut count = V::splat(isa, whole);
    let mut counts = vec![whole; V::LANES];
    for pattern in 0..patterns {
        count = count.count_where(mask_of(pattern));
        (0..V::LANES).filter(|i| pattern >> i & 1 == 1).for_each(|i| counts[i] = counts[i] + V::Elem::ONE);
        expect(level, "count_where", &lanes(count), |i| counts[i]);
        expect_mask(level, "pattern", mask_of(pattern), pattern);
        let other = random.next() % patterns;
        expect_mask(level, "and of patterns", mask_of(pattern).and(mask_of(other)), pattern & other);
    }
    // Where the mask is false nothing is added, not even a zero.
    let minus_zero = V::splat(isa, -V::Elem::default());
    expect(level, "add_where", &lanes(minus_zero.add_where(mask_of(0), V::splat(isa, V::Elem::NAN))), |_| -V::Elem::default());
}

/// Three pages, of which only the middle one may be touched.
#[cfg(unix)]
struct Page {
    base: *mut u8,
    size: usize,
}

#[cfg(unix)]
impl Page {
    fn new() -> Self {
        // SAFETY: a fresh anonymous mapping, and its middle part.
        unsafe {
            let size = libc::sysconf(libc::_SC_PAGESIZE) as usize;
            let base = libc::mmap(core::ptr::null_mut(), 3 * size, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANON, -1, 0);
            assert_ne!(base, libc::MAP_FAILED);
            assert_eq!(libc::mprotect(base.cast::<u8>().add(size).cast(), size, libc::PROT_READ | libc::PROT_WRITE), 0);
            Self { base: base.cast(), size }
        }
    }
    /// `count` elements at the beginning or at the end.
    fn part<T>(&self, count: usize, at_end: bool) -> *mut T {
        let bytes = count * size_of::<T>();
        assert!(bytes <= self.size);
        self.base.wrapping_add(if at_end { 2 * self.size - bytes } else { self.size }).cast()
    }
}

#[cfg(unix)]
impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nothing refers to it any more.
        unsafe { libc::munmap(self.base.cast(), 3 * self.size) };
    }
}

fn partial<V: Vector>(isa: V::Isa)
where
    V::Elem: Lane,
{
    const ZONE: usize = 32;
    let level = <V::Isa as Isa>::LEVEL;
    let mark = V::Elem::from_i32(-77);
    let data: Vec<V::Elem> = (0..V::LANES as i32 + 3).map(|i| V::Elem::from_i32(100 + i)).collect();
    for n in 0..=V::LANES {
        for shift in 0..3 {
            for fill in [-V::Elem::INFINITY, V::Elem::NAN, -V::Elem::default(), V::Elem::ONE] {
                // SAFETY: the slice holds n elements from shift on.
                let v = unsafe { V::load_partial(isa, data[shift..].as_ptr(), n, fill) };
                expect(level, "load_partial", &lanes(v), |i| if i < n { data[shift + i] } else { fill });
            }
            let v = of::<V>(isa, &data[shift..]);
            let mut out = vec![mark; 2 * ZONE + V::LANES];
            // SAFETY: the vector holds n elements from there on.
            unsafe { v.store_partial(out[ZONE + shift..].as_mut_ptr(), n) };
            expect(level, "store_partial", &out, |i| if (ZONE + shift..ZONE + shift + n).contains(&i) { data[i - ZONE] } else { mark });
            out.fill(mark);
            // SAFETY: the vector holds LANES elements from there on.
            unsafe { v.store(out[ZONE + shift..].as_mut_ptr()) };
            expect(level, "store", &out, |i| if (ZONE + shift..ZONE + shift + V::LANES).contains(&i) { data[i - ZONE] } else { mark });
        }
        #[cfg(unix)]
        for at_end in [false, true] {
            let page = Page::new();
            let part: *mut V::Elem = page.part(n, at_end);
            // SAFETY: n elements of the page. Whatever else is touched ends the process.
            unsafe {
                of::<V>(isa, &data).store_partial(part, n);
                expect(level, "load_partial", &lanes(V::load_partial(isa, part, n, mark)), |i| if i < n { data[i] } else { mark });
            }
        }
    }
    // Nothing is read through the pointer when n is zero.
    // SAFETY: no element is asked for.
    let v = unsafe { V::load_partial(isa, core::ptr::NonNull::dangling().as_ptr(), 0, V::Elem::ONE) };
    expect(level, "load_partial", &lanes(v), |_| V::Elem::ONE);
    // SAFETY: as above.
    unsafe { v.store_partial(core::ptr::NonNull::dangling().as_ptr(), 0) };
}

fn flags<V: Vector>(isa: V::Isa) {
    let level = <V::Isa as Isa>::LEVEL;
    let check = |bytes: &[u8]| {
        let want = bytes.iter().enumerate().fold(0, |bits, (lane, &byte)| bits | u64::from(byte != 0) << lane);
        #[cfg(unix)]
        for at_end in [false, true] {
            let page = Page::new();
            let part: *mut u8 = page.part(bytes.len(), at_end);
            // SAFETY: one byte per lane of the page. Whatever else is touched ends the process.
            let mask = unsafe {
                core::ptr::copy_nonoverlapping(bytes.as_ptr(), part, bytes.len());
                V::flags(isa, part)
            };
            expect_mask(level, "flags", mask, want);
        }
        // SAFETY: one byte per lane.
        expect_mask(level, "flags", unsafe { V::flags(isa, bytes.as_ptr()) }, want);
    };
    for value in [1, 2, 127, 128, 255] {
        // Each set of lanes, or 2^12 of them.
        for bits in 0..1_u32 << V::LANES.min(12) {
            let bits = if V::LANES > 12 { bits | bits << 12 } else { bits };
            check(&(0..V::LANES).map(|lane| if bits >> lane & 1 == 1 { value } else { 0 }).collect::<Vec<_>>());
        }
    }
}

#[cfg(unix)]
fn full_at_page_ends<S: Isa>(isa: S) {
    for at_end in [false, true] {
        let page = Page::new();
        let (single, double, half): (*mut f32, *mut f64, *mut u16) =
            (page.part(S::F32::LANES, at_end), page.part(S::F64::LANES, at_end), page.part(S::F32::LANES, at_end));
        // SAFETY: each is one vector's worth of the page. Whatever else is touched ends the process.
        unsafe {
            let v = S::F32::splat(isa, 2.5);
            v.store(single);
            expect(S::LEVEL, "load", &lanes(S::F32::load(isa, single)), |_| 2.5);
            S::F64::splat(isa, 2.5).store(double);
            expect(S::LEVEL, "load", &lanes(S::F64::load(isa, double)), |_| 2.5);
            isa.store_f16(v, half);
            expect(S::LEVEL, "load_f16", &lanes(isa.load_f16(half)), |_| 2.5);
            isa.store_bf16(v, half);
            expect(S::LEVEL, "load_bf16", &lanes(isa.load_bf16(half)), |_| 2.5);
        }
    }
}

fn stream<V: Vector>(isa: V::Isa)
where
    V::Elem: Lane,
{
    #[repr(align(64))]
    struct Aligned<T>([T; 48]);
    let mark = V::Elem::from_i32(-77);
    let data: Vec<V::Elem> = (0..V::LANES as i32).map(|i| V::Elem::from_i32(100 + i)).collect();
    let mut out = Aligned([mark; 48]);
    // SAFETY: LANES elements at the second vector's place, which is aligned because the array is.
    unsafe { of::<V>(isa, &data).stream(out.0[V::LANES..].as_mut_ptr()) };
    isa.fence();
    expect(<V::Isa as Isa>::LEVEL, "stream", &out.0, |i| if (V::LANES..2 * V::LANES).contains(&i) { data[i - V::LANES] } else { mark });
}

fn scale2<V: Vector>(isa: V::Isa)
where
    V::Elem: Lane,
{
    let level = <V::Isa as Isa>::LEVEL;
    let half = V::Elem::ONE / V::Elem::from_i32(2);
    let four = V::Elem::from_i32(4);
    let mut mantissas = vec![half * half, half, V::Elem::SQRT_HALF, V::Elem::ONE, V::Elem::SQRT_HALF + V::Elem::SQRT_HALF, four];
    mantissas.extend(V::Elem::ONE.neighbours());
    mantissas.push(four.neighbours()[1]);
    let mantissas: Vec<V::Elem> = mantissas.into_iter().flat_map(|x| [x, -x]).collect();
    let first_normal = *V::Elem::EXPONENTS.start();
    let deepest = V::Elem::VANISHED - 1000;
    for d in deepest..=*V::Elem::EXPONENTS.end() {
        for p in 0..mantissas.len() {
            let x = window(&mantissas, p, V::LANES);
            // Every lane its own exponent.
            let d: Vec<i32> = (0..V::LANES as i32).map(|i| (d - 7 * i).max(deepest)).collect();
            let exponents: Vec<V::Elem> = d.iter().map(|&d| V::Elem::from_i32(d)).collect();
            let got = lanes(of::<V>(isa, &x).scale2(of(isa, &exponents)));
            for (i, got) in got.into_iter().enumerate() {
                let want = x[i].times_power(d[i]);
                // The sign of a flushed zero is left open.
                let zero = got == V::Elem::default();
                let fine = if d[i] >= first_normal {
                    got.same(want)
                } else if d[i] > V::Elem::VANISHED {
                    got.same(want) || zero
                } else {
                    zero
                };
                assert!(fine, "scale2({:?}, {}) on {} is {got:?}, not {want:?}", x[i], d[i], level.name());
            }
        }
    }
    let ordinary = V::splat(isa, V::Elem::ONE);
    for far in [-V::Elem::INFINITY, V::Elem::from_i32(-1_000_000_000), V::Elem::from_i32(i32::MIN)] {
        expect(level, "scale2", &lanes(ordinary.scale2(V::splat(isa, far))), |_| V::Elem::default());
    }
    // NaN stays, wherever the factor is a normal number or NaN itself.
    let nan = V::splat(isa, V::Elem::NAN);
    for d in [V::Elem::NAN, V::Elem::from_i32(first_normal), V::Elem::from_i32(0), V::Elem::from_i32(127)] {
        expect(level, "scale2 of NaN", &lanes(nan.scale2(V::splat(isa, d))), |_| V::Elem::NAN);
    }
}

fn frexp<V: Vector>(isa: V::Isa)
where
    V::Elem: Lane,
{
    let level = <V::Isa as Isa>::LEVEL;
    let (first, last) = V::Elem::EXPONENTS.into_inner();
    let two = V::Elem::from_i32(2);
    let smallest = V::Elem::ONE.times_power(first);
    let mut inputs = vec![smallest, smallest.neighbours()[0], V::Elem::INFINITY.neighbours()[1]];
    for e in first + 1..=last {
        let (octave, threshold) = (V::Elem::ONE.times_power(e), V::Elem::SQRT_HALF.times_power(e));
        inputs.extend([octave, threshold]);
        inputs.extend(octave.neighbours());
        inputs.extend(threshold.neighbours());
    }
    let mut random = Random(2);
    while inputs.len() < 40_000 {
        let x = V::Elem::from_random(random.next()).magnitude();
        if x >= smallest && x < V::Elem::INFINITY {
            inputs.push(x);
        }
    }
    for start in 0..inputs.len() {
        let x: Vec<V::Elem> = window(&inputs, start, V::LANES);
        let (f, e) = of::<V>(isa, &x).frexp();
        for ((&x, f), e) in x.iter().zip(lanes(f)).zip(lanes(e)) {
            assert!(f >= V::Elem::SQRT_HALF && f < V::Elem::SQRT_HALF * two, "frexp({x:?}) on {}: f is {f:?}", level.name());
            let exact = (first..=last + 1).find(|&k| V::Elem::from_i32(k) == e).is_some_and(|k| {
                // In two steps, as 2^k itself may overflow; both are exact.
                f.times_power(k / 2).times_power(k - k / 2).same(x)
            });
            assert!(exact, "frexp({x:?}) on {}: f is {f:?} and e {e:?}", level.name());
        }
    }
    let mut x = vec![V::Elem::from_i32(3); V::LANES];
    x[V::LANES - 1] = V::Elem::INFINITY;
    let (f, e) = of::<V>(isa, &x).frexp();
    assert!(lanes(f)[V::LANES - 1].same(V::Elem::ONE) && lanes(e)[V::LANES - 1].same(V::Elem::INFINITY));
    for nan in [V::Elem::NAN, -V::Elem::NAN] {
        x[V::LANES - 1] = nan;
        let (_, e) = of::<V>(isa, &x).frexp();
        assert!(lanes(e)[V::LANES - 1].same(V::Elem::NAN));
        assert!(V::LANES == 1 || lanes(e)[0].same(two), "the other lanes are untouched");
    }
}

fn reductions<V: Vector>(isa: V::Isa, mut random: impl FnMut() -> V::Elem)
where
    V::Elem: Lane,
{
    let level = <V::Isa as Isa>::LEVEL;
    let mut told_apart = 0;
    for _ in 0..10_000 {
        let x: Vec<V::Elem> = (0..V::LANES).map(|_| random()).collect();
        let v = of::<V>(isa, &x);
        let mut tree = x.clone();
        while tree.len() > 1 {
            let half = tree.len() / 2;
            tree = (0..half).map(|i| tree[i] + tree[i + half]).collect();
        }
        assert!(v.reduce_sum().same(tree[0]), "sum of {x:?} on {}", level.name());
        let in_order = x[1..].iter().fold(x[0], |sum, &x| sum + x);
        told_apart += usize::from(!in_order.same(tree[0]));
        let max = x[1..].iter().fold(x[0], |max, &x| if x > max { x } else { max });
        assert!(v.reduce_max().same(max), "max of {x:?} on {}", level.name());
    }
    assert!(V::LANES < 4 || told_apart > 1000, "the random lanes do not tell one order from another");
    for at in 0..V::LANES {
        let mut x = vec![-V::Elem::INFINITY; V::LANES];
        assert!(of::<V>(isa, &x).reduce_max().same(-V::Elem::INFINITY));
        for value in [-V::Elem::ONE, V::Elem::INFINITY] {
            x[at] = value;
            assert!(of::<V>(isa, &x).reduce_max().same(value));
        }
        x.fill(V::Elem::ONE);
        for value in [V::Elem::NAN, V::Elem::INFINITY] {
            x[at] = value;
            assert!(of::<V>(isa, &x).reduce_sum().same(value));
        }
    }
}

/// Numbers near every step and midpoint of a 16-bit format, both signs, given what its bit patterns mean.
fn around_halves(decode: fn(u16) -> f64, infinity: u16) -> Vec<f32> {
    let mut inputs = Vec::new();
    for bits in 0..infinity {
        let low = decode(bits) as f32;
        let high = if bits + 1 == infinity { decode(bits) * 2.0 - decode(bits - 1) } else { decode(bits + 1) };
        let middle = f64::midpoint(decode(bits), high) as f32;
        for x in [low, middle] {
            inputs.push(x);
            inputs.push(f32::from_bits(x.to_bits() + 1));
            inputs.push(f32::from_bits(x.to_bits().saturating_sub(1)));
        }
    }
    inputs.extend([f32::MAX, f32::INFINITY, f32::MIN_POSITIVE, 1e-40, 65520.0, 65536.0, 1e6, 1e38]);
    inputs.extend([0x7f80_0001, 0x7f80_8000, 0x7fbf_ffff, 0x7fc0_0000, 0x7fc0_1234, 0x7fff_ffff].map(f32::from_bits));
    let mut random = Random(3);
    inputs.extend((0..300_000).map(|_| f32::from_bits(random.next() as u32)));
    inputs.iter().flat_map(|&x| [x, -x]).collect()
}

/// The meaning of the bits of a 16-bit format, from its definition.
fn decode(bits: u16, mantissa: u32, bias: i32) -> f64 {
    let sign = if bits >> 15 == 0 { 1.0 } else { -1.0 };
    let fraction = f64::from(bits & ((1 << mantissa) - 1));
    let field = i32::from((bits & 0x7fff) >> mantissa);
    let top = 0x7fff >> mantissa;
    let one = f64::from(1u32 << mantissa);
    match field {
        0 => sign * fraction * power(1 - bias - mantissa as i32),
        _ if field < top => sign * (one + fraction) * power(field - bias - mantissa as i32),
        _ if fraction == 0.0 => sign * f64::INFINITY,
        _ => f64::NAN,
    }
}

/// `x` rounded to the nearest number of a 16-bit format, ties to even, as arithmetic on doubles; NaN is left to the caller.
fn round(x: f32, mantissa: u32, bias: i32) -> f64 {
    let x = f64::from(x);
    if x.is_infinite() || x == 0.0 {
        return x;
    }
    let exponent = ((x.to_bits() >> 52 & 0x7ff) as i32 - 1023).max(1 - bias);
    let step = power(exponent - mantissa as i32);
    let rounded = (x / step).round_ties_even() * step;
    if rounded.abs() >= power(bias + 1) { f64::INFINITY.copysign(x) } else { rounded }
}

fn decode_f16(bits: u16) -> f64 {
    decode(bits, 10, 15)
}
fn decode_bf16(bits: u16) -> f64 {
    decode(bits, 7, 127)
}

fn load_halves<S: Isa>(what: &str, load: impl Fn(*const u16) -> S::F32, meaning: impl Fn(u16) -> f64, crate_half: impl Fn(u16) -> f32) {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    for start in 0..all.len() {
        let words = window(&all, start, S::F32::LANES);
        expect(S::LEVEL, what, &lanes(load(words.as_ptr())), |i| meaning(words[i]) as f32);
        expect(S::LEVEL, what, &lanes(load(words.as_ptr())), |i| crate_half(words[i]));
    }
}

fn store_halves<S: Isa>(
    isa: S,
    what: &str,
    inputs: &[f32],
    store: impl Fn(S::F32, *mut u16),
    decode: impl Fn(u16) -> f64,
    round: impl Fn(f32) -> f64,
    crate_half: impl Fn(f32) -> u16,
) {
    for start in (0..inputs.len()).step_by(S::F32::LANES) {
        let x = window(inputs, start, S::F32::LANES);
        let mut words = vec![0xaaaa_u16; S::F32::LANES + 1];
        store(of::<S::F32>(isa, &x), words.as_mut_ptr());
        assert_eq!(words.pop(), Some(0xaaaa), "{what} on {} writes too much", S::LEVEL.name());
        for (&x, word) in x.iter().zip(words) {
            if x.is_nan() {
                assert!(decode(word).is_nan(), "{what} on {}: {:#x} gives {word:#x}", S::LEVEL.name(), x.to_bits());
                assert_eq!(word >> 15 == 1, x.is_sign_negative(), "{what} on {}: the sign of {:#x}", S::LEVEL.name(), x.to_bits());
            } else {
                let want = round(x);
                let got = decode(word);
                assert!(
                    got == want && got.is_sign_negative() == want.is_sign_negative(),
                    "{what} of {x:e} on {}: {got:e}",
                    S::LEVEL.name()
                );
                assert_eq!(word, crate_half(x), "{what} of {x:e} on {}", S::LEVEL.name());
            }
        }
    }
}

every_level! {
    fn arithmetic_is_ieee_in_every_lane<S>(isa) {
        arithmetic::<S::F32>(isa);
        arithmetic::<S::F64>(isa);
    }

    fn fused_operations_round_once<S>(isa) {
        let mut random = Random(4);
        fused::<S::F32>(isa, || random.ordinary() as f32);
        fused::<S::F64>(isa, || random.ordinary());
    }

    fn comparisons_and_masks<S>(isa) {
        comparisons::<S::F32>(isa);
        comparisons::<S::F64>(isa);
    }

    fn flags_are_bytes_that_are_not_zero<S>(isa) {
        flags::<S::F32>(isa);
        flags::<S::F64>(isa);
    }

    fn partial_access_touches_nothing_else<S>(isa) {
        partial::<S::F32>(isa);
        partial::<S::F64>(isa);
    }

    #[cfg(unix)]
    fn full_access_touches_nothing_else<S>(isa) {
        full_at_page_ends(isa);
    }

    fn stream_stores<S>(isa) {
        stream::<S::F32>(isa);
        stream::<S::F64>(isa);
    }

    fn scale2_multiplies_by_powers_of_two<S>(isa) {
        scale2::<S::F32>(isa);
        scale2::<S::F64>(isa);
    }

    fn frexp_splits_exactly<S>(isa) {
        frexp::<S::F32>(isa);
        frexp::<S::F64>(isa);
    }

    fn reductions_have_a_fixed_order<S>(isa) {
        let mut random = Random(5);
        reductions::<S::F32>(isa, || random.ordinary() as f32);
        reductions::<S::F64>(isa, || random.ordinary());
    }

    fn widen_and_narrow<S>(isa) {
        let half = S::F64::LANES;
        assert_eq!(half, (S::F32::LANES / 2).max(1));
        let specials = f32::specials();
        for start in 0..specials.len() {
            let x = window(&specials, start, S::F32::LANES);
            let (lo, hi) = isa.widen(of(isa, &x));
            expect(S::LEVEL, "low half of widen", &lanes(lo), |i| f64::from(x[i]));
            expect(S::LEVEL, "high half of widen", &lanes(hi), |i| x.get(half + i).map_or(0.0, |&x| f64::from(x)));
            expect(S::LEVEL, "narrow of widen", &lanes(isa.narrow(lo, hi)), |i| x[i]);
        }
        // Midpoints of neighbouring singles, a little to either side, overflow and underflow.
        let mut wide = f64::specials();
        let mut random = Random(6);
        for _ in 0..20_000 {
            let x = f32::from_bits(random.next() as u32 & 0x7f7f_fffe);
            let middle = f64::midpoint(f64::from(x), f64::from(x.neighbours()[0]));
            wide.extend([middle, -middle, f64::from_bits(middle.to_bits() + 1), f64::from_bits(middle.to_bits() - 1)]);
        }
        wide.extend([f64::from(f32::MAX) + power(103), f64::from(f32::MAX) + power(102), power(-149), power(-150), power(-151)]);
        for start in 0..wide.len() {
            let x = window(&wide, start, 2 * half);
            let narrow = isa.narrow(of(isa, &x), of(isa, &x[half..]));
            expect(S::LEVEL, "narrow", &lanes(narrow), |i| x[i] as f32);
        }
    }

    fn f16_loads_all_bit_patterns<S>(isa) {
        // SAFETY: the pointer comes from a vector of LANES words.
        load_halves::<S>("load_f16", |src| unsafe { isa.load_f16(src) }, decode_f16, |bits| half::f16::from_bits(bits).to_f32());
    }

    fn bf16_loads_all_bit_patterns<S>(isa) {
        // SAFETY: the pointer comes from a vector of LANES words.
        load_halves::<S>("load_bf16", |src| unsafe { isa.load_bf16(src) }, decode_bf16, |bits| half::bf16::from_bits(bits).to_f32());
    }

    fn f16_stores_round_to_even<S>(isa) {
        let inputs = around_halves(decode_f16, 0x7c00);
        // SAFETY: the pointer comes from a vector of more than LANES words.
        let store = |v, dst| unsafe { isa.store_f16(v, dst) };
        store_halves::<S>(isa, "store_f16", &inputs, store, decode_f16, |x| round(x, 10, 15), |x| half::f16::from_f32(x).to_bits());
    }

    fn bf16_stores_round_to_even<S>(isa) {
        let inputs = around_halves(decode_bf16, 0x7f80);
        // SAFETY: the pointer comes from a vector of more than LANES words.
        let store = |v, dst| unsafe { isa.store_bf16(v, dst) };
        store_halves::<S>(isa, "store_bf16", &inputs, store, decode_bf16, |x| round(x, 7, 127), |x| half::bf16::from_f32(x).to_bits());
    }
}

// --- rows and columns ---------------------------------------------------------------------------------------------------------------

fn transposition<V: Vector>(isa: V::Isa, mut random: impl FnMut() -> V::Elem)
where
    V::Elem: Lane,
{
    let level = <V::Isa as Isa>::LEVEL;
    // Rows five elements apart, in the opposite order, and one byte off the alignment.
    let (step, size) = (5, size_of::<V::Elem>());
    let values: Vec<V::Elem> = (0..step * V::LANES).map(|_| random()).collect();
    let offsets: Vec<isize> = (0..V::LANES).map(|i| ((V::LANES - 1 - i) * step * size) as isize).collect();
    let mut bytes = vec![0xA5u8; size * values.len() + 2];
    // SAFETY: room for every value behind the first byte; any bytes are numbers.
    unsafe { bytes.as_mut_ptr().add(1).copy_from(values.as_ptr().cast(), size * values.len()) };
    // SAFETY: the last row begins four elements and one before the end of the values.
    let columns = unsafe { V::load4(isa, bytes.as_ptr().add(1), offsets.as_ptr()) };
    for (j, &column) in columns.iter().enumerate() {
        expect(level, "load4", &lanes(column), |i| values[(V::LANES - 1 - i) * step + j]);
    }
    let before = bytes.clone();
    for i in 0..V::LANES {
        bytes[1 + i * step * size..][..4 * size].fill(0);
    }
    // SAFETY: as above.
    unsafe { V::store4(columns, bytes.as_mut_ptr().add(1), offsets.as_ptr()) };
    assert!(bytes == before, "store4 on {}", level.name());

    let (a, b) = (of::<V>(isa, &values[..V::LANES]), of::<V>(isa, &values[V::LANES..]));
    expect(level, "reverse", &lanes(a.reverse()), |i| values[V::LANES - 1 - i]);
    let (even, odd) = a.deinterleave(b);
    expect(level, "deinterleave, even", &lanes(even), |i| values[2 * i]);
    expect(level, "deinterleave, odd", &lanes(odd), |i| values[2 * i + 1]);
    let (low, high) = even.interleave(odd);
    expect(level, "interleave, low", &lanes(low), |i| values[i]);
    expect(level, "interleave, high", &lanes(high), |i| values[V::LANES + i]);
}

every_level! {
    fn transposition_of_rows<S>(isa) {
        let mut random = Random(11);
        transposition::<S::F32>(isa, || random.ordinary() as f32);
        transposition::<S::F64>(isa, || random.ordinary());
    }
}
