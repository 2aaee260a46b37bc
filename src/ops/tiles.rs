//! Into a tile of columns and out of it, for every layout: the arithmetic of a row never sees how it lies in memory.

use crate::array::{Array, Columns, ColumnsMut, Element, Offsets, Out, Rows, RowsMut, Span, SpanMut};
use crate::kernels::copy;
use crate::simd::{Isa, Kernel};

use super::job::OUT;
use super::plan::Path;
use super::scratch::{Buffer, OfType, Work, room};
use super::source::{gather, scatter};
use super::strip::Strip;

/// The most lanes of a vector: tiles are filled up to a multiple of it.
pub(super) const LANES: usize = 16;

/// Classes that columns are asked for ahead while they are copied: their runs are too short for the processor to find out by itself.
const LATER: isize = 12;

impl Strip<'_, '_> {
    /// The path of an operand for this strip: rows with gaps between them are not columns.
    pub(super) fn path(&self, path: Path) -> Path {
        if path == Path::Columns && !self.run { Path::Gathered } else { path }
    }

    /// Whether results in columns are written past the caches.
    pub(super) fn streams(&self) -> bool {
        self.job.past_columns
    }

    /// Fills a tile with `count` classes from `first` on of an operand.
    pub(super) fn fill<T: Work>(
        &self,
        array: &Array,
        operand: usize,
        path: Path,
        classes: (usize, usize),
        tile: (&mut [T], usize),
        offsets: &mut [Offsets; 3],
        flat: &mut Buffer<T>,
    ) {
        T::of_type(array.dtype(), Fill { strip: self, array, operand, path, classes, tile, offsets, flat });
    }

    /// Writes `count` classes from `first` on of the result from a tile, columns past the caches if it is to `stream`.
    pub(super) fn empty<T: Work>(
        &self,
        out: &Out,
        classes: (usize, usize),
        tile: (&[T], usize),
        stream: bool,
        offsets: &mut [Offsets; 3],
        flat: &mut Buffer<T>,
    ) {
        T::of_type(out.array().dtype(), Empty { strip: self, out, classes, tile, stream, offsets, flat });
    }
}

/// [`Strip::fill`] of elements of one type.
struct Fill<'s, 'j, 'a, T> {
    strip: &'s Strip<'j, 'a>,
    array: &'s Array<'a>,
    operand: usize,
    path: Path,
    classes: (usize, usize),
    tile: (&'s mut [T], usize),
    offsets: &'s mut [Offsets; 3],
    flat: &'s mut Buffer<T>,
}

impl<T: Work> OfType<T> for Fill<'_, '_, '_, T> {
    fn run<E: Element<Acc = T>>(self) {
        let Self { strip, array, operand, path, classes: (first, count), tile: (tile, stride), offsets, flat } = self;
        let (job, n) = (strip.job, strip.kept.len());
        let step = job.classes.inner_stride(operand);
        let size = size_of::<E>();
        let path = strip.path(path);
        match path {
            Path::Columns => {
                let src = array.columns::<E>(job.rows.offset(operand, strip.kept[0]) + first as isize * step, step, count, n);
                // Where there are several blocks, what could not be asked for while the one before was computed with.
                let ahead = (count < job.classes.size).then_some(LATER * step);
                job.level.run(Move::In(src, ColumnsMut::of(tile, stride, count, stride), ahead));
            }
            Path::Rows if count == 2 && strip.adjacent(operand, count, size) => {
                let src = array.span::<E>(job.rows.offset(operand, strip.kept[0]), 2 * n);
                job.level.run(Move::PairsIn(src, ColumnsMut::of(tile, stride, count, stride)));
            }
            Path::Rows => {
                let backwards = step < 0;
                let shift = (if backwards { first + count.max(1) - 1 } else { first }) as isize * step;
                let whole = n.next_multiple_of(LANES);
                let tile = ColumnsMut::of(tile, stride, count, stride);
                let tile = if backwards { tile.reversed() } else { tile };
                if E::DTYPE == T::DTYPE {
                    let (base, rows) = strip.offsets(operand, shift, whole, &mut offsets[0]);
                    let src = array.rows::<T>(base, rows, count);
                    job.level.run(Move::<T, T>::RowsIn(src, tile));
                } else {
                    let flat = room(flat, whole * count);
                    let (rows, len) = strip.flat(operand, shift, count, size, &mut offsets[0]);
                    job.level.run(Move::<E, T>::Widen(array.rows(rows.0, rows.1, len), SpanMut::of(flat)));
                    let src = RowsMut::of(flat, offsets[1].run((count * size_of::<T>()) as isize, n, whole), count).read();
                    job.level.run(Move::<T, T>::RowsIn(src, tile));
                }
            }
            Path::Gathered => {
                for (slot, &row) in strip.kept.iter().enumerate() {
                    gather(array, operand, &job.classes, job.rows.offset(operand, row), first, &mut tile[slot..], count, stride);
                }
            }
        }
    }
}

