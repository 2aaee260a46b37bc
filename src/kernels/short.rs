//! Short rows: of a few blocks at most, reduced many at a time, so that what a row costs by itself is shared.

use crate::array::{DType, Float, HalfRows, Rows, RowsMut, Span, SpanMut, Vf};
use crate::simd::{Isa, Kernel, Level, Mask, Vector};

use super::finish::{Tile, WIDTH};
use super::input::{Ahead, Backwards, Raw};
use super::math::{Anchored, Exp};
use super::real::Real;
use super::rows::{add_distances, block_max, chain};
use super::state::{Summand, Wide, splat};

/// Rows without a dense stream, as a kernel: their states go to the tile, from its first row on.
///
/// Not for the portable level, where exponentials cost so much that what a row costs by itself is no matter.
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
    /// Whether that is wanted for what comes after; otherwise it may be read where it is.
    pub wanted: bool,
    /// Where the exponentials go, if anywhere; may be the rows themselves, but not those of `from`.
    pub dst: Option<RowsMut<'a, T>>,
    /// Where results will go, if that is memory that no cache has: it is asked for, too.
    pub cold: Option<Rows<'a, T>>,
    /// Whether Σ (max − x) is wanted: it goes to `lin`, and a class that has the maximum to `arg`.
    pub distances: bool,
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
pub const MOST_SHORT: usize = WIDTH;

/// Bytes of rows whose maxima are taken before the first of them is read again: they are still in L1 then, and so are as many if they are
/// taken in the loops over the rows before.
const TOGETHER: usize = 16 << 10;

/// Shorter rows cost more by themselves than a loop of its own for the maxima.
const FUSED: usize = 256;

/// Most rows whose maxima are taken together.
const GROUP: usize = 16;

/// Rows that are asked for beyond the next group, where exponentials are kept.
const MORE: usize = 4;

/// Most chains of rows whose maxima are taken together, where they are [`apart`]: of [`TOGETHER`], or of two rows of the most classes there are.
const CHAINS: usize = 64;

/// Whether the maxima of a row's chains (the classes that are summed without a pause) are told apart: a chain that does not hold the row's maximum
/// takes a loop of its own, which need not look for it. Where there are registers for masks, looking costs no more than the choice does.
#[inline(always)]
fn apart<S: Isa, T: Real>(classes: usize) -> bool {
    let chain = chain::<S, T>();
    T::DTYPE == DType::F32 && matches!(S::LEVEL, Level::Avx2 | Level::Neon) && (chain + 1..=CHAINS / 2 * chain).contains(&classes)
}

/// Whether half of a chain's accumulators are carried on apart from the others: a rounding less, for the type whose results have no digits to spare.
#[inline(always)]
const fn in_halves<S: Isa, T: Real>() -> bool {
    S::REGISTERS >= 32 && matches!(T::DTYPE, DType::F64)
}

impl<T: Summand> Kernel for Short<'_, T> {
    type Output = bool;
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) -> bool {
        assert!(S::LEVEL != Level::Scalar, "short rows are read one by one");
        if self.dst.is_some() { short::<S, T, true>(isa, self) } else { short::<S, T, false>(isa, self) }
    }
}

