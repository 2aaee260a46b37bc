//! Short rows: of one block each, reduced many at a time, so that what a row costs by itself is shared.

use crate::array::{Float, HalfRows, Rows, RowsMut, Span, SpanMut, Vf};
use crate::simd::{Isa, Kernel, Mask, Vector};

use super::finish::Tile;
use super::input::{Ahead, Backwards, Raw};
use super::math::{Anchored, Exp, Real};
use super::rows::chain;
use super::state::{Summand, Wide, splat};

/// Rows of one block each, without a dense stream, as a kernel: their states go to the tile, from its first row on.
///
/// Rows whose maximum is off the grid of the integer reduction, or infinite, are left as they are, with NaN for the number of their ties; the
/// result says whether there are any.
pub struct Short<'a, T> {
    /// 1 / temperature.
    pub scale: f64,
    /// The logits of at most [`MOST_SHORT`] rows.
    pub x: Rows<'a, T>,
    /// What is to be widened or turned round to where the logits are then expected, if that is where they come from.
    pub from: Option<(RawRows<'a, T>, RowsMut<'a, T>)>,
    /// Where the exponentials go, if anywhere; may be the rows themselves.
    pub dst: Option<RowsMut<'a, T>>,
    /// Whether it is memory that no cache has: it is asked for, too.
    pub cold: bool,
    /// A class of each row, or nothing: their logits go to `x_target`.
    pub classes: &'a [usize],
    /// Gets `max`, `ties`, `k`, `b` and `rest`.
    pub tile: &'a mut Tile,
}

/// Rows that are not read as they stand.
#[derive(Clone, Copy)]
pub enum RawRows<'a, T> {
    /// Of halves.
    Half(HalfRows<'a>),
    /// Read from their ends.
    Backwards(Rows<'a, T>),
}

impl<'a, T: Float> RawRows<'a, T> {
    #[inline(always)]
    fn row(self, r: usize) -> Raw<'a, T> {
        match self {
            Self::Half(rows) => Raw::Half(rows.row(r)),
            Self::Backwards(rows) => Raw::Backwards(Backwards(rows.row(r))),
        }
    }
    #[inline(always)]
    fn address(self, r: usize) -> *const u8 {
        match self {
            Self::Half(rows) => rows.address(r),
            Self::Backwards(rows) => rows.address(r),
        }
    }
}

/// Most rows in one go of [`Short`].
pub const MOST_SHORT: usize = 128;

/// Bytes of rows whose maxima are taken before the first of them is read again: they are still in L1 then, and so are as many if they are
/// taken in the loops over the rows before.
const TOGETHER: usize = 16 << 10;

/// Shorter rows cost more by themselves than a loop of its own for the maxima.
const FUSED: usize = 256;

/// Most rows whose maxima are taken together.
const GROUP: usize = 16;

impl<T: Summand> Kernel for Short<'_, T> {
    type Output = bool;
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) -> bool {
        if self.dst.is_some() { short::<S, T, true>(isa, self) } else { short::<S, T, false>(isa, self) }
    }
}

#[inline(always)]
fn short<S: Isa, T: Summand, const STORE: bool>(isa: S, job: Short<T>) -> bool {
    let Short { scale, x, from, dst, cold, classes, tile } = job;
    let dst = dst.unwrap_or(RowsMut::single(SpanMut::of(&mut [])));
    let exp = Exp::<Vf<S, T>>::new(isa, scale);
    let limit = T::from_f64(T::LIMIT.to_f64() / scale);
    // Where registers are few, keeping exponentials takes all of them.
    let fused = (S::REGISTERS >= 32 || !STORE) && x.len() >= FUSED && from.is_none();
    let together = (TOGETHER / (x.len() * size_of::<T>()).max(1) / (1 + usize::from(fused))).clamp(2, GROUP);
    let distance = if fused { 2 * together } else { together };
    let row_ahead = |slot: usize| match from {
        Some((raw, to)) => Ahead::raw(raw.row(slot), to.row(slot)),
        None => Ahead::of(x.row(slot)),
    };
    // What is left of rows lane by lane is reduced row after row, away from the long chains of their exponentials.
    let (mut tops, mut rests) = ([Vf::<S, T>::splat(isa, T::ZERO); GROUP], [Wide::<S>::zero(isa); GROUP]);
    let (mut top, mut magic, mut floor) = ([T::ZERO; GROUP], [T::ZERO; GROUP], [T::ZERO; GROUP]);
    let mut left = false;
    let mut first = 0;
    while first < x.count() {
        let n = together.min(x.count() - first);
        if first == 0 || !fused {
            for (r, top) in tops[..n].iter_mut().enumerate() {
                *top = row_ahead(first + r).max(isa, 0);
            }
        }
        for (top, lanes) in top[..n].iter_mut().zip(&tops) {
            *top = lanes.reduce_max();
        }
        for j in (0..n).step_by(Vf::<S, T>::LANES) {
            let max = Span::of(&top).load(isa, j);
            let near = Vf::<S, T>::select(max.abs().le(Vf::<S, T>::splat(isa, limit)), max, splat::<S, T>(isa, 0.0));
            let k = exp.reference(near);
            let parts = exp.anchor_parts(k);
            SpanMut::of(&mut magic).store(isa, j, parts.0);
            SpanMut::of(&mut floor).store(isa, j, parts.1);
            T::store_wide(isa, max, SpanMut::of(&mut tile.max), first + j);
            T::store_wide(isa, k, SpanMut::of(&mut tile.k), first + j);
        }
        for slot in first..first + n {
            tile.b[slot] = 0.0;
            // Before exponentials take its place.
            if let Some(&class) = classes.get(slot) {
                tile.x_target[slot] = x.row(slot).get(class).to_f64();
            }
        }
        for r in 0..n {
            let slot = first + r;
            let (row, max) = (x.row(slot), top[r]);
            let next = (fused && slot + together < x.count()).then(|| x.row(slot + together));
            if max.to_f64().abs() > limit.to_f64() {
                tile.ties[slot] = f64::NAN;
                left = true;
                if let Some(next) = next {
                    tops[r] = Ahead::of(next).max(isa, 0);
                }
                continue;
            }
            let at = exp.anchored(Vf::<S, T>::splat(isa, magic[r]), Vf::<S, T>::splat(isa, floor[r]));
            let later = if STORE && cold { Some(dst.read().address(slot + distance)) } else { None };
            let dst = if STORE { dst.row(slot) } else { SpanMut::of(&mut []) };
            let ahead = match from {
                Some((raw, _)) => raw.address(slot + distance),
                None => x.address(slot + distance),
            };
            let max = Vf::<S, T>::splat(isa, max);
            let sums = match next {
                Some(next) if S::REGISTERS >= 32 || !STORE => sum_row::<S, T, STORE, true>(isa, &at, max, row, next, (ahead, later), dst),
                _ => sum_row::<S, T, STORE, false>(isa, &at, max, row, row, (ahead, later), dst),
            };
            tile.ties[slot] = sums.ties as f64;
            (rests[r], tops[r]) = (sums.rest, sums.next);
        }
        for (rest, lanes) in tile.rest[first..first + n].iter_mut().zip(&rests) {
            *rest = T::total(*lanes).value();
        }
        first += n;
    }
    left
}

