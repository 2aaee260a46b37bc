//! Tasks whose vectors run along the classes: the kernels of [`crate::kernels::rows`].

use crate::array::{Element, Out, Span, SpanMut};
use crate::kernels::finish::{Tile, WIDTH, finish};
use crate::kernels::rows::{self, Beside, Direct, Gathered, Known, Row, Setup, Source, Stream, Wanted};
use crate::kernels::state::{Reference, State};
use crate::simd::Isa;
use crate::tunables::tunables;

use super::job::{Job, Kind, OUT, Stores, X, prepare};
use super::plan::Path;
use super::scratch::{Buffers, Scratch, Work, room};
use super::source::{dense_row, gather_logits, scatter, shared_stream, unbend, unbend_patches};

/// Rows of so many classes are long: what was read of them is not in the first cache any more when they are written.
const LONG: usize = 4 * rows::BLOCK;

/// How the results of a call are made from rows that are read and written in place.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// No results of the logits' size, or not in place.
    Other,
    /// From the exponentials, kept where the results will stand.
    Stored,
    /// From the exponentials, computed again.
    Anew,
    /// From the logits.
    Logs,
}

fn way<T: Element, E: Element>(job: &Job, direct: bool) -> Way {
    if job.out.is_none() || !direct || job.write != Path::Rows {
        return Way::Other;
    }
    if job.kind == Kind::LogSoftmax {
        Way::Logs
    } else if E::DTYPE == T::DTYPE && (job.stores != Stores::PastAnew || job.classes.size < LONG) {
        Way::Stored
    } else {
        Way::Anew
    }
}

/// A row that was read and is to be written, a block at a time.
struct Pending<'p, S: Isa, E: Element>
where
    E::Acc: Work,
{
    setup: &'p Setup<S, E::Acc>,
    way: Way,
    row: Row,
    x: Span<'p, E>,
    out: SpanMut<'p, E>,
    /// The same memory, as the type that exponentials are stored in.
    e: SpanMut<'p, E::Acc>,
    references: &'p [Reference],
    past: bool,
}

impl<S: Isa, E: Element> Beside for Option<Pending<'_, S, E>>
where
    E::Acc: Work,
{
    #[inline(always)]
    fn block(&mut self, index: usize) {
        if let Some(pending) = self {
            pending.emit(index, Span::of(&[]));
        }
    }
}

impl<S: Isa, E: Element> Pending<'_, S, E>
where
    E::Acc: Work,
{
    #[inline(always)]
    fn emit(&self, index: usize, t: Span<E::Acc>) {
        let out = block(self.out.read(), index);
        let dst = self.out.part(out.0, out.1);
        match self.way {
            Way::Stored => self.setup.emit_stored(&self.row, self.references[index], self.e.part(out.0, out.1), t, dst),
            Way::Logs => self.setup.emit_log(&self.row, self.x.part(out.0, out.1), dst, self.past),
            _ => self.setup.emit_exp(&self.row, self.x.part(out.0, out.1), t, dst, self.past),
        }
    }
}

/// Start and length of block `index` of a row.
#[inline(always)]
fn block<E: Element>(row: Span<E>, index: usize) -> (usize, usize) {
    let start = index * rows::BLOCK;
    (start, rows::BLOCK.min(row.len() - start))
}