#[inline(always)]
fn short<S: Isa, T: Summand, const STORE: bool>(isa: S, job: Short<T>) -> bool {
    let Short { scale, mut x, mut from, wanted, dst, cold, distances, classes, tile } = job;
    let dst = dst.unwrap_or(RowsMut::single(SpanMut::of(&mut [])));
    let exp = Exp::<Vf<S, T>>::new(isa, scale).opaque();
    let limit = T::from_f64(T::LIMIT.to_f64() / scale);
    // Where registers are few, keeping exponentials takes all of them.
    let fusing = S::REGISTERS >= 32 || (!STORE && T::DTYPE == DType::F32);
    let mut back = false;
    if let Some((RawRows::Backwards(rows), _)) = from
        && T::DTYPE == DType::F32
        && fusing
        && !wanted
        // Whose sums would be others in the opposite order.
        && !distances
        && x.len() >= FUSED
    {
        (x, from, back) = (rows, None, true);
    }
    let fused = fusing && x.len() >= FUSED && from.is_none();
    let together = (TOGETHER / (x.len() * size_of::<T>()).max(1) / (1 + usize::from(fused))).clamp(2, GROUP);
    // How many rows ahead memory is asked for; of those whose maxima are taken apart just the next ones, which are to be in L1, unless exponentials are kept.
    let distance = if fused { 2 * together + usize::from(!STORE) } else { together + if STORE { MORE } else { 0 } };
    let had = had::<S, T>(x.len());
    // What is left of rows lane by lane is reduced row after row, away from the long chains of their exponentials.
    let lowest = Vf::<S, T>::splat(isa, T::NEG_INF);
    let (mut tops, mut lasts, mut rests) = ([lowest; GROUP], [lowest; GROUP], [Wide::<S>::zero(isa); GROUP]);
    let mut others = [lowest; GROUP];
    // Row r of a group has those from r·chains on.
    let (mut peaks, chains) = ([lowest; CHAINS], x.len().div_ceil(chain::<S, T>()));
    let (mut top, mut magic, mut floor) = ([T::ZERO; GROUP], [T::ZERO; GROUP], [T::ZERO; GROUP]);
    let mut left = false;
    let mut first = 0;
    while first < x.count() {
        let n = together.min(x.count() - first);
        if first == 0 || !fused {
            for (r, top) in tops[..n].iter_mut().enumerate() {
                *top = match from {
                    Some((raw, to)) => Ahead::raw(raw.row(first + r), to.row(first + r)).max(isa, 0),
                    None => chains_max(isa, x.row(first + r), &mut peaks, r * chains),
                };
                if apart::<S, T>(x.len()) && (from.is_some() || back) {
                    all_may(&mut peaks, r * chains, chains, *top);
                }
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
                tile.x_target[slot] = x.row(slot).get(if back { x.len() - 1 - class } else { class }).to_f64();
            }
        }
        if distances {
            for (&max, slot) in top[..n].iter().zip(first..) {
                let mut sum = Wide::zero(isa);
                let at = add_distances(isa, x.row(slot), max, max, &mut sum);
                tile.lin[slot] = T::total_called(sum).value();
                tile.arg[slot] = at as f64;
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
                    tops[r] = chains_max(isa, next, &mut peaks, r * chains);
                    if back {
                        all_may(&mut peaks, r * chains, chains, tops[r]);
                    }
                }
                continue;
            }
            let at = exp.anchored(Vf::<S, T>::splat(isa, magic[r]), Vf::<S, T>::splat(isa, floor[r]));
            let later = cold.map(|to| to.address(slot + distance));
            let dst = if STORE { dst.row(slot) } else { SpanMut::of(&mut []) };
            let ahead = match from {
                Some((raw, _)) => raw.address(slot + distance),
                None => x.address(slot + distance),
            };
            let top = (Vf::<S, T>::splat(isa, max), &mut peaks, r * chains);
            let sums = match next {
                // (Where there is no next one, what is found out is not used.)
                next if back && fusing && T::DTYPE == DType::F32 => {
                    sum_row::<S, T, STORE, true, true>(isa, &at, top, &had, row, next.unwrap_or(row), (ahead, later), dst)
                }
                Some(next) if fusing => sum_row::<S, T, STORE, true, false>(isa, &at, top, &had, row, next, (ahead, later), dst),
                _ => sum_row::<S, T, STORE, false, false>(isa, &at, top, &had, row, row, (ahead, later), dst),
            };
            tile.ties[slot] = sums.ties as f64;
            (rests[r], lasts[r], tops[r]) = (sums.rest, sums.last, sums.next);
            if in_halves::<S, T>() {
                others[r] = sums.other;
            }
        }
        let totals = tile.rest[first..first + n].iter_mut().zip(&mut tile.lost[first..first + n]);
        for (((rest, lost), lanes), (&last, &other)) in totals.zip(&mut rests).zip(lasts.iter().zip(&others)) {
            T::add(isa, lanes, last);
            if in_halves::<S, T>() {
                T::add(isa, lanes, other);
            }
            let total = T::total(*lanes);
            *rest = total.value();
            if T::DTYPE == DType::F64 {
                *lost = total.lost();
            }
        }
        first += n;
    }
    left
}

