//! reduce → finish → emit over all rows: the one loop behind softmax, log-softmax, logsumexp and cross-entropy.

use std::cell::Cell;
use std::sync::Mutex;

use crate::array::{Array, Columns, ColumnsMut, DType, Dims, Element, Float, FromNumber, Out, Span, SpanMut, Vf};
use crate::kernels::columns::{self, Dense};
use crate::kernels::finish::{Terms, Tile, WIDTH, finish};
use crate::kernels::math::tanh_sech2;
use crate::kernels::rows::{self, Direct, Gathered, Setup, Source, Stream};
use crate::kernels::state::{Pair, Reference, State, Summand};
use crate::simd::{Isa, Kernel, Level, Vector};
use crate::threads;

use super::api::{Error, Exec, Grad, GradOutput, LossOptions, Reduction, Target};
use super::plan::{Axes, Path, path, with_axes};
use super::targets::{Labels, RowWeights, read_all, row_shape};
use super::with_element;

/// Elements per task: enough to be worth handing to another thread, and a function of the shape alone, so that the bits do not depend on the threads.
const TASK: usize = 1 << 15;

/// What is computed of every row.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Softmax,
    LogSoftmax,
    LogSumExp,
    Loss,
}

/// Operands of the class axes and of the row axes.
const X: usize = 0;
const OUT: usize = 1;
const PROBS: usize = 2;
/// Operands of the row axes alone.
const RESULT: usize = 3;
const UPSTREAM: usize = 4;
/// Operand of both again.
const MASK: usize = 5;

struct Job<'a> {
    kind: Kind,
    x: &'a Array<'a>,
    out: Option<&'a Out<'a>>,
    probs: Option<&'a Array<'a>>,
    result: Option<&'a Out<'a>>,
    upstream: Option<&'a Array<'a>>,
    level: Level,
    classes: Axes,
    rows: Axes,
    read: Path,
    write: Path,
    labels: Option<Labels>,
    weights: RowWeights,
    bend: Bend<'a>,
    /// Class weights, empty when all are 1.
    weight: Vec<f64>,
    /// Share of the target that stays where it is: 1 − e.
    keep: f64,
    /// Share per class that smoothing adds: e / C.
    spread: f64,
    /// Multiplies every gradient: upstream / divisor.
    g: f64,
    terms: Terms,
    /// A function of the shape alone.
    rows_per_task: usize,
}

/// What happens to the logits before anything else: they reach the kernels as gathered blocks that are already bent.
#[derive(Clone, Copy, Default)]
struct Bend<'a> {
    softcap: Option<f64>,
    mask: Option<&'a Array<'a>>,
}

impl Bend<'_> {
    fn is_some(self) -> bool {
        self.softcap.is_some() || self.mask.is_some()
    }
}

/// `cap·tanh(x/cap)` of a strided run in place, or the derivative 1 − tanh² there.
struct Softcap<'a, T> {
    cap: f64,
    slope: bool,
    x: &'a mut [T],
}

impl<T: Work> Kernel for Softcap<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        let step = Vf::<S, T>::LANES;
        let cap = Vf::<S, T>::splat(isa, T::from_f64(self.cap));
        let span = SpanMut::of(self.x);
        let mut i = 0;
        while i < span.read().len() {
            let n = step.min(span.read().len() - i);
            let (tanh, sech2) = tanh_sech2(isa, span.read().load_partial(isa, i, n, T::ZERO) / cap);
            span.store_partial(isa, i, n, if self.slope { sech2 } else { tanh * cap });
            i += n;
        }
    }
}

/// Reads classes of a row of logits into scratch, bent.
fn gather_logits<T: Work>(job: &Job, row: usize, start: usize, dst: &mut [T], n: usize, step: usize) {
    gather(job.x, X, &job.classes, job.rows.offset(X, row), start, dst, n, step);
    if !job.bend.is_some() {
        return;
    }
    let mut block = [T::ZERO; rows::BLOCK];
    if let Some(cap) = job.bend.softcap {
        for i in 0..n {
            block[i] = dst[i * step];
        }
        job.level.run(Softcap { cap, slope: false, x: &mut block[..n] });
        for i in 0..n {
            dst[i * step] = block[i];
        }
    }
    if let Some(mask) = job.bend.mask {
        gather(mask, MASK, &job.classes, job.rows.offset(MASK, row), start, &mut block, n, 1);
        for i in (0..n).filter(|&i| block[i] == T::ZERO) {
            dst[i * step] = T::NEG_INF;
        }
    }
}

