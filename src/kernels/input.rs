//! Where the blocks of a row come from, and what is read after them.

use half::{bf16, f16};

use crate::array::{DType, Element, Flags, Half, Span, SpanMut, Vf};
use crate::simd::{Isa, Vector};

use super::real::Real;
use super::rows::{BLOCK, block_max};

/// Writes a block into the given elements.
pub type Fill<'a, T> = dyn FnMut(usize, &mut [T]) + 'a;

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
        /// Makes blocks, asked for in ascending order.
        fill: &'a mut Fill<'a, T>,
        /// Room for two blocks: one to be read, and the one after it.
        scratch: &'a mut [T],
        /// Classes in the row.
        classes: usize,
        /// Where the row stands that blocks are made of, and bytes per class there; or any address.
        from: (*const u8, usize),
    },
    /// Made block by block, each in the loop over the block before it.
    Raw {
        /// The row.
        row: Raw<'a, T>,
        /// The next one, if any.
        after: Option<Raw<'a, T>>,
        /// As above. Its contents outlast the row: the first block of the next one may be there.
        scratch: &'a mut [T],
    },
}

/// What blocks are made of in the loop over the block before.
#[derive(Clone, Copy)]
pub enum Raw<'a, T> {
    /// Halves, to be widened.
    Half(Half<'a>),
    /// Logits, of which those under False become −inf.
    Masked(Masked<'a, T>),
    /// Logits, the last one first.
    Backwards(Backwards<'a, T>),
}

/// A run that is read from its end.
#[derive(Clone, Copy)]
pub struct Backwards<'a, T>(pub Span<'a, T>);

impl<T: Real> Raw<'_, T> {
    #[inline(always)]
    fn len(self) -> usize {
        match self {
            Self::Half(half) => half.len(),
            Self::Masked(masked) => masked.x.len(),
            Self::Backwards(run) => run.0.len(),
        }
    }
    #[inline(always)]
    fn part(self, start: usize, len: usize) -> Self {
        match self {
            Self::Half(half) => Self::Half(half.part(start, len)),
            Self::Masked(masked) => Self::Masked(Making::<T>::part(masked, start, len)),
            Self::Backwards(run) => Self::Backwards(Making::<T>::part(run, start, len)),
        }
    }
}

/// Logits and their mask.
#[derive(Clone, Copy)]
pub struct Masked<'a, T> {
    /// As many as there are truth values.
    pub x: Span<'a, T>,
    /// One for each.
    pub mask: Flags<'a>,
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

/// From one block in scratch to the other. Not a multiple of a page: what is written to the one would seem to be what is read of the other.
const APART: usize = BLOCK + 512;

/// Elements of scratch for two blocks.
pub const TWO_BLOCKS: usize = APART + BLOCK;

/// How far ahead of the next block memory is asked for: two pages, for the processor's own prefetching ends with the page.
pub(super) const LATER: usize = 8192;

/// Asks for what stands so far behind element `i`, of a run whose elements are read in order.
#[inline(always)]
pub(super) fn ask<S: Isa, T: Element>(isa: S, x: Span<T>, i: usize) {
    if (i * size_of::<T>()).is_multiple_of(64) {
        isa.prefetch(x.address(i).wrapping_add(LATER));
    }
}

/// What a block is read from: a type for each kind, so that a loop has the code of its own only.
pub(super) trait Making<T: Real>: Copy {
    /// Bytes per class in memory.
    const SIZE: usize;
    /// Whether what is read goes to scratch.
    const MADE: bool;
    /// Whether there is one byte per class as well.
    const FLAGS: bool = false;
    /// `len` classes from `start` on.
    fn part(self, start: usize, len: usize) -> Self;
    /// Run `k` of `size` classes each, see [`Span::nth`].
    fn nth(self, k: usize, size: usize) -> Self;
    /// The `n` logits from `i` on, the other lanes −inf.
    fn load<S: Isa>(self, isa: S, i: usize, n: usize) -> Vf<S, T>;
}

/// What can be read on from one block to the next.
pub(super) trait Onward<T: Real>: Making<T> {
    /// Where it stands.
    fn address(self) -> *const u8;
    /// What the loops read of it, unless it is made.
    fn standing(&self) -> Span<'_, T> {
        Span::of(&[])
    }
}

