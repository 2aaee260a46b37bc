//! Tasks whose vectors run along the classes: the kernels of [`crate::kernels::rows`].
//!
//! Rows are read where they stand if they are adjacent elements of the type that is computed in, otherwise they are copied to scratch, or block by
//! block if they are long. Results are written where they belong, or to scratch first.

use crate::array::{DType, HalfRows, Out, Rows, RowsMut, Span, SpanMut};
use crate::kernels::emit::From;
use crate::kernels::finish::{APART, Terms, Tile, WIDTH};
use crate::kernels::input::{Backwards, Input, Known, Raw, TWO_BLOCKS};
use crate::kernels::rows::{BLOCK, Distances, Reduce, ReduceCapped, Wanted};
use crate::kernels::short::{MOST_SHORT, RawRows, Short};
use crate::kernels::state::{Reference, State};
use crate::simd::Level;
use crate::tunables::tunables;

use super::job::{Job, Kind, OUT, Stores, X};
use super::results::{Results, Set, To, clear, patch, unbend_and_write};
use super::scratch::{Buffers, Scratch, Work, room};
use super::segments;
use super::source::{self, adjacent_masked, logits, logits_and_slopes, masked, target_slopes, unbend_patches, unbent};
use super::stream::{Spread, adjacent_probs, dense_row, kept_classes, shared_stream, spreads};
use super::strip::{Finish, Strip, Total, collect, ignored, prepare, settle, targets};
use super::targets::NONE;

/// Bytes of short rows that are worked on together: part of L2, where they stay until they are written. (Fewer, which stay in L1, cost more by what
/// a group of rows costs by itself.)
const ROOM: usize = 128 << 10;

/// Fewest rows that are worked on together: without exponentials, with them, and where rows are long for short ones.
const LEAST: [usize; 3] = [64, 32, 16];

/// Bytes of the longest short rows of several blocks: with longer ones what is read ahead would leave L1 before it is used, and a row costs little by itself.
const SHORT: usize = 16 << 10;

/// Bytes of exponentials of a long row that are kept in scratch, where they cannot be kept in the result: even from the last cache they come sooner than
/// they are computed again.
const KEPT: usize = 2 << 20;

/// Rows `first..last`; their losses are added to `total`.
pub(super) fn run<T: Work>(job: &Job, first: usize, last: usize, scratch: &mut Scratch, total: &mut Total) {
    let bytes = job.classes.size * size_of::<T>();
    let one_block = job.classes.size <= BLOCK;
    let short = (!job.terms.dense || job.even())
        && job.level != Level::Scalar
        // (Masks and softcaps are applied in the loops of long ones. Where rows lie decides nothing: they have the same bits everywhere.)
        && (one_block || bytes <= SHORT && !job.bend.is_some());
    let width = if short && job.out.is_none() && (one_block || Way::of::<T>(job).direct) {
        MOST_SHORT
    } else if short {
        let least = if one_block { usize::from(job.kind != Kind::LogSoftmax) } else { 2 };
        (ROOM / bytes).clamp(LEAST[least], MOST_SHORT)
    } else if job.out.is_some() {
        // Rows that are finished together stay in the cache until they are written.
        (tunables().group_bytes / bytes).clamp(1, 16)
    } else {
        16
    };
    shared_stream(job, &mut T::buffers(scratch).1.shared);
    let mut kept = [0; WIDTH];
    let mut known = Known::default();
    let mut row = first;
    while row < last {
        let (start, n);
        (start, (n, row)) = (row, collect(job, row, last, &mut kept[..width]));
        if n > 0 {
            let strip = Strip::new(job, &kept[..n]);
            if short {
                short_rows::<T>(&strip, scratch, total);
            } else {
                let next = (row..last).find(|&row| job.kept(row));
                long_rows::<T>(&strip, next, &mut known, scratch, total);
            }
        }
        if row - start > n {
            ignored(job, start, row, &kept[..n]);
        }
    }
}

/// How the results of a call come about.
#[derive(Clone, Copy)]
#[allow(clippy::struct_excessive_bools)]
pub(super) struct Way {
    /// Whether logits are read where they stand.
    pub(super) direct: bool,
    /// Whether exponentials are kept.
    pub(super) store: bool,
    /// Whether they are kept where the results will stand.
    pub(super) in_result: bool,
    /// Whether results go where they belong at once: otherwise there is something to be done before, or they do not stand together.
    pub(super) at_once: bool,
}