/// The maximum of a row, and of its chains, lane by lane; these from `first` on.
#[inline(always)]
fn chains_max<S: Isa, T: Real>(isa: S, x: Span<T>, peaks: &mut [Vf<S, T>; CHAINS], first: usize) -> Vf<S, T> {
    if !apart::<S, T>(x.len()) {
        return block_max(isa, x);
    }
    let mut top = Vf::<S, T>::splat(isa, T::NEG_INF);
    for (k, i) in (0..x.len()).step_by(chain::<S, T>()).enumerate() {
        let peak = block_max(isa, x.part(i, chain::<S, T>().min(x.len() - i)));
        peaks[(first + k) % CHAINS] = peak;
        top = peak.max(top);
    }
    top
}

/// For the chains of a row where it is not known which of them holds the maximum: all may.
#[inline(always)]
fn all_may<V: Copy>(peaks: &mut [V; CHAINS], first: usize, chains: usize, top: V) {
    for k in first..first + chains {
        peaks[k % CHAINS] = top;
    }
}

/// What is known of a row, and of the one whose maximum was taken meanwhile.
struct Sums<S: Isa, T: Real> {
    /// All chains but the last one, which is added to them later: away from the long chains of exponentials, like all that is done lane by lane.
    rest: Wide<S>,
    last: Vf<S, T>,
    /// The other half of that.
    other: Vf<S, T>,
    ties: usize,
    next: Vf<S, T>,
}

/// Accumulators of a loop.
struct Lanes<V> {
    rest: [V; 4],
    /// The maxima of the next row's chain.
    next: [V; 4],
    below: usize,
}

/// Where a row is, the next one, what is to be asked for, and where the exponentials go.
#[derive(Clone, Copy)]
struct Places<'a, T> {
    x: Span<'a, T>,
    next: Span<'a, T>,
    ahead: *const u8,
    dst: SpanMut<'a, T>,
}

/// Asks for a line of a later row; where neither its maximum is taken before nor anything is written, it is read soon.
#[inline(always)]
fn ask<S: Isa, const STORE: bool, const NEXT: bool>(isa: S, at: *const u8) {
    if STORE || NEXT { isa.prefetch(at) } else { isa.prefetch_near(at) }
}

/// The classes of group `k`. BACK: counted from the end.
#[inline(always)]
fn part<T: Real, const BACK: bool>(x: Span<T>, k: usize, group: usize) -> Span<T> {
    if BACK { x.part(x.len() - (k + 1) * group, group) } else { x.nth(k, group) }
}

/// Where vector `u` of four stands in their group.
#[inline(always)]
fn place<const BACK: bool>(u: usize, step: usize) -> usize {
    if BACK { (3 - u) * step } else { u * step }
}

/// The last classes, a vector of them: those before them as well, where there are so many, otherwise less than one.
#[inline(always)]
fn end_of<S: Isa, T: Real, const BACK: bool>(isa: S, x: Span<T>) -> Vf<S, T> {
    let step = Vf::<S, T>::LANES;
    if x.len() < step {
        x.load_partial(isa, 0, x.len(), T::NEG_INF)
    } else if BACK {
        x.load(isa, 0).reverse()
    } else {
        x.load(isa, x.len() - step)
    }
}

/// Lanes of [`end_of`] that are in whole vectors before it, or nothing: 1 there.
#[inline(always)]
fn had<S: Isa, T: Real>(len: usize) -> [T; 16] {
    let step = Vf::<S, T>::LANES;
    let mut had = [T::ONE; 16];
    had[if len < step { 0..len } else { step - len % step..step }].fill(T::ZERO);
    had
}

