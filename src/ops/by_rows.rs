//! Tasks whose classes are adjacent (or are gathered row by row): the kernels of [`crate::kernels::rows`].

use crate::array::{Element, Span, SpanMut};
use crate::kernels::finish::{Tile, WIDTH, finish};
use crate::kernels::rows::{self, Direct, Gathered, Known, Setup, Source, Stream, Wanted};
use crate::kernels::state::{Reference, State};
use crate::simd::Isa;

use super::job::{Job, Kind, OUT, X, prepare};
use super::plan::Path;
use super::scratch::{Buffers, Scratch, Work, room};
use super::source::{dense_row, gather_logits, scatter, shared_stream, unbend, unbend_patches};

#[inline(always)]
pub(super) fn work_rows<S: Isa, E: Element<Acc = T>, T: Work>(isa: S, job: &Job, kept: &[usize], scratch: &mut Scratch) {
    let (tile, buffers, references) = T::buffers(scratch);
    // The logits of one or two targets are read with their blocks.
    let late = job.read == Path::Rows && job.terms.entries <= 2;
    prepare::<T>(job, kept, tile, !late);
    let setup = Setup::<S, T>::new(isa, job.terms.scale);
    let classes = job.classes.size;
    let blocks = classes.div_ceil(rows::BLOCK);
    shared_stream(job, &mut buffers.shared);
    room(&mut buffers.dense, rows::BLOCK);
    room(&mut buffers.block, rows::BLOCK);
    room(&mut buffers.x, rows::BLOCK);
    // One exponential per element: it is kept where the gradient will stand, if that can hold it.
    let store =
        job.kind != Kind::LogSoftmax && job.out.is_some() && E::DTYPE == T::DTYPE && job.read == Path::Rows && job.write == Path::Rows;
    if store && references.len() < blocks * kept.len() {
        references.resize(blocks * kept.len(), Reference { k: 0.0, b: 0.0 });
    }
    let mut known: Known<S, T> = None;
    for (slot, &row) in kept.iter().enumerate() {
        let refs = if store { &mut references[slot * blocks..(slot + 1) * blocks] } else { &mut [][..] };
        let dst = match job.out {
            Some(out) if store => out.span::<T>(job.rows.offset(OUT, row), classes),
            _ => SpanMut::of(&mut []),
        };
        let Buffers { x, dense, shared, .. } = buffers;
        let mut classes_of = [0; 2];
        let mut entries = 0;
        if late && let Some(labels) = &job.labels {
            for (j, class, _) in labels.row(row) {
                classes_of[j] = class;
                entries = j + 1;
            }
        }
        let mut wanted = Wanted { classes: &classes_of[..entries], logits: [0.0; 2] };
        let state = if job.read == Path::Rows {
            let span = |row| job.x.span::<E>(job.rows.offset(X, row), classes);
            let mut source = Direct { row: span(row), after: kept.get(slot + 1).map_or_else(|| Span::of(&[]), |&row| span(row)) };
            reduce_row::<S, E, T, _>(&setup, job, row, &mut source, dense, shared, dst, refs, &mut known, &mut wanted, store)
        } else {
            let mut fill = |index: usize, dst: &mut [T]| gather_logits(job, row, index * rows::BLOCK, dst, dst.len(), 1);
            let mut source = Gathered { fill: &mut fill, scratch: &mut x[..], classes };
            reduce_row::<S, T, T, _>(
                &setup,
                job,
                row,
                &mut source,
                dense,
                shared,
                SpanMut::of(&mut []),
                refs,
                &mut known,
                &mut wanted,
                false,
            )
        };
        put(tile, slot, &state);
        for j in 0..entries {
            tile.x_target[j * WIDTH + slot] = wanted.logits[j];
        }
    }
    finish(isa, &job.terms, tile, kept.len());
    if job.out.is_some() {
        unbend_patches(job, kept, tile);
    }
    let Some(out) = job.out else { return };
    for (slot, &row) in kept.iter().enumerate() {
        let (from, to) = (job.rows.offset(X, row), job.rows.offset(OUT, row));
        let reference = Reference { k: tile.k[slot], b: tile.b[slot] };
        let g = T::from_f64(tile.g[slot]);
        for index in 0..blocks {
            let start = index * rows::BLOCK;
            let n = rows::BLOCK.min(classes - start);
            let Buffers { x, dense, shared, block } = buffers;
            let t = dense_block(job, row, index, dense, shared);
            if store {
                let dst = out.span::<T>(to, classes).part(start, n);
                let mut a = tile.a[slot];
                let factor = references[slot * blocks + index].factor(reference, job.terms.scale);
                if factor != 1.0 && (a * factor).abs() < 1e-30 {
                    // The product of both would be subnormal where the result need not be.
                    rows::emit_stored(isa, dst.read(), T::from_f64(factor), T::ZERO, Span::of(&[]), dst);
                } else {
                    a *= factor;
                }
                rows::emit_stored(isa, dst.read(), T::from_f64(a), g, t, dst);
                continue;
            }
            let direct = job.write == Path::Rows;
            if job.read == Path::Rows {
                let source = job.x.span::<E>(from, classes).part(start, n);
                if direct {
                    emit_row(&setup, job, tile, slot, source, t, out.span::<E>(to, classes).part(start, n));
                } else {
                    emit_row(&setup, job, tile, slot, source, t, SpanMut::of(&mut block[..n]));
                }
            } else {
                gather_logits(job, row, start, x, n, 1);
                let source = Span::of(&x[..n]);
                if direct {
                    emit_row(&setup, job, tile, slot, source, t, out.span::<E>(to, classes).part(start, n));
                } else {
                    emit_row(&setup, job, tile, slot, source, t, SpanMut::of(&mut block[..n]));
                }
            }
            if !direct {
                if job.bend.is_some() {
                    unbend(job, row, start, block, n, 1);
                }
                scatter(out, &job.classes, to, start, &block[..n], n, 1);
            }
        }
    }
}