impl<T: Real> Onward<T> for Here<'_, T> {
    #[inline(always)]
    fn address(self) -> *const u8 {
        self.0.address(0)
    }
    #[inline(always)]
    fn standing(&self) -> Span<'_, T> {
        self.0
    }
}

/// A whole row, to be read on from one block to the next.
#[derive(Clone, Copy)]
pub(super) struct Whole<'a, T, M> {
    row: M,
    /// Where blocks of it are made, if they are: the next one to be read in the first, the one after it in the other, and so on.
    scratch: [SpanMut<'a, T>; 2],
}

impl<'a, T: Real, M: Onward<T>> Whole<'a, T, M> {
    /// `len` classes of block `index` from `from` on, and as many of the block after it.
    #[inline(always)]
    pub(super) fn part(&self, index: usize, from: usize, len: usize) -> (M, Next<'a, T, M>) {
        let start = index * BLOCK + from;
        let next = self.row.part(start + BLOCK, len);
        let to = if M::MADE { self.scratch[1].part(from, len) } else { self.scratch[1] };
        (self.row.part(start, len), Next { from: next, to, later: next.address().wrapping_add(LATER), flags: core::ptr::null() })
    }
    /// Of such a part what the loops read.
    #[inline(always)]
    pub(super) fn standing<'p>(&self, part: &'p M, from: usize, len: usize) -> Span<'p, T>
    where
        'a: 'p,
    {
        if M::MADE { self.scratch[0].read().part(from, len) } else { part.standing() }
    }
    /// Goes on to the next block.
    #[inline(always)]
    pub(super) fn step(&mut self) {
        self.scratch.swap(0, 1);
    }
}

/// A [`Whole`] of any kind.
pub(super) enum Course<'a, T> {
    Here(Whole<'a, T, Here<'a, T>>),
    F16(Whole<'a, T, F16<'a>>),
    Bf16(Whole<'a, T, Bf16<'a>>),
}

/// The block as it stands.
#[derive(Clone, Copy)]
pub(super) struct Here<'a, T>(Span<'a, T>);

impl<T: Real> Making<T> for Here<'_, T> {
    const SIZE: usize = size_of::<T>();
    const MADE: bool = false;
    #[inline(always)]
    fn part(self, start: usize, len: usize) -> Self {
        Self(self.0.part(start, len))
    }
    #[inline(always)]
    fn nth(self, k: usize, size: usize) -> Self {
        Self(self.0.nth(k, size))
    }
    #[inline(always)]
    fn load<S: Isa>(self, isa: S, i: usize, n: usize) -> Vf<S, T> {
        if n == Vf::<S, T>::LANES { self.0.load(isa, i) } else { self.0.load_partial(isa, i, n, T::NEG_INF) }
    }
}

macro_rules! halves {
    ($name:ident, $half:ty, $kind:ident) => {
        /// Halves.
        #[derive(Clone, Copy)]
        pub(super) struct $name<'a>(Span<'a, $half>);

        impl<T: Real> Making<T> for $name<'_> {
            const SIZE: usize = 2;
            const MADE: bool = true;
            #[inline(always)]
            fn part(self, start: usize, len: usize) -> Self {
                Self(self.0.part(start, len))
            }
            #[inline(always)]
            fn nth(self, k: usize, size: usize) -> Self {
                Self(self.0.nth(k, size))
            }
            #[inline(always)]
            fn load<S: Isa>(self, isa: S, i: usize, n: usize) -> Vf<S, T> {
                T::load_half(isa, Half::$kind(self.0), i, n)
            }
        }

        impl<T: Real> Onward<T> for $name<'_> {
            #[inline(always)]
            fn address(self) -> *const u8 {
                self.0.address(0)
            }
        }
    };
}
halves!(F16, f16, F16);
halves!(Bf16, bf16, Bf16);

