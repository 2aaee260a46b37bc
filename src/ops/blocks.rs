//! Rows block by block for kernels that take a row in several calls: in place where the classes are adjacent, otherwise copied, and a tile of
//! neighbouring rows at a time where those lie closer together than classes do.

use core::marker::PhantomData;

use crate::array::{Array, DType, Element, FromNumber, Out, Span};
use crate::kernels::scan::BLOCK;
use crate::simd::{Isa, Level};

use super::plan::{Axes, Path, path};
use super::scratch::{Buffer, Scratch, Work, room};
use super::source::{gather, line};

/// Rows that are read together when a tile is copied: where every class is a page of its own, a visit should be worth it.
pub(super) const TILE: usize = 128;
/// From one row of a tile to the next: not a power of two, or all of them would compete for the same lines of the cache.
const PITCH: usize = BLOCK + 16;

/// The rows and the one class axis of a call, with the same operands in both.
pub(super) struct Layout {
    pub(super) classes: Axes,
    pub(super) rows: Axes,
}

impl Layout {
    /// `strides` of every operand over `shape`; those of row results have a 0 for the class axis.
    pub(super) fn new(shape: &[usize], axis: usize, strides: &[&[isize]]) -> Self {
        let classes = Axes::new(shape, strides, core::iter::once(axis));
        let rows = Axes::new(shape, strides, (0..shape.len()).filter(|&a| a != axis));
        Self { classes, rows }
    }

    /// How many rows from `row` on are read together, until `last`: of neighbours that share cache lines as many as have one stride.
    pub(super) fn together(&self, tiled: bool, row: usize, last: usize) -> usize {
        let inner = self.rows.inner_len().max(1);
        if tiled { TILE.min(last - row).min(inner - row % inner) } else { 1 }
    }
}

/// Rows of one task of a job, computed in `T`, as a kernel.
pub(super) struct Chunk<'j, J, T> {
    pub(super) job: &'j J,
    pub(super) first: usize,
    pub(super) last: usize,
    pub(super) scratch: &'j mut Scratch,
    element: PhantomData<T>,
}

impl<'j, J, T> Chunk<'j, J, T> {
    pub(super) fn new(job: &'j J, first: usize, last: usize, scratch: &'j mut Scratch) -> Self {
        Self { job, first, last, scratch, element: PhantomData }
    }
}

/// Whether by-products of such logits are computed in float64: at the portable level, where speed is no matter, all are, and no code for float32 is needed.
pub(super) fn in_float64(level: Level, dtype: DType) -> bool {
    dtype == DType::F64 || level == Level::Scalar
}

/// That [`in_float64`] was asked.
#[inline(always)]
pub(super) fn assert_asked<S: Isa, T: Work>() {
    assert!(S::LEVEL != Level::Scalar || T::DTYPE == DType::F64, "the portable level computes by-products in float64");
}

/// How an operand is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Direct,
    Row,
    Tile,
}

/// One operand of a call.
pub(super) struct Operand<'a> {
    pub(super) array: &'a Array<'a>,
    index: usize,
    layout: &'a Layout,
    way: Way,
}

impl<'a> Operand<'a> {
    pub(super) fn new(array: &'a Array<'a>, index: usize, layout: &'a Layout) -> Self {
        let Layout { classes, rows } = layout;
        let way = if path(array, index, classes, rows) == Path::Rows {
            Way::Direct
        } else if rows.inner_len() > 1 && rows.inner_stride(index).abs() < classes.inner_stride(index).abs() {
            Way::Tile
        } else {
            Way::Row
        };
        Self { array, index, layout, way }
    }

    /// Whether blocks are read where they stand.
    pub(super) fn is_direct(&self) -> bool {
        self.way == Way::Direct
    }

    /// Whether neighbouring rows want to be read together.
    pub(super) fn is_tiled(&self) -> bool {
        self.way == Way::Tile
    }