/// What is known of a row, and of the one whose maximum was taken meanwhile.
struct Sums<S: Isa, T: Real> {
    rest: Wide<S>,
    ties: usize,
    next: Vf<S, T>,
}

/// The sum of the exponentials of a row but for its maxima, and their number; with NEXT and in the same loop, the maximum of a row of as many classes. Memory
/// is asked for what lies `ahead`, a row that is read later, and for one that is written `later`.
#[inline(always)]
fn sum_row<S: Isa, T: Summand, const STORE: bool, const NEXT: bool>(
    isa: S,
    at: &Anchored<Vf<S, T>>,
    top: Vf<S, T>,
    x: Span<T>,
    next: Span<T>,
    (ahead, later): (*const u8, Option<*const u8>),
    dst: SpanMut<T>,
) -> Sums<S, T> {
    let (step, len) = (Vf::<S, T>::LANES, x.len());
    let own = if S::REGISTERS < 32 { 1 } else { 3 };
    let (group, most) = (4 * step, chain::<S, T>() / (4 * step));
    // Of one length, known to the compiler: no check is left in the loop.
    let next = next.part(0, len);
    let dst = if STORE { dst.part(0, len) } else { dst };
    let mut wide = Wide::zero(isa);
    let mut max = [Vf::<S, T>::splat(isa, T::NEG_INF); 4];
    let mut below = 0;
    let (mut k, mut i) = (0, 0);
    while i < len {
        let end = (len / group).min(k + most);
        if STORE && let Some(later) = later {
            for line in (i..len.min(i + most * group)).step_by(64 / size_of::<T>()) {
                isa.prefetch(later.wrapping_add(line * size_of::<T>()));
            }
        }
        let room = end - k < most;
        let mut rest = [splat::<S, T>(isa, 0.0); 4];
        while k < end {
            let (x, next, dst) = (x.nth(k, group), next.nth(k, group), if STORE { dst.nth(k, group) } else { dst });
            for u in 0..4 {
                isa.prefetch(ahead.wrapping_add((k * group + u * step) * size_of::<T>()));
                if NEXT {
                    // In this order a NaN is passed over; it comes back through the sum.
                    max[u & own] = next.load(isa, u * step).max(max[u & own]);
                }
                let v = x.load(isa, u * step);
                let (p, q) = at.parts(v);
                if STORE {
                    dst.store(isa, u * step, p * q);
                }
                // Unordered: a NaN is not the maximum and so reaches the sum.
                let others = v.ne(top);
                rest[u & own] = rest[u & own].fma_where(others, p, q);
                below += others.count();
            }
            k += 1;
        }
        i = k * group;
        while room && i < len {
            let n = step.min(len - i);
            isa.prefetch(ahead.wrapping_add(i * size_of::<T>()));
            if NEXT {
                let next = if n == step { next.load(isa, i) } else { next.load_partial(isa, i, n, T::NEG_INF) };
                max[0] = next.max(max[0]);
            }
            let v = if n == step { x.load(isa, i) } else { x.load_partial(isa, i, n, T::NEG_INF) };
            let (p, q) = at.parts(v);
            if STORE {
                if n == step { dst.store(isa, i, p * q) } else { dst.store_partial(isa, i, n, p * q) }
            }
            let others = v.ne(top);
            rest[1] = rest[1].fma_where(others, p, q);
            below += others.count() - (step - n);
            i += n;
        }
        let [a, b, c, d] = rest;
        T::add(isa, &mut wide, (a + b) + (c + d));
    }
    Sums { rest: wide, ties: len - below, next: max[0].max(max[1]).max(max[2].max(max[3])) }
}