/// The classes of vector `u` of a group. TOP: the maximum may be among them.
#[inline(always)]
fn sum_vector<S: Isa, T: Summand, const STORE: bool, const NEXT: bool, const TOP: bool, const BACK: bool>(
    isa: S,
    at: &Anchored<Vf<S, T>>,
    top: Vf<S, T>,
    u: usize,
    row: &mut Places<T>,
    to: &mut Lanes<Vf<S, T>>,
) {
    let step = Vf::<S, T>::LANES;
    let (own, most) = if S::REGISTERS < 32 { (u & 1, 0) } else { (u, u) };
    let i = place::<BACK>(u, step);
    if (u * step * size_of::<T>()).is_multiple_of(64) {
        ask::<S, STORE, NEXT>(isa, row.ahead.wrapping_add(u * step * size_of::<T>()));
    }
    if NEXT {
        // In this order a NaN is passed over; it comes back through the sum.
        to.next[most] = row.next.load(isa, i).max(to.next[most]);
    }
    let v = row.x.load(isa, i);
    let v = if BACK { v.reverse() } else { v };
    let (p, q) = at.parts(v);
    if STORE {
        row.dst.store(isa, u * step, p * q);
    }
    if TOP {
        // Unordered: a NaN is not the maximum and so reaches the sum.
        let others = v.ne(top);
        to.rest[own] = to.rest[own].fma_where(others, p, q);
        to.below += others.count();
    } else {
        to.rest[own] = p.mul_add(q, to.rest[own]);
    }
    if !STORE && T::DTYPE == DType::F32 {
        row.x = row.x.after(&mut to.rest[own]);
    }
}

/// The classes of some groups of four vectors.
#[inline(always)]
fn sum_groups<S: Isa, T: Summand, const STORE: bool, const NEXT: bool, const TOP: bool, const BACK: bool>(
    isa: S,
    at: &Anchored<Vf<S, T>>,
    top: Vf<S, T>,
    groups: core::ops::Range<usize>,
    row: Places<T>,
    to: &mut Lanes<Vf<S, T>>,
) {
    let group = 4 * Vf::<S, T>::LANES;
    let mut k = groups.start;
    while k < groups.end {
        let part = &mut Places {
            x: part::<T, BACK>(row.x, k, group),
            next: part::<T, BACK>(row.next, k, group),
            ahead: row.ahead.wrapping_add(k * group * size_of::<T>()),
            dst: if STORE { row.dst.nth(k, group) } else { row.dst },
        };
        if S::REGISTERS < 32 {
            // As a loop it would be too long for the compiler to unroll, and the accumulators in memory.
            sum_vector::<S, T, STORE, NEXT, TOP, BACK>(isa, at, top, 0, part, to);
            sum_vector::<S, T, STORE, NEXT, TOP, BACK>(isa, at, top, 1, part, to);
            sum_vector::<S, T, STORE, NEXT, TOP, BACK>(isa, at, top, 2, part, to);
            sum_vector::<S, T, STORE, NEXT, TOP, BACK>(isa, at, top, 3, part, to);
        } else {
            for u in 0..4 {
                sum_vector::<S, T, STORE, NEXT, TOP, BACK>(isa, at, top, u, part, to);
            }
        }
        k += 1;
    }
    if !TOP {
        to.below += groups.len() * group;
    }
}