impl Way {
    pub(super) fn of<T: Work>(job: &Job) -> Self {
        let same = job.x.dtype() == T::DTYPE;
        let store = job.out.is_some() && job.kind != Kind::LogSoftmax;
        // Under False of a mask, where the gradient is 0, there may be a share of the target.
        let bent = job.bend.softcap.is_some() || job.bend.mask.is_some() && job.terms.dense;
        let at_once = job.direct_out && !bent;
        Self { direct: job.direct && same, store, in_result: store && at_once && same, at_once }
    }
}

/// Rows of one block, or of [`SHORT`] bytes at most.
fn short_rows<T: Work>(strip: &Strip, scratch: &mut Scratch, total: &mut Total) {
    let Strip { job, kept, .. } = *strip;
    let (classes, n) = (job.classes.size, kept.len());
    let mut offsets = core::mem::take(&mut scratch.offsets);
    let (tile, Buffers { x: copy, slope, block, .. }, references) = T::buffers(scratch);
    let spreads = spreads(strip);
    let plain = prepare(strip, tile, &spreads);
    let Way { direct, store, in_result, at_once } = Way::of::<T>(job);
    let [here, there, local] = &mut offsets;
    let pitch = classes.next_multiple_of(16);
    let local = local.run((pitch * size_of::<T>()) as isize, n, n);
    let copy = room(copy, n * pitch);
    let capped = job.out.is_some() && job.bend.softcap.is_some();
    let slopes = room(slope, if capped { n * pitch } else { 0 });
    let backwards = backwards::<T>(job);
    if !direct && !job.direct && !backwards {
        for (slot, &row) in kept.iter().enumerate() {
            let slopes = if capped { &mut slopes[slot * pitch..][..classes] } else { &mut [] };
            logits_and_slopes(job, row, 0, &mut copy[slot * pitch..][..classes], slopes);
        }
    }
    let copied = RowsMut::of(copy, local, classes);
    let (base, rows) = match (job.direct, backwards) {
        (true, _) => strip.offsets(X, 0, 0, here),
        (_, true) => strip.offsets(X, (classes - 1) as isize * job.classes.inner_stride(X), 0, here),
        _ => (0, &*here),
    };
    let x = if direct { job.x.rows::<T>(base, rows, classes) } else { copied.read() };
    let from = if job.direct {
        job.x.half_rows(base, rows, classes).map(RawRows::Half)
    } else if backwards {
        Some(RawRows::Backwards(job.x.rows::<T>(base, rows, classes)))
    } else {
        None
    };
    let from = from.map(|from| (from, copied));
    let out = job.out.map(|out| (out, if job.direct_out { strip.offsets(OUT, 0, 0, there) } else { (0, &*there) }));
    let e = match out {
        Some((out, (base, rows))) if in_result => Some(out.rows::<T>(base, rows, classes)),
        _ => store.then_some(copied),
    };
    let mut target = [0; MOST_SHORT];
    let target = match &job.labels {
        Some(labels) if labels.entries == 1 => {
            target.iter_mut().zip(kept).for_each(|(target, &row)| *target = labels.class[row].max(0) as usize);
            &target[..n]
        }
        _ => {
            targets(strip, |slot, j, class| {
                tile.x_target[j * APART + slot] = if direct { x.get(slot, class).to_f64() } else { logit::<T>(job, kept[slot], class) };
            });
            &[]
        }
    };
    let scale = job.terms.scale;
    let wanted = job.kind == Kind::LogSoftmax;
    // Log-probabilities may go past the caches.
    let asks = job.cold && at_once && job.x.dtype() == T::DTYPE && (store || job.stores == Stores::Cached);
    let cold = out.filter(|_| asks).map(|(out, (base, rows))| out.rows::<T>(base, rows, classes).read());
    let (even, masked, block) = (job.even(), job.bend.mask.is_some(), room(block, BLOCK));
    if even && masked {
        for (slot, &row) in kept.iter().enumerate() {
            set_distances(tile, slot, distances(job, row, Some(x.row(slot)), block));
        }
    }
    if job.level.run(Short { scale, x, from, wanted, dst: e, cold, distances: even && !masked, classes: target, tile }) {
        for (slot, &row) in kept.iter().enumerate() {
            if !tile.ties[slot].is_nan() {
                continue;
            }
            if let Some((RawRows::Backwards(rows), to)) = from {
                (0..classes).for_each(|c| to.row(slot).set(c, rows.row(slot).get(classes - 1 - c)));
            }
            let far = even.then(|| distances(job, row, Some(x.row(slot)), block));
            references.resize(references.len().max(classes.div_ceil(BLOCK)), Reference { k: 0.0, b: 0.0 });
            let state = job.level.run(Reduce {
                scale,
                classes,
                x: Input::row(x.row(slot)),
                t: Input::None,
                dst: e.map(|e| e.row(slot)),
                cold: false,
                references,
                known: &mut Known::default(),
                wanted: Wanted { classes: &[], logits: &mut [] },
            });
            if let Some(e) = e.map(|e| e.row(slot)) {
                for (start, of) in (0..classes).step_by(BLOCK).zip(&*references) {
                    let factor = of.factor(state.reference, scale);
                    if factor != 1.0 {
                        (start..classes.min(start + BLOCK)).for_each(|c| e.set(c, T::from_f64(e.read().get(c).to_f64() * factor)));
                    }
                }
            }
            put(tile, slot, &state);
            if let Some(far) = far {
                set_distances(tile, slot, far);
            }
        }
    }
    let terms = Terms { plain, ..job.terms };
    share_evenly(strip, tile, &spreads);
    job.level.run(Finish { terms: &terms, tile, rows: (0, n), single: T::DTYPE == DType::F32 });
    if let Some((out, (base, rows))) = out {
        unbend_patches(job, kept, tile);
        let from = if store { From::Stored } else { From::Logs };
        let emit = Results { job, from, tile, first: 0, past: at_once && !in_result };
        let src = e.map_or(x, RowsMut::read);
        if at_once {
            emit.write(src, Span::of(&[]), &[], To::Rows(out, base, rows, classes));
        } else {
            emit.write(src, Span::of(&[]), &[], To::Scratch(copied));
            for (slot, &row) in kept.iter().enumerate() {
                let slopes = if capped { &slopes[slot * pitch..][..classes] } else { &[] };
                unbend_and_write(job, out, row, 0, slopes, &mut copy[slot * pitch..][..classes]);
            }
        }
        match &job.labels {
            Some(labels) if labels.entries == 1 && job.direct_out => {
                if job.terms.dense {
                    let lone = (0..n).filter(|&slot| tile.ties[slot] == 1.0).map(|slot| (slot, tile.arg[slot] as usize, tile.top[slot]));
                    T::of_type(out.array().dtype(), Set { to: To::Rows(out, base, rows, classes), values: lone });
                }
                let exact = kept.iter().zip(target).enumerate().filter(|(_, (row, _))| labels.class[**row] != NONE);
                let values = exact.map(|(slot, (_, &class))| (slot, class, tile.patch[slot]));
                T::of_type(out.array().dtype(), Set { to: To::Rows(out, base, rows, classes), values });
                clear(strip, tile, out, at_once);
            }
            _ => patch(strip, tile, out, at_once),
        }
    }
    settle(strip, tile, total);
    scratch.offsets = offsets;
}

