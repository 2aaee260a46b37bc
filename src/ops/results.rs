//! Where the results of rows go, and how they come there: to an array of any float type, or to scratch.

use crate::array::{DType, Element, Half, HalfRows, Offsets, Out, Rows, RowsMut, Span, SpanMut};
use crate::kernels::bend::Product;
use crate::kernels::copy;
use crate::kernels::emit::{Emit, From};
use crate::kernels::finish::{APART, Tile};
use crate::kernels::real::HIGH;
use crate::kernels::rows::BLOCK;
use crate::kernels::state::{Reference, exp_f64};
use crate::simd::{Isa, Kernel, Level, Scalar};

use super::job::{Job, Kind, MASK, OUT, Stores};
use super::scratch::{OfType, Work};
use super::source::{scatter, unbend};
use super::strip::{Strip, targets};

/// Bytes of a row from which on stores past the caches pay: at both ends of a row they share lines with its neighbours. With the widest vectors, and with
/// others, where it takes more than one store to fill a line.
const STREAMED: [usize; 2] = [2 << 10, 6 << 10];

/// Where results go.
#[derive(Clone, Copy)]
pub(super) enum To<'o, 'a, T> {
    /// Rows of an array, from a byte offset on.
    Rows(&'o Out<'a>, isize, &'o Offsets, usize),
    /// Part of a row of it.
    Run(&'o Out<'a>, isize, usize),
    /// Scratch.
    Scratch(RowsMut<'o, T>),
}

impl<'o, T: Work> To<'o, '_, T> {
    /// Number of rows.
    fn count(self) -> usize {
        match self {
            Self::Rows(_, _, rows, _) => rows.count(),
            Self::Run(..) => 1,
            Self::Scratch(rows) => rows.count(),
        }
    }

    /// Classes of each.
    fn len(self) -> usize {
        match self {
            Self::Rows(_, _, _, len) | Self::Run(_, _, len) => len,
            Self::Scratch(rows) => rows.read().len(),
        }
    }

    /// One of the rows.
    fn row(self, r: usize) -> Self {
        match self {
            Self::Rows(out, base, rows, len) => Self::Run(out, base + rows.at(r), len),
            Self::Run(..) => self,
            Self::Scratch(rows) => Self::Scratch(RowsMut::single(rows.row(r))),
        }
    }

    /// Sets class `i` of the first row, rounded once.
    fn set(self, i: usize, value: f64) {
        match self {
            Self::Rows(out, offset, ..) | Self::Run(out, offset, _) => out.set(offset + (i * out.array().dtype().size()) as isize, value),
            Self::Scratch(rows) => rows.set(0, i, T::from_f64(value)),
        }
    }

    /// Rows of the array, of its type.
    pub(super) fn rows<E: Element<Acc = T>>(self) -> RowsMut<'o, E> {
        match self {
            Self::Rows(out, base, rows, len) => out.rows(base, rows, len),
            Self::Run(out, offset, len) => RowsMut::single(out.span(offset, len)),
            Self::Scratch(_) => unreachable!("scratch is of the type that is computed in"),
        }
    }
}

/// Rows of results of one type.
struct Write<'s, 'r, 'j, 'a, 'b, T> {
    results: Results<'r, 'j, 'a>,
    src: Rows<'s, T>,
    half: Option<HalfRows<'s>>,
    t: Span<'s, T>,
    references: &'s [Reference],
    to: To<'s, 'b, T>,
}

impl<T: Work> OfType<T> for Write<'_, '_, '_, '_, '_, T> {
    fn run<E: Element<Acc = T>>(self) {
        self.results.emit(self.src, self.half, self.t, self.references, self.to.rows::<E>());
    }
}

/// Elements of rows of results: row, class and value.
pub(super) struct Set<'s, 'b, T, I> {
    pub(super) to: To<'s, 'b, T>,
    pub(super) values: I,
}

