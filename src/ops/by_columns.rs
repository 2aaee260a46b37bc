//! Tasks whose rows are adjacent, or whose classes are few and transposed into a tile: the kernels of [`crate::kernels::columns`].

use crate::array::{Columns, ColumnsMut, Element, Span};
use crate::kernels::columns::{self, Dense};
use crate::kernels::finish::{Tile, WIDTH, finish};
use crate::simd::Isa;

use super::job::{Job, Kind, OUT, PROBS, X, prepare};
use super::plan::Path;
use super::scratch::{Buffers, Scratch, Work, room};
use super::source::{dense_row, gather_logits, scatter, shared_stream, unbend, unbend_patches};

#[inline(always)]
pub(super) fn work_columns<S: Isa, E: Element<Acc = T>, T: Work>(isa: S, job: &Job, kept: &[usize], scratch: &mut Scratch) {
    let (tile, buffers, _) = T::buffers(scratch);
    prepare::<T>(job, kept, tile, true);
    shared_stream(job, &mut buffers.shared);
    let classes = job.classes.size;
    let n = kept.len();
    let few = classes <= columns::BLOCK;
    let direct = job.read == Path::Columns;
    let depth = classes.min(columns::BLOCK);
    let Buffers { x, dense, shared, .. } = buffers;
    let x: &mut [T] = room(x, depth.max(1) * WIDTH);
    if job.own_dense() && few {
        room(dense, depth.max(1) * WIDTH);
        for (slot, &row) in kept.iter().enumerate() {
            dense_row(job, row, 0, &mut dense[slot..], classes, WIDTH);
        }
    }
    let stream = if job.kind != Kind::Loss || !job.terms.dense {
        Dense::None
    } else if job.own_dense() && few {
        Dense::Tile(Columns::of(dense, WIDTH, classes, n))
    } else if let Some(probs) = job.probs {
        Dense::Tile(probs.columns::<T>(job.rows.offset(PROBS, kept[0]), job.classes.inner_stride(PROBS), classes, n))
    } else {
        Dense::Shared(Span::of(&shared[..classes]))
    };
    if !direct {
        for (slot, &row) in kept.iter().enumerate() {
            gather_logits(job, row, 0, &mut x[slot..], classes, WIDTH);
        }
    }
    // With few classes the exponentials stay in the tile; with many they are computed again, class by class.
    let store = few && job.out.is_some() && job.kind != Kind::LogSoftmax;
    let scale = job.terms.scale;
    if direct {
        let source = job.x.columns::<E>(job.rows.offset(X, kept[0]), job.classes.inner_stride(X), classes, n);
        reduce_columns::<S, E, T>(isa, scale, source, stream, ColumnsMut::of(x, WIDTH, depth, n), tile, store);
    } else {
        let room = ColumnsMut::of(x, WIDTH, depth, n);
        reduce_columns::<S, T, T>(isa, scale, room.read(), stream, room, tile, store);
    }
    finish(isa, &job.terms, tile, n);
    if job.out.is_some() {
        unbend_patches(job, kept, tile);
    }
    let Some(out) = job.out else { return };
    let write = direct && job.write == Path::Columns;
    let mut start = 0;
    while start < classes {
        let count = depth.min(classes - start);
        let part = match stream {
            Dense::None => Dense::None,
            Dense::Shared(span) => Dense::Shared(span.part(start, count)),
            Dense::Tile(columns) => Dense::Tile(columns.part(start, count)),
        };
        let source = || job.x.columns::<E>(job.rows.offset(X, kept[0]), job.classes.inner_stride(X), classes, n).part(start, count);
        let inner = job.classes.inner_stride(OUT);
        let target = || out.columns::<E>(job.rows.offset(OUT, kept[0]) + start as isize * inner, inner, count, n);
        let scratch = ColumnsMut::of(&mut x[..], WIDTH, count, n);
        match (job.kind == Kind::LogSoftmax, store, direct, write) {
            (true, _, true, true) => columns::emit_log(isa, scale, source(), tile, target()),
            (true, _, true, false) => columns::emit_log(isa, scale, source(), tile, scratch),
            (true, _, false, _) => columns::emit_log(isa, scale, scratch.read(), tile, scratch),
            (false, true, _, true) => columns::emit_stored(isa, scratch.read(), part, tile, target()),
            (false, true, _, false) => columns::emit_stored(isa, scratch.read(), part, tile, scratch),
            (false, false, _, true) => columns::emit_exp(isa, scale, source(), part, tile, target()),
            (false, false, _, false) => columns::emit_exp(isa, scale, source(), part, tile, scratch),
        }
        if !write {
            for (slot, &row) in kept.iter().enumerate() {
                if job.bend.is_some() {
                    unbend(job, row, start, &mut x[slot..], count, WIDTH);
                }
                scatter(out, &job.classes, job.rows.offset(OUT, row), start, &x[slot..], count, WIDTH);
            }
        }
        start += count;
    }
}

#[inline(always)]
pub(super) fn reduce_columns<S: Isa, E: Element<Acc = T>, T: Work>(
    isa: S,
    scale: f64,
    x: Columns<E>,
    dense: Dense<T>,
    e: ColumnsMut<T>,
    tile: &mut Tile,
    store: bool,
) {
    match (dense.is_some(), store) {
        (false, false) => columns::reduce::<S, E, T, false, false>(isa, scale, x, dense, e, tile),
        (false, true) => columns::reduce::<S, E, T, false, true>(isa, scale, x, dense, e, tile),
        (true, false) => columns::reduce::<S, E, T, true, false>(isa, scale, x, dense, e, tile),
        (true, true) => columns::reduce::<S, E, T, true, true>(isa, scale, x, dense, e, tile),
    }
}