/// Longer rows, or with a dense stream. `next` is the row after them, whose first maximum goes to `known`.
fn long_rows<T: Work>(strip: &Strip, next: Option<usize>, known: &mut Known<T>, scratch: &mut Scratch, total: &mut Total) {
    let Strip { job, kept, .. } = *strip;
    let (classes, n, scale) = (job.classes.size, kept.len(), job.terms.scale);
    let blocks = classes.div_ceil(BLOCK);
    let (tile, Buffers { x: copy, dense, shared, block, slope: slopes, exponentials, .. }, references) = T::buffers(scratch);
    let spreads = spreads(strip);
    let plain = prepare(strip, tile, &spreads);
    let terms = Terms { plain, ..job.terms };
    let mut way = Way::of::<T>(job);
    // What a softcap did to the logits goes into the exponentials, if the gradient is nothing but those.
    let cap = source::cap::<T>(job, job.out.is_none() || way.store && job.direct_out);
    let folds = cap.is_some() && job.out.is_some();
    if folds {
        (way.at_once, way.in_result) = (true, job.x.dtype() == T::DTYPE);
    }
    if way.in_result && way.direct && job.stores == Stores::PastAnew || !way.in_result && classes * size_of::<T>() > KEPT {
        (way.store, way.in_result) = (false, false);
        way.at_once &= !folds;
    }
    let Way { store, in_result, at_once, .. } = way;
    let cap = cap.filter(|_| store || !folds);
    let folds = folds && store;
    let there = job.direct || cap.is_some() && job.there;
    let direct = there && job.x.dtype() == T::DTYPE;
    let from = match job.kind {
        Kind::LogSoftmax => From::Logs,
        _ if store => From::Stored,
        _ => From::Anew,
    };
    let (copy, dense) = (room(copy, TWO_BLOCKS), room(dense, TWO_BLOCKS));
    // Apart from the scratch of the reduction, where the first block of the next row may be.
    let (block, again) = room(block, 2 * BLOCK).split_at_mut(BLOCK);
    let exponentials = room(exponentials, if store && !in_result { n * classes } else { 0 });
    let capped = !folds && job.out.is_some() && job.bend.softcap.is_some() && classes * size_of::<T>() <= KEPT;
    let slopes = room(slopes, if capped { n * classes } else { 2 * BLOCK * usize::from(cap.is_some()) });
    let (shared, own, stream) = (&shared[..], job.own_dense(), terms.dense && !job.even());
    references.resize(references.len().max(blocks * n), Reference { k: 0.0, b: 0.0 });
    let line = |row: usize| job.x.span::<T>(job.rows.offset(X, row), classes);
    let raw = |row: usize| match job.bend.mask {
        None if there => job.x.half(job.rows.offset(X, row), classes).map(Raw::Half),
        None if backwards::<T>(job) => {
            let first = job.rows.offset(X, row) + (classes - 1) as isize * job.classes.inner_stride(X);
            Some(Raw::Backwards(Backwards(job.x.span::<T>(first, classes))))
        }
        None => None,
        Some(_) => adjacent_masked(job, row),
    };
    let half = |row: usize| if job.direct { job.x.half(job.rows.offset(X, row), classes) } else { None };
    let result = |row: usize, start: usize, count: usize| {
        let at = |out: &Out| job.rows.offset(OUT, row) + (start * out.array().dtype().size()) as isize;
        job.out.filter(|_| job.direct_out).map(|out| To::Run(out, at(out), count))
    };
    let exponentials = SpanMut::of(exponentials);
    let stored = |slot: usize| match job.out {
        Some(out) if in_result => out.span::<T>(job.rows.offset(OUT, kept[slot]), classes),
        _ => exponentials.part(slot * classes, classes),
    };
    let past = at_once && !in_result;
    let segments = segments::segmented::<T>(job);
    let (single, level) = (T::DTYPE == DType::F32, job.level);
    let mut slopes_at = Vec::new();
    for (slot, &row) in kept.iter().enumerate() {
        let Spread { share: spread, .. } = spreads.get(slot).copied().unwrap_or_default();
        let (own_slopes, bent) =
            if capped { (&mut slopes[slot * classes..][..classes], &mut [][..]) } else { (&mut [][..], &mut slopes[..]) };
        // Before exponentials may take the place of the logits; those of the first caches are read twice.
        let far = job.even().then(|| distances(job, row, (direct && cap.is_none()).then(|| line(row)), again));
        let mut fill = |index: usize, dst: &mut [T]| {
            let start = index * BLOCK;
            if cap.is_some() {
                return unbent(job, row, start, dst);
            }
            logits_and_slopes(job, row, start, dst, own_slopes.get_mut(start..start + dst.len()).unwrap_or_default());
        };
        let mut fill_dense = |index: usize, dst: &mut [T]| dense_row(job, row, spread, index * BLOCK, dst);
        let x = if direct {
            let after = kept.get(slot + 1).copied().or(next).map_or(Span::of(&[]), line);
            Input::Row { row: line(row), after }
        } else if let Some(this) = raw(row) {
            Input::Raw { row: this, after: kept.get(slot + 1).copied().or(next).and_then(raw), scratch: copy }
        } else {
            let from = if job.lines { job.x.address(job.rows.offset(X, row)) } else { copy.as_ptr().cast() };
            Input::Made { fill: &mut fill, scratch: copy, classes, from: (from, job.x.dtype().size()) }
        };
        let probs = if own { adjacent_probs(job, row) } else { None };
        let t = match (stream, own, probs) {
            (false, ..) => Input::None,
            (true, false, _) => Input::row(Span::of(&shared[..classes])),
            (true, true, Some(probs)) => Input::row(probs),
            (true, true, None) => {
                let from = (dense.as_ptr().cast(), 0);
                Input::Made { fill: &mut fill_dense, scratch: dense, classes, from }
            }
        };
        if folds {
            target_slopes(job, row, slot, &mut slopes_at);
        }
        // The logits of the targets are read with their blocks.
        let (one, entries) = match &job.labels {
            Some(labels) if labels.entries == 1 => ([(labels.class[row] as usize, slot)], 1),
            labels => ([(0, 0)], labels.as_ref().map_or(0, |labels| labels.entries)),
        };
        let targets = if entries == 1 { &one[..] } else { &tile.order[slot * entries..][..entries] };
        let wanted = Wanted { classes: targets, logits: &mut tile.x_target };
        let reduce = Reduce {
            scale,
            classes,
            x,
            t,
            dst: store.then(|| stored(slot)),
            cold: in_result && job.cold,
            references: &mut references[slot * blocks..][..blocks],
            known,
            wanted,
        };
        // For other types there is no code.
        let state = match cap {
            Some(cap) if single => level.run(ReduceCapped { row: reduce, cap, bent }),
            _ if segments => {
                let Reduce { x, dst, references, known, wanted, .. } = reduce;
                let Input::Row { row: x, after } = x else { unreachable!("such rows are read where they stand") };
                let (state, logit) = segments::reduce(job, row, x, after, dst, references, known);
                if let Some(logit) = logit {
                    wanted.logits[slot] = logit;
                }
                state
            }
            _ => level.run(reduce),
        };
        put(tile, slot, &state);
        if let Some(far) = far {
            set_distances(tile, slot, far);
        }
    }
    share_evenly(strip, tile, &spreads);
    level.run(Finish { terms: &terms, tile, rows: (0, n), single });
    let Some(out) = job.out else { return settle(strip, tile, total) };
    if folds {
        for (at, slope) in slopes_at {
            tile.patch[at] = slope.map_or(0.0, |slope| tile.patch[at] * slope);
        }
    } else {
        unbend_patches(job, kept, tile);
    }
    for (slot, &row) in kept.iter().enumerate() {
        let results = Results { job, from, tile, first: slot, past };
        let references = if store { &references[slot * blocks..][..blocks] } else { &[] };
        let src = if store {
            Some(stored(slot).read())
        } else if direct {
            Some(line(row))
        } else {
            None
        };
        let whole = match (stream, own) {
            (false, _) => Some(Span::of(&[])),
            (true, false) => Some(Span::of(&shared[..classes])),
            (true, true) => adjacent_probs(job, row),
        };
        if at_once && let (Some(t), Some(src), Some(dst)) = (whole, src, result(row, 0, classes)) {
            results.write(Rows::single(src), t, references, dst);
            continue;
        }
        if at_once
            && !stream
            && let (None, Some(half), Some(dst)) = (src, half(row), result(row, 0, classes))
        {
            results.read::<T>(Rows::single(Span::of(&[])), Some(HalfRows::single(half)), Span::of(&[]), &[], dst);
            continue;
        }
        let Spread { share: spread, .. } = spreads.get(slot).copied().unwrap_or_default();
        for index in 0..blocks {
            let start = index * BLOCK;
            let count = BLOCK.min(classes - start);
            let t = if let Some(t) = whole {
                if stream { t.part(start, count) } else { t }
            } else {
                dense_row(job, row, spread, start, &mut dense[..count]);
                Span::of(&dense[..count])
            };
            let src = if let Some(src) = src {
                src.part(start, count)
            } else {
                logits(job, row, start, &mut again[..count]);
                Span::of(&again[..count])
            };
            let references = references.get(index..=index).unwrap_or_default();
            match result(row, start, count) {
                Some(dst) if at_once => results.write(Rows::single(src), t, references, dst),
                _ => {
                    let block = &mut block[..count];
                    results.write(Rows::single(src), t, references, To::Scratch(RowsMut::single(SpanMut::of(block))));
                    let slopes = if capped { &slopes[slot * classes + start..][..count] } else { &[] };
                    unbend_and_write(job, out, row, start, slopes, block);
                }
            }
        }
    }
    patch(strip, tile, out, at_once);
    settle(strip, tile, total);
}