impl<T: Work, I: Iterator<Item = (usize, usize, f64)>> OfType<T> for Set<'_, '_, T, I> {
    fn run<E: Element<Acc = T>>(self) {
        let rows = self.to.rows::<E>();
        self.values.for_each(|(row, class, value)| rows.set(row, class, E::from_f64(value)));
    }
}

/// What results are made with.
#[derive(Clone, Copy)]
pub(super) struct Results<'r, 'j, 'a> {
    pub(super) job: &'j Job<'a>,
    pub(super) from: From,
    pub(super) tile: &'r Tile,
    /// The slot of the first row.
    pub(super) first: usize,
    /// Whether results may go past the caches: not where exponentials are.
    pub(super) past: bool,
}

impl Results<'_, '_, '_> {
    pub(super) fn write<T: Work>(self, src: Rows<T>, t: Span<T>, references: &[Reference], to: To<T>) {
        self.read(src, None, t, references, to);
    }

    /// The same, of halves as they are if there are some.
    pub(super) fn read<T: Work>(self, src: Rows<T>, half: Option<HalfRows>, t: Span<T>, references: &[Reference], to: To<T>) {
        if self.are_high::<T>(to.count(), t) {
            return self.one_by_one(src, half, t, references, to);
        }
        match to {
            To::Scratch(dst) => self.emit(src, half, t, references, dst),
            To::Rows(out, ..) | To::Run(out, ..) => T::of_type(out.array().dtype(), Write { results: self, src, half, t, references, to }),
        }
    }

    /// Whether coefficients of one of `n` rows are high, see [`HIGH`].
    fn are_high<T: Work>(self, n: usize, t: Span<T>) -> bool {
        let Self { job, tile, first, .. } = self;
        // All of them, as that takes vectors.
        let high = |values: &[f64]| values[first..][..n].iter().fold(false, |any, value| any | (value.abs() >= HIGH));
        T::DTYPE == DType::F32 && job.kind == Kind::Loss && (high(&tile.a) || (job.even() || !t.is_empty()) && high(&tile.slope))
    }

    /// Rows some of which have high coefficients: those class by class, in float64.
    #[inline(never)]
    fn one_by_one<T: Work>(self, src: Rows<T>, half: Option<HalfRows>, t: Span<T>, references: &[Reference], to: To<T>) {
        let Self { job, tile, .. } = self;
        let (count, even) = (to.count(), job.even());
        let blocks = references.len() / count;
        for (r, slot) in (0..count).zip(self.first..) {
            let (references, to) = (&references[r * blocks..][..blocks], to.row(r));
            let (x, half) = (if half.is_some() { Span::of(&[]) } else { src.row(r) }, half.map(|half| half.row(r)));
            let row = Self { first: slot, ..self };
            if !row.are_high(1, t) {
                row.read(Rows::single(x), half.map(HalfRows::single), t, references, to);
                continue;
            }
            let own = Reference { k: tile.k[slot], b: tile.b[slot] };
            let slope = if even || !t.is_empty() { tile.slope[slot] } else { 0.0 };
            for i in 0..to.len() {
                let x = match half {
                    Some(Half::F16(x)) => x.get(i).to_f64(),
                    Some(Half::Bf16(x)) => x.get(i).to_f64(),
                    None => x.get(i).to_f64(),
                };
                let e = match references.get(i / BLOCK) {
                    _ if self.from != From::Stored => exp_f64(Scalar, (x - own.b) * job.terms.scale, own.k),
                    Some(reference) => x * reference.factor(own, job.terms.scale),
                    None => x,
                };
                let t = match t.is_empty() {
                    _ if even => tile.share[slot],
                    true => 0.0,
                    false => t.get(i).to_f64(),
                };
                to.set(i, tile.a[slot] * e - slope * t);
            }
        }
    }

    fn emit<O: Element<Acc = T>, T: Work>(
        self,
        src: Rows<T>,
        half: Option<HalfRows>,
        t: Span<T>,
        references: &[Reference],
        dst: RowsMut<O>,
    ) {
        let Self { job, from, tile, first, past } = self;
        let most = if job.kind == Kind::Softmax { 1.0 } else { f64::INFINITY };
        // (Adjacent rows have no ends of their own there.)
        let least = if from == From::Logs && O::DTYPE == T::DTYPE && src.line().is_some() && dst.line().is_some() {
            0
        } else {
            STREAMED[usize::from(job.level != Level::Avx512)]
        };
        let past = past && job.stores != Stores::Cached && job.classes.size * size_of::<O>() >= least;
        job.level.run(Emit { scale: job.terms.scale, from, most, tile, first, src, half, t, even: job.even(), references, dst, past });
    }
}