/// The sum of the exponentials of a row but for its maxima, and their number; with NEXT and in the same loop, the maximum of a row of as many classes, and of
/// its chains, which take the place of this one's. Memory is asked for what lies `ahead`, a row that is read later, and for one that is written `later`.
#[inline(always)]
fn sum_row<S: Isa, T: Summand, const STORE: bool, const NEXT: bool, const BACK: bool>(
    isa: S,
    exp: &Anchored<Vf<S, T>>,
    (top, peaks, first): (Vf<S, T>, &mut [Vf<S, T>; CHAINS], usize),
    had: &[T; 16],
    x: Span<T>,
    next: Span<T>,
    (ahead, later): (*const u8, Option<*const u8>),
    dst: SpanMut<T>,
) -> Sums<S, T> {
    let (step, len) = (Vf::<S, T>::LANES, x.len());
    let (group, most) = (4 * step, chain::<S, T>() / (4 * step));
    let (zero, lowest) = (splat::<S, T>(isa, 0.0), Vf::<S, T>::splat(isa, T::NEG_INF));
    // Of one length, known to the compiler: no check is left in the loop.
    let next = next.part(0, len);
    let dst = if STORE { dst.part(0, len) } else { dst };
    let row = Places { x, next, ahead, dst };
    let apart = apart::<S, T>(len);
    // Before its exponentials may take the place of the classes before it.
    let tail = if STORE { end_of::<S, T, BACK>(isa, x) } else { zero };
    let mut wide = Wide::zero(isa);
    let (mut to, mut max, mut last) = (Lanes { rest: [zero; 4], next: [lowest; 4], below: 0 }, lowest, zero);
    let mut other = zero;
    let (mut k, mut i) = (0, 0);
    while i < len {
        let end = (len / group).min(k + most);
        if let Some(later) = later {
            for line in (i..len.min(i + most * group)).step_by(64 / size_of::<T>()) {
                isa.prefetch(later.wrapping_add(line * size_of::<T>()));
            }
        }
        let room = end - k < most;
        to.rest = [zero; 4];
        let peak = &mut peaks[(first + k / most) % CHAINS];
        if apart && !peak.eq(top).any() {
            sum_groups::<S, T, STORE, NEXT, false, BACK>(isa, exp, top, k..end, row, &mut to);
        } else {
            sum_groups::<S, T, STORE, NEXT, true, BACK>(isa, exp, top, k..end, row, &mut to);
        }
        k = end;
        i = k * group;
        while room && i + step <= len {
            let at = if BACK { len - i - step } else { i };
            ask::<S, STORE, NEXT>(isa, ahead.wrapping_add(i * size_of::<T>()));
            if NEXT {
                to.next[0] = next.load(isa, at).max(to.next[0]);
            }
            let v = x.load(isa, at);
            let v = if BACK { v.reverse() } else { v };
            let (p, q) = exp.parts(v);
            if STORE {
                dst.store(isa, i, p * q);
            }
            let others = v.ne(top);
            to.rest[1] = to.rest[1].fma_where(others, p, q);
            to.below += others.count();
            i += step;
        }
        if room && i < len {
            ask::<S, STORE, NEXT>(isa, ahead.wrapping_add(i * size_of::<T>()));
            if NEXT {
                to.next[0] = end_of::<S, T, BACK>(isa, next).max(to.next[0]);
            }
            let v = if STORE { tail } else { end_of::<S, T, BACK>(isa, x) };
            let (p, q) = exp.parts(v);
            if STORE {
                if len < step { dst.store_partial(isa, 0, len, p * q) } else { dst.store(isa, len - step, p * q) }
            }
            let others = Vf::<S, T>::select(Span::of(had).load(isa, 0).ne(zero), top, v).ne(top);
            to.rest[1] = to.rest[1].fma_where(others, p, q);
            to.below += others.count();
            i = len;
        }
        let [a, b, c, d] = to.rest;
        last = (a + b) + (c + d);
        if in_halves::<S, T>() {
            (last, other) = (a + b, c + d);
        }
        if i < len {
            T::add(isa, &mut wide, last);
            if in_halves::<S, T>() {
                T::add(isa, &mut wide, other);
            }
        }
        if NEXT && apart {
            let [a, b, c, d] = core::mem::replace(&mut to.next, [lowest; 4]);
            *peak = a.max(b).max(c.max(d));
            max = peak.max(max);
        }
    }
    if NEXT && !apart {
        let [a, b, c, d] = to.next;
        max = a.max(b).max(c.max(d));
    }
    Sums { rest: wide, last, other, ties: len - to.below, next: max }
}