/// Multiplies gradients of a row in scratch by what bending did to the logits. Read before the logits are overwritten.
fn unbend<T: Work>(job: &Job, row: usize, start: usize, gradient: &mut [T], n: usize, step: usize) {
    let mut block = [T::ZERO; rows::BLOCK];
    if let Some(cap) = job.bend.softcap {
        gather(job.x, X, &job.classes, job.rows.offset(X, row), start, &mut block, n, 1);
        job.level.run(Softcap { cap, slope: true, x: &mut block[..n] });
        for i in 0..n {
            gradient[i * step] = T::from_f64(gradient[i * step].to_f64() * block[i].to_f64());
        }
    }
    if let Some(mask) = job.bend.mask {
        gather(mask, MASK, &job.classes, job.rows.offset(MASK, row), start, &mut block, n, 1);
        for i in (0..n).filter(|&i| block[i] == T::ZERO) {
            gradient[i * step] = T::ZERO;
        }
    }
}

/// The same for the exact values at the maximum and the targets.
fn unbend_patches(job: &Job, kept: &[usize], tile: &mut Tile) {
    if !job.bend.is_some() {
        return;
    }
    for (slot, &row) in kept.iter().enumerate() {
        let at = |class: usize, value: &mut f64| {
            let mut one = [*value];
            unbend::<f64>(job, row, class, &mut one, 1, 1);
            *value = one[0];
        };
        if job.terms.dense && tile.arg[slot] < job.classes.size as f64 {
            at(tile.arg[slot] as usize, &mut tile.top[slot]);
        }
        if let Some(labels) = &job.labels {
            for (j, class, _) in labels.row(row) {
                at(class, &mut tile.patch[j * WIDTH + slot]);
            }
        }
    }
}

/// Scratch of one thread, kept between calls.
#[derive(Default)]
struct Scratch {
    tile: Tile,
    single: Buffers<f32>,
    double: Buffers<f64>,
    references: Vec<Reference>,
}

#[derive(Default)]
struct Buffers<T> {
    x: Vec<T>,
    dense: Vec<T>,
    shared: Vec<T>,
    block: Vec<T>,
}

thread_local! {
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

/// Float types with scratch buffers.
trait Work: Summand + FromNumber {
    fn buffers(scratch: &mut Scratch) -> (&mut Tile, &mut Buffers<Self>, &mut Vec<Reference>);
}
impl Work for f32 {
    fn buffers(scratch: &mut Scratch) -> (&mut Tile, &mut Buffers<Self>, &mut Vec<Reference>) {
        (&mut scratch.tile, &mut scratch.single, &mut scratch.references)
    }
}
impl Work for f64 {
    fn buffers(scratch: &mut Scratch) -> (&mut Tile, &mut Buffers<Self>, &mut Vec<Reference>) {
        (&mut scratch.tile, &mut scratch.double, &mut scratch.references)
    }
}

fn room<T: Float>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::ZERO);
    }
    &mut buffer[..len]
}

/// Rows of one task, as a kernel.
struct Chunk<'j, 'a, E> {
    job: &'j Job<'a>,
    first: usize,
    last: usize,
    scratch: &'j mut Scratch,
    element: core::marker::PhantomData<E>,
}