    /// The row at `row` where it stands.
    #[inline(always)]
    fn row<E: Element>(&self, row: usize) -> Span<'a, E> {
        self.array.span::<E>(self.layout.rows.offset(self.index, row), self.layout.classes.size)
    }

    /// Copies `len` classes from `start` on of `n` rows from `row` on to `dst[slot * PITCH..]`.
    fn copy<T: Work>(&self, level: Level, row: usize, n: usize, start: usize, len: usize, dst: &mut [T]) {
        let Layout { classes, rows } = self.layout;
        if self.way == Way::Direct {
            for slot in 0..n {
                let offset = rows.offset(self.index, row + slot) + (start * self.array.dtype().size()) as isize;
                let next = (len * self.array.dtype().size()) as isize;
                line(level, self.array, offset, false, next, &mut dst[slot * PITCH..][..len]);
            }
        } else if self.way == Way::Tile {
            let (base, step) = (rows.offset(self.index, row), classes.inner_stride(self.index));
            for i in 0..len {
                self.array.read(base + (start + i) as isize * step, rows.inner_stride(self.index), n, &mut dst[i..], PITCH);
            }
        } else {
            for slot in 0..n {
                gather(self.array, self.index, classes, rows.offset(self.index, row + slot), start, &mut dst[slot * PITCH..], len, 1);
            }
        }
    }

    /// One element.
    pub(super) fn get<T: FromNumber>(&self, row: usize, class: usize) -> T {
        self.array.get(self.layout.rows.offset(self.index, row) + self.layout.classes.offset(self.index, class))
    }
}

/// Hands the blocks of an operand to a kernel, as the type that is computed in.
pub(super) struct Feed<'s, T> {
    copy: &'s mut Buffer<T>,
    /// Whether the blocks are read where they stand.
    direct: bool,
}

impl<'s, T: Work> Feed<'s, T> {
    /// `copy` becomes the scratch for blocks that cannot be read where they stand.
    pub(super) fn new(x: &Operand, copy: &'s mut Buffer<T>) -> Self {
        Self { copy, direct: x.way == Way::Direct && x.array.dtype() == T::DTYPE }
    }

    /// Gets classes `start..start + len` of `n` rows from `row` on ready.
    #[inline(always)]
    pub(super) fn load(&mut self, level: Level, x: &Operand, row: usize, n: usize, start: usize, len: usize) {
        if !self.direct {
            x.copy(level, row, n, start, len, room(self.copy, n * PITCH));
        }
    }

    /// Those of row `row + slot`, and the block after it where that is whole and stands in memory.
    #[inline(always)]
    pub(super) fn block<'a>(
        &'a self,
        x: &Operand<'a>,
        row: usize,
        slot: usize,
        start: usize,
        len: usize,
    ) -> (Span<'a, T>, Option<Span<'a, T>>) {
        if !self.direct {
            return (Span::of(&self.copy[slot * PITCH..slot * PITCH + len]), None);
        }
        let whole = x.row::<T>(row + slot);
        let next = if start + 2 * BLOCK <= whole.len() { Some(whole.part(start + BLOCK, BLOCK)) } else { None };
        (whole.part(start, len), next)
    }
}

/// As many of a state as rows are read together, moved by the vectors of the caller.
#[inline(always)]
pub(super) fn states<S: Copy>(empty: S, tiled: bool) -> Vec<S> {
    let most = if tiled { TILE } else { 1 };
    let mut states = Vec::with_capacity(most);
    for _ in 0..most {
        states.push(empty);
    }
    states
}

/// A result with one element per row.
pub(super) struct RowResult<'a> {
    pub(super) out: &'a Out<'a>,
    pub(super) index: usize,
}

impl RowResult<'_> {
    pub(super) fn set(&self, layout: &Layout, row: usize, x: f64) {
        self.out.set(layout.rows.offset(self.index, row), x);
    }
    pub(super) fn set_int(&self, layout: &Layout, row: usize, x: i64) {
        self.out.set_int(layout.rows.offset(self.index, row), x);
    }
}