/// Finishes a block of gradients in scratch and writes it where it belongs.
pub(super) fn unbend_and_write<T: Work>(job: &Job, out: &Out, row: usize, start: usize, slopes: &[T], block: &mut [T]) {
    let base = job.rows.offset(OUT, row);
    let offset = base + (start * out.array().dtype().size()) as isize;
    let to = To::Run(out, offset, block.len());
    let straight = |x, by| T::of_type(out.array().dtype(), Run { level: job.level, x, by, to });
    if job.direct_out && job.bend.mask.is_none() && !slopes.is_empty() {
        return straight(Span::of(block), Span::of(slopes));
    }
    if job.bend.is_some() {
        unbend(job, row, start, slopes, block);
    }
    if job.direct_out {
        straight(Span::of(block), Span::of(&[]));
    } else {
        scatter(out, &job.classes, base, start, block, block.len(), 1);
    }
}

/// To adjacent elements, rounded once; multiplied by something, if that is there.
struct Run<'s, 'b, T> {
    level: Level,
    x: Span<'s, T>,
    by: Span<'s, T>,
    to: To<'s, 'b, T>,
}

impl<T: Work> OfType<T> for Run<'_, '_, T> {
    fn run<E: Element<Acc = T>>(self) {
        let Self { level, x, by, to } = self;
        let dst = to.rows::<E>().row(0);
        if by.is_empty() { level.run(Narrow { src: x, dst }) } else { level.run(Product { x, by, dst }) }
    }
}

struct Narrow<'s, E, T> {
    src: Span<'s, T>,
    dst: SpanMut<'s, E>,
}

impl<E: Element<Acc = T>, T: Work> Kernel for Narrow<'_, E, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        copy::convert(isa, self.src, self.dst);
    }
}

/// Zeros under False in rows that are NaN elsewhere, unless they are there already.
pub(super) fn clear(strip: &Strip, tile: &Tile, out: &Out, at_once: bool) {
    let Strip { job, kept, .. } = *strip;
    if let Some(mask) = job.bend.mask
        && at_once
    {
        for slot in (0..kept.len()).filter(|&slot| !tile.a[slot].is_finite()) {
            let (from, to) = (job.rows.offset(MASK, kept[slot]), job.rows.offset(OUT, kept[slot]));
            for class in (0..job.classes.size).filter(|&class| mask.get::<f32>(from + job.classes.offset(MASK, class)) == 0.0) {
                out.set(to + job.classes.offset(OUT, class), 0.0);
            }
        }
    }
}

/// The exact values at a lone maximum and at the sparse targets.
pub(super) fn patch(strip: &Strip, tile: &Tile, out: &Out, at_once: bool) {
    let Strip { job, kept, .. } = *strip;
    clear(strip, tile, out, at_once);
    if job.kind != Kind::Loss {
        return;
    }
    let set = |slot: usize, class: usize, value: f64| {
        out.set(job.rows.offset(OUT, kept[slot]) + job.classes.offset(OUT, class), value);
    };
    if job.terms.dense {
        (0..kept.len()).filter(|&slot| tile.ties[slot] == 1.0).for_each(|slot| set(slot, tile.arg[slot] as usize, tile.top[slot]));
    }
    targets(strip, |slot, j, class| set(slot, class, tile.patch[j * APART + slot]));
}