/// Works on rows that are finished together. `next` is the row after them, whose first maximum goes to `known`.
#[inline(always)]
pub(super) fn work_rows<S: Isa, E: Element<Acc = T>, T: Work, const DIRECT: bool>(
    isa: S,
    job: &Job,
    kept: &[usize],
    next: Option<usize>,
    known: &mut Known<S, T>,
    scratch: &mut Scratch,
) {
    let (tile, buffers, references) = T::buffers(scratch);
    // The logits of one or two targets are read with their blocks.
    let late = DIRECT && job.terms.entries <= 2;
    prepare::<T>(job, kept, tile, !late);
    let setup = Setup::<S, T>::new(isa, job.terms.scale);
    let classes = job.classes.size;
    let blocks = classes.div_ceil(rows::BLOCK);
    shared_stream(job, &mut buffers.shared);
    room(&mut buffers.dense, rows::BLOCK);
    room(&mut buffers.block, rows::BLOCK);
    room(&mut buffers.x, rows::BLOCK);
    let way = way::<T, E>(job, DIRECT);
    if way == Way::Stored && references.len() < blocks * kept.len() {
        references.resize(blocks * kept.len(), Reference { k: 0.0, b: 0.0 });
    }
    let beside = way != Way::Other && !job.terms.dense && job.stores != Stores::Cached && classes >= tunables().beside_from;
    let mut left = &mut references[..];
    let mut pending: Option<Pending<S, E>> = None;
    for (slot, &row) in kept.iter().enumerate() {
        let (own, rest) = left.split_at_mut(if way == Way::Stored { blocks } else { 0 });
        left = rest;
        let dst = match job.out {
            Some(out) if way == Way::Stored => out.span::<T>(job.rows.offset(OUT, row), classes),
            _ => SpanMut::of(&mut []),
        };
        let mut classes_of = [0; 2];
        let mut entries = 0;
        if late && let Some(labels) = &job.labels {
            for (j, class, _) in labels.row(row) {
                classes_of[j] = class;
                entries = j + 1;
            }
        }
        let mut wanted = Wanted { classes: &classes_of[..entries], logits: [0.0; 2] };
        let Buffers { x, dense, shared, .. } = buffers;
        let dense = Dense { job, row, scratch: dense, shared };
        let state = if DIRECT {
            let span = |row| job.x.span::<E>(job.rows.offset(X, row), classes);
            let mut source = Direct { row: span(row), after: kept.get(slot + 1).copied().or(next).map_or_else(|| Span::of(&[]), span) };
            reduce_row(&setup, dense, &mut source, dst, own, known, &mut wanted, &mut pending, way == Way::Stored)
        } else {
            let mut fill = |index: usize, dst: &mut [T]| gather_logits(job, row, index * rows::BLOCK, dst, dst.len(), 1);
            let mut source = Gathered { fill: &mut fill, scratch: &mut x[..], classes };
            reduce_row(&setup, dense, &mut source, dst, own, known, &mut wanted, &mut (), false)
        };
        put(tile, slot, &state);
        for j in 0..entries {
            tile.x_target[j * WIDTH + slot] = wanted.logits[j];
        }
        if DIRECT
            && beside
            && let Some(out) = job.out
        {
            finish(isa, &job.terms, tile, slot, slot + 1);
            let (from, to) = (job.rows.offset(X, row), job.rows.offset(OUT, row));
            pending = Some(Pending {
                setup: &setup,
                way,
                row: row_of(job, tile, slot),
                x: job.x.span::<E>(from, classes),
                out: out.span::<E>(to, classes),
                e: dst,
                references: own,
                past: job.stores != Stores::Cached,
            });
        }
    }
    if beside {
        for index in 0..blocks {
            pending.block(index);
        }
        return fence(isa, job);
    }
    finish(isa, &job.terms, tile, 0, kept.len());
    if job.out.is_some() {
        unbend_patches(job, kept, tile);
    }
    let Some(out) = job.out else { return };
    for (slot, &row) in kept.iter().enumerate() {
        emit_row::<S, E, T, DIRECT>(&setup, job, out, row, row_of(job, tile, slot), way, &references[..], slot * blocks, buffers);
    }
    fence(isa, job);
}

#[inline(always)]
fn fence<S: Isa>(isa: S, job: &Job) {
    if job.stores != Stores::Cached {
        isa.fence();
    }
}

fn row_of(job: &Job, tile: &Tile, slot: usize) -> Row {
    let most = if job.kind == Kind::Softmax { 1.0 } else { f64::INFINITY };
    Row {
        max: tile.max[slot],
        reference: Reference { k: tile.k[slot], b: tile.b[slot] },
        log_sum: tile.log_sum[slot],
        a: tile.a[slot],
        slope: if job.kind == Kind::Loss { tile.slope[slot] } else { 0.0 },
        most,
    }
}

/// Where the dense stream of a row comes from.
struct Dense<'d, 'a, T> {
    job: &'d Job<'a>,
    row: usize,
    scratch: &'d mut [T],
    shared: &'d [T],
}