/// Whether rows are runs of logits of the type that is computed in, read from their ends; float32, as for other types there is no code.
fn backwards<T: Work>(job: &Job) -> bool {
    T::DTYPE == DType::F32 && job.lines && !job.bend.is_some() && job.x.dtype() == T::DTYPE && job.classes.inner_stride(X) < 0
}

/// One logit.
fn logit<T: Work>(job: &Job, row: usize, class: usize) -> f64 {
    let mut x = [T::ZERO];
    logits(job, row, class, &mut x);
    x[0].to_f64()
}

pub(super) fn put(tile: &mut Tile, slot: usize, state: &State) {
    tile.max[slot] = state.max;
    tile.ties[slot] = state.ties;
    tile.arg[slot] = state.arg as f64;
    tile.k[slot] = state.reference.k;
    tile.b[slot] = state.reference.b;
    (tile.rest[slot], tile.lost[slot]) = (state.rest.value(), state.rest.lost());
    tile.lin[slot] = state.lin.value();
    tile.t_rest[slot] = state.t_rest.value();
    tile.t_top[slot] = state.t_top;
}

/// Σ (max − x) of the classes of a row that take part, and where its first maximum is: of `line`, or of what is copied to `scratch` block by block.
fn distances<T: Work>(job: &Job, row: usize, line: Option<Span<T>>, scratch: &mut [T]) -> (f64, usize) {
    let (classes, mut before) = (job.classes.size, 0);
    let (mut max, mut sum, mut at) = (f64::NEG_INFINITY, 0.0, 0);
    for start in (0..classes).step_by(BLOCK) {
        let mut n = BLOCK.min(classes - start);
        let own = scratch.get_mut(..n).unwrap_or_default();
        if line.is_none() {
            logits(job, row, start, own);
        }
        let own = SpanMut::of(own);
        let block = line.map_or(own.read(), |line| line.part(start, n));
        let (top, mut part, first) = job.level.run(Distances(block));
        if job.bend.mask.is_some() {
            // What does not take part is as far as the maximum.
            masked(job, row, start, T::from_f64(if top.is_finite() { top } else { 0.0 }), block, own);
            (_, part, _) = job.level.run(Distances(own.read()));
            n = kept_classes(job, row, start, n);
        }
        if top > max {
            if max > f64::NEG_INFINITY {
                sum += before as f64 * (top - max);
            }
            (max, at) = (top, start + first);
        } else if top > f64::NEG_INFINITY {
            sum += n as f64 * (max - top);
        }
        sum += part;
        before += n;
    }
    (sum, at)
}

fn set_distances(tile: &mut Tile, slot: usize, (sum, at): (f64, usize)) {
    (tile.lin[slot], tile.arg[slot]) = (sum, at as f64);
}

/// From distances to what a stream would have left, where all classes have the same share of the target.
fn share_evenly(strip: &Strip, tile: &mut Tile, spreads: &[Spread]) {
    if strip.job.even() {
        for (slot, &Spread { share, classes }) in spreads.iter().enumerate() {
            tile.share[slot] = share;
            // A share of nothing of an infinite distance is nothing.
            tile.lin[slot] = if share == 0.0 { 0.0 } else { share * tile.lin[slot] };
            tile.t_top[slot] = share * tile.ties[slot];
            tile.t_rest[slot] = share * (classes as f64 - tile.ties[slot]);
        }
    }
}