impl<T: Real> Making<T> for Masked<'_, T> {
    const SIZE: usize = size_of::<T>();
    const MADE: bool = true;
    const FLAGS: bool = true;
    #[inline(always)]
    fn part(self, start: usize, len: usize) -> Self {
        Self { x: self.x.part(start, len), mask: self.mask.part(start, len) }
    }
    #[inline(always)]
    fn nth(self, k: usize, size: usize) -> Self {
        Self { x: self.x.nth(k, size), mask: self.mask.nth(k, size) }
    }
    #[inline(always)]
    fn load<S: Isa>(self, isa: S, i: usize, n: usize) -> Vf<S, T> {
        let lowest = Vf::<S, T>::splat(isa, T::NEG_INF);
        if n == Vf::<S, T>::LANES {
            Vf::<S, T>::select(self.mask.load::<Vf<S, T>>(isa, i), self.x.load(isa, i), lowest)
        } else {
            let kept = self.mask.load_partial::<Vf<S, T>>(isa, i, n);
            Vf::<S, T>::select(kept, self.x.load_partial(isa, i, n, T::NEG_INF), lowest)
        }
    }
}

impl<T: Real> Making<T> for Backwards<'_, T> {
    const SIZE: usize = size_of::<T>();
    const MADE: bool = true;
    #[inline(always)]
    fn part(self, start: usize, len: usize) -> Self {
        Self(self.0.part(self.0.len() - start - len, len))
    }
    #[inline(always)]
    fn nth(self, k: usize, size: usize) -> Self {
        Making::<T>::part(self, k * size, size)
    }
    #[inline(always)]
    fn load<S: Isa>(self, isa: S, i: usize, n: usize) -> Vf<S, T> {
        let end = self.0.len() - i;
        if n == Vf::<S, T>::LANES {
            return self.0.load(isa, end - n).reverse();
        }
        let mut few = [T::NEG_INF; 16];
        for (k, x) in few[..n].iter_mut().enumerate() {
            *x = self.0.get(end - 1 - k);
        }
        Span::of(&few).load(isa, 0)
    }
}

/// The block to be read next: it is made and its maximum taken in the loop over the one before it.
#[derive(Clone, Copy)]
pub(super) struct Next<'a, T, M> {
    from: M,
    /// Where it goes, if it is made.
    to: SpanMut<'a, T>,
    /// What is read later still, and asked for meanwhile.
    later: *const u8,
    /// The same of one byte per class.
    flags: *const u8,
}

impl<T: Real, M: Making<T>> Next<'_, T, M> {
    #[inline(always)]
    pub(super) fn part(self, start: usize, len: usize) -> Self {
        let flags = if M::FLAGS { self.flags.wrapping_add(start) } else { self.flags };
        let to = if M::MADE { self.to.part(start, len) } else { self.to };
        Self { from: self.from.part(start, len), to, later: self.later.wrapping_add(start * M::SIZE), flags }
    }
    #[inline(always)]
    pub(super) fn nth(self, k: usize, size: usize) -> Self {
        let flags = if M::FLAGS { self.flags.wrapping_add(k * size) } else { self.flags };
        let to = if M::MADE { self.to.nth(k, size) } else { self.to };
        Self { from: self.from.nth(k, size), to, later: self.later.wrapping_add(k * size * M::SIZE), flags }
    }
    /// Asks for what is as far behind as element `i` is in the block.
    #[inline(always)]
    pub(super) fn ask<S: Isa>(self, isa: S, i: usize) {
        if (i * M::SIZE).is_multiple_of(64) {
            isa.prefetch(self.later.wrapping_add(i * M::SIZE));
        }
        if M::FLAGS && i == 0 {
            isa.prefetch(self.flags);
        }
    }
    /// A vector from element `i` on.
    #[inline(always)]
    pub(super) fn load<S: Isa>(self, isa: S, i: usize) -> Vf<S, T> {
        let v = self.from.load(isa, i, Vf::<S, T>::LANES);
        if M::MADE {
            self.to.store(isa, i, v);
        }
        v
    }
    /// As `load`, of `n` elements and −inf after them.
    #[inline(always)]
    pub(super) fn load_partial<S: Isa>(self, isa: S, i: usize, n: usize) -> Vf<S, T> {
        let v = self.from.load(isa, i, n);
        if M::MADE {
            self.to.store_partial(isa, i, n, v);
        }
        v
    }
    /// The maximum of `len` elements, which are all there are.
    #[inline(always)]
    fn max<S: Isa>(self, isa: S, len: usize) -> Vf<S, T> {
        let step = Vf::<S, T>::LANES;
        let mut max = [Vf::<S, T>::splat(isa, T::NEG_INF); 2];
        let groups = len / (2 * step);
        let all = self.part(0, len);
        for k in 0..groups {
            let part = all.nth(k, 2 * step);
            for (u, max) in max.iter_mut().enumerate() {
                *max = part.load(isa, u * step).max(*max);
            }
        }
        let mut i = groups * 2 * step;
        while i < len {
            let n = step.min(len - i);
            max[0] = all.load_partial(isa, i, n).max(max[0]);
            i += n;
        }
        max[0].max(max[1])
    }
}