impl<E: Element> Kernel for Chunk<'_, '_, E>
where
    E::Acc: Work,
{
    type Output = Pair;
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) -> Pair {
        let Chunk { job, first, last, scratch, .. } = self;
        let mut sum = Pair::default();
        let mut kept = [0; WIDTH];
        let by_rows = job.classes.size > columns::BLOCK && job.read != Path::Columns;
        // Rows that are finished together stay in the cache until they are written.
        let group = if by_rows { (TASK / 2 / job.classes.size).clamp(1, 16) } else { WIDTH };
        let mut row = first;
        while row < last {
            let mut n = 0;
            let start = row;
            if !by_rows && job.read == Path::Columns {
                let inner = job.rows.inner_len();
                let run = group.min(last - row).min(inner - row % inner);
                let mut any = false;
                for r in row..row + run {
                    kept[r - row] = r;
                    any |= job.weights.kept(job.labels.as_ref(), r);
                }
                row += run;
                n = if any { run } else { 0 };
            } else {
                while row < last && n < group {
                    if job.weights.kept(job.labels.as_ref(), row) {
                        kept[n] = row;
                        n += 1;
                    }
                    row += 1;
                }
            }
            let kept = &kept[..n];
            if n > 0 {
                if by_rows {
                    work_rows::<S, E, E::Acc>(isa, job, kept, scratch);
                } else {
                    work_columns::<S, E, E::Acc>(isa, job, kept, scratch);
                }
            }
            settle(job, start, row, kept, &scratch.tile, &mut sum);
        }
        sum
    }
}

/// Writes row results, zero gradients of ignored rows and the patches, and sums the losses.
fn settle(job: &Job, start: usize, end: usize, kept: &[usize], tile: &Tile, sum: &mut Pair) {
    let single = job.x.dtype().row_dtype() == DType::F32;
    let mut at = 0;
    for row in start..end {
        let here = at < kept.len() && kept[at] == row;
        let slot = at;
        at += usize::from(here);
        // A tile of adjacent columns carries its ignored rows along.
        if here && (job.kind != Kind::Loss || job.weights.kept(job.labels.as_ref(), row)) {
            let value = match job.kind {
                // The sum over no classes.
                Kind::Loss if job.classes.size == 0 => 0.0,
                Kind::Loss => tile.loss[slot],
                _ => tile.lse[slot],
            };
            let value = if single { f64::from(value as f32) } else { value };
            sum.add(value);
            if let Some(result) = job.result {
                result.set(job.rows.offset(RESULT, row), value);
            }
            if job.kind == Kind::Loss
                && let Some(out) = job.out
            {
                let base = job.rows.offset(OUT, row);
                if job.terms.dense && tile.ties[slot] == 1.0 {
                    out.set(base + job.classes.offset(OUT, tile.arg[slot] as usize), tile.top[slot]);
                }
                if let Some(labels) = &job.labels {
                    for (j, class, _) in labels.row(row) {
                        out.set(base + job.classes.offset(OUT, class), tile.patch[j * WIDTH + slot]);
                    }
                }
            }
        } else {
            if let Some(result) = job.result {
                result.set(job.rows.offset(RESULT, row), 0.0);
            }
            if let Some(out) = job.out {
                let base = job.rows.offset(OUT, row);
                job.classes.runs(OUT, 0, job.classes.size, |offset, stride, _, n| out.zero(base + offset, stride, n));
            }
        }
    }
}

/// Fills the per-row inputs of `finish`. Reads the target logits, which the reduction may overwrite.
fn prepare<E: Work>(job: &Job, kept: &[usize], tile: &mut Tile) {
    let entries = job.terms.entries;
    tile.reserve(entries);
    if job.kind != Kind::Loss {
        return;
    }
    for (slot, &row) in kept.iter().enumerate() {
        let weight = job.weights.sample_weight(row);
        tile.weight[slot] = weight;
        let upstream = job.upstream.map_or(1.0, |g| g.get::<f64>(job.rows.offset(UPSTREAM, row)));
        tile.g[slot] = job.g * weight * upstream;
        let Some(labels) = &job.labels else { continue };
        let base = job.rows.offset(X, row);
        let spread = row_spread(job, row);
        for j in 0..entries {
            tile.mass[j * WIDTH + slot] = 0.0;
            tile.mass_all[j * WIDTH + slot] = 0.0;
            tile.x_target[j * WIDTH + slot] = 0.0;
        }
        for (j, class, share) in labels.row(row) {
            let w = job.weight.get(class).copied().unwrap_or(1.0);
            let mass = share * job.keep * w;
            let at = j * WIDTH + slot;
            tile.mass[at] = mass;
            tile.x_target[at] = if job.bend.is_some() {
                let mut x = [E::ZERO];
                gather_logits(job, row, class, &mut x, 1, 1);
                x[0].to_f64()
            } else {
                job.x.get::<f64>(base + job.classes.offset(X, class))
            };
            let mut all = mass;
            if entries > 1 {
                all = labels.row(row).filter(|&(_, other, _)| other == class).map(|(_, _, share)| share * job.keep * w).sum();
            }
            tile.mass_all[at] = all + spread * w;
        }
    }
}