#[inline(always)]
pub(super) fn reduce_row<S: Isa, E: Element<Acc = T>, T: Work, Src: Source<E>>(
    setup: &Setup<S, T>,
    job: &Job,
    row: usize,
    x: &mut Src,
    dense: &mut [T],
    shared: &[T],
    dst: SpanMut<T>,
    references: &mut [Reference],
    known: &mut Known<S, T>,
    wanted: &mut Wanted,
    store: bool,
) -> State {
    let classes = job.classes.size;
    let fill: &mut dyn FnMut(usize, &mut [T]) = &mut |index, dst: &mut [T]| dense_row(job, row, index * rows::BLOCK, dst, dst.len(), 1);
    let mut stream = if !job.terms.dense {
        Stream::None
    } else if !job.own_dense() {
        Stream::Slice(Span::of(&shared[..classes]))
    } else {
        Stream::Gathered(Gathered { fill, scratch: dense, classes })
    };
    let t = &mut stream;
    match (job.terms.dense, store && E::DTYPE == T::DTYPE) {
        (false, false) => rows::reduce::<S, E, T, _, false, false>(setup, classes, x, t, dst, references, known, wanted),
        (false, true) => rows::reduce::<S, E, T, _, false, true>(setup, classes, x, t, dst, references, known, wanted),
        (true, false) => rows::reduce::<S, E, T, _, true, false>(setup, classes, x, t, dst, references, known, wanted),
        (true, true) => rows::reduce::<S, E, T, _, true, true>(setup, classes, x, t, dst, references, known, wanted),
    }
}

pub(super) fn dense_block<'b, T: Work>(job: &Job, row: usize, index: usize, dense: &'b mut [T], shared: &'b [T]) -> Span<'b, T> {
    let start = index * rows::BLOCK;
    let n = rows::BLOCK.min(job.classes.size - start);
    if job.kind != Kind::Loss || !job.terms.dense {
        Span::of(&[])
    } else if job.own_dense() {
        dense_row(job, row, start, &mut dense[..n], n, 1);
        Span::of(&dense[..n])
    } else {
        Span::of(&shared[start..start + n])
    }
}

#[inline(always)]
pub(super) fn emit_row<S: Isa, E: Element<Acc = T>, O: Element<Acc = T>, T: Work>(
    setup: &Setup<S, T>,
    job: &Job,
    tile: &Tile,
    slot: usize,
    x: Span<E>,
    t: Span<T>,
    dst: SpanMut<O>,
) {
    if job.kind == Kind::LogSoftmax {
        let (max, log_sum) = (T::from_f64(tile.max[slot]), T::from_f64(tile.log_sum[slot]));
        rows::emit_log(setup.isa, x, max, T::from_f64(job.terms.scale), log_sum, dst);
    } else {
        let reference = Reference { k: tile.k[slot], b: tile.b[slot] };
        rows::emit_exp(setup, reference, tile.max[slot], x, T::from_f64(tile.a[slot]), T::from_f64(tile.g[slot]), t, dst);
    }
}

pub(super) fn put(tile: &mut Tile, slot: usize, state: &State) {
    tile.max[slot] = state.max;
    tile.ties[slot] = state.ties;
    tile.arg[slot] = state.arg as f64;
    tile.k[slot] = state.reference.k;
    tile.b[slot] = state.reference.b;
    tile.rest[slot] = state.rest.value();
    tile.lin[slot] = state.lin.value();
    tile.t_rest[slot] = state.t_rest.value();
    tile.t_top[slot] = state.t_top;
}