impl<'a, T: Real> Next<'a, T, Here<'a, T>> {
    /// A block as it stands, and what stands behind it.
    #[inline(always)]
    pub(super) fn here(block: Span<'a, T>) -> Self {
        let later = block.address(0).wrapping_add(LATER);
        Self { from: Here(block), to: SpanMut::of(&mut []), later, flags: core::ptr::null() }
    }
}

/// A [`Next`] of any kind.
#[derive(Clone, Copy)]
pub(super) enum Ahead<'a, T> {
    Here(Next<'a, T, Here<'a, T>>),
    F16(Next<'a, T, F16<'a>>),
    Bf16(Next<'a, T, Bf16<'a>>),
    Masked(Next<'a, T, Masked<'a, T>>),
    Backwards(Next<'a, T, Backwards<'a, T>>),
}

impl<'a, T: Real> Ahead<'a, T> {
    #[inline(always)]
    pub(super) fn of(block: Span<'a, T>) -> Self {
        Self::Here(Next::here(block))
    }
    /// What is made of `from`, written to `to`.
    #[inline(always)]
    pub(super) fn raw(from: Raw<'a, T>, to: SpanMut<'a, T>) -> Self {
        match from {
            Raw::Half(Half::F16(half)) => {
                Self::F16(Next { from: F16(half), to, later: half.address(0).wrapping_add(LATER), flags: core::ptr::null() })
            }
            Raw::Half(Half::Bf16(half)) => {
                Self::Bf16(Next { from: Bf16(half), to, later: half.address(0).wrapping_add(LATER), flags: core::ptr::null() })
            }
            Raw::Masked(from) => {
                let (later, flags) = (from.x.address(0).wrapping_add(LATER), from.mask.address(LATER / size_of::<T>()));
                Self::Masked(Next { from, to, later, flags })
            }
            // What is later still is not always before it.
            Raw::Backwards(from) => Self::Backwards(Next { from, to, later: from.0.address(0), flags: core::ptr::null() }),
        }
    }
    /// The block, of which there may be nothing yet.
    #[inline(always)]
    pub(super) fn block(self) -> Span<'a, T> {
        match self {
            Self::Here(next) => next.from.0,
            Self::F16(Next { to, .. }) | Self::Bf16(Next { to, .. }) | Self::Masked(Next { to, .. }) | Self::Backwards(Next { to, .. }) => {
                to.read()
            }
        }
    }
    /// Whether the block is made where it is read.
    #[inline(always)]
    pub(super) fn is_made(self) -> bool {
        !matches!(self, Self::Here(_))
    }
    /// Another block in its place, with the same to be asked for meanwhile.
    #[inline(always)]
    pub(super) fn instead(self, block: Span<'a, T>) -> Next<'a, T, Here<'a, T>> {
        let later = match self {
            Self::Here(next) => next.later,
            Self::F16(next) => next.later,
            Self::Bf16(next) => next.later,
            Self::Masked(next) => next.later,
            Self::Backwards(next) => next.later,
        };
        Next { from: Here(block), to: SpanMut::of(&mut []), later, flags: core::ptr::null() }
    }
    /// The maximum of the classes from `start` on.
    #[inline(always)]
    pub(super) fn max<S: Isa>(self, isa: S, start: usize) -> Vf<S, T> {
        let len = self.block().len() - start;
        match self {
            Self::Here(next) => block_max(isa, next.from.0.part(start, len)),
            Self::F16(next) => next.part(start, len).max(isa, len),
            Self::Bf16(next) => next.part(start, len).max(isa, len),
            Self::Masked(next) => next.part(start, len).max(isa, len),
            Self::Backwards(next) => next.part(start, len).max(isa, len),
        }
    }
}