#[inline(always)]
fn reduce_row<S: Isa, E: Element<Acc = T>, T: Work, Src: Source<E>, B: Beside>(
    setup: &Setup<S, T>,
    dense: Dense<T>,
    x: &mut Src,
    dst: SpanMut<T>,
    references: &mut [Reference],
    known: &mut Known<S, T>,
    wanted: &mut Wanted,
    beside: &mut B,
    store: bool,
) -> State {
    let Dense { job, row, scratch, shared } = dense;
    let classes = job.classes.size;
    let fill: &mut dyn FnMut(usize, &mut [T]) = &mut |index, dst: &mut [T]| dense_row(job, row, index * rows::BLOCK, dst, dst.len(), 1);
    let mut stream = if !job.terms.dense {
        Stream::None
    } else if !job.own_dense() {
        Stream::Slice(Span::of(&shared[..classes]))
    } else {
        Stream::Gathered(Gathered { fill, scratch, classes })
    };
    let t = &mut stream;
    match (job.terms.dense, store && E::DTYPE == T::DTYPE) {
        (false, false) => rows::reduce::<S, E, T, _, _, false, false>(setup, classes, x, t, dst, references, known, wanted, beside),
        (false, true) => rows::reduce::<S, E, T, _, _, false, true>(setup, classes, x, t, dst, references, known, wanted, beside),
        (true, false) => rows::reduce::<S, E, T, _, _, true, false>(setup, classes, x, t, dst, references, known, wanted, &mut ()),
        (true, true) => rows::reduce::<S, E, T, _, _, true, true>(setup, classes, x, t, dst, references, known, wanted, &mut ()),
    }
}

fn dense_block<'b, T: Work>(job: &Job, row: usize, index: usize, dense: &'b mut [T], shared: &'b [T]) -> Span<'b, T> {
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

/// Writes a row after it was finished.
#[inline(always)]
fn emit_row<S: Isa, E: Element<Acc = T>, T: Work, const DIRECT: bool>(
    setup: &Setup<S, T>,
    job: &Job,
    out: &Out,
    row: usize,
    values: Row,
    way: Way,
    references: &[Reference],
    first: usize,
    buffers: &mut Buffers<T>,
) {
    let classes = job.classes.size;
    let (from, to) = (job.rows.offset(X, row), job.rows.offset(OUT, row));
    for index in 0..classes.div_ceil(rows::BLOCK) {
        let start = index * rows::BLOCK;
        let n = rows::BLOCK.min(classes - start);
        let Buffers { x, dense, shared, block } = buffers;
        let t = dense_block(job, row, index, dense, shared);
        if DIRECT && way != Way::Other {
            let e = if way == Way::Stored { out.span::<T>(to, classes) } else { SpanMut::of(&mut []) };
            let pending = Pending {
                setup,
                way,
                row: values,
                x: job.x.span::<E>(from, classes),
                out: out.span::<E>(to, classes),
                e,
                references: references.get(first..).unwrap_or_default(),
                past: job.stores != Stores::Cached,
            };
            pending.emit(index, t);
            continue;
        }
        // Not in place on at least one side: read into scratch, written from scratch.
        let block = &mut block[..n];
        let dst = SpanMut::of(block);
        if DIRECT {
            emit_block(setup, job, &values, job.x.span::<E>(from, classes).part(start, n), t, dst);
        } else {
            gather_logits(job, row, start, x, n, 1);
            emit_block(setup, job, &values, Span::of(&x[..n]), t, dst);
        }
        if job.bend.is_some() {
            unbend(job, row, start, block, n, 1);
        }
        scatter(out, &job.classes, to, start, block, n, 1);
    }
}

#[inline(always)]
fn emit_block<S: Isa, E: Element<Acc = T>, T: Work>(setup: &Setup<S, T>, job: &Job, values: &Row, x: Span<E>, t: Span<T>, dst: SpanMut<T>) {
    if job.kind == Kind::LogSoftmax {
        setup.emit_log(values, x, dst, false);
    } else {
        setup.emit_exp(values, x, t, dst, false);
    }
}

fn put(tile: &mut Tile, slot: usize, state: &State) {
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