/// [`Strip::empty`] to elements of one type.
struct Empty<'s, 'j, 'a, T> {
    strip: &'s Strip<'j, 'a>,
    out: &'s Out<'a>,
    classes: (usize, usize),
    tile: (&'s [T], usize),
    stream: bool,
    offsets: &'s mut [Offsets; 3],
    flat: &'s mut Buffer<T>,
}

impl<T: Work> OfType<T> for Empty<'_, '_, '_, T> {
    fn run<E: Element<Acc = T>>(self) {
        let Self { strip, out, classes: (first, count), tile: (tile, stride), stream, offsets, flat } = self;
        let (job, n) = (strip.job, strip.kept.len());
        let step = job.classes.inner_stride(OUT);
        let size = size_of::<E>();
        let source = Columns::of(tile, stride, count, stride);
        match strip.path(job.tile_write) {
            Path::Columns => {
                let dst = out.columns::<E>(job.rows.offset(OUT, strip.kept[0]) + first as isize * step, step, count, n);
                job.level.run(Move::Out(source, dst, stream));
            }
            Path::Rows if count == 2 && strip.adjacent(OUT, count, size) => {
                let dst = out.span::<E>(job.rows.offset(OUT, strip.kept[0]), 2 * n);
                job.level.run(Move::PairsOut(source, dst));
            }
            Path::Rows => {
                let backwards = step < 0;
                let shift = (if backwards { first + count.max(1) - 1 } else { first }) as isize * step;
                let source = if backwards { source.reversed() } else { source };
                if E::DTYPE == T::DTYPE {
                    let (base, rows) = strip.offsets(OUT, shift, 0, &mut offsets[0]);
                    let dst = out.rows::<T>(base, rows, count);
                    job.level.run(Move::<T, T>::RowsOut(source, dst));
                } else {
                    let flat = room(flat, n * count);
                    let rows = offsets[1].run((count * size_of::<T>()) as isize, n, n);
                    job.level.run(Move::<T, T>::RowsOut(source, RowsMut::of(flat, rows, count)));
                    let (rows, len) = strip.flat(OUT, shift, count, size, &mut offsets[0]);
                    job.level.run(Move::<E, T>::Narrow(Span::of(flat), out.rows(rows.0, rows.1, len)));
                }
            }
            Path::Gathered => {
                for (slot, &row) in strip.kept.iter().enumerate() {
                    scatter(out, &job.classes, job.rows.offset(OUT, row), first, &tile[slot..], count, stride);
                }
            }
        }
    }
}

/// Ways into a tile and out of it.
pub(super) enum Move<'s, E, T> {
    /// Adjacent rows.
    In(Columns<'s, E>, ColumnsMut<'s, T>, Option<isize>),
    Out(Columns<'s, T>, ColumnsMut<'s, E>, bool),
    /// Adjacent rows of two adjacent classes.
    PairsIn(Span<'s, E>, ColumnsMut<'s, T>),
    PairsOut(Columns<'s, T>, SpanMut<'s, E>),
    /// Adjacent classes.
    RowsIn(Rows<'s, T>, ColumnsMut<'s, T>),
    RowsOut(Columns<'s, T>, RowsMut<'s, T>),
    /// Between half types and rows of the type they are computed in, one behind the other.
    Widen(Rows<'s, E>, SpanMut<'s, T>),
    Narrow(Span<'s, T>, RowsMut<'s, E>),
}

impl<E: Element<Acc = T>, T: Work> Kernel for Move<'_, E, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        match self {
            Self::In(src, tile, ahead) => copy::copy_in(isa, src, tile, ahead),
            Self::Out(tile, dst, stream) => copy::copy_out(isa, tile, dst, stream),
            Self::PairsIn(src, tile) => copy::deinterleave_in(isa, src, tile),
            Self::PairsOut(tile, dst) => copy::interleave_out(isa, tile, dst),
            Self::RowsIn(src, tile) => copy::transpose_in(isa, src, tile),
            Self::RowsOut(tile, dst) => copy::transpose_out(isa, tile, dst),
            Self::Widen(src, dst) => {
                for r in 0..src.count() {
                    copy::convert(isa, src.row(r), dst.part(r * src.len(), src.len()));
                }
            }
            Self::Narrow(src, dst) => {
                let len = dst.row(0).read().len();
                for r in 0..dst.count() {
                    copy::convert(isa, src.part(r * len, len), dst.row(r));
                }
            }
        }
    }
}