impl<'a, T: Real> Input<'a, T> {
    /// The whole row, if it can be read on from the block that was asked for last.
    #[inline(always)]
    pub(super) fn course(&mut self, known: &Known<T>) -> Option<Course<'_, T>> {
        let none = SpanMut::of(&mut []);
        match self {
            Self::Row { row, .. } => Some(Course::Here(Whole { row: Here(*row), scratch: [none; 2] })),
            Self::Raw { row: Raw::Half(half), scratch, .. } if T::DTYPE == DType::F32 => {
                let (even, odd) = scratch.split_at_mut(APART);
                let (even, odd) = (SpanMut::of(&mut even[..BLOCK]), SpanMut::of(&mut odd[..BLOCK]));
                let scratch = if known.turn == 1 { [even, odd] } else { [odd, even] };
                Some(match *half {
                    Half::F16(half) => Course::F16(Whole { row: F16(half), scratch }),
                    Half::Bf16(half) => Course::Bf16(Whole { row: Bf16(half), scratch }),
                })
            }
            _ => None,
        }
    }

    /// A row with nothing after it.
    pub fn row(row: Span<'a, T>) -> Self {
        Self::Row { row, after: Span::of(&[]) }
    }

    /// Block `index`, and the block that will be asked for next, of this row or another (empty when it cannot be read yet). Blocks are asked for
    /// in ascending order.
    #[inline(always)]
    pub(super) fn block<S: Isa>(&mut self, isa: S, index: usize, known: &mut Known<T>) -> (Span<'_, T>, Ahead<'_, T>) {
        let none = Span::of(&[]);
        match self {
            Self::None => (none, Ahead::of(none)),
            Self::Row { row, after } => {
                let next = if (index + 1) * BLOCK < row.len() { block_of(*row, index + 1) } else { block_of(*after, 0) };
                (block_of(*row, index), Ahead::of(next))
            }
            Self::Raw { row, after, scratch } => {
                let of = |row: Raw<'a, T>, index: usize| row.part(index * BLOCK, BLOCK.min(row.len() - index * BLOCK));
                let (even, odd) = scratch.split_at_mut(APART);
                let (this, other) = if known.turn == 0 { (even, odd) } else { (odd, even) };
                known.turn = 1 - known.turn;
                let raw = of(*row, index);
                let this = SpanMut::of(&mut this[..raw.len()]);
                if known.top.is_none() {
                    known.top = Some(Ahead::raw(raw, this).max(isa, 0).reduce_max());
                }
                let next = if (index + 1) * BLOCK < row.len() { Some(of(*row, index + 1)) } else { after.map(|after| of(after, 0)) };
                let mut ahead = match next {
                    Some(next) => Ahead::raw(next, SpanMut::of(&mut other[..next.len()])),
                    None => Ahead::of(Span::of(&[])),
                };
                if let Ahead::Backwards(next) = &mut ahead {
                    // The second one after it.
                    let (blocks, later) = (row.len().div_ceil(BLOCK), index + 3);
                    let (row, later) = if later < blocks { (Some(*row), later) } else { (*after, later - blocks) };
                    if let Some(Raw::Backwards(run)) = row.filter(|row| later * BLOCK < row.len()).map(|row| of(row, later)) {
                        next.later = run.0.address(0);
                    }
                }
                (this.read(), ahead)
            }
            Self::Made { fill, scratch, classes, from } => {
                let len = |index: usize| BLOCK.min(classes.saturating_sub(index * BLOCK));
                let (mut this, mut other) = scratch.split_at_mut(APART);
                if !index.is_multiple_of(2) {
                    (this, other) = (other, this);
                }
                if index == 0 {
                    fill(0, &mut this[..len(0)]);
                }
                let next = &mut other[..len(index + 1)];
                if !next.is_empty() {
                    fill(index + 1, next);
                }
                let later = from.0.wrapping_add((index + 2) * BLOCK * from.1);
                let next = Next { from: Here(Span::of(next)), to: SpanMut::of(&mut []), later, flags: core::ptr::null() };
                (Span::of(&this[..len(index)]), Ahead::Here(next))
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