/// Share of the target that smoothing gives each class of a row: e over the classes that take part.
fn row_spread(job: &Job, row: usize) -> f64 {
    let Some(mask) = job.bend.mask else { return job.spread };
    if job.spread == 0.0 {
        return 0.0;
    }
    let mut block = [0_f32; rows::BLOCK];
    let mut count = 0;
    for start in (0..job.classes.size).step_by(rows::BLOCK) {
        let n = rows::BLOCK.min(job.classes.size - start);
        gather(mask, MASK, &job.classes, job.rows.offset(MASK, row), start, &mut block, n, 1);
        count += block[..n].iter().filter(|&&kept| kept != 0.0).count();
    }
    job.spread * job.classes.size as f64 / count as f64
}

/// Reads classes of a row into scratch.
#[inline]
fn gather<T: FromNumber>(array: &Array, operand: usize, classes: &Axes, base: isize, start: usize, dst: &mut [T], n: usize, step: usize) {
    if classes.is_line() {
        let stride = classes.inner_stride(operand);
        return array.read(base + start as isize * stride, stride, n, dst, step);
    }
    classes.runs(operand, start, n, |offset, stride, at, count| {
        array.read(base + offset, stride, count, &mut dst[at * step..], step);
    });
}

/// Writes classes of a row from scratch.
#[inline]
fn scatter<T: Float>(out: &Out, classes: &Axes, base: isize, start: usize, src: &[T], n: usize, step: usize) {
    if classes.is_line() {
        let stride = classes.inner_stride(OUT);
        return out.write(base + start as isize * stride, stride, n, src, step);
    }
    classes.runs(OUT, start, n, |offset, stride, at, count| out.write(base + offset, stride, count, &src[at * step..], step));
}

/// The dense stream T = w·(P·(1 − e) + e/C) of a row, for classes `start..` in `dst[0], dst[step], …`; P = 0 without probabilities.
fn dense_row<T: Work>(job: &Job, row: usize, start: usize, dst: &mut [T], n: usize, step: usize) {
    if let Some(probs) = job.probs {
        gather(probs, PROBS, &job.classes, job.rows.offset(PROBS, row), start, dst, n, step);
        if job.keep == 1.0 && job.spread == 0.0 && job.weight.is_empty() {
            return;
        }
    }
    let spread = row_spread(job, row);
    let mut mask = [T::ONE; rows::BLOCK];
    if let Some(array) = job.bend.mask {
        gather(array, MASK, &job.classes, job.rows.offset(MASK, row), start, &mut mask, n, 1);
    }
    for i in 0..n {
        let p = if job.probs.is_some() { dst[i * step].to_f64() } else { 0.0 };
        let w = job.weight.get(start + i).copied().unwrap_or(1.0);
        let spread = if mask[i] == T::ZERO { 0.0 } else { spread };
        dst[i * step] = T::from_f64(w * (p * job.keep + spread));
    }
}

/// The dense stream that is the same for every row: `u_c = w_c·e/C`.
fn shared_stream<T: Float>(job: &Job, shared: &mut Vec<T>) {
    if job.terms.dense && !job.own_dense() {
        room(shared, job.classes.size);
        for (c, u) in shared[..job.classes.size].iter_mut().enumerate() {
            *u = T::from_f64(job.spread * job.weight.get(c).copied().unwrap_or(1.0));
        }
    }
}

