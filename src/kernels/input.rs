//! Where the blocks of a row come from, and what is read after them.

use crate::array::{Element, Half, Span, SpanMut, Vf};
use crate::simd::{Isa, Vector};

use super::math::Real;
use super::rows::{BLOCK, block_max};

/// A row of logits or of a dense target stream, read block by block.
pub enum Input<'a, T> {
    /// There is none.
    None,
    /// Where it stands, and what is to be read after it (or nothing).
    Row {
        /// The row.
        row: Span<'a, T>,
        /// The next one.
        after: Span<'a, T>,
    },
    /// Copied or computed block by block.
    Made {
        /// Writes a block into the given elements; asked for in ascending order.
        fill: &'a mut dyn FnMut(usize, &mut [T]),
        /// Room for two blocks: one to be read, and the one after it.
        scratch: &'a mut [T],
        /// Classes in the row.
        classes: usize,
        /// Where the row stands that blocks are made of, and bytes per class there; or any address.
        from: (*const u8, usize),
        /// Where its mask stands, of one byte per class, if it has one.
        mask: Option<*const u8>,
    },
    /// Halves, which are widened block by block, each in the loop over the block before it.
    Half {
        /// The row.
        row: Half<'a>,
        /// The next one, if any.
        after: Option<Half<'a>>,
        /// As above. Its contents outlast the row: the first block of the next one may be there.
        scratch: &'a mut [T],
    },
}

/// What is known of the row that is read next.
#[derive(Clone, Copy, Debug)]
pub struct Known<T> {
    /// The maximum of its first block.
    pub top: Option<T>,
    /// Which part of the scratch the first block is in, or goes to.
    pub turn: usize,
}

impl<T> Default for Known<T> {
    fn default() -> Self {
        Self { top: None, turn: 0 }
    }
}

/// Kinds of [`Ahead`], as parameters of loops: nothing to be widened, or halves of either type.
pub(super) const WIDE: u8 = 0;
pub(super) const F16: u8 = 1;
pub(super) const BF16: u8 = 2;

/// The block to be read next: its maximum is taken in the loop over the one before it, and halves are widened there.
#[derive(Clone, Copy)]
pub(super) struct Ahead<'a, T> {
    pub(super) block: Span<'a, T>,
    /// What is to be widened into the block.
    from: Option<(Half<'a>, SpanMut<'a, T>)>,
    /// What is read later still, and asked for meanwhile.
    later: *const u8,
    /// The same of one byte per class.
    mask: Option<*const u8>,
}

/// How far ahead of the next block memory is asked for: two pages, for the processor's own prefetching ends with the page.
const LATER: usize = 8192;

/// Asks for what stands so far behind element `i`, of a run whose elements are read in order.
#[inline(always)]
pub(super) fn ask<S: Isa, T: Element>(isa: S, x: Span<T>, i: usize) {
    if (i * size_of::<T>()).is_multiple_of(64) {
        isa.prefetch(x.address(i).wrapping_add(LATER));
    }
}