#[inline(always)]
fn work_rows<S: Isa, E: Element<Acc = T>, T: Work>(isa: S, job: &Job, kept: &[usize], scratch: &mut Scratch) {
    let (tile, buffers, references) = T::buffers(scratch);
    prepare::<T>(job, kept, tile);
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
    for (slot, &row) in kept.iter().enumerate() {
        let base = job.rows.offset(X, row);
        let refs = if store { &mut references[slot * blocks..(slot + 1) * blocks] } else { &mut [][..] };
        let dst = match job.out {
            Some(out) if store => out.span::<T>(job.rows.offset(OUT, row), classes),
            _ => SpanMut::of(&mut []),
        };
        let Buffers { x, dense, shared, .. } = buffers;
        let state = if job.read == Path::Rows {
            let span = job.x.span::<E>(base, classes);
            reduce_row::<S, E, T, _>(&setup, job, row, &mut Direct(span), dense, shared, dst, refs, Some(span), store)
        } else {
            let mut fill = |index: usize, dst: &mut [T]| gather_logits(job, row, index * rows::BLOCK, dst, dst.len(), 1);
            let mut source = Gathered { fill: &mut fill, scratch: &mut x[..], classes };
            reduce_row::<S, T, T, _>(&setup, job, row, &mut source, dense, shared, SpanMut::of(&mut []), refs, None, false)
        };
        put(tile, slot, &state);
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
fn reduce_row<S: Isa, E: Element<Acc = T>, T: Work, Src: Source<E>>(
    setup: &Setup<S, T>,
    job: &Job,
    row: usize,
    x: &mut Src,
    dense: &mut [T],
    shared: &[T],
    dst: SpanMut<T>,
    references: &mut [Reference],
    ahead: Option<Span<E>>,
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
        (false, false) => rows::reduce::<S, E, T, _, false, false>(setup, classes, x, t, dst, references, ahead),
        (false, true) => rows::reduce::<S, E, T, _, false, true>(setup, classes, x, t, dst, references, ahead),
        (true, false) => rows::reduce::<S, E, T, _, true, false>(setup, classes, x, t, dst, references, ahead),
        (true, true) => rows::reduce::<S, E, T, _, true, true>(setup, classes, x, t, dst, references, ahead),
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

#[inline(always)]
fn emit_row<S: Isa, E: Element<Acc = T>, O: Element<Acc = T>, T: Work>(
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

#[inline(always)]
fn work_columns<S: Isa, E: Element<Acc = T>, T: Work>(isa: S, job: &Job, kept: &[usize], scratch: &mut Scratch) {
    let (tile, buffers, _) = T::buffers(scratch);
    prepare::<T>(job, kept, tile);
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
fn reduce_columns<S: Isa, E: Element<Acc = T>, T: Work>(
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

impl<'a> Job<'a> {
    /// Whether every row has a dense stream of its own.
    fn own_dense(&self) -> bool {
        self.terms.dense && (self.probs.is_some() || self.bend.mask.is_some())
    }

    /// A job without targets. `operands` are out, probs, result and upstream strides, in the logits' axes.
    fn new(
        kind: Kind,
        x: &'a Array<'a>,
        axes: &[usize],
        out: Option<&'a Out<'a>>,
        probs: Option<&'a Array<'a>>,
        result: Option<&'a Out<'a>>,
        upstream: Option<&'a Array<'a>>,
        bend: Bend<'a>,
        level: Level,
    ) -> Result<Self, Error> {
        let shape = x.shape();
        let ndim = shape.len();
        if axes.iter().any(|&axis| axis >= ndim) || !x.dtype().is_float() {
            return Err(Error::Invalid("axis or dtype of the logits"));
        }
        let rows_shape = row_shape(shape, axes);
        for like in out.iter().map(|out| out.array()).chain(probs) {
            if like.shape() != shape || !like.dtype().is_float() {
                return Err(Error::Invalid("an array does not have the logits' shape"));
            }
        }
        for rows in result.iter().map(|out| out.array()).chain(upstream) {
            if rows.shape() != &rows_shape[..] || !rows.dtype().is_float() {
                return Err(Error::Invalid("an array does not have the shape of the rows"));
            }
        }
        if out.is_some_and(|out| out.array().dtype() != x.dtype()) || result.is_some_and(|r| r.array().dtype() != x.dtype().row_dtype()) {
            return Err(Error::Invalid("dtype of a result"));
        }
        let strides = x.strides();
        let like = |array: Option<&Array>| array.map_or_else(|| strides.into(), |a| a.strides().into());
        if bend.mask.is_some_and(|mask| mask.shape() != shape) {
            return Err(Error::Invalid("where does not have the logits' shape"));
        }
        let none = with_axes(&[], ndim, &(0..ndim).collect::<Vec<_>>());
        let reduced = |array: Option<&Array>| array.map_or_else(|| none.clone(), |a| with_axes(a.strides(), ndim, axes));
        let operands: [Dims<isize>; 5] =
            [strides.into(), like(out.map(Out::array)), like(probs), reduced(result.map(Out::array)), reduced(upstream)];
        let views: [&[isize]; 5] = [&operands[0], &operands[1], &operands[2], &operands[3], &operands[4]];
        // Operands that are not there must not keep axes apart: they alias the logits for whole arrays and are left out for rows.
        let mut present = vec![views[0], views[1], views[2]];
        let absent = views[0];
        present.push(if result.is_some() { views[3] } else { absent });
        present.push(if upstream.is_some() { views[4] } else { absent });
        let mask_strides: Dims<isize> = like(bend.mask);
        present.push(&mask_strides);
        let classes = Axes::new(shape, &present_classes(&present, bend.mask.is_some()), axes.iter().copied());
        let rows = Axes::new(shape, &present, (0..ndim).filter(|axis| !axes.contains(axis)));
        let mut read = path(x, X, &classes, &rows);
        let mut write = out.map_or(read, |out| path(out.array(), OUT, &classes, &rows));
        if read == Path::Columns && classes.size > columns::BLOCK {
            // The tile of probabilities must be readable in place, as it would not fit a bounded block.
            if let Some(probs) = probs
                && (probs.dtype() != x.dtype().row_dtype() || path(probs, PROBS, &classes, &rows) != Path::Columns)
            {
                read = Path::Gathered;
            }
        }
        // A class axis of length 1 is adjacent and strided at once; with few classes only columns matter.
        let columns_of =
            |array: &Array, operand| array.is_plain() && classes.is_line() && rows.inner_stride(operand) == array.dtype().size() as isize;
        if classes.size <= columns::BLOCK {
            if columns_of(x, X) && (classes.size == 1 || read != Path::Rows) {
                read = Path::Columns;
            }
            if out.is_some_and(|out| columns_of(out.array(), OUT)) {
                write = Path::Columns;
            }
        }
        if bend.is_some() {
            (read, write) = (Path::Gathered, Path::Gathered);
        }
        let per_row = TASK / classes.size.max(1);
        let rows_per_task = if per_row >= WIDTH { per_row / WIDTH * WIDTH } else { per_row.max(1) };
        let rows_per_task = if read == Path::Columns { rows_per_task.max(WIDTH) } else { rows_per_task };
        Ok(Self {
            kind,
            x,
            out,
            probs,
            result,
            upstream,
            level,
            bend,
            classes,
            rows,
            read,
            write,
            labels: None,
            weights: RowWeights::default(),
            weight: Vec::new(),
            keep: 1.0,
            spread: 0.0,
            g: 1.0,
            terms: Terms { scale: 1.0, z_loss: 0.0, entries: 0, dense: false, loss: kind == Kind::Loss },
            rows_per_task,
        })
    }

    /// Runs over all rows and returns the sum of the row results.
    fn run(&self, exec: &Exec) -> Result<f64, Error> {
        let tasks = self.rows.size.div_ceil(self.rows_per_task);
        let work = |task: usize| -> Result<Pair, Error> {
            let first = task * self.rows_per_task;
            let last = self.rows.size.min(first + self.rows_per_task);
            let mut scratch = SCRATCH.take().unwrap_or_default();
            let sum = with_element!(self.x.dtype(), E => {
                exec.level.run(Chunk::<E> { job: self, first, last, scratch: &mut scratch, element: core::marker::PhantomData })
            });
            SCRATCH.set(Some(scratch));
            Ok(sum)
        };
        let mut total = Pair::default();
        if tasks < 2 || exec.threads <= 1 || self.rows.size * self.classes.size < 2 * TASK {
            for task in 0..tasks {
                total.merge(work(task)?);
            }
            return Ok(total.value());
        }
        let partial = Mutex::new(vec![Pair::default(); tasks]);
        threads::for_each(exec.threads, tasks, &|task| {
            // The dtype was checked when the job was made.
            if let Ok(sum) = work(task)
                && let Ok(mut partial) = partial.lock()
            {
                partial[task] = sum;
            }
        });
        for sum in partial.into_inner().unwrap_or_default() {
            total.merge(sum);
        }
        Ok(total.value())
    }
}

/// The operands that have class axes; the row operands stand for themselves only among rows.
fn present_classes<'s>(strides: &[&'s [isize]], mask: bool) -> Vec<&'s [isize]> {
    let mut classes = strides.to_vec();
    (classes[RESULT], classes[UPSTREAM]) = (strides[X], strides[X]);
    if !mask {
        classes[MASK] = strides[X];
    }
    classes
}

/// `log Σ exp(x)` over `axes`; `out` has the other axes.
pub fn logsumexp(exec: &Exec, x: &Array, axes: &[usize], out: &Out) -> Result<(), Error> {
    Job::new(Kind::LogSumExp, x, axes, None, None, Some(out), None, Bend::default(), exec.level)?.run(exec).map(|_| ())
}

/// `exp(x − logsumexp(x))` over `axes`.
pub fn softmax(exec: &Exec, x: &Array, axes: &[usize], out: &Out) -> Result<(), Error> {
    Job::new(Kind::Softmax, x, axes, Some(out), None, None, None, Bend::default(), exec.level)?.run(exec).map(|_| ())
}

/// `x − logsumexp(x)` over `axes`.
pub fn log_softmax(exec: &Exec, x: &Array, axes: &[usize], out: &Out) -> Result<(), Error> {
    Job::new(Kind::LogSoftmax, x, axes, Some(out), None, None, None, Bend::default(), exec.level)?.run(exec).map(|_| ())
}

/// Cross-entropy of logits; the reduced loss, or 0 when the rows go to `rows`. Everything is checked before anything is written.
pub fn cross_entropy(
    exec: &Exec,
    logits: &Array,
    axis: usize,
    target: &Target,
    options: &LossOptions,
    rows: Option<&Out>,
    grad: Option<&Grad>,
) -> Result<f64, Error> {
    let probs = if let Target::Probs(probs) = target { Some(probs) } else { None };
    let upstream = grad.and_then(|grad| if let GradOutput::Rows(rows) = &grad.grad_output { Some(rows) } else { None });
    let bend = Bend { softcap: options.softcap, mask: options.mask.as_ref() };
    let mut job = Job::new(Kind::Loss, logits, &[axis], grad.map(|grad| &grad.out), probs, rows, upstream, bend, exec.level)?;
    job.weight = options.weight.as_ref().map_or_else(Vec::new, read_all);
    if !job.weight.is_empty() && job.weight.len() != job.classes.size {
        return Err(Error::Invalid("weight must have one element per class"));
    }
    let labels = Labels::new(target, job.rows.size, job.classes.size, options)?;
    let sparse = matches!(target, Target::Sparse { .. });
    job.weights = RowWeights::new(labels.as_ref(), sparse, job.rows.size, &job.weight, options)?;
    let divisor = if options.reduction == Reduction::Mean { job.weights.divisor } else { 1.0 };
    let e = options.label_smoothing;
    job.keep = 1.0 - e;
    job.spread = if e == 0.0 { 0.0 } else { e / job.classes.size as f64 };
    if let Some(grad) = grad {
        job.g = if let GradOutput::Scalar(g) = grad.grad_output { g } else { 1.0 };
        if options.reduction == Reduction::Mean {
            job.g /= divisor;
        }
    }
    job.terms = Terms {
        scale: 1.0 / options.temperature,
        z_loss: options.z_loss,
        entries: labels.as_ref().map_or(0, |labels| labels.entries),
        dense: probs.is_some() || e > 0.0,
        loss: true,
    };
    job.labels = labels;
    let sum = job.run(exec)?;
    Ok(match options.reduction {
        Reduction::Mean => sum / divisor,
        Reduction::Sum => sum,
        Reduction::None => 0.0,
    })
}