impl<'a, T: Real> Ahead<'a, T> {
    #[inline(always)]
    pub(super) fn of(block: Span<'a, T>) -> Self {
        Self { block, from: None, later: block.address(0).wrapping_add(LATER), mask: None }
    }
    #[inline(always)]
    pub(super) fn half(from: Half<'a>, to: SpanMut<'a, T>) -> Self {
        Self { block: to.read(), from: Some((from, to)), later: from.address().wrapping_add(LATER), mask: None }
    }
    /// Another block in its place, with the same to be asked for meanwhile.
    #[inline(always)]
    pub(super) fn instead(self, block: Span<'a, T>) -> Self {
        Self { block, from: None, ..self }
    }
    #[inline(always)]
    pub(super) fn part(self, start: usize, len: usize) -> Self {
        let from = self.from.map(|(half, to)| (half.part(start, len), to.part(start, len)));
        let mask = self.mask.map(|mask| mask.wrapping_add(start));
        Self { block: self.block.part(start, len), from, later: self.later.wrapping_add(start * self.size()), mask }
    }
    #[inline(always)]
    pub(super) fn nth(self, k: usize, size: usize) -> Self {
        let from = self.from.map(|(half, to)| (half.nth(k, size), to.nth(k, size)));
        let mask = self.mask.map(|mask| mask.wrapping_add(k * size));
        Self { block: self.block.nth(k, size), from, later: self.later.wrapping_add(k * size * self.size()), mask }
    }
    /// Bytes per class in memory.
    #[inline(always)]
    fn size(self) -> usize {
        if self.from.is_some() { 2 } else { size_of::<T>() }
    }
    /// Asks for what is as far behind as element `i` is in the block.
    #[inline(always)]
    pub(super) fn ask<S: Isa>(self, isa: S, i: usize) {
        if (i * self.size()).is_multiple_of(64) {
            isa.prefetch(self.later.wrapping_add(i * self.size()));
        }
        if let (0, Some(mask)) = (i, self.mask) {
            isa.prefetch(mask);
        }
    }
    /// What is to be widened.
    #[inline(always)]
    pub(super) fn kind(self) -> u8 {
        match self.from {
            None => WIDE,
            Some((Half::F16(_), _)) => F16,
            Some((Half::Bf16(_), _)) => BF16,
        }
    }
    /// The same, of which the compiler now knows the kind: a loop has no other ways in it.
    #[inline(always)]
    pub(super) fn of_kind<const KIND: u8>(self) -> Self {
        let from = match (KIND, self.from) {
            (WIDE, _) => None,
            (F16, Some((Half::F16(half), to))) => Some((Half::F16(half), to)),
            (BF16, Some((Half::Bf16(half), to))) => Some((Half::Bf16(half), to)),
            _ => unreachable!("asked for after `kind`"),
        };
        Self { from, ..self }
    }
    /// A vector from element `i` on, of a block whose kind is known.
    #[inline(always)]
    pub(super) fn load<S: Isa>(self, isa: S, i: usize) -> Vf<S, T> {
        let Some((half, to)) = self.from else { return self.block.load(isa, i) };
        let v = T::load_half(isa, half, i, Vf::<S, T>::LANES);
        to.store(isa, i, v);
        v
    }
    /// As `load`, of `n` elements and −inf after them.
    #[inline(always)]
    pub(super) fn load_partial<S: Isa>(self, isa: S, i: usize, n: usize) -> Vf<S, T> {
        let Some((half, to)) = self.from else { return self.block.load_partial(isa, i, n, T::NEG_INF) };
        let v = T::load_half(isa, half, i, n);
        to.store_partial(isa, i, n, v);
        v
    }
    /// The maximum.
    #[inline(always)]
    pub(super) fn max<S: Isa>(self, isa: S) -> Vf<S, T> {
        match self.kind() {
            F16 => self.of_kind::<F16>().widened_max(isa),
            BF16 => self.of_kind::<BF16>().widened_max(isa),
            _ => block_max(isa, self.block),
        }
    }
    #[inline(always)]
    fn widened_max<S: Isa>(self, isa: S) -> Vf<S, T> {
        let (step, len) = (Vf::<S, T>::LANES, self.block.len());
        let mut max = [Vf::<S, T>::splat(isa, T::NEG_INF); 2];
        let groups = len / (2 * step);
        for k in 0..groups {
            let part = self.nth(k, 2 * step);
            for (u, max) in max.iter_mut().enumerate() {
                *max = part.load(isa, u * step).max(*max);
            }
        }
        let mut i = groups * 2 * step;
        while i < len {
            let n = step.min(len - i);
            max[0] = self.load_partial(isa, i, n).max(max[0]);
            i += n;
        }
        max[0].max(max[1])
    }
}

impl<'a, T: Real> Input<'a, T> {
    /// A row with nothing after it.
    pub fn row(row: Span<'a, T>) -> Self {
        Self::Row { row, after: Span::of(&[]) }
    }

    /// Block `index`, and the block that will be asked for next, of this row or another: empty when it cannot be read yet. Blocks are asked for in
    /// ascending order.
    #[inline(always)]
    pub(super) fn block<S: Isa>(&mut self, isa: S, index: usize, known: &mut Known<T>) -> (Span<'_, T>, Ahead<'_, T>) {
        match self {
            Self::None => (Span::of(&[]), Ahead::of(Span::of(&[]))),
            Self::Row { row, after } => {
                let next = if (index + 1) * BLOCK < row.len() { block_of(*row, index + 1) } else { block_of(*after, 0) };
                (block_of(*row, index), Ahead::of(next))
            }
            Self::Half { row, after, scratch } => {
                let of = |row: Half<'a>, index: usize| row.part(index * BLOCK, BLOCK.min(row.len() - index * BLOCK));
                let (even, odd) = scratch.split_at_mut(BLOCK);
                let (this, other) = if known.turn == 0 { (even, odd) } else { (odd, even) };
                known.turn = 1 - known.turn;
                let half = of(*row, index);
                let this = SpanMut::of(&mut this[..half.len()]);
                if known.top.is_none() {
                    known.top = Some(Ahead::half(half, this).max(isa).reduce_max());
                }
                let next = if (index + 1) * BLOCK < row.len() { Some(of(*row, index + 1)) } else { after.map(|after| of(after, 0)) };
                let ahead = match next {
                    Some(next) => Ahead::half(next, SpanMut::of(&mut other[..next.len()])),
                    None => Ahead::of(Span::of(&[])),
                };
                (this.read(), ahead)
            }
            Self::Made { fill, scratch, classes, from, mask } => {
                let len = |index: usize| BLOCK.min(classes.saturating_sub(index * BLOCK));
                let (even, odd) = scratch.split_at_mut(BLOCK);
                let (this, other) = if index.is_multiple_of(2) { (even, odd) } else { (odd, even) };
                if index == 0 {
                    fill(0, &mut this[..len(0)]);
                }
                let next = &mut other[..len(index + 1)];
                if !next.is_empty() {
                    fill(index + 1, next);
                }
                let later = from.0.wrapping_add((index + 2) * BLOCK * from.1);
                let mask = mask.map(|mask| mask.wrapping_add((index + 2) * BLOCK));
                (Span::of(&this[..len(index)]), Ahead { block: Span::of(next), from: None, later, mask })
            }
        }
    }
}

/// Block `index` of a row; empty past its end.
#[inline(always)]
fn block_of<T: Element>(row: Span<'_, T>, index: usize) -> Span<'_, T> {
    let start = row.len().min(index * BLOCK);
    row.part(start, BLOCK.min(row.len() - start))
}
